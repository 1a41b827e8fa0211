"""Checkpoints: exact on any mesh, safe from kill -9, damage and full disks; clear messages."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lmjax
from lmjax.config import UserError
from lmjax.training import array_files, checkpoints, manifest
from lmjax.training.checkpoints import ARRAYS, SAVING, Checkpointer
from lmjax.training.environment import compare_environment, describe_environment

SHARDINGS = {"weight": P("fsdp", "tensor"), "scale": P(None)}


def make(seed=0.0):
    """A small training state whose numbers follow from `seed`."""
    params = {
        "blocks": {"weight": jnp.arange(32.0).reshape(8, 4) + seed, "scale": jnp.ones(3) * seed}
    }
    return {
        "params": params,
        "optimizer": optax.adam(0.1).init(params),
        "average": None,
        "step": jnp.int32(seed),
        "key": jax.random.key(int(seed)),
    }


def assert_equal(first, second):
    """Bit by bit, keys among them."""

    def compare(a, b):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(compare, first, second)


@pytest.fixture
def warnings():
    """What a checkpointer has to say."""
    return []


@pytest.fixture
def saved(tmp_path, warnings):
    """A folder with checkpoints of the steps 1, 2 and 3."""
    checkpointer = Checkpointer(tmp_path, warn=warnings.append)
    for step in (1, 2, 3):
        checkpointer.save(step, make(step), {"row": 10 * step})
    checkpointer.close()
    return checkpointer


def largest_file(folder):
    """The file with the arrays in it."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_no_checkpoint_is_none(tmp_path):
    checkpointer = Checkpointer(tmp_path / "absent")
    assert checkpointer.steps() == [] and checkpointer.latest() is None
    assert checkpointer.restore(None, make()) is None
    assert not (tmp_path / "absent").exists()


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


def mesh_of(*sizes):
    return jax.make_mesh(
        sizes,
        ("fsdp", "tensor"),
        axis_types=(AxisType.Explicit,) * 2,
        devices=jax.devices()[: int(np.prod(sizes))],
    )


def place(tree):
    """On the mesh that is set: matrices cut over both axes, all else on every device."""

    def one(path, leaf):
        spec = SHARDINGS.get(jax.tree_util.keystr(path[-1:], simple=True), P())
        return jax.reshard(leaf, spec)

    return jax.jit(lambda tree: jax.tree.map_with_path(one, tree))(tree)


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


def test_a_disk_without_room_leaves_nothing_behind(saved, monkeypatch, capfd):
    usage = shutil.disk_usage(saved.folder)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"full(.|\n)*step 4(.|\n)*complete: 1, 2, 3"):
            saved.save(4, make(4), {})
    assert sorted(p.name for p in saved.folder.iterdir()) == ["1", "2", "3"]
    assert_equal(saved.restore(None, make())[0], make(3))
    saved.save(4, make(4), {})
    saved.close()
    assert saved.latest() == 4
    assert capfd.readouterr().err == ""


