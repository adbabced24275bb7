"""`Batcher`: the thread that runs the engine, and how the event loop talks to it.

The engine is one thread's own. What asyncio wants of it (a new row, the end of one) goes through a queue that the
thread reads between two steps, so rows join and leave while others are written. New ids come back in one
`call_soon_threadsafe` a step; each `Answer` hands them out in order. How many answers may be open at once is counted on
the event loop: a `Ticket` is a place for so many of them, taken before any work is done for a request.

This file knows ids and rows, not what they mean; media are decoded elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from anyglot_lm.engine import Engine, Row, Sampling
from anyglot_lm.grammar import Request
from anyglot_lm.serve.refusal import Refusal

log = logging.getLogger("anyglot.serve")


class EngineFailure(Exception):
    """The engine failed while it wrote an answer: a defect, in the log."""


@dataclass(frozen=True)
class Work:
    """What the engine needs for a request: one row a seed."""

    prompt: list[int]
    request: Request
    sampling: Mapping[str, Sampling]
    seeds: Sequence[int]


class Answer:
    """One row. Iterate over it, on the event loop, for its ids as they come; `live` ones come step by step."""

    def __init__(self, live: bool) -> None:
        self.live, self.done = live, False
        self.row: Row | None = None  # the engine's thread sets it
        self.read = 0
        self.parts: asyncio.Queue[list[int] | EngineFailure | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        while (part := await self.parts.get()) is not None:
            if isinstance(part, EngineFailure):
                raise part
            yield part

    async def ids(self) -> list[int]:
        """All ids. Raises `EngineFailure`."""
        return [token async for part in self for token in part]


class Batcher:
    """Runs an engine in a thread.

    Args:
        engine: this thread's from now on.
        places: answers at most that are open, in flight and waiting.
        on_left: called when an answer is cancelled.
    """

    def __init__(self, engine: Engine, places: int, on_left: Callable[[], None]) -> None:
        self.engine, self.places, self.on_left = engine, places, on_left
        self.open = 0  # the event loop's
        self.mean_seconds = 1.0
        self._answers: dict[Row, Answer] = {}  # the thread's
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="anyglot-engine", daemon=True)

    # on the event loop ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread; events go to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step it is in. What is still open gets an `EngineFailure`."""
        self._inbox.put(None)
        await self._loop.run_in_executor(None, self._thread.join)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def in_flight(self) -> int:
        """Rows that are being written."""
        return len(self.engine.rows)

    @property
    def waiting(self) -> int:
        """Open answers that are not in flight: they wait, or their media are being decoded."""
        return max(0, self.open - self.in_flight)

    def take(self, count: int) -> Ticket:
        """Places for `count` answers. Raises `Refusal` 429 if there are not as many."""
        if self.open + count > self.places:
            seconds = math.ceil(min(60.0, max(1.0, self.mean_seconds)))
            raise Refusal(
                429,
                f"all {self.places} places of this server are taken; try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        self.open += count
        return Ticket(self, count)

    def _deliver(self, parts: list[tuple[Answer, list[int] | EngineFailure | None]]) -> None:
        for answer, part in parts:
            if answer.done:  # left in the meantime
                continue
            answer.parts.put_nowait(part)
            if not isinstance(part, list):
                answer.done = True  # its place is free when its request is, media decoded

    # in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._obey():
            if self.engine.busy:
                self._step()
        self._fail("the server stopped before the answer was whole")

    def _obey(self) -> bool:
        """Does what the event loop asked for; waits for that if there is nothing else to do. False: stop."""
        while True:
            try:
                command = self._inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _submit(self, answer: Answer, work: Work, seed: int) -> None:
        try:
            answer.row = self.engine.submit(work.prompt, work.request, sampling=work.sampling, seed=seed)
        except Exception:
            log.exception("the engine refused a prepared request")
            self._send([(answer, EngineFailure("the engine refused the request"))])
            return
        self._answers[answer.row] = answer

    def _cancel(self, answer: Answer) -> None:
        if answer.row in self._answers:
            del self._answers[answer.row]
            self.engine.cancel(answer.row)

    def _step(self) -> None:
        try:
            rows = self.engine.step()
        except Exception:
            log.exception("the engine failed; it is empty now and goes on")
            self._fail("the engine failed")
            return
        parts: list[tuple[Answer, list[int] | EngineFailure | None]] = []
        for row in rows:
            answer = self._answers[row]
            if answer.live or row.done:
                parts.append((answer, row.ids[answer.read :]))
                answer.read = len(row.ids)
            if row.done:
                parts.append((answer, None))
                del self._answers[row]
        self._send(parts)

    def _fail(self, reason: str) -> None:
        failed, self._answers = list(self._answers.values()), {}
        self._send([(answer, EngineFailure(reason)) for answer in failed])

    def _send(self, parts: list[tuple[Answer, list[int] | EngineFailure | None]]) -> None:
        if parts:
            self._loop.call_soon_threadsafe(self._deliver, parts)


class Ticket:
    """Places for the answers of one request. Used on the event loop, as a context: at its end, what is still being
    written is cancelled and all places are free, unless `keep` took that over."""

    def __init__(self, batcher: Batcher, count: int) -> None:
        self.batcher, self.unused = batcher, count
        self.answers: list[Answer] = []
        self.kept = self.closed = False
        self.began = time.perf_counter()

    def start(self, work: Work, *, live: bool) -> list[Answer]:
        """Hands the work to the engine: one answer a seed, as many as there are places."""
        assert self.unused == len(work.seeds), "a ticket is for as many answers as were taken"
        self.answers, self.unused = [Answer(live) for _ in work.seeds], 0
        for answer, seed in zip(self.answers, work.seeds, strict=True):
            self.batcher._inbox.put(partial(self.batcher._submit, answer, work, seed))
        return self.answers

    def keep(self) -> Callable[[], None]:
        """Lets the places outlive the context; whoever takes them calls what this returns."""
        self.kept = True
        return self.close

    def close(self) -> None:
        """Frees all places; nothing can be started any more. May be called again."""
        self.closed = True
        batcher, self.unused, unused = self.batcher, 0, self.unused
        batcher.open -= unused + len(self.answers)
        for answer in self.answers:
            if not answer.done:
                answer.done = True
                answer.parts.put_nowait(None)  # for whoever still reads
                batcher.on_left()
                batcher._inbox.put(partial(batcher._cancel, answer))
        if self.answers and all(answer.row is not None and answer.row.done for answer in self.answers):
            batcher.mean_seconds += 0.1 * (time.perf_counter() - self.began - batcher.mean_seconds)
        self.answers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.kept:
            self.close()
