"""Optimizers against their papers' formulas in NumPy, layer by layer, and across meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lmjax.config import UserError
from lmjax.training.matrices import decayed, orthogonalize
from lmjax.training.optimizers import Adafactor, AdamW, Lion, Muon, clip_by_global_norm

LAYERS, EMBED, HEADS, HEAD_DIM, MLP, VOCAB = 3, 16, 4, 4, 32, 128
SHAPES = {
    "embedding": {"table": (VOCAB, EMBED)},
    "positions": {"table": (8, EMBED)},
    "blocks": {
        "attention": {
            "query": {
                "weight": (LAYERS, EMBED, HEADS, HEAD_DIM),
                "bias": (LAYERS, HEADS, HEAD_DIM),
            },
            "output": {"weight": (LAYERS, HEADS, HEAD_DIM, EMBED)},
        },
        "up": {"weight": (LAYERS, EMBED, MLP)},
        "norm": {"scale": (LAYERS, EMBED)},
    },
    "head": {"table": (VOCAB, EMBED)},
}
SPECS = {
    "embedding": {"table": P("tensor", "fsdp")},
    "positions": {"table": P(None, "fsdp")},
    "blocks": {
        "attention": {
            "query": {"weight": P(None, "fsdp", "tensor", None), "bias": P(None, "tensor", None)},
            "output": {"weight": P(None, "tensor", None, "fsdp")},
        },
        "up": {"weight": P(None, "fsdp", "tensor")},
        "norm": {"scale": P(None, None)},
    },
    "head": {"table": P("tensor", "fsdp")},
}
IS_SHAPE = {"is_leaf": lambda leaf: isinstance(leaf, tuple)}
ALL = (
    AdamW(),
    AdamW(decay_to="start"),
    Lion(),
    Adafactor(smallest_factored=4, momentum=0.9, weight_decay=0.1),
    Muon(),
)


def rate(step):
    """A learning rate that changes with the step."""
    return 0.02 / (1 + step)


def draw(seed):
    """Normal numbers in the shapes of a small model."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: generator.normal(size=shape).astype(np.float32), SHAPES, **IS_SHAPE
    )


def compiled(optimizer, params):
    """The optimizer's init, and (params, state, gradient) -> (params, state)."""
    transform = optimizer.build(rate, params)

    def step(params, state, gradient):
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(transform.init), jax.jit(step)


def run(optimizer, params, gradients):
    """The parameters after one update a gradient."""
    init, step = compiled(optimizer, params)
    state = init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def blocks(tree):
    """A tree of the same parameters without what lies outside the blocks."""
    return {"blocks": tree["blocks"]}


