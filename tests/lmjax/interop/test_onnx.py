"""ONNX files, run by onnxruntime, beside our models."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from lmjax.config import UserError, config, replace
from lmjax.generation import Generator, Sampling
from lmjax.generation.prompts import prefix_row
from lmjax.interop import huggingface, onnx_file
from lmjax.interop.__main__ import Convert
from lmjax.interop.export import convert_to_onnx
from lmjax.interop.onnx_graph import Graph, Tensors
from lmjax.interop.onnx_products import int8_codes
from lmjax.interop.onnx_run import OnnxModel, left_padded
from lmjax.models import (
    Batch,
    ExpertChoiceRouter,
    ExpertsConfig,
    GatedFeedForwardConfig,
    RMSNormConfig,
    TextHeadConfig,
    TokenHeadConfig,
    TopKRouter,
    TransformerConfig,
    bert,
    blank_row,
    bloom,
    gpt2,
    gpt3,
    initialize,
    mixtral,
    qwen,
    t5,
    t5_v1_1,
)
from lmjax.models.experts import Experts
from lmjax.models.residual import Arrangement
from lmjax.parallel import training_layout
from tests.larger import larger
from tests.parity_cases import parity_folder

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

# Sums in another order: 3e-6 was the largest difference seen of logits around 3.
CLOSE = 2e-5
SIZES = {"vocab_size": 97, "hidden": 48, "num_layers": 2}


def tiny(base, **more):
    """A model of a family's parts in a size for tests."""
    shared = None if base.attention.num_kv_heads is None else 2
    attention = replace(base.attention, num_heads=4, num_kv_heads=shared, head_dim=12)
    feed_forward = replace(base.feed_forward, size=96)
    encoder = {"encoder_layers": 3} if hasattr(base, "encoder_layers") else {}
    changes = SIZES | encoder | {"attention": attention, "feed_forward": feed_forward}
    return replace(base, **changes | more)


# One more expert for all tokens, and weights that do not add up to 1 (DeepSeekMoE).
SHARED = ExpertsConfig(
    size=24,
    experts=5,
    bias=True,
    router=TopKRouter(chosen=3, normalise=False),
    shared=GatedFeedForwardConfig(size=48),
)
MADE = {
    "mixtral": tiny(mixtral()),
    "deepseek": tiny(mixtral(), num_layers=1, feed_forward=SHARED),
    "bert": tiny(bert(), max_length=32),
    "bloom": tiny(bloom(), max_length=32),
    "gpt3": tiny(gpt3(), max_length=32),
    "t5": tiny(t5()),
    "t5_v1_1": tiny(t5_v1_1(), encoder_layers=1),
}
for name in ("bloom", "gpt3"):  # every second layer sees three tokens
    attention = replace(MADE[name].attention, windows=(None, 3))
    MADE[name] = replace(MADE[name], attention=attention)
DECODERS = ["gpt2", "llama2_gqa", "glm", "deepseek"]
MORE = ["gpt1", "llama", "mixtral", "palm", "qwen", "baichuan_13b", "baichuan2_7b", "chatglm2_6b"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (*MORE, "bloom", "gpt3")]


@dataclasses.dataclass
class Case:
    """A model of ours and its file."""

    config: TransformerConfig
    graph: nnx.GraphDef
    params: dict
    path: Path
    notes: list[str]

    def model(self):
        return nnx.merge(self.graph, self.params)

    def run(self, function, batch):
        """What a function of the model, its hidden states and the batch gives."""

        @jax.jit
        def run(params, batch):
            model = nnx.merge(self.graph, params)
            return function(model, model(batch)[0], batch)

        return jax.device_get(run(self.params, batch))

    def logits(self, batch):
        found = self.run(lambda model, hidden, _: model.logits(hidden), batch)
        return found[..., : self.config.vocab_size]


