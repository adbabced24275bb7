"""`run_on_ray`: the same stages on a Ray cluster, with as many cores and accelerators as each asks for.

Ray Data moves items as JSON, decides how many copies of a group of stages there are, and makes again what a lost node
held. Neighbouring stages that ask for the same (`cpus`, `gpus`) are one group: an actor pool, with a worker process of
`workers.py` in each actor, so that a GPU loads its model once while other nodes speak. The folder of the dataset must
be one that all nodes share: media are written there by content address, so what a node wrote before it died is found
and not made again. The caller notes what ended, as for processes. Joins the cluster of `RAY_ADDRESS` or of this
machine; without one, Ray starts here.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from anyglot_synth.dialogue import Dialogue, canonical
from anyglot_synth.ray_plan import Group, Node, fewer, groups_of, plan, room_for, size_of
from anyglot_synth.stages import FAILED, OK, Item, Stage
from anyglot_synth.store import StoreError
from anyglot_synth.workers import START_SECONDS, WorkerError, Workers, log_defect

log = logging.getLogger("anyglot.synth")
PORTION = 20_000
"""Items that one execution of Ray Data takes, and the driver holds; its copies are set up anew for the next."""
BATCH = 8
"""Items that travel together, at most."""
LIVES = 3
"""Copies, at least, that an item may have been in the hands of when they ended, until it has failed."""


class _Tries:
    """An actor that counts how often an item was begun and not ended. If its node is lost, it counts anew."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, int]] = Counter()

    def begin(self, group: int, index: int, before: int) -> int:
        self.counts.pop((group, before), None)
        self.counts[group, index] += 1
        return self.counts[group, index]


class _Copy:
    """One copy of a group on a node: a worker process, so that what hangs or crashes costs one item."""

    def __init__(self, group: Sequence[Stage], number: int, folder: str, options: dict[str, Any], tries: Any) -> None:
        vars(sys.modules["__main__"]).pop("__file__", None)  # Ray's own program, which a worker process need not load
        self.number, self.tries, self.lives, self.hand = number, tries, max(LIVES, options["attempts"]), -1
        self.defects: dict[int, str] = {}
        threads = max(1, int(size_of(group)["CPU"]))
        self.pool = Workers(group, folder, threads=threads, on_defect=self.defects.__setitem__, **options)
        self.pool.__enter__()  # it ends with the actor's process

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Columns "item" (JSON) and "note": the traceback of a defect, or, without an item, why the run is over."""
        texts, notes = [str(text) for text in batch["item"]], [str(note) for note in batch["note"]]
        if not all(texts):
            return {"item": texts, "note": notes}
        self.defects.clear()
        try:
            items = list(self.pool.run(self._begin(read_item(text)) for text in texts))
        except StoreError as error:
            return {"item": [""], "note": [f"store {error}"]}
        except WorkerError as error:
            return {"item": [""], "note": [f"setup {error}"]}
        notes = [note or self.defects.get(item.index, "") for note, item in zip(notes, items, strict=True)]
        return {"item": [write_item(item) for item in items], "note": notes}

    def _begin(self, item: Item) -> Item:
        """The item, failed if copies keep ending with it: Ray would give it to another for ever."""
        import ray

        if item.status != OK:
            return item
        before, self.hand = self.hand, item.index
        if ray.get(self.tries.begin.remote(self.number, item.index, before)) <= self.lives:
            return item
        failed = replace(item.with_facts(attempts=self.lives), status=FAILED, stage="workers", reason="crash")
        return replace(failed, detail="its copy on the cluster ended each time", retryable=True)


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
        start_timeout: seconds until a copy is set up; likewise until there is room for one of each group.
        attempts: tries of an item in one group, where it hangs, crashes, or may succeed another time.

    Raises:
        WorkerError: a stage cannot be set up, or the cluster has no room for it. StoreError: the disk refuses.
    """
    import ray

    if not ray.is_initialized():
        ray.init(ignore_reinit_error=True, log_to_driver=False)
    options = {"timeout": timeout, "start_timeout": start_timeout, "attempts": attempts}
    while portion := list(islice(items, PORTION)):
        left = {item.index: item for item in portion if item.status == OK and stages}
        done = {item.index: item for item in portion if item.index not in left}
        order = deque(item.index for item in portion)
        while order:
            try:
                for ended in _execute(list(left.values()), stages, str(Path(folder).resolve()), options):
                    source = left.pop(ended.index)
                    if ended.stage == "workers" and ended.status == FAILED:  # as one worker with all stages has it
                        known = {key: ended.facts[key] for key in ("attempts",) if key in ended.facts}
                        ended = replace(ended, dialogue=source.dialogue, facts={**source.facts, **known})
                    done[ended.index] = ended
                    while order and order[0] in done:
                        yield done.pop(order.popleft())
                while order:
                    yield done.pop(order.popleft())
            except _NoRoomError:
                log.warning("nodes are lost, and the groups of stages do not fit as they were: they are made again")


