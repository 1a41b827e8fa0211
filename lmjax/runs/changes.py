"""Changes of a run's settings, and whether it may go on with them."""

import json
from typing import Any

from lmjax.config import UserError, to_json
from lmjax.runs.folder import RunFolder


def check_continues(folder: RunFolder, experiment: Any) -> None:
    """Raises UserError where the folder holds the run of another experiment: shows what differs."""
    differing = [
        f"    {name}: {before} in the folder, {now} now"
        for name, before, now in differences(folder.experiment(), experiment)
        if not experiment.may_change(name)
    ]
    if differing:
        few = differing[:12] + [f"    and {len(differing) - 12} more"] * (len(differing) > 12)
        raise UserError(
            f"{folder.location} holds another run; settings that differ:\n"
            + "\n".join(few)
            + f"\nChoose another folder (output=...), delete {folder.location} to start anew, or "
            "give the same settings to go on."
        )


def differences(before: Any, now: Any) -> list[tuple[str, str, str]]:
    """Name and both values (as JSON, or "absent") of each setting in which two configs differ."""
    old, new = (flatten(json.loads(to_json(config))) for config in (before, now))
    return [
        (name, _shown(old, name), _shown(new, name))
        for name in sorted(old.keys() | new.keys())
        if _shown(old, name) != _shown(new, name)
    ]


def is_below(name: str, settings: tuple[str, ...]) -> bool:
    """Returns whether a dotted name is one of the settings or inside one."""
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested JSON as one dictionary from dotted path to leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flat = {}
    for key, child in items:
        name = f"{path}.{key}" if path else str(key)
        if isinstance(child, dict | list) and child:
            flat |= flatten(child, name)
        else:
            flat[name] = child
    return flat


def _shown(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"
