"""Going on with new data: Fisher information, the elastic penalty, averages, transfer."""

from pathlib import Path

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pretrained run, its Fisher information, and other text."""
    folder = tmp_path_factory.mktemp("continual")
    pretrain_base(folder, MODEL)
    # No two rows share a gradient on this mesh.
    mesh = Mesh(fsdp=1, context=2, tensor=4)
    Fisher(source=str(folder / "base"), output=str(folder / "fisher"), rows=16, mesh=mesh).run()
    (folder / "new.txt").write_text("".join(f"{n * 7 % 13}; {n}\n\n" for n in range(400)))
    return folder


@pytest.fixture
def layout():
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        yield training_layout()


def further(folder, name, **settings):
    """Training on other text from the pretrained run on."""
    source = TextFiles(path=str(folder / "new.txt"), split="paragraph")
    data = Data(
        train=(Domain(name="new", source=source),),
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
    assert max(float(one.max()) for one in jax.tree.leaves(found)) > 0


def test_the_fisher_on_a_mesh_and_of_two_tasks(folder):
    """Rows share a gradient on a mesh: the mean over many is near that of single rows."""
    job = Fisher(source=str(folder / "base"), output=str(folder / "both"), rows=16)
    replace(job, before=str(folder / "fisher"), mesh=Mesh(fsdp=4, tensor=2)).run()
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        layout = training_layout()
        first, both = (read_fisher(folder / n, MODEL, layout)[1] for n in ("fisher", "both"))
        ratio = sum(map(jnp.sum, jax.tree.leaves(both))) / sum(map(jnp.sum, jax.tree.leaves(first)))
    assert 1.7 < float(ratio) < 2.3


def test_new_heads_and_tokens_are_free(folder, layout):
    larger = replace(MODEL, vocab_size=500)
    anchor, fisher = read_fisher(folder / "fisher", larger, layout)
    assert not np.any(fisher["embedding"]["table"][257:])
    assert np.any(fisher["embedding"]["table"][:257])
    assert jax.tree.map(jnp.shape, anchor) == jax.tree.map(jnp.shape, fisher)
    with pytest.raises(UserError, match="holds no Fisher information"):
        read_fisher(folder / "base", MODEL, layout)


def test_a_penalty_holds_a_run_and_the_run_goes_on_bit_for_bit(folder, layout):
    free, held = (
        further(folder, name, elastic=None if strength is None else elastic(folder, strength))
        for name, strength in (("free", None), ("held", 1e6))
    )
    free.run()
    held.run()
    parts = replace(held, output=str(folder / "parts"), steps=2)
    parts.run()
    replace(parts, steps=4).run()
    assert losses(parts) == losses(held)
    gathered = replace(held, output=str(folder / "gathered"), zero=2, steps=2)
    gathered.run()
    for one, other in zip(losses(gathered), losses(held)):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=1e-4)
    first, *_, last = (m for m in read_metrics(held.output) if m["split"] == "train")
    assert first["elastic_penalty"] == 0.0 < last["elastic_penalty"]
    assert first["cross_entropy"] == pytest.approx(losses(free)[0][2], rel=1e-6)

    anchor, fisher = read_fisher(folder / "fisher", MODEL, layout)

    def distance(name):
        params = read_params(folder / name, MODEL, layout)
        terms = jax.tree.map(
            lambda p, a, f: float(jnp.sum(f * (p - a) ** 2)), params, anchor, fisher
        )
        return sum(jax.tree.leaves(terms))

    assert distance("held") < distance("free") / 2
    # Held-out text is scored by the cross-entropy alone.
    [score] = [
        m for m in read_metrics(held.output) if m["split"] == "held_out/new" and m["step"] == 4
    ]
    assert score["bits_per_byte"] < 20


def test_settings_that_do_not_go_together(folder):
    with pytest.raises(UserError, match=r"strength=0.0: must be above 0"):
        elastic(folder, 0.0)
    adapted = replace(MODEL, lora=LoRA(rank=2))
    with pytest.raises(UserError, match=r"adapters \(model.lora\) do not move them"):
        further(folder, "adapted", model=adapted, elastic=elastic(folder, 1.0)).run()
    with pytest.raises(UserError, match="Which folders"):
        Fisher().run()


def test_averages_of_weights_and_their_scores(folder, layout, capsys):
    """At alpha 0 and 1 the two models bit for bit; 0.5 is their mean; scores are the runs' own."""
    tuned = further(folder, "tuned")
    tuned.run()
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
    [score] = [m for m in read_metrics(tuned.output) if m["split"] != "train" and m["step"] == 4]
    assert table["rows"][0][0] == "new"
    assert table["rows"][0][2] == pytest.approx(score["bits_per_byte"], rel=1e-5)
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


def test_the_matrix_of_runs(folder, layout):
    """Its cells are the losses that the runs themselves have measured."""
    old = TextFiles(path=str(folder / "corpus.txt"), split="line")
    first = further(folder, "first", begin_with=None)
    first = replace(first, data=replace(first.data, train=(Domain(name="old", source=old),)))
    first.run()
    second = further(folder, "second", begin_with=first.output)
    replay = Domain(name="old", source=old, weight=0.25)
    both = replace(second.data, train=(*second.data.train, replay))
    second = replace(second, data=both)
    second.run()
    output = folder / "transfer"
    TransferReport(runs=(first.output, second.output), output=str(output)).run()
    tables = [Table.from_json(table) for table in RunFolder(output).results()["tables"]]
    bits, transfer = tables
    assert bits.columns == ("held-out set", "random", "first", "second")
    cells = bits.by_row()
    assert list(cells) == ["old", "new"]
    for job in (first, second):
        for line in read_metrics(job.output):
            if line["step"] == 4 and line["split"] != "train":
                own = cells[line["split"].removeprefix("held_out/")][Path(job.output).name]
                assert own == pytest.approx(line["bits_per_byte"], rel=1e-5)
    gains = transfer.by_row()["bits per byte"]
    old, new = cells["old"], cells["new"]
    assert gains["backward transfer"] == pytest.approx(old["first"] - old["second"])
    assert gains["forward transfer"] == pytest.approx(new["random"] - new["first"])
    assert "Backward transfer" in (output / "report.html").read_text()
    with pytest.raises(UserError, match="output"):
        TransferReport(runs=(first.output,), output=first.output).run()
