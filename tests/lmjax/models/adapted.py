"""Models with adapters that do something: B is zero where training begins."""

import jax
from flax import traverse_util


def with_random_b(params, seed=0, scale=0.1):
    """The parameters with random A and B, which lie on the mesh as before."""
    flat = traverse_util.flatten_dict(params, sep=".")
    for number, (path, leaf) in enumerate(sorted(flat.items())):
        if ".adapter." in path:
            key = jax.random.fold_in(jax.random.key(seed), number)
            spec = jax.typeof(leaf).sharding.spec
            flat[path] = scale * jax.random.normal(key, leaf.shape, out_sharding=spec)
    return traverse_util.unflatten_dict(flat, sep=".")
