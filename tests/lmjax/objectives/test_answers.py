"""Prompts whose answer alone is predicted: what the model reads, and that it fills them in so."""

import json
import re

import jax
import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.data import JsonPrompts, build_stores
from lmjax.data.rows import Ring
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.generation import Sampling, TextGenerator
from lmjax.generation.fill import infiller_of
from lmjax.generation.generator import Generator
from lmjax.models import (
    AttentionConfig,
    BlockPositions,
    FeedForwardConfig,
    TransformerConfig,
)
from lmjax.objectives import BlankInfilling, DocumentBlank, Mixed, TokenTable
from lmjax.objectives.glm import glm_130b_objective
from lmjax.parallel import generation_layout, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from tests.lmjax.objectives.rows import (
    BEGIN,
    END,
    EOP,
    GMASK,
    LEXICON,
    MASK,
    SOP,
    answered_row,
    answers_of,
    full_batch,
    make_row,
)

LENGTH = 64
SHORT = BlankInfilling(cross_documents=True, samples=4, answers="[MASK]")
LONG = BlankInfilling(
    blanks=DocumentBlank(shortest=0.2, rest=1.0),
    cross_documents=True,
    running_positions=True,
    answers="[MASK]",
)
BOTH = Mixed(objectives=(SHORT, LONG), weights=(0.3, 0.7))


@pytest.mark.parametrize("objective", [SHORT, LONG], ids=["short", "long"])
def test_a_row_written_out(objective):
    """The end of an answer, three prompts, of which the last is cut off inside its answer."""
    documents = [
        [31, EOP, 32, END],
        [BEGIN, 41, 42, MASK, 51, 52, EOP, END],
        [BEGIN, 43, MASK, 53, EOP, 44, 45, END],
        [BEGIN, 46, MASK, 54, 55],
    ]
    tokens = np.concatenate(documents).astype(np.int32)
    segments = np.repeat(np.arange(1, 5), [len(d) for d in documents]).astype(np.int32)
    spans = answers_of(tokens[None], segments[None])
    assert list(zip(spans.first, spans.end)) == [(-1, 1), (8, 10), (15, 16), (23, 26)]
    example = objective.prepare(
        tokens[None], segments[None], np.zeros(1, np.uint64), LEXICON, 24, spans
    )
    batch, predicted = example.inputs, example.targets
    columns = [
        # input, target of positive weight, position, block position, segment
        *[(BEGIN, 0, 0, 0, 1), (41, 0, 1, 0, 1), (42, 0, 2, 0, 1), (MASK, 0, 3, 0, 1)],
        *[(END, 0, 4, 0, 1), (SOP, 51, 3, 1, 1), (51, 52, 3, 2, 1), (52, EOP, 3, 3, 1)],
        *[(BEGIN, 0, 0, 0, 2), (43, 0, 1, 0, 2), (MASK, 0, 2, 0, 2), (44, 0, 3, 0, 2)],
        *[(45, 0, 4, 0, 2), (END, 0, 5, 0, 2), (SOP, 53, 2, 1, 2), (53, EOP, 2, 2, 2)],
        *[(BEGIN, 0, 0, 0, 3), (46, 0, 1, 0, 3), (MASK, 0, 2, 0, 3)],
        *[(SOP, 54, 2, 1, 3), (54, 55, 2, 2, 3)],
        *[(0, 0, 0, 0, 0)] * 3,
    ]
    inputs, targets, positions, block_positions, numbers = map(list, zip(*columns, strict=True))
    np.testing.assert_array_equal(batch.tokens[0], inputs)
    np.testing.assert_array_equal(predicted.weights[0], np.array(targets) > 0)
    np.testing.assert_array_equal(predicted.tokens[0] * (predicted.weights[0] > 0), targets)
    np.testing.assert_array_equal(batch.positions[0], positions)
    np.testing.assert_array_equal(batch.block_positions[0], block_positions)
    np.testing.assert_array_equal(batch.segments[0], numbers)
    seen = np.asarray(batch.mask(causal=True).dense(24, 24))[0, 0]
    for query in range(24):
        for key in range(24):
            same = numbers[query] == numbers[key] != 0
            asks, tells = block_positions[query] > 0, block_positions[key] > 0
            assert seen[query, key] == (same and (not tells or (asks and key <= query)))


