"""Many clients at once, good and bad: does the server answer all, and keep nothing?

python -m benchmarks.serving_load [json=FILE]
python -m benchmarks.serving_load clients=20 seconds=5 warm=3

A server of a tiny model in a process of its own, with few slots and a short queue. Some clients
read slowly, leave in the middle, send what is too large, broken or of a wrong type. No response may
be of status 5xx, each has to be whole and in order, and afterwards no slot, no page, no connection
and no memory may be held. In the end it is killed (kill -9) under load, and started again.
"""

import asyncio
import dataclasses
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, save, table
from benchmarks.serving_clients import Ask, Connection, Load, tasks
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line

KEY = "sk-of-the-load"
NAME = "tiny"
GAUGES = ("waiting", "reading", "writing", "pages")


@config
class ServingLoad:
    """Clients of a server, and for how long they ask."""

    model: str = ""  # folder that is served; empty: a tiny run that is trained for a moment
    clients: int = 200  # at once
    seconds: float = 60.0  # for which they ask
    warm: float = 20.0  # seconds of the same before, in which all shapes are compiled
    slots: int = 8  # of the server
    queue: int = 64  # of the server
    most_bytes: int = 100_000  # of a body that the server takes
    growth: float = 16.0  # MiB by which the memory may grow while they ask
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that test nothing."""
        for name in ("clients", "slots", "queue", "most_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not self.seconds > 0 or not self.warm >= 0:
            raise UserError("seconds= must be above 0, and warm= 0 or more")


def tiny_run(folder: Path) -> str:
    """Trains a tiny model for two steps, and returns its folder."""
    settings = [f"output={folder / NAME}", f"data.cache={folder / 'tokens'}", "steps=2"]
    settings += ["schedule.warmup=0", "checkpoint.every=2"]
    settings += ["evaluation.every=2", "evaluation.prompts=()"]
    command = [sys.executable, "-m", "experiments.debug", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no model to serve:\n{done.stdout}{done.stderr}")
    return str(folder / NAME)


class ServerProcess:
    """A server in a process of its own.

    Attributes:
      address: of it.
      load_seconds: from its start to its first answer.
    """

    def __init__(self, model: str, settings: ServingLoad, folder: Path, port: int | None = None):
        """Starts it, and waits until it answers."""
        self.address = "127.0.0.1", port or _free_port()
        self._said = folder / "said.txt"
        sizes = [f"engine.slots={settings.slots}", f"engine.queue={settings.queue}"]
        sizes += [f"max_bytes={settings.most_bytes}", "max_tokens=100"]
        command = [sys.executable, "-m", "lmjax.serving", model, f"port={self.address[1]}", *sizes]
        begin = time.monotonic()
        with self._said.open("ab") as said:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"LMJAX_API_KEY": KEY},
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise
        self.load_seconds = time.monotonic() - begin

    def _wait(self) -> None:
        for _ in range(3000):
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self._said.read_text()[-2000:]}")
            try:
                ask = Ask("/v1/completions", {"prompt": "a", "max_tokens": 1})
                if asyncio.run(one_reply(self.address, ask)).status == 200:
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("the server does not answer")

    def kill(self) -> None:
        """Kills it (kill -9)."""
        self._process.kill()
        self._process.wait()

    @property
    def running(self) -> bool:
        """Returns whether it runs."""
        return self._process.poll() is None

    def usage(self) -> dict[str, float]:
        """Resident memory in MiB, open files, and threads; what the system does not tell is 0."""
        process = Path(f"/proc/{self._process.pid}")
        if not process.is_dir():
            return {"memory": 0.0, "files": 0, "threads": 0}
        pages = int((process / "statm").read_text().split()[1])
        return {
            "memory": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "files": len(list((process / "fd").iterdir())),
            "threads": len(list((process / "task").iterdir())),
        }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


async def one_reply(address: tuple[str, int], ask: Ask) -> Any:
    """A request and its response."""
    async with Connection(address, KEY) as connection:
        return await connection.ask(ask)


async def metrics(server: ServerProcess) -> dict[str, float]:
    """The server's metrics, by name."""
    reply = await one_reply(server.address, Ask("/metrics"))
    lines = [line for line in reply.body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


async def ask_for(
    server: ServerProcess, settings: ServingLoad, seconds: float
) -> tuple[Load, list[dict[str, float]]]:
    """Has all clients ask for some seconds; what came of it, and the server's usage meanwhile."""
    end = time.monotonic() + seconds
    load = Load(server.address, KEY, settings.most_bytes, end)
    samples, asking = [], asyncio.gather(*tasks(load, settings.clients))
    while not asking.done():
        samples.append(server.usage())
        await asyncio.wait([asking], timeout=seconds / 60)
    await asking
    return load, samples


async def settled(server: ServerProcess, files: int, seconds: float = 30.0) -> dict[str, float]:
    """The metrics, and the usage, once nothing is held, or when the time is over."""
    end = time.monotonic() + seconds
    while True:
        found = await metrics(server)
        state = {name: found[f"lmjax_{name}"] for name in GAUGES} | server.usage()
        held = any(state[name] for name in GAUGES) or state["files"] > files + 2
        if not held or time.monotonic() > end:
            return state
        await asyncio.sleep(0.2)


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """Outcome of a load.

    Attributes:
      counts: responses by kind and status.
      faults: descriptions; none is right.
      numbers: what was measured.
    """

    counts: dict[str, dict[str, int]]
    faults: list[str]
    numbers: dict[str, float]


def put_under_load(settings: ServingLoad, folder: Path) -> LoadResult:
    """Starts a server, has clients ask, looks at what it holds, kills it, and starts it again."""
    model = settings.model or tiny_run(folder)
    server = ServerProcess(model, settings, folder)
    try:
        files = int(server.usage()["files"])
        warm, _ = asyncio.run(ask_for(server, settings, settings.warm))
        before = asyncio.run(settled(server, files))
        load, samples = asyncio.run(ask_for(server, settings, settings.seconds))
        after = asyncio.run(settled(server, files))
        faults = [*warm.faults, *load.faults, *held(before, after, settings.growth)]
        first = server.load_seconds
        lost, again = killed(server, model, settings, folder)
        faults += again
    finally:
        server.kill()
    answered = sum(sum(one.values()) for one in load.counts.values())
    numbers = {
        "requests": answered,
        "requests a second": answered / settings.seconds,
        "median seconds": statistics.median(load.seconds),
        "longest seconds": max(load.seconds),
        "memory before, MiB": before["memory"],
        "highest memory, MiB": max(one["memory"] for one in samples),
        "memory after, MiB": after["memory"],
        "most open files": max(one["files"] for one in samples),
        "open files after": after["files"],
        "pages held after": after["pages"],
        "seconds to load": first,
        "seconds to load after kill -9": lost,
    }
    return LoadResult(load.counts, faults, numbers)


def held(before: dict[str, float], after: dict[str, float], growth: float) -> list[str]:
    """Descriptions of what a server still holds after a load."""
    found = [f"{name}: {after[name]:.0f} are held" for name in GAUGES if after[name]]
    if after["files"] > before["files"] + 2:
        found.append(f"open files: {after['files']}, before {before['files']}")
    if after["memory"] > before["memory"] + growth:
        found.append(f"memory: {before['memory']:.0f} MiB before, {after['memory']:.0f} after")
    return found


def killed(
    server: ServerProcess, model: str, settings: ServingLoad, folder: Path
) -> tuple[float, list[str]]:
    """Kills a server that has requests, and starts it again on its port.

    Returns:
      Seconds until it answers again, and descriptions of faults.
    """
    if not server.running:
        return 0.0, ["the server has ended"]

    async def kill() -> None:
        body = {"prompt": "a", "max_tokens": 90, "stream": True, "n": 4}
        async with Connection(server.address, KEY) as connection:
            await connection.send(Ask("/v1/completions", body))
            await connection.receive()
            server.kill()

    asyncio.run(kill())
    again = ServerProcess(model, settings, folder, server.address[1])
    again.kill()
    allowed = 1.5 * server.load_seconds + 5.0  # the machine may be busier than before
    if again.load_seconds <= allowed:
        return again.load_seconds, []
    text = (
        f"{again.load_seconds:.1f} s until it answers again, {server.load_seconds:.1f} s at first"
    )
    return again.load_seconds, [text]


def shown(result: LoadResult) -> str:
    """The result as tables."""
    statuses = sorted({status for one in result.counts.values() for status in one})
    rows = [
        [kind, *(one.get(status, 0) for status in statuses)]
        for kind, one in sorted(result.counts.items())
    ]
    parts = [table(["kind", *statuses], rows), table(["", "number"], _rows(result.numbers))]
    faults = result.faults[:20] or ["No fault: all answered or refused, and nothing is held."]
    return "\n\n".join([*parts, "\n".join(faults)])


def _rows(numbers: dict[str, float]) -> Sequence[Sequence[Any]]:
    return [[name, float(number)] for name, number in numbers.items()]


def main() -> None:
    """Runs, and prints what came of it."""
    settings = from_command_line(ServingLoad())
    with tempfile.TemporaryDirectory() as folder:
        result = put_under_load(settings, Path(folder))
    print(shown(result))
    save(settings.json, "serving_load", **dataclasses.asdict(result))
    if result.faults:
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
