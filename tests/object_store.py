"""An object store for tests, in a folder that several processes share: less than any real one has.

Whole objects are put and read by name. A new object is listed only by the LATE-th listing, and one
that was deleted still stands in as many. There is no renaming, no appending and no lock, and `mode=
"create"` looks first and writes then, as fsspec does where a file system says nothing of it.
"""

import contextlib
import io
import os
import urllib.parse
from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem

LATE = 4  # listings
FOLDER = "LMJAX_TEST_OBJECTS"  # environment variable: where the objects lie
GONE = ".gone"  # ending of what was deleted and is listed still


class Store(AbstractFileSystem):
    """`late://BUCKET/NAME`."""

    protocol = "late"
    cachable = False

    def __init__(self, **options):
        super().__init__(**options)
        self.folder = Path(os.environ[FOLDER])

    def _file(self, path):
        return self.folder / urllib.parse.quote(self._strip_protocol(path), safe="")

    def info(self, path, **options):
        """By name, where there is one; a folder is a beginning of names that are listed."""
        path = self._strip_protocol(path)
        try:
            stat = self._file(path).stat()
        except FileNotFoundError:
            if any(name.startswith(f"{path}/") for name in self._names(counts=False)):
                return {"name": path, "size": 0, "type": "directory"}
            raise FileNotFoundError(path) from None
        written = f"{stat.st_mtime_ns} {stat.st_ino}"
        return {"name": path, "size": stat.st_size, "type": "file", "written": written}

    def _names(self, counts=True):
        """The names that are listed; each counted listing brings the newest nearer."""
        names = []
        for file in sorted(self.folder.iterdir()):
            seen = file.with_name(f"{file.name.removesuffix(GONE)}.seen")
            if file.name.endswith((".seen", ".partial")):
                continue
            times = int(seen.read_text() or 0) if seen.exists() else 0
            if counts:
                seen.write_text(str(times + 1))
            if file.name.endswith(GONE):
                if times > LATE:
                    file.unlink(missing_ok=True)
                    continue
            elif times < LATE:
                continue
            names.append(urllib.parse.unquote(file.name.removesuffix(GONE)))
        return names

    def ls(self, path, detail=True, **options):
        """The objects and folders just below a path."""
        path = self._strip_protocol(path)
        found = {}
        for name in self._names():
            if not name.startswith(f"{path}/"):
                continue
            first, *rest = name[len(path) + 1 :].split("/")
            if rest:
                entry = {"name": f"{path}/{first}", "size": 0, "type": "directory"}
            else:
                with contextlib.suppress(FileNotFoundError):
                    size = self._file(name).stat().st_size
                entry = {"name": name, "size": size if self._file(name).exists() else 0}
                entry["type"] = "file"
            found[entry["name"]] = entry
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path, mode="rb", **options):
        file = self._file(path)
        if mode == "rb":
            return io.BytesIO(file.read_bytes())
        if mode == "wb":
            return _Put(file)
        raise NotImplementedError(f"an object store has no mode {mode!r}")

    def rm_file(self, path):
        """The object is gone at once, but listed still."""
        file = self._file(path)
        file.replace(f"{file}{GONE}")
        Path(f"{file}.seen").write_text("0")

    def mkdir(self, *arguments, **options):
        """Nothing: there are no folders."""

    makedirs = mkdir

    def mv(self, *arguments, **options):
        """Refused: nothing is renamed in an object store."""
        raise NotImplementedError("an object store renames nothing")

    cp_file = mv_file = rename = mv


class _Put(io.BytesIO):
    """Becomes an object when it is closed, as a whole."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def close(self):
        if not self.closed:
            partial = self.file.with_name(f"{os.getpid()}-{id(self)}.partial")
            partial.write_bytes(self.getvalue())
            if not self.file.exists():
                Path(f"{self.file}.seen").unlink(missing_ok=True)
            partial.replace(self.file)
        super().close()


def objects():
    """The names of all objects, listed or not."""
    files = Path(os.environ[FOLDER]).iterdir()
    return sorted(
        urllib.parse.unquote(file.name)
        for file in files
        if not file.name.endswith((".seen", ".partial", GONE))
    )


fsspec.register_implementation("late", Store, clobber=True)
