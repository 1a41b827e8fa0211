"""Tokenizes the text of an experiment before it is trained on, and shows its mixture."""

from __future__ import annotations

from lmjax.config import UserError, config
from lmjax.console import RunLog, Table, make_console
from lmjax.data import Data, PreparedData
from lmjax.jobs.job import Job
from lmjax.jobs.report import write_report
from lmjax.jobs.results import Results
from lmjax.jobs.text import prepare_text
from lmjax.launch import is_first
from lmjax.runs.folder import RESULTS
from lmjax.runs.lock import lock_run_folder

LARGEST_VOCABULARY = 1 << 32  # that tokens are stored for
MOST_EPOCHS = 4  # of a domain: more is worth less and less (Muennighoff et al. 2023)


@config
class TokenizeText(Job):
    """Make the tokenizer and the token stores that a training with the same `data` finds ready.

    The stores are in `data.cache`. The report has the table of GPT-3's mixture (Brown et al. 2020,
    arXiv:2005.14165, table 2.2): tokens, weight, and epochs of each domain.
    """

    data: Data  # the text, its tokenizer and mixture, as the training has it
    tokens: float = 0.0  # of the training, for the epochs; 0: those of one epoch of all text

    def validate(self) -> None:
        """Raises UserError for a negative number of tokens."""
        if self.tokens < 0:
            raise UserError(f"tokens={self.tokens}: must be 0 or more")

    def run(self) -> None:
        """See `Job.run`."""
        log = RunLog(make_console())
        with lock_run_folder(self) as folder:
            log.title(folder.path.name, folder.location)
            prepared = prepare_text(self.data, folder.tokenizer, LARGEST_VOCABULARY, log, {})
            table = self._mixture(prepared)
            if is_first():
                folder.write_json(RESULTS, Results(step=1, tables=(table,)).to_json())
                write_report(folder)
            log.table(table)
            log.files(folder.path, [("the report", str(folder.report))])

    def _mixture(self, prepared: PreparedData) -> Table:
        """Tokens, weight and epochs of each domain that is trained on."""
        stores = prepared.train
        weights = prepared.shares(tuple(domain.weight for domain in self.data.train))
        total = sum(weights[name] for name in stores)
        counts = {name: store.manifest.tokens for name, store in stores.items()}
        wanted = self.tokens or sum(counts.values())
        shares = {name: weights[name] / total for name in stores}
        epochs = {name: shares[name] * wanted / max(counts[name], 1) for name in stores}
        rows = tuple((name, counts[name], shares[name], epochs[name]) for name in stores)
        notes = [
            f"{name} is read {found:.1f} times: more than {MOST_EPOCHS} epochs add little"
            for name, found in epochs.items()
            if found > MOST_EPOCHS
        ]
        if self.data.stages:
            notes.append("The weights are those of the first stage.")
        notes += weight_remarks(self.data)
        caption = f"In a training of {wanted:,.0f} tokens."
        columns = ("domain", "tokens", "share", "epochs")
        return Table("Mixture", columns, rows, caption, notes=tuple(notes))


def weight_remarks(data: Data) -> list[str]:
    """Remarks on weights that look as if they should add up to 1 or to 100, and do not."""
    stages = [("", tuple(domain.weight for domain in data.train))]
    stages += [(f" from step {one.first_step:,} on", one.weights) for one in data.stages]
    remarks = []
    for words, weights in stages:
        total = sum(weights)
        for whole, tolerance in ((1.0, 0.2), (100.0, 20.0)):
            near = 0 < abs(total - whole) < tolerance
            if near and abs(total - whole) > 1e-6 * whole and len(weights) > 1:
                remarks.append(
                    f"The weights{words} add up to {total:g}, not to {whole:g}: they are taken as "
                    "relative shares"
                )
    return remarks