@pytest.fixture
def written(one_device, tmp_path):
    """Writes a model of `MADE`, of a parity folder or of a config as a file."""

    def write(name, kind="float32", **how):
        if isinstance(name, TransformerConfig) or name in MADE:
            config = MADE.get(name) if isinstance(name, str) else name
            # Large enough weights that every part tells.
            graph, params = initialize(config, training_layout(), jax.random.key(3))
            params = larger(params, 4, axes=2)
        else:
            config, graph, params = huggingface.read(parity_folder(name), training_layout())
        path = tmp_path / "model.onnx"
        notes = onnx_file.write(path, config, params, kind, **how)
        return Case(config, graph, params, path, notes)

    return write


def rows(config, lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, config.vocab_size, length).tolist() for length in lengths]


def batch_of(ids, mask, **more):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    arrays = {"tokens": ids, "positions": positions, "segments": mask}
    return Batch(**{k: np.asarray(v, np.int32) for k, v in arrays.items()}, **more)


def inputs_of(batch):
    """Inputs of a file by name, of which it takes those that it has."""
    zeros = np.zeros_like(batch.tokens)
    ranks = batch.positions if batch.ranks is None else batch.ranks
    block = zeros if batch.block_positions is None else batch.block_positions
    found = {
        "input_ids": batch.tokens,
        "attention_mask": batch.segments,
        "position_ids": batch.positions,
        "block_position_ids": block,
        "ranks": ranks,
        "token_type_ids": zeros if batch.token_types is None else batch.token_types,
    }
    return {name: np.asarray(array, np.int64) for name, array in found.items()}


@pytest.mark.parametrize("name", [*DECODERS, *SLOW])
def test_logits_with_padding_on_either_side(written, name):
    case = written(name)
    onnx.checker.check_model(case.path, full_check=True)
    ids, mask = left_padded(rows(case.config, (7, 4)))
    right = np.array([row[np.argsort(-seen, kind="stable")] for row, seen in zip(ids, mask)])
    model = OnnxModel(case.path, threads=1)
    for tokens, seen in ((ids, mask), (right, -np.sort(-mask, axis=1))):
        batch = batch_of(tokens, seen)
        found, _ = model.run(inputs_of(batch), {})
        real = seen == 1
        np.testing.assert_allclose(found[real], case.logits(batch)[real], rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    "name", ["gpt2", "mixtral", "bloom", pytest.param("gpt3", marks=pytest.mark.slow)]
)
def test_greedy_tokens_are_those_of_generation(written, name):
    """Prompts of different lengths in one batch, each token with the cache of those before it."""
    case = written(name)
    prompts = rows(case.config, (6, 1, 3))
    expected = Generator(case.config, case.params).generate(
        prompts, Sampling(temperature=0), max_tokens=9
    )
    assert OnnxModel(case.path, threads=1).greedy(prompts, 9) == expected
    assert len({token for row in expected for token in row}) > 2


def test_a_prompt_is_read_from_both_sides(written):
    """With ranks, prompts of two lengths in one batch, as a model of PrefixLM decodes them."""
    case = written("gpt2", prefix=True)
    prompts = rows(case.config, (6, 3))
    expected = Generator(case.config, case.params).generate(
        [prefix_row(prompt) for prompt in prompts], Sampling(temperature=0), max_tokens=9
    )
    model = OnnxModel(case.path, threads=1)
    assert model.greedy(prompts, 9, prefix=True) == expected != model.greedy(prompts, 9)


