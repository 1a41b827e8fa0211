"""Experiment settings: typed immutable objects, changed from the command line, kept as JSON."""

from lmjax.config.declare import choices, config, fields, preset, registered, replace
from lmjax.config.errors import UserError
from lmjax.config.help import help_text
from lmjax.config.overrides import parse
from lmjax.config.serialise import fingerprint, from_json, to_json, to_text
from lmjax.config.values import is_config

__all__ = [
    "UserError",
    "choices",
    "config",
    "fields",
    "fingerprint",
    "from_json",
    "help_text",
    "is_config",
    "parse",
    "preset",
    "registered",
    "replace",
    "to_json",
    "to_text",
]
