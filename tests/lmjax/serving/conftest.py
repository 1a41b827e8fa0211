"""One device for all tests of the server."""

import jax
import pytest

from lmjax.parallel import Mesh


@pytest.fixture(scope="module")
def mesh():
    """One device, set for a module's tests."""
    mesh = Mesh(fsdp=1).build(jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh
