"""`run_on_ray`: the same stages on a Ray cluster, with as many cores and accelerators as each asks for.

Neighbouring stages that ask for the same (`cpus`, `gpus`) are one group. A copy of a group is an actor of that size
with a worker process of `workers.py` in it, so that a GPU loads its model once while other nodes speak. Copies come
and go with the work that waits for their group; where there is no room for a copy of every group at once, they take
turns. What a lost node held is given to another copy. The folder of the dataset must be one that all nodes share: media
are written there by content address, so what a node wrote before it died is found and not made again. The caller notes
what ended, as for processes. Joins the cluster of `RAY_ADDRESS` or of this machine; without one, Ray starts here.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from anyglot_synth.dialogue import Dialogue, canonical
from anyglot_synth.stages import FAILED, OK, Item, Stage
from anyglot_synth.store import StoreError
from anyglot_synth.workers import START_SECONDS, WorkerError, Workers, log_defect

log = logging.getLogger("anyglot.synth")
BATCH = 8
"""Items that travel together, at most."""
AHEAD = 4
"""Batches that may be under way or wait for an earlier item, per core of the cluster (and no fewer than for two)."""
PATIENCE = 3.0
"""Seconds that a copy has nothing to do before its room may go to another group."""


class _Copy:
    """One copy of a group on a node: a worker process, so that what hangs or crashes costs one item."""

    def __init__(self, stages: Sequence[Stage], folder: str, options: dict[str, Any]) -> None:
        vars(sys.modules["__main__"]).pop("__file__", None)  # Ray's own program, which a worker process need not load
        self.defects: list[tuple[int, str]] = []
        threads = max(1, int(stages[0].cpus))
        self.pool = Workers(stages, folder, threads=threads, on_defect=self._note, **options)
        self.pool.__enter__()  # it ends with the actor's process

    def _note(self, index: int, text: str) -> None:
        self.defects.append((index, text))

    def ready(self) -> None:
        """Answers when there was room for it."""

    def run(self, texts: Sequence[str]) -> tuple[str, Any]:
        """("items", (ended items, defects as (index, traceback))), ("store", message) or ("setup", message)."""
        self.defects.clear()
        try:
            return "items", ([write_item(item) for item in self.pool.run(map(read_item, texts))], list(self.defects))
        except StoreError as error:
            return "store", str(error)
        except WorkerError as error:
            return "setup", str(error)


@dataclass
class _Task:
    """An item on its way: `place` counts in the order in which items are to come out; `source` is as it came in."""

    place: int
    source: Item
    item: Item


@dataclass
class _Batch:
    tasks: list[_Task]
    lost: int = 0


@dataclass(eq=False)
class _Actor:
    """The driver's side of a copy: `answer` is what it waits for, None where the copy has nothing to do."""

    handle: Any
    answer: Any
    since: float
    ready: bool = False
    batch: _Batch | None = None


@dataclass(eq=False)
class _Group:
    stages: list[Stage]
    cpus: float
    gpus: float
    most: int
    waiting: deque[_Batch] = field(default_factory=deque)
    actors: list[_Actor] = field(default_factory=list)
    failures: int = 0

    def idle(self) -> list[_Actor]:
        return [actor for actor in self.actors if actor.ready and actor.batch is None]

    def wanting(self) -> bool:
        """Whether work waits here that nobody is free for."""
        return bool(self.waiting) and not self.idle()

    def starved(self) -> bool:
        """Whether work waits here and there is no copy at all."""
        return bool(self.waiting) and not any(actor.ready for actor in self.actors)

    def __str__(self) -> str:
        names = ", ".join(stage.name for stage in self.stages)
        return f"{names} (cpus: {self.cpus:g}, gpus: {self.gpus:g})"


