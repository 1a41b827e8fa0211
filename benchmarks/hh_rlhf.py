"""Small reward models on hh-rlhf, beside the lengths and the words of the answers.

python -m benchmarks.hh_rlhf folder=hh-rlhf python=PYTHON [json=FILE]

`folder` holds helpful-base-test.jsonl.gz and harmless-base-test.jsonl.gz, the test.jsonl.gz of
https://github.com/anthropics/hh-rlhf under these names. Half of the prompts train a model to
continue the conversations of both, and from it reward models for helpfulness and others for
harmlessness, as LLaMA 2 has them (arXiv:2307.09288). Those of a set differ in the seed of their
training, and their scores are added (Coste et al. 2023, arXiv:2310.02743); the pairs of the other
half are what all sides are compared on. `python` is an interpreter with scikit-learn, for words.
A run that was stopped goes on in its `output` folder.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from benchmarks.harness import Worker, save, table
from lmjax.alignment.comparison_accuracy import pairs_of
from lmjax.alignment.model_reward import ModelReward
from lmjax.alignment.pair_measures import won
from lmjax.alignment.reward_functions import Reply
from lmjax.config import UserError, config
from lmjax.data import Data, Domain, TokenStore, prepare
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.tokenizers import Tokenizer
from lmjax.data.tokenizers.subwords import TrainedBPE
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.settings import ChatEvaluation, Checkpoints, Evaluation
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.parallel import Mesh
from lmjax.runs.folder import RunFolder
from lmjax.scaling.flops import count_parameters
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Cosine

NAMES = ("helpful", "harmless")
VOCABULARY = 4096  # tokens
LARGEST, GOAL = 30_000_000, 0.62  # parameters, accuracy
REPLY = "\n\nAssistant:"  # before a reply, in the plain format
SEED = 0  # of the bootstrap
MODELS = "reward models"  # name of our side
Leads = Float[np.ndarray, "pairs"]
Texts = dict[str, list[str]]  # better and worse replies, pair by pair


@config
class RewardBenchmark:
    """Trains the reward models, and compares them on the other half of the prompts."""

    folder: str = ""  # of hh-rlhf
    python: str = ""  # interpreter with scikit-learn; empty: the words are left out
    output: str = "runs/hh_rlhf"  # folder of all runs
    width: int = 192  # of the models
    layers: int = 4  # of the models
    length: int = 512  # tokens of a conversation, the last ones of a longer one
    reading: int = 1000  # steps in which one learns to continue conversations, of 16 rows
    ranking: int = 110  # steps in which each learns to rank answers, of 32 pairs: 3 epochs
    rate: float = 1e-4  # highest learning rate of the ranking
    members: int = 5  # reward models of a set
    resamples: int = 10_000  # of the bootstrap
    seed: int = 0  # of the training
    json: str = ""  # file for the results


def path_of(folder: str, name: str) -> Path:
    """File of one half of hh-rlhf's base set."""
    return Path(folder) / f"{name}-base-test.jsonl.gz"


def data_of(settings: RewardBenchmark, names: tuple[str, ...] = NAMES, **further) -> Data:
    """Some sets; half of the prompts of each are held out, the same ones in all runs."""
    paths = {name: str(path_of(settings.folder, name)) for name in names}
    # A few answers are empty.
    domains = (
        Domain(name=name, source=Comparisons(path=path, on_error="skip"))
        for name, path in paths.items()
    )
    return Data(train=tuple(domains), held_out=0.5, length=settings.length, **further)