def test_a_disk_that_fills_up_while_the_checkpoint_is_written(saved, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        saved.save(4, make(4), {})  # goes wrong in the background
        with pytest.raises(UserError, match="is full"):
            saved.wait()
    assert sorted(p.name for p in saved.folder.iterdir()) == ["1", "2", "3"]
    saved.save(4, make(4), {})
    saved.close()
    assert_equal(saved.restore(None, make())[0], make(4))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_goes_on(checkpointer, step):
    """What was saved before is whole, and saving works again."""
    assert checkpointer.latest() == step
    assert_equal(checkpointer.restore(None, make())[0], make(step))
    checkpointer.save(step + 1, make(step + 1), {})
    checkpointer.close()
    assert checkpointer.latest() == step + 1


def test_a_folder_that_was_moved_away_and_is_a_link_to_nothing(saved, tmp_path):
    """The disk behind the link is not there: neither an empty folder nor one to write in."""
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(elsewhere)
    saved.folder.symlink_to("/mnt/not mounted/checkpoints")
    for call in (saved.steps, saved.latest, saved.check_place, lambda: saved.restore(None, make())):
        with pytest.raises(UserError, match="is a link to /mnt/not mounted/checkpoints, which is"):
            call()
    with pytest.raises(UserError, match=r"step 4 could not be written(.|\n)*not mounted"):
        saved.save(4, make(4), {})
    saved.folder.unlink()
    elsewhere.rename(tmp_path)
    assert_goes_on(saved, 3)


def test_a_folder_that_goes_while_it_is_written(saved, tmp_path, monkeypatch):
    write = manifest.write

    def vanishing(folder, arrays, extra):
        shutil.rmtree(folder)
        write(folder, arrays, extra)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", vanishing)
        saved.save(4, make(4), {})
        with pytest.raises(UserError, match=r"step 4 could not be written(.|\n)*complete: 1, 2, 3"):
            saved.wait()
    assert_goes_on(saved, 3)


@pytest.mark.parametrize("place", ["file", "below a file", "no permission"])
def test_a_place_where_nothing_can_be_written_is_told_before_training(tmp_path, place):
    (tmp_path / "file").touch()
    folder = {"file": "file", "below a file": "file/x", "no permission": "/proc/checkpoints"}[place]
    checkpointer = Checkpointer(tmp_path / folder)
    with pytest.raises(UserError, match="no checkpoint can be saved in"):
        checkpointer.check_place()
    with pytest.raises(UserError, match="step 1 could not be written"):
        checkpointer.save(1, make(), {})


def test_a_good_place_is_left_as_it_was(saved):
    saved.check_place()
    assert names(saved.folder) == ["1", "2", "3"]


def test_a_disk_that_is_really_full(tmp_path):
    """Its bytes would do for the arrays, but it has no room for so many files."""
    mounted = tmp_path.with_name(f"{tmp_path.name}-small")
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=12", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        for asynchronous in (True, False):
            checkpointer = Checkpointer(mounted / "run", asynchronous=asynchronous)
            with pytest.raises(UserError, match=r"is full(.|\n)*complete: none"):
                checkpointer.save(1, make(), {})
                checkpointer.wait()
            assert checkpointer.steps() == []
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_failure_in_the_background_is_known_without_waiting(saved, monkeypatch):
    release = threading.Event()

    def failing(*arguments):
        release.wait(10)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "write", failing)
    saved.save(4, make(4), {})
    saved.check()  # is going on: nothing to say
    release.set()
    while saved._failure is None:
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"could not be written in .* \(Input/output error\)"):
        saved.check()
    saved.check()  # it has been said
    monkeypatch.undo()
    assert_goes_on(saved, 3)


def test_an_error_that_is_no_disks_keeps_its_class_and_says_what_is_left(saved, monkeypatch):
    def wrong(*arguments):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(manifest, "write", wrong)
    with pytest.raises(KeyError) as raised:
        saved.save(4, make(4), {})
        saved.wait()
    assert any("complete: 1, 2, 3" in note for note in raised.value.__notes__)
    assert raised.value.__cause__ is not raised.value


def test_a_save_that_takes_long_is_told(saved, warnings, monkeypatch):
    monkeypatch.setattr(checkpoints, "PATIENCE", 0.05)
    write = manifest.write

    def slow(*arguments):
        time.sleep(0.5)
        write(*arguments)

    monkeypatch.setattr(manifest, "write", slow)
    saved.save(4, make(4), {})
    saved.wait()
    assert 1 <= len(warnings) <= 4  # after 0.05, 0.15, 0.35 seconds, and not for ever
    assert all("saving step 4" in words and str(saved.folder) in words for words in warnings)
    assert saved.latest() == 4


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failure(tmp_path, warnings, monkeypatch):
    remove = shutil.rmtree

    def stuck(path, *arguments, **settings):
        if ".removing" in str(path):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        remove(path, *arguments, **settings)

    with Checkpointer(tmp_path, keep=1, warn=warnings.append) as checkpointer:
        checkpointer.save(1, make(1), {})
        checkpointer.wait()
        monkeypatch.setattr(shutil, "rmtree", stuck)
        checkpointer.save(2, make(2), {})
        checkpointer.wait()
        assert checkpointer.steps() == [2] and "busy" in warnings[0]
        monkeypatch.undo()
        checkpointer.save(3, make(3), {})
    assert names(tmp_path) == ["3"]


