"""Chat formats of ours as templates in Jinja's language, which transformers and others read."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence

from lmjax.data.chat.messages import ROLES
from lmjax.data.chat.templates import ChatTemplate

CONTENT, SYSTEM, ROUND = "text", "ns.system", "ns.round"
NAMES = {"observation": ("observation", "tool")}  # what conversations call a role, where not by it


def jinja_source(template: ChatTemplate) -> str | None:
    """A template in Jinja's language that writes the texts of `ChatTemplate.render`.

    Where it has no tokens across the borders of its parts (`joined`, or special tokens between
    them), these texts have its tokens. A context is no field of its own there, but the end of the
    request.

    Returns:
      None for formats with tools or thoughts, which such a template does not express.
    """
    slots = {slot for role in ROLES for part in getattr(template, role) for slot in _slots(part)}
    if template.tools or template.thoughts or "metadata" in slots:
        return None
    in_user = "system" in {slot for part in template.user for slot in _slots(part)}
    source = ["{% set ns = namespace(system='', round=0) %}"]
    if template.default_system:
        message = f"{{'role': 'system', 'content': {_literal(template.default_system)}}}"
        source += [
            "{% if messages[0]['role'] != 'system' %}",
            f"{{% set messages = [{message}] + messages %}}{{% endif %}}",
        ]
    source += [_write(template.start, {}), "{% for message in messages %}"]
    source.append(f"{{% set {CONTENT} = message['content']{' | trim' * template.strip} %}}")
    for text in template.forbidden:
        source.append(f"{{% if {_literal(text)} in {CONTENT} %}}")
        source.append(_refuse(f"a message holds {text!r}, which marks roles") + "{% endif %}")
    branches = [_role(template, role, in_user) for role in ROLES if getattr(template, role)]
    source += [f"{{% {word} {b}" for word, b in zip(("if", *["elif"] * 3), branches, strict=False)]
    source += ["{% else %}", _refuse("no such role in this format"), "{% endif %}{% endfor %}"]
    if in_user:
        source += ["{% if ns.system %}", _refuse("a system message needs a user message after it")]
        source.append("{% endif %}")
    opening = template.assistant[: _first_slot(template.assistant)]
    source += ["{% if add_generation_prompt %}", _write(opening, {}), "{% endif %}"]
    return "".join(source)


def _role(template: ChatTemplate, role: str, in_user: bool) -> str:
    """The branch of the loop for the messages of a role, after its `if`."""
    names = ", ".join(map(_literal, NAMES.get(role, (role,))))
    branch = f"message['role'] in ({names},) %}}"
    values = {"content": CONTENT, "system": SYSTEM, "round": ROUND}
    written = _write(getattr(template, role), values)
    if role == "system" and in_user:
        joined = " ~ ".join(_terms(template.system, values))
        return f"{branch}{{% set ns.system = ns.system ~ {joined} %}}"
    if role == "user":
        written = f"{{% set ns.round = ns.round + 1 %}}{written}{{% set ns.system = '' %}}"
    return branch + written


def _write(parts: Sequence[str], values: Mapping[str, str]) -> str:
    """Tags that write parts, filled with values."""
    return "".join(f"{{{{ {term} }}}}" for term in _terms(parts, values))


def _terms(parts: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Expressions whose texts, one after another, are those of parts; of no text, an empty one."""
    terms = []
    for part in parts:
        for text, slot, _, _ in string.Formatter().parse(part):
            if text:
                terms.append(_literal(text))
            if slot in values:
                terms.append(values[slot])
    return terms


def _slots(part: str) -> list[str]:
    return [slot for _, slot, _, _ in string.Formatter().parse(part) if slot is not None]


def _first_slot(parts: Sequence[str]) -> int:
    return next((n for n, part in enumerate(parts) if "{" in part), len(parts))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse(message: str) -> str:
    return f"{{{{ raise_exception({_literal(message)}) }}}}"
