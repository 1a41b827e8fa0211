"""Exact match and F1 of answers that a model finds in held-out contexts (SQuAD)."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lmjax.config import config
from lmjax.console import Table
from lmjax.data.questions import ANSWERS, CONTEXT, context_tokens
from lmjax.data.store import TokenStore
from lmjax.data.tokenizers import Tokenizer
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator, Record
from lmjax.evaluation.held_out import HELD_OUT, HeldOut
from lmjax.evaluation.span_measures import answer_scores, best_span
from lmjax.objectives import Example

COLUMNS = ("held-out questions", "exact match", "F1")
CAPTION = (
    "Percent of questions whose answer is one of people's, and the mean F1 of its words, by the "
    "rules of SQuAD; of version 2.0 where a question has no answer. More is better."
)
SHOWN = 3  # answers of each set


@config
class AnswerMeasures(Evaluator):
    """Exact match and F1 of the best spans of held-out questions.

    Where questions may have no answer, there is one if its score is above that of no span.
    """

    every: int | None = 500  # steps between evaluations; the end always has one
    tokens: int | None = None  # of each set, as in HeldOutLoss
    longest: int = 30  # most tokens of an answer

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed` with the objective TextSpans."""
        sets, tokenizer = HeldOut.of(context, self.tokens), context.feed.tokenizer
        head, graph = context.feed.objective.objective.head, context.learner.graph

        @jax.jit
        def logits_of(params: dict, example: Example) -> Float[Array, "rows seq 2"]:
            model = nnx.merge(graph, params)
            hidden, _ = model(example.inputs)
            logits = model.outputs(head, hidden, example.inputs)
            return jax.reshard(logits, jax.sharding.PartitionSpec())

        def evaluate(step: int, params: dict) -> tuple[Record | Table, ...]:
            records, rows, samples = [], [], []
            for name, store in sets.stores.items():
                logits = [logits_of(params, example) for example in sets.examples(store)]
                logits = np.concatenate(jax.device_get(logits))
                given, found = self.answers(sets, store, tokenizer, logits)
                version = "1.1" if all(given) else "2.0"
                scores = answer_scores(found, given, version)
                records.append({"split": HELD_OUT + name, **scores})
                title = f"{name}, {len(found):,}"
                rows.append((title, scores["exact_match"], scores["f1"]))
                for people, model in list(zip(given, found, strict=True))[:SHOWN]:
                    samples.append((" / ".join(dict.fromkeys(people)) or "none", model or "none"))
            table = Table("Answers", COLUMNS, tuple(rows), CAPTION)
            return (*records, table, Table("Found", ("of people", "of the model"), tuple(samples)))

        return evaluate

    def answers(
        self,
        sets: HeldOut,
        store: TokenStore,
        tokenizer: Tokenizer,
        logits: Float[np.ndarray, "rows seq 2"],
    ) -> tuple[list[list[str]], list[str]]:
        """Answers of people to the questions of a set, and those of the model, "" for none.

        Args:
          sets: how rows are read.
          store: the questions, one a row.
          tokenizer: of the store.
          logits: of the starts and ends of the rows that are evaluated, and perhaps more.
        """
        reader = sets.rows(store)
        rows = np.arange(sets.count_rows(reader))
        spans, length = reader.spans(rows, np.zeros_like(rows)), logits.shape[1]
        begins = np.full(len(rows), length)
        np.minimum.at(begins, spans.row, spans.first)
        documents = [store.metadata(number) for number in reader.documents(rows).tolist()]
        given = [document[ANSWERS] for document in documents]
        found = []
        for row, document in enumerate(documents):
            _, characters = context_tokens(tokenizer, document[CONTEXT])
            index = np.arange(length)
            begin, last = begins[row], min(begins[row] + len(characters), length - 1)
            allowed = (index >= begin) & (index < last)
            text = ""
            if allowed.any():
                span = best_span(*logits[row].T, allowed, 0, self.longest)
                if all(given) or span.margin > 0:
                    low, high = characters[span.start - begin][0], characters[span.end - begin][1]
                    text = document[CONTEXT][low:high]
            found.append(text)
        return given, found
