"""T5 and GLM fine-tuned on prompts and completions: runs, and what the command answers then."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.data import Bytes, ChatTemplate, Conversations, Data, Domain, JsonPrompts, WithTokens
from lmjax.data.documents import is_held_out
from lmjax.generation import Sampling
from lmjax.generation.__main__ import Generate
from lmjax.generation.run import load_run
from lmjax.interop.folder import load_trained_model
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.settings import ChatEvaluation
from lmjax.models import Batch, abstract, glm, t5
from lmjax.objectives import BlankInfilling, SequenceToSequence
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant

GREEDY = Sampling(temperature=0.0)
GLM_MARKS = ("[gMASK]", "<|startofpiece|>", "<|endofpiece|>")
T5 = t5("small")
T5 = replace(
    T5,
    vocab_size=258,
    hidden=16,
    num_layers=1,
    encoder_layers=1,
    attention=replace(T5.attention, num_heads=2, head_dim=8, dropout=0.0),
    feed_forward=replace(T5.feed_forward, size=32),
    head_scale=0.25,
    dropout=0.0,
)
GLM = glm("110M")
GLM = replace(
    GLM,
    vocab_size=261,
    hidden=16,
    num_layers=1,
    max_length=48,
    attention=replace(GLM.attention, num_heads=2, head_dim=8, dropout=0.0),
    feed_forward=replace(GLM.feed_forward, size=32),
    dropout=0.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts that are answered by their letter, twice, and a pretrained GLM."""
    folder = tmp_path_factory.mktemp("pairs")
    records = [
        {"prompt": f"{n % 5}abcde"[: 2 + n % 4], "completion": f"{n % 5}!"} for n in range(80)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def finetune(folder, name, source, **settings):
    return Finetune(
        output=str(folder / name),
        steps=60,
        data=Data(
            train=(Domain(name="pairs", source=source),),
            held_out=0.2,
            length=32,
            batch_size=8,
            rows="whole_documents",
            tokenizer=settings.pop("tokenizer"),
            cache=str(folder / "cache"),
        ),
        schedule=Constant(peak=1e-2, warmup=0),
        **settings,
    )


@pytest.fixture(scope="module")
def translator(folder):
    """A run of a T5 from random parameters."""
    template = ChatTemplate(user=("copy: {content}",))
    source = Conversations(path=str(folder / "pairs.jsonl"), template=template)
    job = finetune(
        folder,
        "t5",
        source,
        model=T5,
        tokenizer=WithTokens(tokenizer=Bytes(), tokens=("<pad>",)),
        objective=SequenceToSequence(),
        evaluation=ChatEvaluation(every=30, prompts=("2ab",), sample_length=4),
    )
    job.run()
    return job


@pytest.fixture(scope="module")
def filler(folder):
    """A run of a GLM from random parameters."""
    source = JsonPrompts(
        path=str(folder / "pairs.jsonl"),
        answer="completion",
        mask=GLM_MARKS[0],
        closing=GLM_MARKS[2],
    )
    job = finetune(
        folder,
        "glm",
        source,
        model=GLM,
        tokenizer=WithTokens(tokenizer=Bytes(), tokens=("[MASK]", *GLM_MARKS)),
        objective=BlankInfilling(answers="[gMASK]"),
        evaluation=ChatEvaluation(every=30, prompts=("2ab[gMASK]",), sample_length=4),
    )
    job.run()
    return job


def held_out(job):
    """Losses on the held-out pairs."""
    return [m["loss"] for m in read_metrics(job.output) if m["split"].startswith("held_out")]


def logits_of(job):
    """The run's tokenizer, and its logits of a row."""
    trained = load_trained_model(job.output, training_layout())
    graph, _ = abstract(trained.config, training_layout())

    @jax.jit
    def logits(batch):
        model = nnx.merge(graph, trained.params)
        return jax.nn.log_softmax(model.logits(model(batch)[0])[0, :, : trained.config.vocab_size])

    return trained.tokenizer, lambda batch: np.asarray(logits(batch))


def row(length=32, **fields):
    """Fields of a batch of one row, filled up on the right."""
    size = len(fields["tokens"])
    fields = {"positions": range(size), "segments": [1] * size} | fields
    lines = {name: np.zeros((1, length), np.int32) for name in fields}
    for name, values in fields.items():
        lines[name][0, :size] = values
    return lines


def said_by(job, command, capsys):
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        capsys.readouterr()
        replace(command, model=job.output).run()
        return capsys.readouterr().out


def test_t5_answers_requests(translator, one_device, capsys):
    """Greedily as a loop without a cache, with the prefix of its training; the command too."""
    first, last = held_out(translator)
    assert last < 0.8 * first
    tokenizer, logits = logits_of(translator)
    source = [*tokenizer.encode("copy: 3ab"), tokenizer.end]
    encoder = Batch(**row(tokens=source))
    written = [tokenizer.special["<pad>"]]
    while written[-1] != tokenizer.end and len(written) < 7:
        batch = Batch(**row(tokens=written), encoder=encoder)
        written.append(int(np.argmax(logits(batch)[len(written) - 1])))
    expected = tokenizer.decode([token for token in written[1:] if token != tokenizer.end])
    (found,) = load_run(translator.output).fill(["3ab"], GREEDY, 6)
    assert found.text == expected
    command = Generate(prompt="3ab", temperature=0.0, max_tokens=6)
    assert said_by(translator, command, capsys) == expected + "\n"
    with pytest.raises(UserError, match="the model's encoder is to read"):
        load_run(translator.output).fill([""])
    [replies] = [
        t for t in RunFolder(translator.output).results()["tables"] if t["title"] == "Replies"
    ]
    assert replies["rows"][0][0] == "2ab"
    translator.run()  # once more: it has ended, and says how to ask it
    assert f'lmjax.generation {translator.output} prompt="..."' in capsys.readouterr().out


def test_glm_learns_completions_with_two_positions(filler, folder, one_device, capsys):
    """The held-out loss, of packed rows, is that of single ones written out: to 1e-5."""
    losses = held_out(filler)
    assert losses[-1] < 0.8 * losses[0]
    tokenizer, logits = logits_of(filler)
    mask, sop, eop = (tokenizer.special[name] for name in GLM_MARKS)
    records = list(map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()))
    [source] = [domain.source for domain in filler.data.train]
    kept = [is_held_out(document, 0.2) for document in source.documents()]
    total, count = 0.0, 0
    for record in (one for one, keep in zip(records, kept, strict=True) if keep):
        prompt = [*tokenizer.opening, *tokenizer.encode(record["prompt"]), mask, *tokenizer.closing]
        answer = tokenizer.encode(record["completion"])
        where, size = prompt.index(mask), len(prompt)
        part_b = [sop, *answer]
        batch = row(
            tokens=[*prompt, *part_b],
            positions=[*range(size), *[where] * len(part_b)],
            block_positions=[*[0] * size, *range(1, len(part_b) + 1)],
            ranks=[*[0] * size, *range(size, size + len(part_b))],
        )
        found = logits(Batch(**batch))
        for number, target in enumerate([*answer, eop]):
            total -= float(found[size + number, target])
            count += 1
    assert count > 10
    assert math.isclose(losses[-1], total / count, rel_tol=1e-5)
    (filled,) = load_run(filler.output).fill(["3abcd[gMASK]"], GREEDY, 6)
    command = Generate(prompt="3abcd[gMASK]", temperature=0.0, max_tokens=6)
    assert said_by(filler, command, capsys) == filled.text + "\n"
