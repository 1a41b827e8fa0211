"""Models with adapters that do something: B is zero where training begins."""

import jax
from flax import traverse_util


def with_random_b(params, seed=0, scale=0.1):
    """The parameters with random A and B, which lie on the mesh as before."""
    flat = traverse_util.flatten_dict(params, sep=".")
    numbered = [(n, path) for n, path in enumerate(sorted(flat)) if ".adapter." in path]

    @jax.jit
    def draw(seed):
        found = {}
        for number, path in numbered:
            key = jax.random.fold_in(jax.random.key(seed), number)
            spec = jax.typeof(flat[path]).sharding.spec
            found[path] = scale * jax.random.normal(key, flat[path].shape, out_sharding=spec)
        return found

    return traverse_util.unflatten_dict(flat | draw(seed), sep=".")
