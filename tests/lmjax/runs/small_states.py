"""Small training states, on one device or cut over a mesh, to be saved and compared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

SHARDINGS = {"weight": P("fsdp", "tensor"), "scale": P(None)}


def make(seed=0.0):
    """A small training state whose numbers follow from `seed`."""
    params = {
        "blocks": {"weight": jnp.arange(32.0).reshape(8, 4) + seed, "scale": jnp.ones(3) * seed}
    }
    return {
        "params": params,
        "optimizer": optax.adam(0.1).init(params),
        "average": None,
        "step": jnp.int32(seed),
        "key": jax.random.key(int(seed)),
    }


def assert_equal(first, second):
    """Bit by bit, keys among them."""

    def compare(a, b):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(compare, first, second)


def mesh_of(*sizes):
    return jax.make_mesh(
        sizes,
        ("fsdp", "tensor"),
        axis_types=(AxisType.Explicit,) * 2,
        devices=jax.devices()[: int(np.prod(sizes))],
    )


def place(tree):
    """On the mesh that is set: matrices cut over both axes, all else on every device."""

    def one(path, leaf):
        spec = SHARDINGS.get(jax.tree_util.keystr(path[-1:], simple=True), P())
        return jax.reshard(leaf, spec)

    return jax.jit(lambda tree: jax.tree.map_with_path(one, tree))(tree)


def largest_file(folder):
    """The file with the arrays in it."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
