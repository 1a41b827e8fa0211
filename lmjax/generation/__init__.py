"""Text from a trained model: decoding with a key-value cache, sampling, streaming."""

import importlib
from typing import Any

# Imported when they are first asked for: settings of training name `sampling` alone.
_MODULES = {
    "BeamSearch": "beams",
    "Continuation": "generator",
    "Generator": "generator",
    "Hypothesis": "beams",
    "Message": "chat",
    "Sampling": "sampling",
    "TextGenerator": "text",
    "TextStream": "stream",
    "ToolCall": "messages",
    "chat_format": "chat",
    "load": "run",
    "load_model": "run",
    "load_run": "run",
    "prompt_tokens": "text",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
