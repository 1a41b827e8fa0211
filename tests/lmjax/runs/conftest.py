"""A folder with checkpoints, for tests of what may happen to it."""

import pytest

from lmjax.runs.checkpoints import Checkpointer
from tests.lmjax.runs.small_states import make


@pytest.fixture
def warnings():
    """What a checkpointer has to say."""
    return []


@pytest.fixture
def saved(tmp_path, warnings):
    """A folder with checkpoints of the steps 1, 2 and 3."""
    checkpointer = Checkpointer(tmp_path, warn=warnings.append)
    for step in (1, 2, 3):
        checkpointer.save(step, make(step), {"row": 10 * step})
    checkpointer.close()
    return checkpointer