def test_rows_of_text_are_as_without_answers_and_mix_with_rows_of_prompts():
    """Text and prompts in one batch: what each row becomes follows from what it holds."""
    text = full_batch(BOTH.row_length(LENGTH), rows=8, longest=40)
    prompts = full_batch(BOTH.row_length(LENGTH), rows=8, longest=20, make=answered_row)
    mixed = [np.concatenate(pair) for pair in zip(text, prompts, strict=True)]
    example = BOTH.prepare(*mixed, LEXICON, LENGTH, answers_of(*mixed[:2]))
    batch, targets = example.inputs, example.targets
    plain = Mixed(
        objectives=tuple(
            BlankInfilling(**{**vars_of(part), "answers": None}) for part in BOTH.objectives
        ),
        weights=BOTH.weights,
    ).prepare(*text, LEXICON, LENGTH)
    for name in ("tokens", "positions", "segments", "ranks"):
        np.testing.assert_array_equal(getattr(batch, name)[:8], getattr(plain.inputs, name))
    for name in ("tokens", "weights"):
        np.testing.assert_array_equal(getattr(targets, name)[:8], getattr(plain.targets, name))
    assert {MASK, GMASK} <= set(plain.inputs.tokens.ravel().tolist())
    tokens, segments, _ = prompts
    for row in range(8):
        size = BOTH.objectives[BOTH.choose(mixed[2])[8 + row]].row_length(LENGTH)
        expected = []
        for number in range(1, segments[row, :size].max() + 1):
            document = tokens[row, :size][segments[row, :size] == number].tolist()
            if MASK in document:
                content = document[document.index(MASK) + 1 :]
                closed = EOP in content
                expected += content[: content.index(EOP) + 1] if closed else content
        found = targets.tokens[8 + row][targets.weights[8 + row] > 0]
        np.testing.assert_array_equal(found, expected)
    assert GMASK not in batch.tokens[8:]


def vars_of(objective):
    names = ("blanks", "cross_documents", "samples", "running_positions")
    return {name: getattr(objective, name) for name in names}


def test_every_prompt_fits_the_row():
    """Full rows in, and nothing of any answer is lost, however many documents there are."""
    for objective in (SHORT, LONG):
        size = objective.row_length(LENGTH)
        tokens, segments, seeds = full_batch(size, rows=50, longest=12, make=answered_row)
        spans = answers_of(tokens, segments)
        example = objective.prepare(tokens, segments, seeds, LEXICON, LENGTH, spans)
        answers = 0
        for row in range(50):
            inside = False
            for token in tokens[row]:
                answers += inside
                inside = token == MASK or (inside and token != EOP)
        assert (example.targets.weights > 0).sum() == answers


def test_a_row_with_an_answer_s_end_alone_is_no_text():
    """An answer's end, and a prompt whose answer stands in the next row; then a row of text."""
    end, prompt = [*range(31, 41), EOP, END], [BEGIN, *range(41, 59)]
    tokens = np.array([[*end, *prompt], [BEGIN, *range(41, 70), END]], np.int32)
    segments = np.array([[1] * len(end) + [2] * len(prompt), [1] * 31], np.int32)
    spans, seeds = answers_of(tokens, segments), np.zeros(2, np.uint64)
    example = SHORT.prepare(tokens, segments, seeds, LEXICON, LENGTH, spans)
    assert not example.inputs.segments[0].any() and example.targets.weights[1].any()
    # A batch of nothing but such rows teaches nothing; there may be one by chance.
    alone = SHORT.prepare(tokens[:1], segments[:1], seeds[:1], LEXICON, LENGTH, spans)
    assert not alone.targets.weights.any()


@pytest.mark.parametrize("other", [dict(answers="[sMASK]"), dict(eop="[dBLOCK]")], ids=str)
def test_other_tokens_around_the_answers_are_told(other):
    tokens, segments, seeds = full_batch(LENGTH, rows=4, longest=12, make=answered_row)
    objective = BlankInfilling(**{"answers": "[MASK]", **other})
    (name, value) = next(iter(other.items()))
    with pytest.raises(UserError, match=rf"{name}={re.escape(repr(value))}.* other tokens stand"):
        objective.prepare(tokens, segments, seeds, LEXICON, LENGTH, answers_of(tokens, segments))


def test_what_stands_for_answers_can_be_filled_in():
    objective = BlankInfilling(blanks=DocumentBlank(), answers="[MASK]")
    assert infiller_of(objective).names(TOKENIZER) == ["[gMASK]", "[MASK]"]
    assert infiller_of(objective).rest == ("[gMASK]",)


