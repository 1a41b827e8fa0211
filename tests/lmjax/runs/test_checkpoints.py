"""Checkpoints: exact on any mesh, safe from kill -9, damage and full disks; clear messages."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.config import UserError
from lmjax.runs import manifest
from lmjax.runs.checkpoints import ARRAYS, Checkpointer
from lmjax.runs.environment import compare_environment, describe_environment
from tests.lmjax.runs.small_states import assert_equal, largest_file, make, mesh_of, place


def test_no_checkpoint_is_none(tmp_path):
    checkpointer = Checkpointer(tmp_path / "absent")
    assert checkpointer.steps() == [] and checkpointer.latest() is None
    assert checkpointer.restore(None, make()) is None
    assert not (tmp_path / "absent").exists()


def test_names_that_are_no_steps_are_nothing(saved, tmp_path):
    for name in ("\u00b2", "\u0663", "x", "4.tmp", ".5"):
        (tmp_path / name).mkdir()
    assert saved.steps() == [1, 2, 3] and saved.latest() == 3


def test_comes_back_bit_for_bit_with_what_lay_beside_it(saved, warnings):
    assert saved.steps() == [1, 2, 3] and saved.latest() == 3
    tree, extra = saved.restore(None, make())
    assert_equal(tree, make(3))
    assert jax.tree.structure(tree) == jax.tree.structure(make())
    assert extra == {"row": 30, "step": 3}
    tree, extra = saved.restore(2, make())
    assert_equal(tree, make(2))
    assert extra["row"] == 20 and warnings == []


def test_parts_can_be_read_alone(saved):
    tree, _ = saved.restore(None, {"params": make()["params"]})
    assert_equal(tree, {"params": make(3)["params"]})


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    """Buffers are overwritten at once; the checkpoint must hold what was in them."""
    overwrite = jax.jit(lambda a: a * 0 - 1, donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(4):
            array = jnp.full((512, 512), step, jnp.float32)
            checkpointer.save(step, {"array": array}, {})
            overwrite(array).block_until_ready()
        for step in range(1, 4):
            tree, _ = checkpointer.restore(step, {"array": jnp.zeros((512, 512))})
            assert (np.asarray(tree["array"]) == step).all()


def test_restores_onto_any_mesh_from_traced_shapes(tmp_path):
    with jax.set_mesh(mesh_of(4, 2)), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, place(make(5)), {})
    for sizes in ((4, 2), (2, 1), (1, 1)):
        with jax.set_mesh(mesh_of(*sizes)):
            abstract = jax.eval_shape(lambda: place(make()))  # shardings on an abstract mesh
            tree, _ = Checkpointer(tmp_path).restore(None, abstract)
            assert_equal(tree, make(5))
            weight = tree["params"]["blocks"]["weight"]
            assert len(weight.devices()) == np.prod(sizes)
            assert jax.tree.map(jax.typeof, tree) == jax.tree.map(jax.typeof, place(make()))


def test_keeps_the_newest_and_the_milestones(tmp_path):
    with Checkpointer(tmp_path, keep=2, keep_every=4) as checkpointer:
        for step in range(1, 10):
            checkpointer.save(step, {"x": jnp.ones(2)}, {})
    assert checkpointer.steps() == [4, 8, 9]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "8", "9"]


def test_a_step_can_be_saved_again(saved):
    saved.save(3, make(7), {"row": 7})
    tree, extra = saved.restore(3, make())
    assert_equal(tree, make(7))
    assert extra["row"] == 7 and saved.steps() == [1, 2, 3]
    saved.close()


def truncate(folder):
    path = largest_file(folder)
    os.truncate(path, path.stat().st_size // 2)


def flip(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_file(folder):
    largest_file(folder).unlink()


def lose_manifest(folder):
    (folder / manifest.NAME).unlink()


def cut_manifest(folder):
    path = folder / manifest.NAME
    os.truncate(path, path.stat().st_size - 20)


def change_manifest(folder):
    path = folder / manifest.NAME
    path.write_text(path.read_text().replace('"row": 30', '"row": 31'))


@pytest.mark.parametrize(
    "damage, says",
    [
        (truncate, "bytes instead of"),
        (flip, "has changed"),
        (lose_file, "is missing"),
        (lose_manifest, "manifest.json is missing"),
        (cut_manifest, "cut short or changed"),
        (change_manifest, "cut short or changed"),
    ],
)
def test_damage_is_found_said_and_passed_over(saved, warnings, capfd, damage, says):
    damage(saved.folder / "3")
    tree, extra = saved.restore(None, make())
    assert_equal(tree, make(2))
    assert extra["row"] == 20
    assert len(warnings) == 1 and says in warnings[0] and "step 2" in warnings[0]
    with pytest.raises(UserError, match=says):
        saved.restore(3, make())
    assert capfd.readouterr() == ("", "")


def test_when_all_are_damaged_nothing_is_made_up(saved):
    for step in (1, 2, 3):
        flip(saved.folder / str(step))
    with pytest.raises(UserError, match=r"No checkpoint can be restored(.|\n)*3(.|\n)*2(.|\n)*1"):
        saved.restore(None, make())


def test_a_checkpoint_of_another_model_is_told_apart(saved, capfd):
    other = make()
    other["params"]["blocks"] = {"weight": jnp.ones((8, 6)), "bias": jnp.ones(3)}
    with pytest.raises(UserError) as error:
        saved.restore(None, other)
    message = str(error.value)
    assert "another model" in message and str(saved.folder / "3") in message
    for line in (
        "params.blocks.bias: nothing in the checkpoint, float32[3] in the model",
        "params.blocks.scale: float32[3] in the checkpoint, nothing in the model",
        "params.blocks.weight: float32[8, 4] in the checkpoint, float32[8, 6] in the model",
    ):
        assert line in message
    many = {"params": {str(i): jnp.ones(1) for i in range(40)}}
    with pytest.raises(UserError, match="and 32 more") as error:
        saved.restore(None, many)
    assert len(str(error.value).splitlines()) == 12
    assert capfd.readouterr().err == ""


def test_a_step_that_is_not_there(saved):
    with pytest.raises(UserError, match="no checkpoint of step 9, but 1, 2, 3"):
        saved.restore(9, make())


CHILD = """
import os, signal, sys, threading
import jax.numpy as jnp
from pathlib import Path
from lmjax.runs import manifest
from lmjax.runs.checkpoints import Checkpointer