def test_tokens_behind_padding_continue_their_rows(written):
    """Prompts that end in padding: biases and windows go by tokens, not by columns."""
    case = written("bloom")
    [long, short], [next_long, next_short] = rows(case.config, (5, 2)), ([7, 9], [11, 13])
    ids = np.array([long, [*short, 0, 0, 0]])
    mask = np.array([[1] * 5, [1, 1, 0, 0, 0]])
    model = OnnxModel(case.path, threads=1)
    _, past = model.run(inputs_of(batch_of(ids, mask)), {})
    given = {
        "input_ids": np.array([next_long, next_short]),
        "attention_mask": np.concatenate([mask, np.ones((2, 2), int)], axis=1),
        "position_ids": np.array([[5, 6], [2, 3]]),
    }
    found, _ = model.run(given, past)
    for row, tokens in enumerate(([*long, *next_long], [*short, *next_short])):
        one = np.array([tokens])
        expected = case.logits(batch_of(one, np.ones_like(one)))[0, -2:]
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", ["glm", pytest.param("chatglm_6b", marks=pytest.mark.slow)])
def test_a_blank_is_filled_with_the_cache(written, name):
    """The text sees itself whole, and each step moves the second position."""
    case = written(name)
    context = rows(case.config, (8,))[0]
    prompt = jax.tree.map(np.asarray, blank_row(context, [(3, [5])]))
    expected = Generator(case.config, case.params).generate(
        [prompt], Sampling(temperature=0), max_tokens=6
    )
    model, past, found = OnnxModel(case.path, threads=1), {}, []
    given = inputs_of(jax.tree.map(lambda a: a[None], prompt))
    for step in range(6):
        logits, past = model.run(given, past)
        found.append(int(logits[0, -1].argmax()))
        given = {
            "input_ids": np.array([[found[-1]]]),
            "attention_mask": np.ones((1, 10 + step), np.int64),
            "position_ids": np.array([[3]]),
            "block_position_ids": np.array([[2 + step]]),
            "ranks": np.array([[9 + step]]),
        }
    assert [found] == expected