def test_answers_need_a_token_of_their_own():
    with pytest.raises(UserError, match=r"answers='<eop>'.* a token of its own"):
        BlankInfilling(sop="<sop>", eop="<eop>", answers="<eop>")
    with pytest.raises(UserError, match=r"answers='\[gMASK\]' stands for the text's rest already"):
        BlankInfilling(blanks=DocumentBlank(), answers="[gMASK]")
    row = make_row([60], 20, np.random.default_rng(0))
    objective = BlankInfilling(answers="[aMASK]")
    with pytest.raises(UserError, match=r"needs the token '\[aMASK\]'"):
        objective.prepare(row[0][None], row[1][None], np.zeros(1, np.uint64), LEXICON, 20)


NAMES = ("[MASK]", "[gMASK]", "<sop>", "<eop>")
TOKENIZER = ExtendedTokenizer(ByteTokenizer(), NAMES)
LINES = [
    *[{"prompt": f"{n} and {n} is ", "answer": str(2 * n)} for n in range(4, 8)],
    *[{"prompt": f"{word} [MASK]!", "answer": word[::-1]} for word in ("abc", "def", "xyz")],
]


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    source = JsonPrompts(path=str(path), closing="<eop>")
    return build_stores(source, TOKENIZER, tmp_path / "store")["all"]


def asked(line):
    """The prompt as a user writes it, and the answer as a blank's content."""
    prompt, answer = line["prompt"], line["answer"]
    place = prompt.partition("[MASK]")[0]
    if "[MASK]" not in prompt:
        prompt += "[MASK]"
    return prompt, " " * place.endswith(" ") + answer


def prepared(store, size):
    """The store's one row as GLM-130B's objective has it."""
    rows, row = Ring(store, size), np.zeros(1, np.int64)
    lexicon, seeds = TokenTable.of(TOKENIZER), np.zeros(1, np.uint64)
    return glm_130b_objective().prepare(*rows.read(row), seeds, lexicon, size, rows.spans(row))


def test_training_reads_what_generation_builds(store):
    """Tokens and positions of each sample: those of its prompt filled with its answer."""
    example, filling = prepared(store, 256), infiller_of(glm_130b_objective())
    batch, targets = example.inputs, example.targets
    for number, line in enumerate(LINES, 1):
        prompt, answer = asked(line)
        content = TOKENIZER.encode(answer)
        blanked = filling.read(TOKENIZER, prompt)
        expected, _ = filling.prompt(TOKENIZER, blanked, [content])
        here = batch.segments[0] == number
        np.testing.assert_array_equal(batch.tokens[0, here], expected.tokens)
        np.testing.assert_array_equal(batch.positions[0, here], expected.positions)
        wanted = [*content, TOKENIZER.special["<eop>"]]
        np.testing.assert_array_equal(targets.tokens[0, here & (targets.weights[0] > 0)], wanted)


@pytest.mark.slow
def test_a_model_that_has_learned_answers_fills_them_in(store, one_device):
    """Prompts learned by heart, with the answer at their end and in their middle."""
    objective, length = glm_130b_objective(), 160
    config = TransformerConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden=64,
        num_layers=2,
        max_length=length,
        attention=AttentionConfig(num_heads=4, head_dim=16),
        feed_forward=FeedForwardConfig(size=128),
        positions=BlockPositions(),
    )
    rate = Constant(peak=3e-3, warmup=10).build(150)
    learner = Learner(
        model=config,
        objective=objective,
        optimizer=AdamW(),
        rate=rate,
        layout=training_layout(),
    )
    state = learner.init(seed=0)
    example = jax.device_put(prepared(store, length))
    for _ in range(150):
        state, metrics = learner.compiled_step(state, example)
    assert float(metrics["loss"]) < 0.05
    generator = Generator(config, state.params, generation_layout())
    generator = TextGenerator(generator, TOKENIZER, infiller_of(objective))
    prompts, answers = zip(*map(asked, LINES), strict=True)
    found = generator.fill(list(prompts), Sampling(temperature=0.0), 8)
    assert [filled.blanks for filled in found] == [[answer.strip()] for answer in answers]
    assert found[0].text == "4 and 4 is 8" and found[-1].text == "xyz zyx!"