def test_what_orbax_leaves_out_is_no_checkpoint(saved, monkeypatch):
    """Where it does not see the folder of a process, it joins nothing and says nothing."""
    end = array_files.ArrayWriter.wait

    def losing(writer):
        end(writer)
        arrays = saved.folder / f"{SAVING}4" / ARRAYS
        (arrays / "manifest.ocdbt").unlink()

    monkeypatch.setattr(array_files.ArrayWriter, "wait", losing)
    with pytest.raises(UserError, match=r"step 4 could not be written .*is missing in what was"):
        saved.save(4, make(4), {})
        saved.wait()
    monkeypatch.undo()
    assert_goes_on(saved, 3)


def test_every_piece_of_every_array_is_looked_for(tmp_path):
    with jax.set_mesh(mesh_of(4, 2)), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, place(make(1)), {})
        checkpointer.wait()
        folder = tmp_path / "1" / ARRAYS
        body = manifest.read(tmp_path / "1")
        array_files.check_written(folder, body["arrays"])
        base = {"driver": "file", "path": f"{folder}/"}
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        name = "params.blocks.weight"
        assert len([key for key in store.list().result() if key.startswith(name.encode())]) == 9
        store.write(f"{name}/3.1", None).result()
        with pytest.raises(array_files.NotWritten, match=f"1 of 8 pieces of {name} are missing"):
            array_files.check_written(folder, body["arrays"])


def test_a_save_that_orbax_does_not_begin_is_a_failure(saved, monkeypatch):
    monkeypatch.setattr("orbax.checkpoint.AsyncCheckpointer.save", lambda *args, **settings: False)
    with pytest.raises(UserError, match=r"step 4 could not be written .*did not begin"):
        saved.save(4, make(4), {})
    monkeypatch.undo()
    assert_goes_on(saved, 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "bool", "int4"])
def test_another_type_is_refused_though_orbax_would_cast_it(saved, dtype):
    other = make(3)
    blocks = other["params"]["blocks"]
    blocks["weight"] = jnp.zeros((8, 4), dtype)
    line = rf"params\.blocks\.weight: float32\[8, 4\] in the checkpoint, {dtype}\[8, 4\] in the"
    with pytest.raises(UserError, match=line):
        saved.restore(None, other)
    # What it is that is guarded against.
    array = jax.ShapeDtypeStruct((8, 4), jnp.dtype(dtype), sharding=blocks["weight"].sharding)
    name = "params.blocks.weight"
    cast = array_files.read_arrays(saved.folder / "3" / ARRAYS, {name: array})
    assert cast[name].dtype == dtype


@pytest.mark.parametrize("change", ["more", "fewer", "shape", "key"])
def test_other_arrays_are_refused(saved, change):
    other = make(3)
    blocks = other["params"]["blocks"]
    if change == "more":
        blocks["gate"] = jnp.ones(3)
    elif change == "fewer":
        del blocks["scale"]
    elif change == "shape":
        blocks["scale"] = jnp.ones((3, 1))
    else:
        other["key"] = jnp.zeros(2, jnp.uint32)
    with pytest.raises(UserError, match="another model or optimizer"):
        saved.restore(None, other)


def test_a_file_that_cannot_be_read_is_a_damage(saved, warnings, monkeypatch):
    path_open, largest = Path.open, largest_file(saved.folder / "3")

    def unreadable(path, *arguments, **settings):
        if path == largest and "rb" in arguments:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return path_open(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", unreadable)
    assert_equal(saved.restore(None, make())[0], make(2))
    assert "cannot be read: Input/output error" in warnings[0]


CHILD = """
import os, signal, sys, threading
import jax.numpy as jnp
from pathlib import Path
from lmjax.training import manifest
from lmjax.training.checkpoints import Checkpointer

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
