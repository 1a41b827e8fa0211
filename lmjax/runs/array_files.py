"""The arrays of a checkpoint on disk, as Orbax writes and reads them."""

import collections
import contextlib
import json
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

LONGEST = 300  # characters of an error that are told


class NotWritten(Exception):
    """An array that Orbax could not write, or has left out silently."""


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    """Makes NotWritten of what Orbax and TensorStore say of files: mostly it is a ValueError."""
    try:
        yield
    except (OSError, NotWritten):
        raise
    except (ValueError, RuntimeError) as error:
        line = str(error).partition("\n")[0]
        raise NotWritten(f"{type(error).__name__}: {line[:LONGEST]}") from error


class ArrayWriter:
    """Writes arrays into folders, one after another, while other things go on."""

    def __init__(self, apart: bool = False) -> None:
        """`apart`: each process has a folder of its own, and writes its pieces as files there."""
        orbax = _orbax()
        hosts = orbax.options.MultiprocessingOptions(primary_host=None if apart else 0)
        # Compressing random bits takes ten times as long as writing them and gains 7 percent.
        handler = orbax.PyTreeCheckpointHandler(
            use_compression=False, use_ocdbt=not apart, multiprocessing_options=hosts
        )
        # Folders that are made in the background are waited for, for 20 minutes, by threads that
        # outlive a save which failed.
        options = orbax.options.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = orbax.AsyncCheckpointer(
            handler, async_options=options, multiprocessing_options=hosts
        )

    def begin(self, folder: Path, arrays: Mapping[str, jax.Array]) -> None:
        """Begins to write into a folder that is not there yet; the arrays may then be donated.

        Raises:
          OSError, NotWritten: it went wrong.
        """
        with _failures_named():
            begun = self._orbax.save(folder, args=_orbax().args.PyTreeSave(dict(arrays)))
        if begun is False:  # how some of its classes refuse
            raise NotWritten(f"Orbax did not begin to write {folder}")

    def wait(self) -> None:
        """Returns when everything is written; raises what `begin` raises."""
        with _failures_named():
            self._orbax.wait_until_finished()

    def close(self) -> None:
        """Lets go of Orbax's threads."""
        self._orbax.close()


def read_arrays(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays of a folder that are wanted, cut over the devices as their shardings say.

    Orbax casts what is there to the type that is wanted without a word: compare them before.
    """
    orbax = _orbax()
    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            folder,
            args=orbax.args.PyTreeRestore(
                item=dict(wanted),
                restore_args=orbax.checkpoint_utils.construct_restore_args(dict(wanted)),
                partial_restore=True,
            ),
        )


@_failures_named()
def check_written(folder: Path, names: Collection[str]) -> None:
    """Raises NotWritten where not every piece of these arrays is in what Orbax has written.

    It joins the files of all processes. A folder of theirs that it does not see, because it has
    gone or because the disk is slow to show it, it leaves out silently.
    """
    import tensorstore

    base = {"driver": "file", "path": f"{folder}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    head = "/.zarray"
    keys = [key.decode() for key in store.list().result()]
    found = collections.Counter(key.rpartition("/")[0] for key in keys if not key.endswith(head))
    heads = {name: store.read(name + head) for name in names}
    for name, reading in heads.items():
        text = reading.result()
        if text.state == "missing":
            raise NotWritten(f"{name} is missing in what was written")
        shape, piece = (json.loads(text.value)[field] for field in ("shape", "chunks"))
        _check_count(name, found[name], shape, piece)


@_failures_named()
def check_pieces(folder: Path, elsewhere: Collection[str], names: Collection[str]) -> None:
    """Like `check_written`, of arrays whose pieces are files apart.

    Args:
      folder: what this process has written.
      elsewhere: files that others have, by their names in the folder.
      names: of the arrays.
    """
    for name in names:
        if not (folder / name / ".zarray").is_file():
            raise NotWritten(f"{name} is missing in what was written")
        about = json.loads((folder / name / ".zarray").read_text("utf-8"))
        here = {path.name for path in (folder / name).iterdir() if path.name != ".zarray"}
        there = {file.rpartition("/")[2] for file in elsewhere if file.startswith(f"{name}/")}
        _check_count(name, len(here | there), about["shape"], about["chunks"])


def _check_count(name: str, found: int, shape: list[int], piece: list[int]) -> None:
    wanted = math.prod(-(-size // part) for size, part in zip(shape, piece, strict=True))
    if found < wanted:
        raise NotWritten(f"{wanted - found} of {wanted} pieces of {name} are missing")


def _orbax() -> ModuleType:
    """Orbax, imported where it is needed, and quiet: what goes wrong is said by the exception."""
    import orbax.checkpoint

    for name, wanted in (("absl", _not_of_orbax), ("asyncio", _not_left_behind)):
        logger = logging.getLogger(name)
        if wanted not in logger.filters:
            logger.addFilter(wanted)
    warnings.filterwarnings("ignore", "coroutine '.*write_fragment' was never awaited")
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)
    return orbax.checkpoint


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _not_left_behind(record: logging.LogRecord) -> bool:
    """Returns whether it is none of the many errors of one save, of which Orbax raises the first."""
    words = record.getMessage()
    if "never retrieved" not in words:
        return True
    words += "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
    return not ("orbax" in words or "tensorstore" in words)


class _Hook:
    """Keeps off the screen what C++ tells an event loop of Orbax's that a failed save has closed.

    A callback from C++ has no caller in Python, so its traceback begins inside asyncio.
    """

    def __init__(self, before: Callable[[Any], None]) -> None:
        self.before = before

    def __call__(self, found: Any) -> None:
        began = found.exc_traceback
        first = began and began.tb_frame.f_globals.get("__name__")
        if first != "asyncio.base_events" or str(found.exc_value) != "Event loop is closed":
            self.before(found)
