"""Going on with new data: Fisher information, the elastic penalty, averages, transfer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.console import RunLog, Table, make_console
from lmjax.data import Bytes, Data, Domain, TextFiles
from lmjax.evaluation.transfer import ScoreMatrix
from lmjax.generation.run import load_run
from lmjax.interop.fisher_folder import read_fisher
from lmjax.interop.folder import read_params
from lmjax.interop.huggingface import by_path
from lmjax.jobs.fisher import Fisher
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.run_text import read_text, text_of_run
from lmjax.jobs.settings import Checkpoints, ElasticPenalty, Evaluation
from lmjax.jobs.transfer import TransferReport
from lmjax.jobs.weight_average import WeightAverage
from lmjax.models import AttentionConfig, FeedForwardConfig, LoRA, TransformerConfig, abstract
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import pretrain_base

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=2,
    max_length=32,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)
ROWS_APART = Mesh(fsdp=1, context=2, tensor=4)  # no two rows share a gradient


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pretrained run, its Fisher information, and other text."""
    folder = tmp_path_factory.mktemp("continual")
    pretrain_base(folder, MODEL, split="line", held_out=0.1)
    settings = {"source": str(folder / "base"), "rows": 16, "mesh": ROWS_APART}
    Fisher(output=str(folder / "fisher"), **settings).run()
    (folder / "new.txt").write_text("".join(f"{n * 7 % 13}; {n}\n\n" for n in range(400)))
    return folder


@pytest.fixture
def layout():
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        yield training_layout()


def further(folder, name, **settings):
    """Training on other text from the pretrained run on, with a share of the old."""
    new = TextFiles(path=str(folder / "new.txt"), split="paragraph")
    old = TextFiles(path=str(folder / "corpus.txt"), split="line")
    data = Data(
        train=(
            Domain(name="new", source=new, weight=0.75),
            Domain(name="lines", source=old, weight=0.25),
        ),
        tokenizer=Bytes(),
        held_out=0.1,
        length=32,
        batch_size=8,
        cache=str(folder / "cache"),
    )
    defaults = {
        "output": str(folder / name),
        "steps": 4,
        "model": MODEL,
        "begin_with": str(folder / "base"),
        "data": data,
        "schedule": Constant(peak=1e-2, warmup=0),
        "evaluation": Evaluation(every=2, prompts=()),
        "checkpoint": Checkpoints(every=2),
    }
    return Pretrain(**(defaults | settings))


@pytest.fixture(scope="module")
def tuned(folder):
    """A run that goes on with other text."""
    job = further(folder, "tuned")
    job.run()
    return job


@pytest.fixture(scope="module")
def held(folder):
    """The same with the penalty."""
    job = further(folder, "held", elastic=elastic(folder, 1e6))
    job.run()
    return job


def elastic(folder, strength):
    return ElasticPenalty(folder=str(folder / "fisher"), strength=strength)


def losses(job):
    return [(m["split"], m["step"], m["loss"]) for m in read_metrics(job.output)]


def test_the_fisher_of_a_run_row_by_row(folder, layout):
    """Against the definition: gradients of each drawn label alone would have the same mean; here
    those of rows, with the labels that the command draws, in plain log-softmax."""
    params = read_params(folder / "base", MODEL, layout)
    anchor, found = read_fisher(folder / "fisher", MODEL, layout)
    jax.tree.map(np.testing.assert_array_equal, anchor, params)

    graph, _ = abstract(MODEL, layout)
    data, objective = text_of_run(str(folder / "base"))
    feed = read_text(data, objective, folder / "base", MODEL, RunLog(make_console()))
    total, weight = jax.tree.map(np.zeros_like, params), 0.0

    @jax.jit
    def gradient(params, batch, weights, key):
        def loss(params):
            model = nnx.merge(graph, params)
            logits = model.logits(model(batch)[0])
            noise = jax.random.gumbel(key, logits.shape)
            drawn = jnp.argmax(jax.lax.stop_gradient(logits) + noise, axis=-1)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1)
            return -jnp.sum(chosen[..., 0] * weights)

        return jax.grad(loss)(params)

    with feed.examples(0) as examples:
        for number in range(2):
            example = next(examples)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), 8)
            for row, key in enumerate(keys):
                one = jax.tree.map(lambda a, row=row: jnp.asarray(a[row : row + 1]), example)
                slopes = gradient(params, one.inputs, one.targets.weights, key)
                total = jax.tree.map(lambda t, g: t + np.square(g, dtype=np.float64), total, slopes)
                weight += float(one.targets.weights.sum())
    for name, one in by_path(found).items():
        expected = by_path(total)[name] / weight
        # Sums of float32 squares in another order.
        np.testing.assert_allclose(one, expected, rtol=2e-4, atol=1e-6 * expected.max() + 1e-12)
    assert any(np.any(np.asarray(one) > 0) for one in jax.tree.leaves(found))


