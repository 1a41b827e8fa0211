"""Classes that a user declares outside the package: their names, and where they are found again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax.config import UserError
from lmjax.launch import import_modules, user_modules
from lmjax.training.optimizers import AdamW

ROOT = Path(__file__).parents[2]
PROGRAM = '''
from lmjax.config import config, from_json, to_json
from lmjax.launch import import_modules, user_modules
from lmjax.training.optimizers import AdamW as Theirs, Optimizer


@config
class {name}(Theirs):
    """Of the program's own."""


@config
class Work:
    optimizer: tuple[Optimizer, ...] = (Theirs(), {name}(b1=0.5))


if __name__ == "__main__":
    modules = user_modules(Work())
    import_modules(modules)  # declares the same classes once more
    print(*modules, [type(part).__module__ for part in from_json(to_json(Work())).optimizer])
'''


@pytest.fixture
def start(tmp_path):
    """Starts Python in a folder with the program `small`, in which a class has the given name."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def start(name: str, *arguments: str) -> subprocess.CompletedProcess:
        (tmp_path / "small.py").write_text(PROGRAM.format(name=name))
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return start


@pytest.mark.parametrize("arguments", [("-m", "small"), ("small.py",)])
def test_the_program_is_known_by_the_name_of_its_file(start, arguments):
    done = start("Mine", *arguments)
    assert (done.stderr, done.stdout) == ("", "small ['lmjax.training.optimizers', 'small']\n")


@pytest.mark.parametrize("arguments", [("-m", "small"), ("small.py",)])
def test_the_program_takes_no_name_of_the_package(start, arguments):
    """Its run folder would be read as one with the package's class."""
    done = start("AdamW", *arguments)
    assert done.returncode == 1
    assert "the config name 'AdamW' is taken by lmjax.training.optimizers.AdamW" in done.stderr


def test_classes_of_the_package_need_no_import():
    assert user_modules(AdamW()) == ()


def test_a_module_that_is_not_there_is_told_with_the_place():
    with pytest.raises(UserError) as caught:
        import_modules(("nowhere_to_be_found",))
    assert "imports=nowhere_to_be_found: No module named" in str(caught.value)
    assert os.getcwd() in str(caught.value)