def assert_close(first, second, tolerance):
    """Leaf by leaf, absolutely: parameters are of order one."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), first, second
    )


def test_only_matrices_decay():
    mask = decayed(draw(0))
    assert mask["embedding"]["table"] and mask["head"]["table"]
    assert mask["blocks"]["attention"]["query"] == {"weight": True, "bias": False}
    assert mask["blocks"]["norm"] == {"scale": False}
    with pytest.raises(ValueError, match="blocks/gate"):
        decayed({"blocks": {"gate": np.zeros(3)}})


@pytest.mark.parametrize("to_start", [False, True], ids=["to zero", "to the start"])
def test_adamw_is_its_formula(to_start):
    params, gradients = draw(0), [draw(seed) for seed in range(1, 6)]
    decay_to = "start" if to_start else "zero"
    optimizer = AdamW(b1=0.8, b2=0.9, epsilon=1e-3, weight_decay=0.2, decay_to=decay_to)
    got = run(optimizer, params, gradients)

    def formula(decay, leaf, *gradients):
        start = leaf * to_start
        leaf, mean, square = leaf.astype(np.float64), 0.0, 0.0
        for t, gradient in enumerate(gradients, start=1):
            mean = 0.8 * mean + 0.2 * gradient
            square = 0.9 * square + 0.1 * gradient.astype(np.float64) ** 2
            step = (mean / (1 - 0.8**t)) / (np.sqrt(square / (1 - 0.9**t)) + 1e-3)
            leaf = leaf - rate(t - 1) * (step + 0.2 * decay * (leaf - start))
        return leaf

    # float32 against float64
    assert_close(got, jax.tree.map(formula, decayed(params), params, *gradients), 2e-6)


def test_decay_to_the_start_returns_there_without_gradients():
    """Closed form: W - W_0 shrinks by 1 - rate weight_decay each step, of matrices alone."""
    start, moved = draw(0), draw(1)
    init, step = compiled(AdamW(weight_decay=0.5, decay_to="start"), start)
    state, params = init(start), moved
    for _ in range(3):
        params, state = step(params, state, jax.tree.map(np.zeros_like, start))

    def expected(decay, first, moved):
        kept = np.prod([1 - 0.5 * rate(step) for step in range(3)])
        return first + (moved - first) * kept if decay else moved

    assert_close(params, jax.tree.map(expected, decayed(start), start, moved), 2e-6)


def test_lion_is_its_formula():
    params, gradients = draw(0), [draw(seed) for seed in range(1, 6)]
    got = run(Lion(b1=0.9, b2=0.99, weight_decay=0.3), params, gradients)

    def formula(decay, leaf, *gradients):
        leaf, momentum = leaf.astype(np.float64), 0.0
        for t, gradient in enumerate(gradients):
            step = np.sign(0.9 * momentum + 0.1 * gradient)
            momentum = 0.99 * momentum + 0.01 * gradient.astype(np.float64)
            leaf = leaf - rate(t) * (step + 0.3 * decay * leaf)
        return leaf

    assert_close(got, jax.tree.map(formula, decayed(params), params, *gradients), 2e-6)


def test_adafactor_is_its_formula_on_each_layers_matrix():
    """Algorithm 4 of arXiv 1804.04235 with decoupled decay, on query as one matrix."""
    params, gradients = blocks(draw(0)), [blocks(draw(seed)) for seed in range(1, 5)]
    got = run(Adafactor(smallest_factored=4, weight_decay=0.1), params, gradients)
    for layer in range(LAYERS):
        matrix = lambda tree, i=layer: (  # noqa: E731
            np.asarray(tree["blocks"]["attention"]["query"]["weight"][i], np.float64)
        ).reshape(EMBED, HEADS * HEAD_DIM)
        x = matrix(params)
        rows, columns = 0.0, 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = matrix(gradient)
            decay = 1 - t**-0.8
            rows = decay * rows + (1 - decay) * (g**2).mean(1)
            columns = decay * columns + (1 - decay) * (g**2).mean(0)
            update = g / np.sqrt(np.outer(rows, columns) / rows.mean())
            update /= max(1.0, np.sqrt((update**2).mean()))
            update *= max(1e-3, np.sqrt((x**2).mean()))
            x = x - rate(t - 1) * (update + 0.1 * x)
        np.testing.assert_allclose(matrix(got), x, rtol=0, atol=3e-6)


def test_palm_is_adam_with_parameter_scaling_and_decay_by_the_squared_rate():
    """arXiv 2204.02311, section 5: no factors, b1 = 0.9, b2 = 1 - k^-0.8, decay by lr^2."""
    params, gradients = blocks(draw(0)), [blocks(draw(seed)) for seed in range(1, 5)]
    optimizer = Adafactor(
        factored=False, clipping=None, momentum=0.9, weight_decay=1.0, decay_exponent=2.0
    )
    got = run(optimizer, params, gradients)

    def formula(path, *leaves):
        matrix = decayed({"blocks": {path[-1].key: 0}})["blocks"][path[-1].key]
        results = []
        for x, *gradients in zip(*(np.asarray(leaf, np.float64) for leaf in leaves)):
            square = mean = 0.0
            for k, g in enumerate(gradients, start=1):
                b2 = 1 - k**-0.8
                square = b2 * square + (1 - b2) * g**2
                scale = max(1e-3, np.sqrt((x**2).mean()))
                mean = 0.9 * mean + 0.1 * scale * g / np.sqrt(square)
                x = x - rate(k - 1) * mean - rate(k - 1) ** 2 * matrix * x
            results.append(x)
        return np.stack(results)

    # float32 against float64
    assert_close(got, jax.tree.map_with_path(formula, params, *gradients), 2e-6)


@pytest.mark.parametrize(
    "path, columns, match_rms, scale",
    [(("attention", "output"), EMBED, 0.2, 0.2 * EMBED**0.5), (("up",), MLP, None, 2**0.5)],
    ids=["rms of AdamW", "by shape"],
)
def test_muon_is_its_formula_on_each_layers_matrix(path, columns, match_rms, scale):
    """The Newton-Schulz polynomial on the singular values of an SVD in float64."""
    params, gradients = blocks(draw(0)), [blocks(draw(seed)) for seed in range(1, 4)]
    got = run(Muon(momentum=0.9, match_rms=match_rms, weight_decay=0.1), params, gradients)

    def matrix(tree, layer):
        tree = tree["blocks"]
        for name in path:
            tree = tree[name]
        return np.asarray(tree["weight"][layer], np.float64).reshape(EMBED, columns)

    for layer in range(LAYERS):
        x, momentum = matrix(params, layer), 0.0
        for t, gradient in enumerate(gradients):
            g = matrix(gradient, layer)
            momentum = 0.9 * momentum + g
            u, s, v = np.linalg.svd(g + 0.9 * momentum, full_matrices=False)
            s /= np.sqrt((s**2).sum())
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            x = x - rate(t) * (scale * (u * s) @ v + 0.1 * x)
        # the iteration multiplies rounding in the smallest singular values by up to 3.4445^5 = 485
        np.testing.assert_allclose(matrix(got, layer), x, rtol=0, atol=1e-5)


def test_muon_leaves_embeddings_and_vectors_to_adamw():
    params, gradients = draw(0), [draw(1), draw(2)]
    muon = run(Muon(weight_decay=0.2), params, gradients)
    adam = run(AdamW(weight_decay=0.2), params, gradients)
    for name in ("embedding", "positions", "head"):
        assert_close(muon[name], adam[name], 1e-7)
    assert_close(muon["blocks"]["norm"], adam["blocks"]["norm"], 1e-7)
    up = [tree["blocks"]["up"]["weight"] for tree in (muon, adam)]
    assert np.abs(up[0] - up[1]).max() > 1e-3


@pytest.mark.parametrize("optimizer", ALL[2:], ids=lambda o: type(o).__name__)
def test_stacked_layers_equal_separate_ones(optimizer):
    """Each layer by itself, its query and output as plain matrices, in a model of one layer."""
    trees = [blocks(draw(seed)) for seed in range(3)]

    def alone(tree, layer):
        tree = jax.tree.map(lambda a: a[layer : layer + 1], tree)
        attention = tree["blocks"]["attention"]
        for name, rows in (("query", EMBED), ("output", HEADS * HEAD_DIM)):
            attention[name]["weight"] = attention[name]["weight"].reshape(1, rows, -1)
        return tree

    together = run(optimizer, trees[0], trees[1:])
    init, step = compiled(optimizer, alone(trees[0], 0))
    for layer in range(LAYERS):
        params, *gradients = (alone(tree, layer) for tree in trees)
        state = init(params)
        for gradient in gradients:
            params, state = step(params, state, gradient)
        # the same arithmetic; batched and single products may round differently
        assert_close(params, alone(together, layer), 2e-6)


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)
def test_eight_devices_equal_one(optimizer):
    """In Explicit mode, with every kind of mesh axis that parameters and batches are cut over."""
    params, gradients = draw(0), [draw(1), draw(2), draw(3)]
    one = run(optimizer, params, gradients)
    mesh = jax.make_mesh(
        (2, 2, 1, 1, 2),
        ("data", "fsdp", "stage", "context", "tensor"),
        axis_types=(AxisType.Explicit,) * 5,
    )

    def place(tree):
        return jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, SPECS
        )

    with jax.set_mesh(mesh):
        many = run(optimizer, place(params), [place(gradient) for gradient in gradients])
        assert jax.typeof(many["embedding"]["table"]).sharding.spec == P("tensor", "fsdp")
        assert_close(one, jax.tree.map(np.asarray, many), 1e-6)


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)
def test_the_state_lies_where_the_parameters_lie_and_keeps_its_type(optimizer):
    mesh = jax.make_mesh(
        (1, 4, 1, 1, 2),
        ("data", "fsdp", "stage", "context", "tensor"),
        axis_types=(AxisType.Explicit,) * 5,
    )
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), draw(0), SPECS
        )
        transform = optimizer.build(rate, params)
        state = jax.jit(transform.init)(params)
        _, after = jax.eval_shape(transform.update, params, state, params)
        before = jax.tree.map(jax.typeof, state)
        assert jax.tree.map(lambda a: (a.shape, a.sharding.spec), before) == jax.tree.map(
            lambda a: (a.shape, a.sharding.spec), after
        )
        weight = params["blocks"]["up"]["weight"]
        alike = [leaf for leaf in jax.tree.leaves(before) if leaf.shape == weight.shape]
        assert all(leaf.sharding.spec == P(None, "fsdp", "tensor") for leaf in alike)
        assert alike or isinstance(optimizer, Adafactor)


def test_orthogonalized_singular_values():
    matrices = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 8)), jnp.float32)
    singular = np.linalg.svd(np.asarray(orthogonalize(matrices)), compute_uv=False)
    assert singular.min() > 0.65 and singular.max() < 1.25
    # a matrix and its transpose are the same problem; float32 rounding apart
    np.testing.assert_allclose(
        orthogonalize(matrices.swapaxes(1, 2)), orthogonalize(matrices).swapaxes(1, 2), atol=1e-5
    )


def test_muon_shards_its_products_by_whole_layers():
    """No all-reduce in the compiled iteration: matrices are exchanged, products are not."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, "fsdp", "tensor"))
        matrices = jax.ShapeDtypeStruct((3, 16, 32), jnp.float32, sharding=sharding)
        text = jax.jit(orthogonalize).lower(matrices).compile().as_text()
    assert "all-to-all" in text and "all-reduce" not in text and "all-gather" not in text