@pytest.mark.slow
def test_the_fisher_on_a_mesh_and_of_two_tasks(folder, capsys):
    """That of older tasks is added; where rows share a gradient, the mean is near that of rows."""
    job = Fisher(source=str(folder / "base"), output=str(folder / "both"), rows=16, mesh=ROWS_APART)
    job = replace(job, before=str(folder / "fisher"))
    job.run()
    job.run()
    assert "has been made before" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        replace(job, seed=1).run()
    shared = replace(job, output=str(folder / "shared"), before=None, mesh=Mesh(fsdp=4, tensor=2))
    shared.run()
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        first, both, shared = (
            read_fisher(folder / name, MODEL, training_layout())[1]
            for name in ("fisher", "both", "shared")
        )
    # The same rows and labels twice.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, 2 * a, rtol=1e-5), first, both)
    sums = (sum(float(jnp.sum(a)) for a in jax.tree.leaves(tree)) for tree in (shared, first))
    assert 0.75 < np.divide(*sums) < 1.35


def test_new_heads_and_tokens_are_free(folder, layout):
    larger = replace(MODEL, vocab_size=500)
    anchor, fisher = read_fisher(folder / "fisher", larger, layout)
    assert not np.any(fisher["embedding"]["table"][257:])
    assert np.any(fisher["embedding"]["table"][:257])
    assert jax.tree.map(jnp.shape, anchor) == jax.tree.map(jnp.shape, fisher)
    with pytest.raises(UserError, match="holds no Fisher information"):
        read_fisher(folder / "base", MODEL, layout)


def test_a_penalty_holds_a_run(folder, tuned, held, layout):
    first, *_, last = (m for m in read_metrics(held.output) if m["split"] == "train")
    assert first["elastic_penalty"] == 0.0 < last["elastic_penalty"]
    assert first["cross_entropy"] == pytest.approx(losses(tuned)[0][2], rel=1e-6)
    anchor, fisher = read_fisher(folder / "fisher", MODEL, layout)

    def distance(job):
        params = read_params(job.output, MODEL, layout)
        terms = jax.tree.map(lambda p, a, f: jnp.sum(f * (p - a) ** 2), params, anchor, fisher)
        return float(sum(jax.tree.leaves(terms)))

    assert distance(held) < distance(tuned) / 2
    # Held-out text is scored by the cross-entropy alone.
    scores = [m for m in read_metrics(held.output) if m["split"] != "train"]
    assert max(score["loss"] for score in scores) < np.log(300)


@pytest.mark.slow
def test_a_run_with_a_penalty_goes_on_bit_for_bit_and_gathers_parameters(folder, held):
    parts = replace(held, output=str(folder / "parts"), steps=2)
    parts.run()
    replace(parts, steps=4).run()
    assert losses(parts) == losses(held)
    gathered = replace(held, output=str(folder / "gathered"), zero=2, steps=2)
    gathered.run()
    for one, other in zip(losses(gathered), losses(held)):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=1e-4)


def test_settings_that_do_not_go_together(folder):
    with pytest.raises(UserError, match=r"strength=0.0: must be above 0"):
        elastic(folder, 0.0)
    adapted = replace(MODEL, lora=LoRA(rank=2))
    with pytest.raises(UserError, match=r"adapters \(model.lora\) do not move them"):
        further(folder, "adapted", model=adapted, elastic=elastic(folder, 1.0)).run()
    with pytest.raises(UserError, match="Which folders"):
        Fisher().run()


