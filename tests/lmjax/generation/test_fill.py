"""Blanks filled by tiny models: against a loop without a cache, and what is said of mistakes."""

import functools
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, config, replace, to_json
from lmjax.data.tokenizers import ByteTokenizer, CharacterTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.generation import Sampling, TextGenerator, load_run
from lmjax.generation.__main__ import Generate
from lmjax.generation.fill import BlankInfiller, MaskedTokenInfiller, SentinelInfiller, infiller_of
from lmjax.generation.generator import Generator
from lmjax.launch import run
from lmjax.models import (
    AttentionConfig,
    BlockPositions,
    EncoderDecoderConfig,
    FeedForwardConfig,
    Normal,
    RelativeBuckets,
    Rotary,
    TransformerConfig,
    initialize,
    plain_batch,
)
from lmjax.objectives import (
    BlankInfilling,
    CausalLM,
    DocumentBlank,
    MaskedLM,
    Mixed,
    Objective,
    SpanCorruption,
)
from lmjax.parallel import Mesh, generation_layout
from lmjax.runs.checkpoints import Checkpointer
from tests.lmjax.generation.slow_filling import slow_sentinels, slowly

SPECIAL = (
    *("[MASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>"),
    *("<pad>", "<extra_id_0>", "<extra_id_1>", "[CLS]", "[SEP]"),
)
TOKENIZER = ExtendedTokenizer(CharacterTokenizer("".join(map(chr, range(32, 127)))), SPECIAL)
ID = TOKENIZER.special
ATTENTION = AttentionConfig(num_heads=2, head_dim=8)
GLM = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden=16,
    num_layers=2,
    max_length=48,
    attention=ATTENTION,
    feed_forward=FeedForwardConfig(size=32),
    positions=BlockPositions(),
    initializer=Normal(std=0.3),
)
ROTARY = replace(GLM, positions=None, attention=replace(ATTENTION, positions=Rotary()))
T5 = EncoderDecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden=16,
    num_layers=1,
    encoder_layers=1,
    max_length=48,
    attention=replace(ATTENTION, positions=RelativeBuckets()),
    feed_forward=FeedForwardConfig(size=32),
    positions=None,
    initializer=Normal(std=0.3),
)
BERT = replace(ROTARY, attention=replace(ROTARY.attention, causal=False))
GREEDY = Sampling(temperature=0.0)
PROMPT = "a [MASK] b [MASK]."


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


@functools.cache
def parts(model):
    """A model of random parameters, and its logits of whole batches."""
    layout = generation_layout()
    graph, params = initialize(model, layout, jax.random.key(3))

    @jax.jit
    def logits(batch):
        net = nnx.merge(graph, params)
        return net.logits(net(batch)[0])[0, :, : model.vocab_size]

    return Generator(model, params, layout), logits


def made(model, filling, tokenizer=TOKENIZER):
    """A model that fills blanks, and its logits."""
    generator, logits = parts(model)
    return TextGenerator(generator, tokenizer, filling), logits


def by_hand(logits, context, most, blank="[MASK]", running=False):
    """See `slowly`, for this module's tokenizer."""
    stop = {ID["<|endofpiece|>"], TOKENIZER.end}
    return slowly(logits, context, [ID[blank]], most, ID["<|startofpiece|>"], stop, running)


def text_of(tokens):
    return TOKENIZER.decode(tokens)


@pytest.mark.parametrize("beams", [None, 1])
@pytest.mark.parametrize("model", [GLM, ROTARY], ids=["two tables", "rotary"])
def test_every_blank_is_filled_as_by_a_loop_without_a_cache(model, beams):
    generator, logits = made(model, BlankInfiller())
    # A space before a blank is the blank's; the tokenizer has one separator, the begin.
    context = [
        TOKENIZER.begin,
        *TOKENIZER.encode("a"),
        ID["[MASK]"],
        *TOKENIZER.encode(" b"),
        ID["[MASK]"],
        *TOKENIZER.encode("."),
    ]
    first, second = (text_of(span) for span in by_hand(logits, context, 5))
    assert first and second and first != second
    (filled,) = generator.fill([PROMPT], GREEDY, 5, beams=beams)
    assert filled.text == f"a{first} b{second}."
    assert filled.blanks == [first.strip(), second.strip()]


def test_the_rest_of_a_text_has_running_positions_where_the_model_has_them():
    generator, logits = made(ROTARY, BlankInfiller(run_on=("[gMASK]",)))
    context = [TOKENIZER.begin, *TOKENIZER.encode("ab"), ID["[gMASK]"]]
    (span,) = by_hand(logits, context, 6, "[gMASK]", running=True)
    assert generator.fill(["ab [gMASK]"], GREEDY, 6)[0].text == "ab" + text_of(span)
    with pytest.raises(UserError, match=r"\[MASK\], \[gMASK\] cannot stand in one prompt"):
        generator.fill(["a [MASK] b [gMASK]"])


def test_prompts_with_different_blanks_do_not_change_each_other():
    generator, _ = made(GLM, BlankInfiller())
    prompts = ["[MASK]", PROMPT, "something longer [MASK]"]
    alone = [generator.fill([prompt], GREEDY, 4)[0] for prompt in prompts]
    assert generator.fill(prompts, GREEDY, 4) == alone


