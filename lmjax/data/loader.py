"""Batches by step: read, prepared and handed over in the background, the same on any machine."""

import dataclasses
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from lmjax.config import UserError
from lmjax.data.mixture import Mixture
from lmjax.data.permutation import random_bits
from lmjax.data.plan import Plan

Batch = TypeVar("Batch")
Prepare = Callable[
    ..., Batch
]  # of tokens, segment ids and seeds, and `spans` and `labels` where it reads them
STEPS = 1 << 40  # more than anybody trains; grain wants a length
SEEDS = 1 << 32  # sets the seeds of rows apart from those of the mixture's sources


@dataclasses.dataclass(frozen=True)
class Loader(Generic[Batch]):
    """Makes the batch of any step, and walks over steps with the work done in the background.

    A batch is a pure function of the plan, the mixture and the step: where iteration began, how
    many workers there are and what they did before make no difference. Hosts take their share of
    each batch's rows, in order.

    Attributes:
      plan: which rows a step takes.
      mixture: what the rows are.
      prepare: tokens, segment ids and a seed for each row -> a batch of numpy arrays; given by the
        objective. Every random choice in it must come from the seeds.
      host_index, host_count: which share of the rows is made here.
      workers: processes that make batches; 0 is a thread of this process.
      prefetch: batches that each worker makes in advance.
      spans: whether `prepare` gets `spans`, too: the answers and turns of the rows (`RowSpans`).
      labels: whether `prepare` gets `labels`, too: those of the rows' documents.
    """

    plan: Plan
    mixture: Mixture
    prepare: Prepare
    host_index: int = 0
    host_count: int = 1
    workers: int = 0
    prefetch: int = 2
    spans: bool = False
    labels: bool = False

    def batch(self, step: int) -> Batch:
        """This host's share of the batch of a step."""
        rows = self.plan.rows(step)
        self._check(len(rows))
        share = len(rows) // self.host_count
        rows = rows[self.host_index * share : (self.host_index + 1) * share]
        tokens, segments = self.mixture.read(rows, self.plan.seed)
        further = {
            name: getattr(self.mixture, name)(rows, self.plan.seed)
            for name in ("spans", "labels")
            if getattr(self, name)
        }
        return self.prepare(tokens, segments, random_bits(self.plan.seed, SEEDS, rows), **further)

    def iterate(self, first_step: int = 0) -> "Batches[Batch]":
        """Steps from `first_step` on, without end, each with its batch. Close it after use.

        Raises:
          UserError: a batch that is to come does not divide among the hosts.
        """
        self._check(self.plan.batch_size(first_step))
        for row in self.plan.table:
            if row.first_step > first_step:
                self._check(row.batch_size)
        return Batches(self, first_step)

    def _check(self, rows: int) -> None:
        if rows % self.host_count:
            raise UserError(
                f"a batch of {rows} rows does not divide among {self.host_count} hosts; choose a "
                "multiple"
            )


class Batches(Generic[Batch]):
    """An endless iterator of (step, batch); a context manager that ends the work behind it.

    What goes wrong in the background is raised by `next`.
    """

    def __init__(self, loader: Loader[Batch], first_step: int):
        begin = _in_processes if loader.workers else _in_thread
        self._next, close = begin(loader, first_step)
        # Also runs when the iterator is forgotten, and at the end of the program.
        self._close = weakref.finalize(self, close)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if not self._close.alive:
            raise StopIteration
        try:
            return self._next()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Batches[Batch]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends threads and processes. May be called again."""
        self._close()


def _in_thread(
    loader: Loader[Batch], first_step: int
) -> tuple[Callable[[], tuple[int, Batch]], Callable[[], None]]:
    """`next` and `close` over a thread of this process."""
    made: queue.Queue[tuple[int, Batch] | BaseException] = queue.Queue(loader.prefetch)
    stopping = threading.Event()

    def work() -> None:
        step = first_step
        try:
            while not stopping.is_set():
                made.put((step, loader.batch(step)))
                step += 1
        except BaseException as error:
            made.put(error)

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()

    def following() -> tuple[int, Batch]:
        result = made.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def close() -> None:
        stopping.set()
        while thread.is_alive():  # it may be waiting for room
            while not made.empty():
                made.get()
            thread.join(0.01)

    return following, close


def _in_processes(
    loader: Loader[Batch], first_step: int
) -> tuple[Callable[[], tuple[int, Batch]], Callable[[], None]]:
    """`next` and `close` over grain's worker processes."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain hands the flags on to its workers
        flags.FLAGS.mark_as_parsed()
    steps = grain.MapDataset.source(_Steps(loader))[first_step:]
    # One thread a worker and nothing in its own buffer: the queue between processes is the buffer.
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    workers = grain.MultiprocessingOptions(loader.workers, per_worker_buffer_size=loader.prefetch)
    iterators = [iter(steps.to_iter_dataset(reading).mp_prefetch(workers))]

    def following() -> tuple[int, Batch]:
        made = next(iterators[0])
        return made.step, made.batch

    def close() -> None:
        if iterators:
            iterators.pop().close()  # forgotten too: grain complains about those that outlive it

    return following, close


class _Steps(Generic[Batch]):
    """A loader as grain's random-access source."""

    def __init__(self, loader: Loader[Batch]):
        self._loader = loader

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> "_Made[Batch]":
        batch = self._loader.batch(step)
        if type(batch).__module__ == "__main__":
            raise TypeError(
                f"{type(batch).__name__} is declared in the script itself, so a worker cannot send "
                "one; move it into a module, or set workers=0"
            )
        return _Made(step, batch)

    def __repr__(self) -> str:  # grain compares sources by it
        return f"Steps({self._loader.plan})"


@dataclasses.dataclass(frozen=True)
class _Made(Generic[Batch]):
    """A batch on its way from a worker.

    Not a pytree: grain would put the arrays inside into shared memory, which it loses, with a
    complaint, when an iterator is closed before its end.
    """

    step: int
    batch: Any
