"""Blanks filled from folders like the published ones: a tiny random model, a whole vocabulary."""

import functools
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import replace
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.generation.__main__ import Generate
from lmjax.generation.fill import infiller_by
from lmjax.generation.run import load
from lmjax.interop import huggingface
from lmjax.interop.convert import convert
from lmjax.launch import run
from lmjax.models import DeepNorm, Normal, bert, chatglm, glm, glm_130b, initialize, plain_batch, t5
from lmjax.models.family import families
from lmjax.parallel import Mesh, generation_layout
from tests.lmjax.data.vocabulary_folders import FOLDERS, UNCASED
from tests.lmjax.generation.slow_filling import slow_sentinels, slowly


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def tiny(config, vocabulary):
    """A small model of the config's family."""
    return replace(
        config,
        vocab_size=vocabulary,
        hidden=16,
        num_layers=1,
        max_length=64,
        attention=replace(config.attention, num_heads=2, head_dim=8),
        feed_forward=replace(config.feed_forward, size=64),
        initializer=Normal(std=0.3),
    )


MODELS = {
    "glm-10b": tiny(glm(), 50_304),
    "glm-roberta-large": tiny(glm(), 50_304),
    "glm-515m": tiny(glm(), 30_592),
    "glm-10b-chinese": tiny(glm(), 50_048),
    "glm-130b": replace(tiny(glm_130b(), 150_528), arrangement=DeepNorm(alpha=2**0.5)),
    "chatglm-6b": tiny(chatglm(), 130_528),
    "bert-base-chinese": tiny(bert(), 21_128),
    "t5-base": replace(tiny(t5(), 32_128), encoder_layers=1, head_scale=0.25),
}