def test_averages_of_weights_and_their_scores(folder, tuned, layout):
    """At alpha 0 and 1 the two models bit for bit; 0.5 is their mean; scores are the runs' own."""
    names = str(folder / "base"), tuned.output
    for alpha in (0.0, 0.5, 1.0):
        alphas = (0.0, 1.0) if alpha == 0.5 else ()
        output = str(folder / f"mean{alpha}")
        settings = {"start": names[0], "tuned": names[1], "alpha": alpha, "alphas": alphas}
        WeightAverage(output=output, mesh=Mesh(fsdp=4, tensor=2), **settings).run()
    start, end = (read_params(name, MODEL, layout) for name in names)
    zero, half, one = (read_params(folder / f"mean{a}", MODEL, layout) for a in (0.0, 0.5, 1.0))
    jax.tree.map(np.testing.assert_array_equal, zero, start)
    jax.tree.map(np.testing.assert_array_equal, one, end)
    mean = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, start, end)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), half, mean)

    [table] = RunFolder(folder / "mean0.5").results()["tables"]
    assert table["columns"] == ["held-out set", "alpha 0", "alpha 1"]
    assert {row[0]: row[2] for row in table["rows"]} == pytest.approx(
        bits_per_byte(tuned, 4), rel=1e-5
    )
    assert table["rows"][0][0] == "lines"
    expected = bits_per_byte(RunFolder(folder / "base").experiment(), 1)["lines"]
    assert table["rows"][0][1] == pytest.approx(expected, rel=1e-5)
    run = load_run(folder / "mean0.5")
    assert run.tokenizer.kind == "bytes"
    with pytest.raises(UserError, match="a share is between 0 and 1"):
        WeightAverage(alphas=(0.5, 1.1))


def test_transfer_of_a_matrix_that_is_written_out():
    """Three tasks, accuracies: the numbers below are computed by hand from the definitions."""
    scores = np.array([[0.9, 0.5, 0.3], [0.8, 0.9, 0.4], [0.6, 0.7, 0.8]])
    matrix = ScoreMatrix(scores, (0, 1, 2), np.array([0.1, 0.2, 0.25]), True)
    assert matrix.average() == pytest.approx((0.6 + 0.7 + 0.8) / 3)
    assert matrix.backward_transfer() == pytest.approx(((0.6 - 0.9) + (0.7 - 0.9)) / 2)
    assert matrix.forward_transfer() == pytest.approx(((0.5 - 0.2) + (0.4 - 0.25)) / 2)
    losses = ScoreMatrix(-scores, (0, 1, 2), -np.array([0.1, 0.2, 0.25]), False)
    assert losses.backward_transfer() == pytest.approx(matrix.backward_transfer())
    assert losses.forward_transfer() == pytest.approx(matrix.forward_transfer())
    alone = ScoreMatrix(scores[:1, :1], (0,), np.array([0.1]), True)
    assert (alone.backward_transfer(), alone.forward_transfer()) == (None, None)
    gaps = ScoreMatrix(np.array([[np.nan, 1.0], [2.0, 3.0]]), (1, 0), np.array([0.0, 0.0]), True)
    assert (gaps.backward_transfer(), gaps.forward_transfer()) == (2.0, None)


def bits_per_byte(job, step):
    """The scores that a run has measured itself, by set; to the float32 that they are."""
    lines = [m for m in read_metrics(job.output) if m["split"] != "train" and m["step"] == step]
    return {line["split"].removeprefix("held_out/"): line["bits_per_byte"] for line in lines}


def test_the_matrix_of_runs(folder, tuned):
    """Its cells are the scores that the runs themselves have measured."""
    base = RunFolder(folder / "base").experiment()
    job = TransferReport(runs=(base.output, tuned.output), output=str(folder / "transfer"))
    job.run()
    tables = [Table.from_json(table) for table in RunFolder(job.output).results()["tables"]]
    bits, transfer = tables
    assert bits.columns == ("held-out set", "random", "base", "tuned")
    cells = bits.by_row()
    assert list(cells) == ["lines", "new"]
    assert cells["lines"]["base"] == pytest.approx(bits_per_byte(base, 1)["lines"], rel=1e-5)
    for name, score in bits_per_byte(tuned, 4).items():
        assert cells[name]["tuned"] == pytest.approx(score, rel=1e-5)
    gains = transfer.by_row()["bits per byte"]
    old, new = cells["lines"], cells["new"]
    assert gains["backward transfer"] == pytest.approx(old["base"] - old["tuned"])
    assert gains["forward transfer"] == pytest.approx(new["random"] - new["base"])
    assert "Backward transfer" in RunFolder(job.output).report.read_text()
    with pytest.raises(UserError, match="Which runs"):
        TransferReport().run()
    with pytest.raises(UserError, match="must have different names"):
        TransferReport(runs=("a/base", "b/base"))