def test_samples_differ_and_come_again():
    generator, _ = made(GLM, BlankInfiller())
    drawn = generator.fill([PROMPT], Sampling(seed=5), 6, samples=3)
    assert len({filled.text for filled in drawn}) == 3
    assert generator.fill([PROMPT], Sampling(seed=5), 6, samples=3) == drawn
    # The second blank is not drawn with the first one's numbers.
    assert all(filled.blanks[0] != filled.blanks[1] for filled in drawn)


def test_sentinels_are_filled_as_by_a_loop_without_a_cache():
    generator, logits = made(T5, SentinelInfiller())
    names = ("<extra_id_0>", "<extra_id_1>")
    source = [
        *TOKENIZER.encode("a"),
        ID[names[0]],
        *TOKENIZER.encode(" b"),
        ID[names[1]],
        *TOKENIZER.encode("."),
        TOKENIZER.end,
    ]
    sentinels = [ID[name] for name in names]
    stop = {*sentinels, TOKENIZER.end}
    spans = slow_sentinels(logits, source, sentinels, 5, ID["<pad>"], stop)
    (filled,) = generator.fill(["a <extra_id_0> b <extra_id_1>."], GREEDY, 5)
    assert filled.text == f"a{text_of(spans[0])} b{text_of(spans[1])}."
    with pytest.raises(UserError, match="numbered from 0 on"):
        generator.fill(["a <extra_id_1> b"])


def test_masks_are_guessed_from_all_of_the_text():
    generator, logits = made(BERT, MaskedTokenInfiller())
    tokens = np.array(
        [ID["[CLS]"], *TOKENIZER.encode("a"), ID["[MASK]"], *TOKENIZER.encode(" b"), ID["[SEP]"]]
    )
    wanted = np.asarray(jax.nn.softmax(logits(plain_batch(tokens[None]))[2]))
    (found,) = generator.guess("a [MASK] b", count=3)
    # The same numbers in another order of addition, where the layers are stacked.
    np.testing.assert_allclose([p for _, p in found], np.sort(wanted)[::-1][:3], rtol=1e-5)
    assert found[0][0] == TOKENIZER.decode([int(np.argmax(wanted))]).strip()


def test_what_is_trained_says_how_blanks_are_filled():
    blanks = BlankInfilling(), BlankInfilling(blanks=DocumentBlank(), running_positions=True)
    mixed = Mixed(objectives=blanks, weights=(1.0, 2.0))
    filling = BlankInfiller(("[MASK]", "[gMASK]"), rest=("[gMASK]",), run_on=("[gMASK]",))
    assert infiller_of(mixed) == filling
    assert infiller_of(SpanCorruption()) == SentinelInfiller()
    assert infiller_of(MaskedLM()) == MaskedTokenInfiller(cls=None, sep=None)
    assert infiller_of(MaskedLM(pair="next sentence")) == MaskedTokenInfiller()
    assert infiller_of(CausalLM()) is infiller_of(None) is None


def test_mistakes_are_named():
    generator, _ = made(GLM, BlankInfiller())
    with pytest.raises(UserError, match=r"has no blank.*put \[MASK\], \[gMASK\] where"):
        generator.fill(["nothing is missing"])
    # 1 + 24 tokens leave 49 - 25 places, of which each blank takes 2: the last is never read.
    read = generator.filling.read
    assert generator.filling.share(read(TOKENIZER, "[MASK]a" * 12), GLM.max_length) == 1
    with pytest.raises(UserError, match=r"27 tokens and 13 blanks.*context of 48 has no room"):
        generator.fill(["[MASK]a" * 13])
    with pytest.raises(UserError, match="continues texts"):
        made(GLM, None)[0].fill([PROMPT])
    with pytest.raises(UserError, match="guesses masks"):
        made(BERT, MaskedTokenInfiller())[0].fill([PROMPT])
    with pytest.raises(UserError, match="no encoder"):
        generator.guess(PROMPT)
    longer = ExtendedTokenizer(TOKENIZER, ("[new]",))
    generator, _ = made(BERT, MaskedTokenInfiller(mask="[new]"), longer)
    with pytest.raises(UserError, match=rf"tokens\[0, 2\] of the batch is {longer.vocab_size - 1}"):
        generator.guess("a [new] b")


@pytest.mark.parametrize("filling", [BlankInfiller(), SentinelInfiller()], ids=["GLM", "T5"])
def test_a_tokenizer_without_the_tokens_is_told_how_to_get_them(filling):
    generator, _ = made(GLM, filling, ByteTokenizer())
    with pytest.raises(UserError, match=r"lacks .its special tokens: <.endoftext.>.*WithTokens"):
        generator.fill([PROMPT])


@config
class Run:
    """What generation needs to know of an experiment."""

    model: TransformerConfig = GLM  # what was trained
    objective: Objective = BlankInfilling()  # how


def test_the_command_fills_the_blanks_of_a_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text(to_json(Run()))
    TOKENIZER.save(tmp_path / "tokenizer")
    _, params = initialize(GLM, generation_layout(), jax.random.key(3))
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params}, {"tokenizer": TOKENIZER.fingerprint})
    wanted = load_run(tmp_path).fill([PROMPT], GREEDY, 4)[0].text

    def command(*words):
        with pytest.raises(SystemExit) as end:
            run(Generate(), [str(tmp_path), *words], positional="model")
            sys.exit(0)
        return end.value.code, capsys.readouterr()

    settings = "max_tokens=4", "temperature=0"
    code, said = command(f"prompt={PROMPT}", *settings)
    assert (code, said.out) == (0, wanted + "\n")
    code, said = command("prompt=nothing", *settings)
    assert code == 2 and "has no blank" in said.err
