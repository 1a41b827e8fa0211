"""Saves that fail, for whatever reason: they are told, and what was saved before goes on."""

import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tensorstore

from lmjax.config import UserError
from lmjax.runs import array_files, checkpoints, manifest
from lmjax.runs.checkpoint_folder import SAVING
from lmjax.runs.checkpoints import ARRAYS, Checkpointer
from lmjax.training.interruption import Interruption
from tests.lmjax.runs.small_states import assert_equal, largest_file, make, mesh_of, place


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
    restore = lambda: saved.restore(None, make())  # noqa: E731
    for call in (saved.steps, saved.latest, saved.check_folder, restore):
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
        checkpointer.check_folder()
    with pytest.raises(UserError, match="step 1 could not be written"):
        checkpointer.save(1, make(), {})


def test_a_good_place_is_left_as_it_was(saved):
    saved.check_folder()
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


def test_ctrl_c_while_a_slow_save_is_waited_for(saved, monkeypatch):
    """It is a wish to stop, as everywhere in the loop: the checkpoint is completed."""
    write = manifest.write

    def slow(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(manifest, "write", slow)
    with Interruption() as interruption:
        saved.save(4, make(4), {})
        saved.wait()
    assert interruption.signal == signal.SIGINT and saved.latest() == 4


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
