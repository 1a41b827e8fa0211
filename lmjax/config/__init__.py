"""Experiment settings: typed immutable objects, changed from the command line, kept as JSON."""

from lmjax.config.command_line import (
    command_name,
    exit_on_user_error,
    from_command_line,
    import_modules,
    own_modules,
)
from lmjax.config.declare import choices, config, fields, preset, registered, replace
from lmjax.config.errors import UserError
from lmjax.config.help import help_text
from lmjax.config.overrides import parse
from lmjax.config.serialise import fingerprint, from_json, to_json, to_text
from lmjax.config.values import is_config

__all__ = [
    "UserError",
    "choices",
    "command_name",
    "config",
    "exit_on_user_error",
    "fields",
    "fingerprint",
    "from_command_line",
    "from_json",
    "help_text",
    "import_modules",
    "is_config",
    "own_modules",
    "parse",
    "preset",
    "registered",
    "replace",
    "to_json",
    "to_text",
]
