"""`Workers`: processes that take items through the stages, and bear what goes wrong there.

Items come back in the order they went in. A worker that hangs or dies is replaced, and its item tried again; an item
that keeps doing so has failed, and the others go on. An error that nobody foresaw fails its item as a defect, with
its traceback in the log. Workers do not outlive their parent. Which items there are and where they go is not known
here.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from anyglot_synth.dialogue import canonical
from anyglot_synth.stages import FAILED, OK, Item, Stage
from anyglot_synth.store import DISK_ERRORS, Store, StoreError
from anyglot_tokenizers.errors import AnyglotError

log = logging.getLogger("anyglot.synth")
START_SECONDS = 300.0
"""A worker that is not ready after this time (it may load models) ends the run."""


class WorkerError(AnyglotError):
    """A stage cannot be set up in a worker."""


@dataclass
class _Task:
    """An item on its way: `place` counts in the order in which items are to come out."""

    place: int
    item: Item
    tries: int = 1


@dataclass
class _Worker:
    """A process, its pipe, and what it is at."""

    process: SpawnProcess
    pipe: Connection
    deadline: float
    ready: bool = False
    task: _Task | None = None


class Workers:
    """A pool for one run; a context manager.

    Args:
        stages: in order. They are pickled once per process, and set up there.
        folder: of the dataset.
        count: processes.
        timeout: seconds that an item may take.
        attempts: tries of an item whose worker hangs or dies, or whose stage says that another try may succeed.
        ahead: items that may be under way or wait for an earlier one, per process.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        folder: str | os.PathLike[str],
        count: int = 1,
        *,
        timeout: float = 300.0,
        attempts: int = 3,
        ahead: int = 16,
    ) -> None:
        self.stages, self.folder, self.count = list(stages), Path(folder), count
        self.timeout, self.attempts, self.ahead = timeout, attempts, ahead
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        self._workers = [self._start() for _ in range(self.count)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            _kill(worker.process)
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def run(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items, ended, in the same order. Those that have ended before pass through.

        Raises:
            WorkerError: a stage cannot be set up. StoreError: the disk refuses.
        """
        again: deque[_Task] = deque()
        done: dict[int, Item] = {}
        given = taken = 0
        more = True
        while True:
            idle = [worker for worker in self._workers if worker.ready and worker.task is None]
            while again and idle:
                self._give(idle.pop(), again.popleft())
            while more and idle and given - taken < self.count * self.ahead:
                item = next(items, None)
                if item is None:
                    more = False
                    break
                if item.status == OK:
                    self._give(idle.pop(), _Task(given, item))
                else:
                    done[given] = item
                given += 1
            while taken in done:
                yield done.pop(taken)
                taken += 1
            if taken == given and not more:
                return
            for task, ended in self._hear():
                if ended.status == FAILED and ended.retryable and task.tries < self.attempts:
                    again.append(_Task(task.place, task.item, task.tries + 1))
                else:
                    done[task.place] = ended.with_facts(attempts=task.tries) if ended.status == FAILED else ended

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.stages, self.folder), daemon=True)
        with _one_thread(), _without_interrupts():
            process.start()
        theirs.close()
        return _Worker(process, ours, time.monotonic() + START_SECONDS)

    def _give(self, worker: _Worker, task: _Task) -> None:
        worker.task, worker.deadline = task, time.monotonic() + self.timeout
        with suppress(OSError):  # it has just died: `_hear` finds that out
            worker.pipe.send(task.item)

    def _hear(self) -> Iterator[tuple[_Task, Item]]:
        """Waits until something happens; gives the tasks that ended, with how."""
        busy = {worker.pipe: worker for worker in self._workers if worker.task is not None or not worker.ready}
        if not busy:
            return
        until = min(worker.deadline for worker in busy.values())
        said = wait(list(busy), max(0.0, until - time.monotonic()))
        for pipe, worker in busy.items():
            if pipe in said:
                yield from self._read(worker)
            elif time.monotonic() > worker.deadline:
                if not worker.ready:
                    raise WorkerError(f"the stages were not set up within {START_SECONDS:.0f} s; see the log")
                yield from self._replace(worker, "timeout", f"no answer within {self.timeout:g} s")

    def _read(self, worker: _Worker) -> Iterator[tuple[_Task, Item]]:
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of an answer
            worker.process.join()
            how = worker.process.exitcode
            if not worker.ready:
                raise WorkerError(
                    f"a worker process ended with status {how} while it was set up; see the log"
                ) from None
            yield from self._replace(worker, "crash", f"its process ended with status {how}")
            return
        if kind == "ready":
            worker.ready = True
        elif kind == "item":
            assert worker.task is not None
            task, worker.task = worker.task, None
            yield task, content
        elif kind == "defect":
            assert worker.task is not None
            task, worker.task = worker.task, None
            line, text = content
            log.error("a defect in the stages, item %d:\n%s", task.item.index, text)
            yield task, replace(task.item, status=FAILED, stage="workers", reason="defect", detail=line)
        elif kind == "store":
            raise StoreError(content)
        else:
            raise WorkerError(content)

    def _replace(self, worker: _Worker, reason: str, detail: str) -> Iterator[tuple[_Task, Item]]:
        """A new process for one that hangs or died."""
        _kill(worker.process)
        worker.process.join()
        worker.pipe.close()
        self._workers[self._workers.index(worker)] = self._start()
        if worker.task is not None:
            failed = replace(
                worker.task.item, status=FAILED, stage="workers", reason=reason, detail=detail, retryable=True
            )
            yield worker.task, failed


def _work(pipe: Connection, stages: Sequence[Stage], folder: Path) -> None:
    """What a worker process does."""
    os.setpgid(0, 0)  # with the programs that it starts: none of them outlives it, and Ctrl+C is the parent's
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    store = Store(folder)
    try:
        for stage in stages:
            stage.setup()
    except AnyglotError as error:
        pipe.send(("setup", str(error)))
        return
    with suppress(EOFError, OSError):  # the parent has gone
        pipe.send(("ready", None))
        while True:
            pipe.send(through(stages, pipe.recv(), store))


def through(stages: Sequence[Stage], item: Item, store: Store) -> tuple[str, Item | tuple[str, str] | str]:
    """One item through all stages: ("item", it), ("defect", (line, traceback)) or ("store", message)."""
    try:
        ended = item
        for stage in stages:
            ended = stage(ended, store)
        canonical([ended.dialogue.to_dict(), dict(ended.facts), ended.detail])  # what is no JSON fails here, not later
        return "item", ended
    except StoreError as error:
        return "store", str(error)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            return "store", f"{error.filename or store.folder}: {error.strerror}; free some space and run again"
        return _defect(error)
    except Exception as error:  # noqa: BLE001 (one item must not end a run of a million; the log has it all)
        return _defect(error)


def _defect(error: Exception) -> tuple[str, tuple[str, str]]:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return "defect", (line, "".join(traceback.format_exception(error)))


def _end_with(sentinel: int) -> None:
    """Ends this process and the programs that it runs when its parent has gone, however that went."""
    wait([sentinel])
    os.killpg(0, signal.SIGKILL)


def _kill(process: SpawnProcess) -> None:
    """Ends a worker with the programs that it runs."""
    assert process.pid is not None
    with suppress(ProcessLookupError, PermissionError):  # it is gone, or has no group of its own yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start here never see Ctrl+C, not even before they have a group of their own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that start here use one thread each, so that as many as cores do not get in each other's way."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