moment, folder = sys.argv[1:]
die = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
checkpointer = Checkpointer(folder, keep=2)
for step in (1, 2, 3):
    checkpointer.save(step, {"x": jnp.full((1000, 1000), step, jnp.float32)}, {})
checkpointer.wait()
if moment == "before the manifest":
    manifest.write = die
elif moment == "while an old one is removed":
    import shutil
    shutil.rmtree = die
checkpointer.save(4, {"x": jnp.full((1000, 1000), 4, jnp.float32)}, {})
if moment == "while arrays are written":
    die()
checkpointer.close()
"""


@pytest.mark.parametrize(
    "moment, newest",
    [
        ("while arrays are written", 3),
        ("before the manifest", 3),
        ("while an old one is removed", 4),
    ],
)
def test_kill_9(tmp_path, warnings, moment, newest):
    child = subprocess.run(
        [sys.executable, "-c", CHILD, moment, str(tmp_path)],
        cwd=Path(lmjax.__file__).parents[1],
        capture_output=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    checkpointer = Checkpointer(tmp_path, keep=2, warn=warnings.append)
    abstract = {"x": jnp.zeros((1000, 1000))}
    tree, extra = checkpointer.restore(None, abstract)
    assert extra["step"] == newest == checkpointer.latest()
    assert (np.asarray(tree["x"]) == newest).all()
    for step in (4, 5):
        checkpointer.save(step, tree, {})
    checkpointer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]
    assert warnings == []


def test_the_manifest_names_everything(saved):
    folder = saved.folder / "3"
    body = json.loads((folder / manifest.NAME).read_text())["body"]
    assert body["arrays"]["params.blocks.weight"] == [[8, 4], "float32"]
    assert body["arrays"]["key"] == [[], "key<fry>"]
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert set(body["files"]) == files - {manifest.NAME}
    assert any(name.startswith(ARRAYS) for name in files)


def test_what_makes_bits_differ_is_recorded_and_said():
    with jax.set_mesh(mesh_of(4, 2)):
        saved = json.loads(json.dumps(describe_environment()))
        assert saved["mesh"] == {"fsdp": 4, "tensor": 2} and saved["cores"] >= 1
        assert compare_environment(saved) == []
        lines = compare_environment({**saved, "cores": 999, "jax": "0.0.1"})
    assert lines[0].startswith("cores: 999 before, ") and lines[1].startswith("jax: 0.0.1 before")
    assert any(line.startswith("mesh") for line in compare_environment(saved))