class _NoRoomError(Exception):
    """Nodes are lost, so that the groups do not fit as they are."""


def _nodes() -> list[Node]:
    """CPU and GPU of every node that lives."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _watch(groups: Sequence[Group], patience: float) -> type:
    """A callback of Ray Data that ends an execution which has lost its room: Ray would wait for ever.

    At once where fewer groups have room, else after so many seconds: there may be another node.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data.exceptions import ExecutionTimeoutError

    class Watch(ExecutionCallback):  # type: ignore[misc]
        looked = fitted = time.monotonic()

        def on_execution_step(self, executor: Any) -> None:
            now = time.monotonic()
            if now - self.looked > 1:
                self.looked, nodes = now, _nodes()
                if room_for(groups, nodes):
                    self.fitted = now
                elif room_for(fewer(groups), nodes) or now - self.fitted > patience:
                    raise ExecutionTimeoutError("nodes are lost")

    return Watch


def _execute(items: Sequence[Item], stages: Sequence[Stage], folder: str, options: dict[str, Any]) -> Iterator[Item]:
    """One execution of Ray Data: the items, ended, in any order."""
    import ray

    if not items:
        return
    groups, most = plan(groups_of(stages), _nodes())
    tries = ray.remote(_Tries).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 5  # a node may be lost while a copy starts
    context.wait_for_min_actors_s = int(options["start_timeout"]) + 1
    longest = options["start_timeout"] + 2 * BATCH * options["attempts"] * options["timeout"]
    context.execution_no_progress_timeout_s = longest + 60
    context.custom_execution_callback_classes = [_watch(groups, options["start_timeout"])]
    rows = [{"item": write_item(item), "note": ""} for item in items]
    with ray.data.DataContext.current(context):
        data: Any = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // BATCH))  # owned by the driver
        for number, (group, copies) in enumerate(zip(groups, most, strict=True)):
            data = data.map_batches(
                _Copy,
                fn_constructor_args=(group, number, folder, options, tries),
                batch_size=BATCH,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=copies),
                num_cpus=size_of(group)["CPU"],
                num_gpus=size_of(group)["GPU"],
            )
    try:
        for row in data.iter_rows():
            if not row["item"]:
                kind, _, message = str(row["note"]).partition(" ")
                raise StoreError(message) if kind == "store" else WorkerError(message)
            item = read_item(str(row["item"]))
            if row["note"]:
                log_defect(item.index, str(row["note"]))
            yield item
    except (ray.exceptions.GetTimeoutError, ray.data.exceptions.ExecutionTimeoutError) as error:
        if not room_for(groups, _nodes()):
            raise _NoRoomError from error
        raise WorkerError(
            "the cluster gave no room for a copy of each group, or no answer: others use it, or nodes are lost; run "
            f"again when there is room ({' '.join(str(error).split())[:200]})"
        ) from error
    except ray.exceptions.RayActorError as error:
        why = str(error).strip().splitlines()[-1]
        raise WorkerError(f"copies end while they start ({why}); install the same on all nodes") from error


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
