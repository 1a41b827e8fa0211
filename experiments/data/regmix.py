"""The best mixture of three kinds of text for one of them, by tiny runs (RegMix, arXiv:2407.01492).

python -m experiments.data.regmix
2 CPU cores, about half an hour for 24 runs, no download. The text is this Python's own: its code,
its documentation, and whole sentences of that. Held-out documentation is what counts.

runs/regmix/report.html has the mixture that was found beside the best run and the prior, the rank
correlation of the regression on mixtures that it had not seen, and all runs; best.json has the
shares for a training.
"""

from experiments.debug import experiment as debug
from lmjax.config import replace
from lmjax.data import Domain, EmbeddedCorpus
from lmjax.jobs.mixture_search import MixtureSearch
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.launch import run

KINDS = ("documentation", "code", "prose")

experiment = MixtureSearch(
    output="runs/regmix",
    experiment=replace(
        debug,
        steps=100,
        data=replace(
            debug.data,
            train=tuple(Domain(name=kind, source=EmbeddedCorpus(domain=kind)) for kind in KINDS),
        ),
        evaluation=Evaluation(every=100, tokens=20_000),
        checkpoint=Checkpoints(every=100, keep=1),
    ),
    runs=24,
    target=("documentation",),
)

if __name__ == "__main__":
    run(experiment)