def test_an_encoder_with_its_heads(written):
    """BERT with texts of two lengths, its words and its classes."""
    case = written("bert")
    onnx.checker.check_model(case.path, full_check=True)
    ids, mask = (a[:, ::-1] for a in left_padded(rows(case.config, (9, 5))))
    types = np.array([[0] * 4 + [1] * 5, [0] * 9], np.int32)
    batch = batch_of(ids, mask, token_types=types)
    given = inputs_of(batch)
    session = OnnxModel(case.path, threads=1).session
    names = [one.name for one in session.get_inputs()]
    assert names == ["input_ids", "attention_mask", "token_type_ids"]
    logits, classes = session.run(None, {name: given[name] for name in names})
    real = mask == 1
    np.testing.assert_allclose(logits[real], case.logits(batch)[real], rtol=0, atol=CLOSE)
    expected = case.run(lambda model, hidden, _: model.classes(hidden), batch)
    np.testing.assert_allclose(classes, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", ["t5", pytest.param("t5_v1_1", marks=pytest.mark.slow)])
def test_an_encoder_and_its_decoder(written, name):
    case = written(name)
    encoder = case.path.with_suffix(".encoder.onnx")
    for path in (case.path, encoder):
        onnx.checker.check_model(path, full_check=True)
    assert case.notes[-1] == "the model is model.encoder.onnx, model.onnx: they belong together"
    sources, prompts = rows(case.config, (7, 3)), [[0], [0]]
    expected = Generator(case.config, case.params).generate(
        prompts, Sampling(temperature=0), max_tokens=8, sources=sources
    )
    model = OnnxModel(case.path, threads=1)
    assert model.greedy(prompts, 8, sources) == expected
    ids, mask = left_padded(rows(case.config, (4, 4), seed=1))
    batch = batch_of(ids, mask, encoder=batch_of(*left_padded(sources)))
    found, _ = model.run(inputs_of(batch) | model.encode(sources), {})
    # T5 does not scale its attention scores, and logits of 1.1 are up to 10: rounding grows with
    # them, 3e-6 of the largest were seen.
    expected = case.logits(batch)
    close = CLOSE * max(1, np.abs(expected).max() / 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=close)


def test_heads_on_labels(written):
    """Of the last token of each text, wherever it is, and of each token; no word is predicted."""
    heads = TextHeadConfig(name="score", outputs=3), TokenHeadConfig(name="tag", outputs=5)
    case = written(tiny(gpt2(), max_length=32, word_head=False, heads=heads))
    ids, mask = (a[:, ::-1] for a in left_padded(rows(case.config, (6, 4))))
    batch = batch_of(ids, mask)
    given = {name: inputs_of(batch)[name] for name in ("input_ids", "attention_mask")}
    score, tag = OnnxModel(case.path, threads=1).session.run(None, given)
    scores, tags = case.run(
        lambda model, *given: [model.outputs(name, *given) for name in ("score", "tag")], batch
    )
    np.testing.assert_allclose(score, scores[:, 0], atol=CLOSE)
    real = mask == 1
    np.testing.assert_allclose(tag[real], tags[real], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", ["llama2_gqa", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_weights_in_8_bits(written, name):
    """Files are a good quarter as large, and what they compute is what ONNX's reference does."""
    exact = written(name)
    size = exact.path.stat().st_size
    ids, mask = left_padded(rows(exact.config, (7, 7)))
    given = inputs_of(batch_of(ids, mask))
    logits, _ = OnnxModel(exact.path, threads=1).run(given, {})
    case = written(name, "int8")
    onnx.checker.check_model(case.path, full_check=True)
    weights = sum(a.size for a in jax.tree.leaves(case.params) if a.ndim > 1)
    assert case.path.stat().st_size < size - 2.5 * weights
    model = OnnxModel(case.path, threads=1)
    found, past = model.run(given, {})
    error = np.sqrt(np.mean(np.square(found - logits)) / np.mean(np.square(logits)))
    assert error < 0.04
    reference = ReferenceEvaluator(str(case.path))
    empty = {n: np.zeros((2, a.shape[1], 0, a.shape[3]), np.float32) for n, a in past.items()}
    known = {name: array for name, array in given.items() if name in model.inputs}
    # A number beside the middle between two steps of its 8 bits may fall to the other side.
    np.testing.assert_allclose(reference.run(["logits"], known | empty)[0], found, atol=0.05)


def rounded(path, leaf):
    """A parameter as a file in 8 bits has it: each output of a matrix, and each row of a table."""
    if path.endswith("table"):
        steps = np.abs(leaf).max(axis=1, keepdims=True) / 127
    elif path.endswith("weight") and ".router." not in path:
        first = 2 if ".experts." in path else 1  # axis of inputs, behind layers and experts
        inputs = (first, first + 1) if ".output." in path else first
        steps = np.abs(leaf).max(axis=inputs, keepdims=True) / 127
    else:
        return leaf
    return np.rint(leaf / np.where(steps > 0, steps, 1)) * steps


def test_a_mixture_in_8_bits(written, monkeypatch):
    """Logits of our model with the same weights, but for the 8 bits of the inputs: a token may be
    routed otherwise where two experts are nearly as likely, so that these are left out. The last
    one is read alone with the cache, where most experts have no rows."""
    case = written(tiny(mixtral(), num_layers=1, unroll=0), "int8")
    onnx.checker.check_model(case.path, full_check=True)
    flat = traverse_util.flatten_dict(jax.device_get(case.params), sep=".")
    flat = {path: jax.numpy.asarray(rounded(path, leaf), "float32") for path, leaf in flat.items()}
    case.params = traverse_util.unflatten_dict(flat, sep=".")
    own, seen = Experts.logits, []

    def noted(layer, x, key):
        seen.append(own(layer, x, key))
        return seen[-1]

    monkeypatch.setattr(Experts, "logits", noted)
    ids, mask = left_padded(rows(case.config, (12, 12)))
    expected, router = case.run(
        lambda model, hidden, _: (model.logits(hidden)[..., :97], seen[-1]), batch_of(ids, mask)
    )
    model = OnnxModel(case.path, threads=1)
    first, past = model.run(inputs_of(batch_of(ids[:, :-1], mask[:, :-1])), {})
    given = inputs_of(batch_of(ids, mask))
    given |= {name: given[name][:, -1:] for name in ("input_ids", "position_ids")}
    last, _ = model.run(given, past)
    found = np.concatenate([first, last], axis=1)
    ranked = np.sort(router.reshape(*ids.shape, -1), axis=-1)
    sure = ranked[..., -2] - ranked[..., -3] > 0.1 * ranked.std()
    wrong = (found - expected)[sure]
    assert sure.mean() > 0.6 and sure[:, -1].any()
    assert wrong.std() < 0.04 * expected.std()


def test_codes_of_8_bits():
    """Each number is missed by half a step at most, and a row of zeros stays one."""
    matrix = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    matrix[2] = 0
    codes, scales = int8_codes(matrix, axis=1)
    assert codes.dtype == np.int8 and abs(codes.astype(int)).max() == 127
    again = codes * scales[:, None]
    assert (abs(again - matrix) <= scales[:, None] / 2 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(again[2], 0)


@pytest.mark.parametrize("kind", [pytest.param("float32", marks=pytest.mark.slow), "int8"])
def test_large_weights_lie_beside_the_graph(written, kind):
    """One file for both graphs of T5, in which the table of tokens is once."""
    case = written("t5", kind)
    prompts, sources = [[0], [0]], rows(case.config, (7, 3))
    expected = OnnxModel(case.path, threads=1).greedy(prompts, 5, sources)
    inside = sum(path.stat().st_size for path in case.path.parent.iterdir())
    case = written("t5", kind, largest_graph=0)
    files = {path.name: path.stat().st_size for path in case.path.parent.iterdir()}
    assert set(files) == {"model.onnx", "model.encoder.onnx", "model.onnx.data"}
    assert case.notes[-1].startswith("the model is model.encoder.onnx, model.onnx, model.onnx.data")
    assert OnnxModel(case.path, threads=1).greedy(prompts, 5, sources) == expected
    assert files["model.onnx"] < inside / 2
    tables = [
        next(
            one
            for one in onnx.load(path, load_external_data=False).graph.initializer
            if one.name.startswith("embedding.table") and one.dims[0] == 97 and len(one.dims) == 2
        )
        for path in (case.path, case.path.with_suffix(".encoder.onnx"))
    ]
    offsets = [{e.key: e.value for e in one.external_data}["offset"] for one in tables]
    assert offsets[0] == offsets[1] and int(offsets[0]) % 4096 == 0


@config
class Halved(Arrangement):
    """An arrangement of one's own."""

    def apply(self, x, norms, attention, feed_forward):
        x = 0.5 * x + attention(norms["attention_norm"](x))
        return x + feed_forward(norms["feed_forward_norm"](x)) / 2


@config
class Rooted(Arrangement):
    """One that does more than add and multiply."""

    def apply(self, x, norms, attention, feed_forward):
        return jax.numpy.sqrt(x) + attention(x) + feed_forward(x)


@config
class OwnNorm(RMSNormConfig):
    """A norm of one's own."""


def test_parts_of_ones_own(written):
    """An arrangement of sums and products is written as any; other parts are refused by name."""
    case = written(tiny(gpt2(), max_length=32, arrangement=Halved()))
    ids, mask = left_padded(rows(case.config, (5, 3)))
    batch = batch_of(ids, mask)
    found, _ = OnnxModel(case.path, threads=1).run(inputs_of(batch), {})
    real = mask == 1
    np.testing.assert_allclose(found[real], case.logits(batch)[real], rtol=0, atol=CLOSE)
    case.path.unlink()
    with pytest.raises(UserError, match="arrangement=Rooted"):
        written(tiny(gpt2(), max_length=32, arrangement=Rooted()))
    with pytest.raises(UserError, match="norm=OwnNorm"):
        written(tiny(gpt2(), max_length=32, norm=OwnNorm()))
    choosing = replace(SHARED, router=ExpertChoiceRouter())
    with pytest.raises(UserError, match="router=ExpertChoiceRouter"):
        onnx_file.check(tiny(mixtral(), feed_forward=choosing))
    dropping = replace(SHARED, router=TopKRouter(capacity=1.0))
    with pytest.raises(UserError, match="router=TopKRouter"):  # of texts that are read whole
        onnx_file.check(tiny(bert(), max_length=32, feed_forward=dropping))
    assert list(case.path.parent.iterdir()) == []


def test_rotations_of_long_texts_are_left_out(written):
    """Qwen stretches them with the text, which a file cannot; the note says up to where it is."""
    case = written(tiny(qwen()))
    assert case.notes[-1].startswith("up to 8192 tokens the file is the same model")
    ids, mask = left_padded(rows(case.config, (7, 4)))
    batch = batch_of(ids, mask)
    found, _ = OnnxModel(case.path, threads=1).run(inputs_of(batch), {})
    np.testing.assert_allclose(found[mask == 1], case.logits(batch)[mask == 1], atol=CLOSE)


def test_the_command(one_device, tmp_path):
    """What is there already is left as it is; a kind of weights of other files is refused."""
    path, folder = tmp_path / "model.onnx", parity_folder("gpt2")
    Convert(source=str(folder), destination=str(path), weights="int8").run()
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        convert_to_onnx(folder, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    other = str(tmp_path / "other.onnx")
    with pytest.raises(UserError, match="weights=q8_0: must be float32 or int8 or none in onnx"):
        Convert(source=str(folder), destination=other, weights="q8_0").run()
    with pytest.raises(UserError, match="dtype=bfloat16"):
        Convert(source=str(folder), destination=other, dtype="bfloat16").run()
    with pytest.raises(UserError, match="XLNetConfig"):
        convert_to_onnx(parity_folder("xlnet"), other)


def test_graphs_have_plain_operators_and_known_shapes(written):
    """Whatever builds an engine from a file (TensorRT) infers all shapes and finds no extension."""
    case = written("llama2_gqa")
    model = onnx.load(case.path)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 20)]
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert {node.op_type for node in model.graph.node} <= {
        *("Add", "And", "Cast", "Concat", "Cos", "CumSum", "Div", "Gather", "Gemm", "Identity"),
        *("Less", "LessOrEqual", "MatMul", "Mul", "ReduceMean", "Reshape", "Shape", "Sigmoid"),
        *("Sin", "Slice", "Softmax", "Split", "Sqrt", "Sub", "Transpose", "Unsqueeze", "Where"),
    }


def test_bounds_of_all_inputs_for_tensorrt(written, tmp_path, monkeypatch, capsys):
    """As EXPORT.md prints them: every input has its own, and shapes within them can be run."""
    case = written("llama2_gqa")
    case.path.rename(tmp_path / "mine.onnx")
    monkeypatch.chdir(tmp_path)
    text = Path(onnx_file.__file__).with_name("EXPORT.md").read_text("utf-8")
    exec(text.partition("```python\nimport onnx\n")[2].partition("```")[0], {"onnx": onnx})
    lines = capsys.readouterr().out.split()
    assert [line.partition("=")[0] for line in lines] == [
        "--minShapes",
        "--optShapes",
        "--maxShapes",
    ]
    bounds = [dict(one.split(":") for one in line.partition("=")[2].split(",")) for line in lines]
    session = OnnxModel("mine.onnx", threads=1).session
    assert all(list(bound) == [one.name for one in session.get_inputs()] for bound in bounds)
    assert bounds[1]["past_key_values.0.key"] == "1x2x512x12"
    assert [bound["attention_mask"] for bound in bounds] == ["1x1", "1x513", "8x2048"]


def test_a_graph_of_ones_own(tmp_path):
    """As in the docstring: names say where a node is from, equal constants are one."""
    graph = Graph(Tensors())
    x = graph.input("x", np.float32, ("batch", 4))
    with graph.scope("part"):
        y = graph.op("MatMul", x, graph.weight("w", np.eye(4, dtype=np.float32))) + 1.0
    graph.output("y", y * 2 + 1, ("batch", 4))
    path = tmp_path / "y.onnx"
    onnx.save(graph.model(), path)
    given = np.ones((2, 4), np.float32)
    [found] = OnnxModel(path).session.run(None, {"x": given})
    np.testing.assert_array_equal(found, (given + 1) * 2 + 1)
    written = onnx.load(path)
    assert written.graph.node[0].name == "part/MatMul_0"
    assert [one.name for one in written.graph.initializer] == ["w", "constant_0", "constant_1"]