def reader(settings: RewardBenchmark) -> Pretrain:
    """The language model of the conversations that train the reward models."""
    width = settings.width
    model = TransformerConfig(
        vocab_size=VOCABULARY,
        hidden=width,
        num_layers=settings.layers,
        max_length=settings.length,
        attention=AttentionConfig(num_heads=width // 32, head_dim=32),
        feed_forward=FeedForwardConfig(size=4 * width),
        dropout=0.1,
        unroll=settings.layers,
    )
    return Pretrain(
        output=f"{settings.output}/reader",
        steps=settings.reading,
        seed=settings.seed,
        model=model,
        data=data_of(settings, batch_size=16, tokenizer=TrainedBPE(vocab_size=VOCABULARY)),
        optimizer=AdamW(weight_decay=0.1),
        schedule=Cosine(peak=2e-3, warmup=settings.reading // 20, final=0.1),
        evaluation=Evaluation(every=settings.reading, tokens=50_000),
        checkpoint=Checkpoints(every=200, keep=1),
    )


def ranker(settings: RewardBenchmark, name: str, member: int) -> RewardModel:
    """One of the reward models of a set."""
    return RewardModel(
        output=f"{settings.output}/{name}-{member}",
        steps=settings.ranking,
        seed=settings.seed + member,
        begin_with=f"{settings.output}/reader",
        data=data_of(settings, (name,), batch_size=32, rows="groups"),
        optimizer=AdamW(weight_decay=0.1),
        schedule=Cosine(peak=settings.rate, warmup=settings.ranking // 20, final=0.1),
        ema_decay=0.98,
        evaluation=ChatEvaluation(every=settings.ranking),
        checkpoint=Checkpoints(every=100, keep=1),
    )


def texts_of(store: TokenStore, tokenizer: Tokenizer) -> Texts:
    """Last replies of the better and the worse conversation of each pair."""
    found = {"better": [], "worse": []}
    for pair in pairs_of(store):
        for side, documents in zip(found, pair, strict=True):
            texts = (store.text(document, tokenizer) for document in documents.tolist())
            found[side] += [text.rpartition(REPLY)[2] for text in texts]
    return found


def leads_of_model(folder: str, store: TokenStore, length: int) -> Leads:
    """Scores of the better conversations less those of the worse ones."""
    edges = zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True)
    tokens = [store.tokens[max(first, end - length) : end].tolist() for first, end in edges]
    replies = [Reply("", "", True, {}, ids) for ids in tokens]
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        scores = np.array(ModelReward(folder=folder).score(replies))
    return np.concatenate([scores[better] - scores[worse] for better, worse in pairs_of(store)])


def leads_of_length(train: Texts, held_out: Texts) -> Leads:
    """Differences of characters, with the sign that is right more often in training."""

    def longer(texts: Texts) -> Leads:
        sizes = [np.array([len(text) for text in texts[side]], float) for side in texts]
        return sizes[0] - sizes[1]

    return longer(held_out) * (1 if won(longer(train)) >= 0.5 else -1)


def leads_of_words(python: str, train: Texts, held_out: Texts) -> tuple[Leads, float]:
    """Leads by logistic regression on words, and the strength of its regularisation."""
    with tempfile.TemporaryDirectory() as folder, Worker("benchmarks.hh_rlhf_words", python) as one:
        path = Path(folder) / "texts.json"
        path.write_text(json.dumps({"train": train, "held_out": held_out}), "utf-8")
        found = one.ask("fit", path=str(path))
    return np.array(found["leads"]), found["strength"]


def interval(values: Float[np.ndarray, "pairs"], resamples: int) -> tuple[float, float]:
    """Bounds of the mean that hold it in 95 of 100 cases, by the bootstrap over pairs."""
    generator = np.random.default_rng(SEED)
    count = len(values)
    means = [values[generator.integers(count, size=count)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def joined(parts: Iterable[Texts]) -> Texts:
    """Replies of all sets, one after another."""
    return {side: [text for part in parts for text in part[side]] for side in ("better", "worse")}


@dataclasses.dataclass(frozen=True)
class Compared:
    """The sides' leads of the better conversations of a set, and the texts of its pairs."""

    members: Float[np.ndarray, "members pairs"]
    length: Leads
    train: Texts
    held_out: Texts


def compare(settings: RewardBenchmark, name: str) -> Compared:
    """Leads of the better held-out conversations of a set."""
    runs = [RunFolder(ranker(settings, name, one).output) for one in range(settings.members)]
    run, experiment = runs[0], runs[0].experiment()
    prepared = prepare(experiment.data, run.tokenizer)
    store, tokenizer = prepared.held_out[name], prepared.tokenizer
    train, held_out = (texts_of(one, tokenizer) for one in (prepared.train[name], store))
    leads = np.array([leads_of_model(one.location, store, settings.length) for one in runs])
    return Compared(leads, leads_of_length(train, held_out), train, held_out)


def sides_of(settings: RewardBenchmark, sets: dict[str, Compared]) -> tuple[dict[str, Leads], dict]:
    """Leads of all held-out pairs by each side, and what was found on the way."""
    parts, facts = list(sets.values()), {}
    found = {"length": np.concatenate([one.length for one in parts])}
    if settings.python:
        train, held_out = joined([o.train for o in parts]), joined([o.held_out for o in parts])
        found["words"], strength = leads_of_words(settings.python, train, held_out)
        words = [leads_of_words(settings.python, one.train, one.held_out) for one in parts]
        found["words, each set alone"] = np.concatenate([leads for leads, _ in words])
        facts["strengths"] = [strength, *(strength for _, strength in words)]
    members = np.concatenate([one.members for one in parts], axis=1)
    facts["members"] = [won(leads) for leads in members]
    return found | {MODELS: members.sum(0)}, facts


def main(settings: RewardBenchmark) -> None:
    """Trains, prints and saves the comparison.

    UserError: the folder lacks the files, the models of a set have too many parameters.
    """
    for name in NAMES:
        if not path_of(settings.folder, name).is_file():
            raise UserError(f"folder={settings.folder!r} has no {path_of('', name)}")
    parameters = settings.members * count_parameters(reader(settings).model).total
    if parameters > LARGEST:
        raise UserError(f"the models have {parameters:,} parameters; {LARGEST:,} are allowed")
    rankers = (ranker(settings, name, one) for one in range(settings.members) for name in NAMES)
    jobs = reader(settings), *rankers
    for job in jobs:
        job.run()
    seconds = sum(RunFolder(job.output).results()["seconds"] for job in jobs)
    compared = {name: compare(settings, name) for name in NAMES}
    found, facts = sides_of(settings, compared)
    sets = np.repeat(NAMES, [len(compared[name].length) for name in NAMES])
    rights = {name: np.heaviside(leads, 0.5) for name, leads in found.items()}
    model, rows, results = rights[MODELS], [], {}
    for name, right in rights.items():
        bounds = interval(right, settings.resamples)
        ahead = interval(model - right, settings.resamples)
        by_set = {one: float(right[sets == one].mean()) for one in NAMES}
        rows.append([name, float(right.mean()), *bounds, *by_set.values(), *ahead])
        results[name] = {"accuracy": float(right.mean()), "interval": bounds, "sets": by_set}
        results[name]["models_ahead"] = [float((model - right).mean()), *ahead]
    columns = ["", "accuracy", "from", "to", *NAMES, "models ahead from", "to"]
    print("\n" + table(columns, rows))
    print(f"\n{len(sets):,} pairs, {parameters:,} parameters a set, {seconds:,.0f} s of training")
    facts |= {"pairs": len(sets), "seconds": seconds, "goal": GOAL, "parameters": parameters}
    save(settings.json, "hh_rlhf", results=results, **facts)


if __name__ == "__main__":
    with exit_on_user_error():
        main(from_command_line(RewardBenchmark()))
