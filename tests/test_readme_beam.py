"""The guide's commands for runners of Apache Beam: the shell, our settings and Beam take them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax.config import parse

GUIDE = (Path(__file__).parents[1] / "lmjax" / "data" / "README.md").read_text("utf-8")
RUNNERS = ("FnApiRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")
SHOW = "import json, sys; print(json.dumps(sys.argv[1:]))"


@pytest.fixture(scope="module")
def cleanings():
    """The experiment of each command, by its runner, as the shell gives it its arguments."""
    from experiments.data.fineweb_beam import experiment

    before, name, after = GUIDE.partition("experiments.data.fineweb_beam")
    script = before.rpartition("```\n")[2] + name + after.partition("```")[0]
    script = script.replace("gs://", "memory://")  # which needs no further package
    script = f'python() {{ "{sys.executable}" -c \'{SHOW}\' "$@"; }}\n{script}'
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True)
    commands = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one[:2] for one in commands] == [["-m", "experiments.data.fineweb_beam"]] * 4
    found = [parse(experiment, one[2:]) for one in commands]
    return {one.runner: one for one in found}


def test_commands_are_settings(cleanings):
    """A runner on other machines gets options, and reads and writes what they all see."""
    assert tuple(cleanings) == RUNNERS
    for cleaning in list(cleanings.values())[1:]:
        assert cleaning.options and all(one.startswith("--") for one in cleaning.options)
        for path in (cleaning.storage, *cleaning.sources[0].source.path):
            assert path.startswith("memory://BUCKET/")


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_option_is_one_of_beam_s(cleanings, runner):
    """Under its whole name: Beam ignores what it does not know, with no more than a warning."""
    reason = "apache-beam is not installed: pip install 'lmjax[beam]'"
    pytest.importorskip("apache_beam", reason=reason)
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    assert runner in StandardOptions.KNOWN_RUNNER_NAMES
    options = cleanings[runner].options
    shown = dict(one.removeprefix("--").split("=", 1) for one in options)
    known = PipelineOptions([*options, "--no_such_option=1"]).get_all_options(drop_default=True)
    assert {name: str(value) for name, value in known.items()} == shown