def test_clip_by_global_norm():
    gradients = {"weight": jnp.full((2, 2), 3.0), "bias": jnp.full(4, 4.0)}
    clipped, norm = clip_by_global_norm(gradients, 1.0)
    assert float(norm) == 10.0
    np.testing.assert_allclose(clipped["bias"], 0.4, rtol=1e-7)
    for limit in (11.0, None):
        same, norm = clip_by_global_norm(gradients, limit)
        assert float(norm) == 10.0
        assert_close(same, gradients, 0)
    zero, norm = clip_by_global_norm({"bias": jnp.zeros(3)}, 1.0)
    assert float(norm) == 0 and not np.asarray(zero["bias"]).any()


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: AdamW(b1=1.0), r"AdamW\.b1=1\.0"),
        (lambda: AdamW(weight_decay=-1.0), "0 or more"),
        (lambda: AdamW(epsilon=0.0), "above 0"),
        (lambda: Lion(b2=-0.1), r"Lion\.b2"),
        (lambda: Adafactor(clipping=0.0), r"Adafactor\.clipping"),
        (lambda: Adafactor(momentum=1.0), r"Adafactor\.momentum"),
        (lambda: Muon(iterations=0), r"Muon\.iterations"),
        (lambda: Muon(match_rms=-0.2), r"Muon\.match_rms"),
    ],
)
def test_an_optimizer_that_cannot_be_says_why(make, says):
    with pytest.raises(UserError, match=says):
        make()