LIKELIER = [UNCASED.index(name) for name in ("好", "天", "the", "##es", "气")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> a folder of this published model's kind, not to be changed, and its logits.

    Those of whole batches. Of BERT the `LIKELIER` tokens have a higher bias of the head.
    """

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("made") / "model"
        FOLDERS[name](folder)
        config, layout = MODELS[name], generation_layout()
        graph, params = initialize(config, layout, jax.random.key(7))
        if name.startswith("bert"):
            params["head_bias"] = params["head_bias"].at[np.array(LIKELIER)].add(12.0)
        huggingface.write(folder, config, params)

        @jax.jit
        def logits(batch):
            net = nnx.merge(graph, params)
            return net.logits(net(batch)[0])[0, :, : config.vocab_size]

        return folder, logits

    return make


def command(capsys, folder, *words):
    """What `python -m lmjax.generation` ends with, and what it prints."""
    with pytest.raises(SystemExit) as end:
        run(Generate(), [str(folder), *words], positional="model")
        sys.exit(0)
    return end.value.code, capsys.readouterr()


EOT = "<|endoftext|>"
BLANKS = {  # by folder: a prompt, and tokens in it, of which None is a text's in its turn
    "glm-10b": ("The [MASK] fox[sMASK].", ["[CLS]", None, "[MASK]", None, "[sMASK]", None, EOT]),
    "glm-10b, at its end": ("The fox [gMASK]", ["[CLS]", None, "[gMASK]"]),
    "glm-roberta-large": ("The <mask> fox.", ["<s>", None, "<mask>", None, "</s>"]),
    "glm-515m": ("the [MASK] fox.", ["[CLS]", None, "[MASK]", None, "[SEP]"]),
    "glm-10b-chinese": ("今天天气很[MASK]。", ["[CLS]", None, "[MASK]", None, EOT]),
    "glm-130b": ("今天\t[MASK]。\n", [None, "[MASK]", None, "</s>"]),
    "chatglm-6b": ("今天\t天气很[gMASK]", [None, "[gMASK]"]),
    "glm-130b, running on": ("今天  天气[gMASK]", [None, "[gMASK]"]),
    "glm-130b, at its end": ("今天天气[MASK]", [None, "[MASK]"]),
}


def taken_apart(tokenizer, case):
    """The texts between the prompt's blanks, and the tokens of all of it."""
    prompt, layout = BLANKS[case]
    texts = re.split(r" ?(?:\[\w*MASK\]|<mask>)", prompt)
    parts = iter(texts)
    pieces = (
        tokenizer.encode(next(parts)) if name is None else [tokenizer.special[name]]
        for name in layout
    )
    return texts, [token for piece in pieces for token in piece]


@pytest.mark.parametrize("case", BLANKS)
def test_a_prompt_is_read_as_by_the_authors_program(case, tmp_path):
    name, family = case.split(",")[0], re.match("glm-130b|chatglm|glm", case)[0].replace("-", "_")
    tokenizer = read_tokenizer(FOLDERS[name](tmp_path / "folder"))
    (infill,) = [known.infill for known in families() if known.name == family]
    read = infiller_by(infill).read(tokenizer, BLANKS[case][0])
    assert (read.texts, read.tokens) == taken_apart(tokenizer, case)


@pytest.mark.parametrize(
    "case",
    [
        *("glm-10b", "glm-130b", "glm-130b, running on"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("glm-515m", "chatglm-6b")),
    ],
)
def test_a_glm_folder_fills_blanks(case, made, capsys):
    prompt, layout = BLANKS[case]
    folder, logits = made(case.split(",")[0])
    tokenizer = read_tokenizer(folder)
    texts, context = taken_apart(tokenizer, case)
    special = tokenizer.special
    sop, eop = ("<sop>", "<eop>") if "<sop>" in special else ("<|startofpiece|>", "<|endofpiece|>")
    masks = [special[name] for name in layout if name and name.lower().endswith(("mask]", "mask>"))]
    stop = {special[eop], tokenizer.end}
    spans = slowly(logits, context, masks, 3, special[sop], stop, case == "glm-130b, running on")
    assert all(spans)
    wanted = texts[0]
    for span, text in zip(spans, texts[1:], strict=True):
        wanted += b"".join(map(tokenizer.token_bytes, span)).decode("utf-8", "replace") + text
    code, said = command(capsys, folder, f"prompt={prompt}", "max_tokens=3", "temperature=0")
    assert (code, said.out) == (0, wanted + "\n")


def test_a_t5_folder_fills_sentinels(made, capsys):
    prompt = "The <extra_id_0> jumps over<extra_id_1>."
    folder, logits = made("t5-base")
    generator = load(folder)
    tokenizer = generator.tokenizer
    encode = tokenizer.encode
    source = [*encode("The"), 32_099, *encode("jumps over"), 32_098, *encode("."), 1]
    assert generator.filling.read(tokenizer, prompt).tokens == source
    first, second = slow_sentinels(
        logits, source, [32_099, 32_098], 3, 0, {1, *range(32_000, 32_100)}
    )
    written = [b"".join(map(tokenizer.token_bytes, span)).decode() for span in (first, second)]
    code, said = command(capsys, folder, f"prompt={prompt}", "max_tokens=3", "temperature=0")
    assert (code, said.out) == (0, f"The{written[0]} jumps over{written[1]}.\n")


def test_a_bert_folder_gives_candidates_for_a_mask(made, capsys):
    folder, logits = made("bert-base-chinese")
    text = [UNCASED.index(character) for character in "今天天气很"]
    context = [101, *text, 103, UNCASED.index("。"), 102]
    found = np.asarray(jax.nn.softmax(logits(plain_batch(np.array([context])))[6]))
    best = sorted(zip(LIKELIER, found[LIKELIER]), key=lambda pair: -pair[1])
    wanted = ", ".join(f"{UNCASED[token]} {value:.3f}" for token, value in best)
    code, said = command(capsys, folder, "prompt=今天天气很[MASK]。")
    assert (code, said.out) == (0, f"[MASK] 1: {wanted}\n")


ROUND_TRIPS = {
    "glm-130b": "今天\t[MASK]。\n",
    "glm-10b": "The [MASK] fox[sMASK].",
    "t5-base": "The <extra_id_0> jumps over<extra_id_1>.",
    "bert-base-chinese": "今天天气很[MASK]。",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "glm-130b")) for n in ROUND_TRIPS],
)
def test_a_folder_that_was_a_run_fills_blanks_as_before(name, made, tmp_path, capsys):
    folder, _ = made(name)
    convert(folder, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "again")
    capsys.readouterr()
    words = [f"prompt={ROUND_TRIPS[name]}"]
    if name != "bert-base-chinese":  # which guesses, and writes nothing
        words += ["max_tokens=3", "temperature=0"]
    before = command(capsys, folder, *words)
    assert before[0] == 0
    assert command(capsys, tmp_path / "again", *words) == before


MISSING = {
    "glm-515m": ("added_tokens.json", "the [MASK] fox", "needs the token '<|endofpiece|>'"),
    "glm-10b": ("added_tokens.json", "the [MASK] fox", r"lacks the token '[CLS]'"),
    "glm-130b": ("ice_text.model", "[MASK]", "there is no tokenizer in"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_named(name, made, tmp_path, capsys):
    file, prompt, message = MISSING[name]
    folder = shutil.copytree(made(name)[0], tmp_path / "model")
    (folder / file).unlink()
    code, said = command(capsys, folder, f"prompt={prompt}")
    assert code == 2 and message in said.err and "Traceback" not in said.err
    if file == "added_tokens.json":
        assert file in said.err


def test_a_prompt_without_a_blank_says_which_there_are(made, capsys):
    code, said = command(capsys, made("glm-10b")[0], "prompt=The fox")
    assert code == 2 and "put [MASK], [sMASK], [gMASK] where something is missing" in said.err