def groups_of(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Neighbours that ask for the same, together."""
    return [list(same) for _, same in groupby(stages, key=lambda stage: (stage.cpus, stage.gpus))]


def run_on_ray(
    items: Iterator[Item],
    stages: Sequence[Stage],
    folder: str | os.PathLike[str],
    *,
    timeout: float = 300.0,
    start_timeout: float = START_SECONDS,
    attempts: int = 3,
) -> Generator[Item, None, None]:
    """The items, ended, in the same order.

    Args:
        items: of the source; those that have ended already pass through.
        stages: with their `cpus` and `gpus` per copy.
        folder: of the dataset, shared by all nodes.
        timeout: seconds that an item may take in one group of stages.
        start_timeout: seconds until a copy is set up; likewise until there is room for one where none is.
        attempts: tries of an item in one group, where it hangs, crashes, or may succeed another time.

    Raises:
        WorkerError: a stage cannot be set up, or no node has room for it. StoreError: the disk refuses.
    """
    import ray

    if not ray.is_initialized():
        ray.init(ignore_reinit_error=True, log_to_driver=False)
    options = {"timeout": timeout, "start_timeout": start_timeout, "attempts": attempts}
    cluster = _Cluster(groups_of(stages), str(Path(folder).resolve()), options)
    try:
        yield from cluster.run(items)
    finally:
        cluster.stop()


class _Cluster:
    """The copies of one run, and what waits for them."""

    def __init__(self, groups: Sequence[list[Stage]], folder: str, options: dict[str, Any]) -> None:
        import ray

        self.ray, self.folder, self.options = ray, folder, options
        self.copy = ray.remote(_Copy)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = sum(node.get("CPU", 0.0) for node in nodes)
        self.ahead = BATCH * AHEAD * max(2, int(cores))
        self.groups: list[_Group] = []
        for stages in groups:
            cpus, gpus = stages[0].cpus, stages[0].gpus
            most = sum(
                int(min([node.get("CPU", 0.0) / cpus, *([node.get("GPU", 0.0) / gpus] if gpus else [])]) + 1e-9)
                for node in nodes
            )
            self.groups.append(_Group(stages, cpus, gpus, most))
            if not most:
                raise WorkerError(
                    f"no node of the cluster has room for {self.groups[-1]}; set cpus and gpus of the stage lower"
                )
        self.done: dict[int, Item] = {}
        self.heard = time.monotonic()
        self.looked = self.made_room = 0.0

    def run(self, items: Iterator[Item]) -> Generator[Item, None, None]:
        """See `run_on_ray`."""
        given = taken = 0
        more = True
        while True:
            fresh: list[_Task] = []
            while more and given - taken < self.ahead:
                item = next(items, None)
                if item is None:
                    more = False
                    break
                if item.status == OK and self.groups:
                    fresh.append(_Task(given, item, item))
                else:
                    self.done[given] = item
                given += 1
            if fresh:
                self._queue(0, fresh)
            while taken in self.done:
                yield self.done.pop(taken)
                taken += 1
            if taken == given:
                if not more:
                    return
                continue
            self._give()
            self._resize()
            self._hear()

    def stop(self) -> None:
        """Ends all copies."""
        for group in self.groups:
            for actor in list(group.actors):
                self._end(group, actor)

    def _queue(self, number: int, tasks: list[_Task]) -> None:
        waiting = self.groups[number].waiting
        waiting.extend(_Batch(tasks[at : at + BATCH]) for at in range(0, len(tasks), BATCH))

    def _give(self) -> None:
        for group in self.groups:
            for actor in group.idle():
                if not group.waiting:
                    break
                actor.batch = group.waiting.popleft()
                actor.answer = actor.handle.run.remote([write_item(task.item) for task in actor.batch.tasks])

    def _hear(self) -> None:
        """Waits until a copy says something, for a moment at most."""
        actors = {actor.answer: (n, actor) for n, group in enumerate(self.groups) for actor in group.actors}
        actors.pop(None, None)
        if not actors:
            time.sleep(0.05)
            return
        said, _ = self.ray.wait(list(actors), num_returns=1, timeout=0.5)
        for answer in said:
            number, actor = actors[answer]
            self.heard = actor.since = time.monotonic()
            actor.answer = None
            try:
                found = self.ray.get(answer)
            except self.ray.exceptions.RayTaskError:
                raise  # a defect of this file
            except self.ray.exceptions.RayError as error:
                self._lost(number, actor, error)
                continue
            if not actor.ready:
                actor.ready, self.groups[number].failures = True, 0
            else:
                self._take(number, actor, *found)

    def _take(self, number: int, actor: _Actor, kind: str, content: Any) -> None:
        """What a copy made of its batch."""
        if kind == "store":
            raise StoreError(content)
        if kind == "setup":
            raise WorkerError(content)
        assert actor.batch is not None
        batch, actor.batch = actor.batch, None
        texts, defects = content
        for index, text in defects:
            log_defect(index, text)
        onward: list[_Task] = []
        for task, text in zip(batch.tasks, texts, strict=True):
            item = read_item(text)
            if item.status == OK and number + 1 < len(self.groups):
                onward.append(replace(task, item=item))
                continue
            if item.stage == "workers" and item.status == FAILED:  # as one worker with all stages has it
                known = {**task.source.facts, **{key: item.facts[key] for key in ("attempts",) if key in item.facts}}
                item = replace(item, dialogue=task.source.dialogue, facts=known)
            self.done[task.place] = item
        if onward:
            self._queue(number + 1, onward)

    def _lost(self, number: int, actor: _Actor, error: Exception) -> None:
        """Gives the batch of a copy that has gone to another; an item alone that keeps losing its copy has failed."""
        group = self.groups[number]
        self._end(group, actor)
        if not actor.ready:
            group.failures += 1
            if group.failures > 5:
                raise WorkerError(f"copies of {group} end while they start: {error}")
        batch = actor.batch
        if batch is None:
            return
        batch.lost += 1
        if batch.lost < max(3, self.options["attempts"]):
            group.waiting.appendleft(batch)
        elif len(batch.tasks) > 1:  # one of them may be what ends copies
            group.waiting.extend(_Batch([task]) for task in batch.tasks)
        else:
            task = batch.tasks[0]
            self.done[task.place] = replace(
                task.source.with_facts(attempts=batch.lost),
                status=FAILED,
                stage="workers",
                reason="crash",
                detail="its copy on the cluster ended each time",
                retryable=True,
            )

    # how many copies --------------------------------------------------------------------------------------------

    def _resize(self) -> None:
        now = time.monotonic()
        if now - self.looked < 0.1:
            return
        self.looked = now
        starved = [group for group in self.groups if group.starved()]
        for group in starved:
            if not group.actors:
                self._start(group)
        wanting = starved or [group for group in self.groups if group.wanting()]
        full = bool(starved)
        for group in [] if starved else wanting:
            ready = sum(actor.ready for actor in group.actors)
            starting = len(group.actors) - ready
            if len(group.actors) < group.most and starting < max(1, ready):
                if self._room(group, starting + 1):
                    self._start(group)
                else:
                    full = True
        if full:
            self._make_room(wanting, now, bool(starved))
        alone = not any(actor.ready for group in self.groups for actor in group.actors)
        if starved and alone and now - self.heard > self.options["start_timeout"]:
            raise WorkerError(
                f"there was no room for {starved[0]} within {self.options['start_timeout']:g} s: others use the "
                "cluster, or nodes are lost; run again when there is"
            )

    def _make_room(self, wanting: Sequence[_Group], now: float, starved: bool) -> None:
        """Ends one copy that others can use the room of: it has had nothing to do for a while."""
        if now - self.made_room < PATIENCE:
            return
        waits = max((now - actor.since for group in wanting for actor in group.actors), default=0.0)
        if starved and waits < 5 * PATIENCE and self._room(wanting[0], 1):
            return  # it may have found room already; after longer than that, what is free is in pieces on many nodes
        for group in self.groups:
            if group in wanting or group.waiting:
                continue
            for actor in group.actors:
                free = actor.batch is None and now - actor.since > PATIENCE
                if free and (starved or len(group.actors) > 1):
                    log.info("a copy of %s makes room for %s", group, wanting[0])
                    self._end(group, actor)
                    self.made_room = now
                    return

    def _room(self, group: _Group, copies: int) -> bool:
        free = self.ray.available_resources()
        return bool(free.get("CPU", 0.0) >= copies * group.cpus and free.get("GPU", 0.0) >= copies * group.gpus)

    def _start(self, group: _Group) -> None:
        copy = self.copy.options(num_cpus=group.cpus, num_gpus=group.gpus, max_restarts=0)
        handle: Any = copy.remote(group.stages, self.folder, self.options)
        self.heard = time.monotonic()
        group.actors.append(_Actor(handle, handle.ready.remote(), time.monotonic()))

    def _end(self, group: _Group, actor: _Actor) -> None:
        group.actors.remove(actor)
        with suppress(self.ray.exceptions.RayError):  # it has gone already, with its node
            self.ray.kill(actor.handle)


def write_item(item: Item) -> str:
    """An item as one line of JSON."""
    found = {key: getattr(item, key) for key in ("index", "status", "stage", "reason", "detail", "retryable")}
    dialogue = item.dialogue.to_dict() if item.dialogue.turns else None
    text = canonical({**found, "facts": dict(item.facts), "source": item.dialogue.source, "dialogue": dialogue})
    return json.dumps(json.loads(text))  # in ASCII: no character of a text ends a line


def read_item(text: str) -> Item:
    """Reads `write_item`."""
    found = json.loads(text)
    dialogue, source = found.pop("dialogue"), found.pop("source")
    return Item(dialogue=Dialogue((), source) if dialogue is None else Dialogue.from_dict(dialogue), **found)
