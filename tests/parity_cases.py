"""Where the parity cases lie: tiny models with the outputs of independent implementations."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent / "data" / "parity"
# Families that transformers still has can be compared with it live: not all are in the repository.
SHARED = Path(__file__).parents[2] / "shared" / "parity"


def parity_folder(name: str) -> Path:
    """The folder of a case; the test is skipped where it is not."""
    folder = next((root / name for root in (HERE, SHARED) if (root / name).is_dir()), None)
    if folder is None:
        pytest.skip(f"the parity case {name} is not here: {HERE / name} or {SHARED / name}")
    return folder
