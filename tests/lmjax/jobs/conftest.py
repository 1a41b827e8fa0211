"""What the tests of jobs share: learners."""

import pytest

from tests.lmjax.jobs.base_run import shared_learners


@pytest.fixture(scope="module", autouse=True)
def learners():
    """See `shared_learners`."""
    with shared_learners():
        yield
