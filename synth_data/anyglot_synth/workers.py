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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from anyglot_synth.dialogue import canonical, escaped
from anyglot_synth.scratch import sweep
from anyglot_synth.stages import FAILED, OK, Item, Stage
from anyglot_synth.store import Store, StoreError
from anyglot_tokenizers.errors import AnyglotError, ManifestError
from anyglot_tokenizers.files import DISK_ERRORS

log = logging.getLogger("anyglot.synth")
START_SECONDS = 600.0
"""A worker that is not ready after this time (it may load models) ends the run, unless the caller says another."""


class WorkerError(AnyglotError):
    """A stage cannot be set up in a worker."""


def log_defect(index: int, text: str) -> None:
    """Writes the traceback of an item's defect into the log."""
    log.error("a defect in the stages, item %d:\n%s", index, escaped(text))


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
        start_timeout: seconds until a process is ready: it may load models.
        threads: that libraries may use in a process.
        on_defect: told the index and the traceback of an item on which a stage has a defect.

    Raises:
        ManifestError: no processes.
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
        start_timeout: float = START_SECONDS,
        threads: int = 1,
        on_defect: Callable[[int, str], None] = log_defect,
    ) -> None:
        if count < 1:
            raise ManifestError(f"count is {count}; a pool has 1 worker or more")
        self.stages, self.folder, self.count = list(stages), Path(folder), count
        self.timeout, self.attempts, self.ahead = timeout, attempts, ahead
        self.start_timeout, self.threads, self.on_defect = start_timeout, threads, on_defect
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        try:
            for _ in range(self.count):
                self._workers.append(self._start())
        except BaseException:
            self.__exit__()  # those that have started do not stay
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            _kill(worker.process)
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []
        sweep()

    def run(self, items: Iterator[Item]) -> Generator[Item, None, None]:
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
        sweep()  # after one that was killed
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.stages, self.folder), daemon=True)
        with _with_threads(self.threads), _without_interrupts():
            process.start()
        theirs.close()
        return _Worker(process, ours, time.monotonic() + self.start_timeout)

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
                    raise WorkerError(
                        f"the stages were not set up within {self.start_timeout:g} s; see the log, or give "
                        "--start-timeout more seconds"
                    )
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
            self.on_defect(task.item.index, text)
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
    except Exception as error:  # noqa: BLE001 (told to the parent, which ends the run; the traceback is in the log)
        message = str(error)
        if not isinstance(error, AnyglotError):
            traceback.print_exc()
            message = f"stage {stage.name!r} was not set up: {_defect(error)[1][0]}; see the log"
        pipe.send(("setup", message))
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
        canonical([ended.dialogue.to_dict(), dict(ended.facts)]).encode()  # what is no JSON fails here, not later
        return "item", ended
    except StoreError as error:
        return "store", str(error)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            return "store", f"{error.filename or store.folder}: {error.strerror}; free some space and run again"
        return _defect(error)
    except Exception as error:  # noqa: BLE001 (one item must not end a run of a million; the log has it all)
        return _defect(error)


def here(stages: Sequence[Stage], item: Item, store: Store) -> Item:
    """One item through stages in this process, as in a worker. Raises `StoreError`."""
    kind, content = through(stages, item, store)
    if isinstance(content, Item):
        return content
    if isinstance(content, str):
        raise StoreError(content)
    assert kind == "defect"
    log_defect(item.index, content[1])
    return replace(item, status=FAILED, stage="workers", reason="defect", detail=content[0])


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
def _with_threads(count: int) -> Iterator[None]:
    """Processes that start here use so many threads each: of as many as cores, one, or they get in each other's way."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
