"""Prints the file that starts an experiment on a cluster: for Slurm, Kubernetes or Cloud TPU VMs.

python -m lmjax.launch slurm experiments.gpt2_124m hosts=4 output=/shared/gpt2 > run.sbatch
python -m lmjax.launch jobset experiments.gpt3_175b tpu=v4:8x8x16 image=IMAGE output=gs://BUCKET/run
python -m lmjax.launch tpu_vm experiments.llama_1b type=v4-32 zone=us-central2-b output=gs://BUCKET/run

Settings that are not the file's own are the experiment's, and are checked here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lmjax.config import UserError, fields, parse
from lmjax.launch.command_line import exit_on_user_error, from_command_line
from lmjax.launch.experiments import load_experiment
from lmjax.launch.job_files import FILES, JobFile


def job_file(words: Sequence[str]) -> str:
    """The file that the words of a command line ask for.

    Raises:
        UserError: no such kind of file, or a setting of it or of the experiment is wrong.
        SystemExit: after `--help`.
    """
    kind, *others = words or [""]
    if kind in ("--help", "-h"):
        print(f"{__doc__}\nKinds of files: {', '.join(FILES)}; --help after one lists its settings")
        raise SystemExit(0)
    if kind not in FILES:
        raise UserError(
            f"the first word is the kind of file, one of {', '.join(FILES)}; it is {kind!r}"
        )
    made = FILES[kind]
    own, experiment = _split(made, others)
    file = from_command_line(made(), own, positional="experiment")
    if not file.experiment:
        raise UserError(f"Which experiment? For instance: {kind} experiments.gpt2_124m")
    parse(load_experiment(file.experiment), experiment)
    return file.text(experiment)


def _split(made: type[JobFile], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of the command line that are the file's, and those of the experiment."""
    names = set(fields(made))
    own, others = [], []
    for word in words:
        name, equals, _ = word.partition("=")
        (own if not equals or name in names else others).append(word)
    return own, others


if __name__ == "__main__":
    with exit_on_user_error():
        print(job_file(sys.argv[1:]), end="")
