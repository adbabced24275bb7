"""`run_on_ray`: the same stages on a Ray cluster, each with as many processes, cores and accelerators as it wants.

Ray Data moves items as JSON, in order, and makes again what a lost node held; stages are actors of their own, so that a
GPU loads its model once while other nodes speak. The folder of the dataset must be one that all nodes share: media are
written there by content address, so what a node wrote before it died is found and not made again. The caller notes
what ended, as for processes. Joins the cluster of `RAY_ADDRESS` or of this machine; without one, Ray starts here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyglot_synth.dialogue import Dialogue, canonical
from anyglot_synth.stages import Item, Stage
from anyglot_synth.store import StoreError
from anyglot_synth.workers import WorkerError, Workers

PENDING = ".pending"
"""Folder of the items that are to be done, inside the dataset's; removed at the end."""
BLOCK = 32
"""Items of one file, and of one batch at most."""


class _Actor:
    """One copy of a stage on a node: a worker process of `workers.py`, so that what hangs or crashes costs one item."""

    def __init__(self, stage: Stage, folder: str, timeout: float, attempts: int) -> None:
        self.pool = Workers([stage], folder, 1, timeout=timeout, attempts=attempts)
        self.pool.__enter__()  # it ends with the actor's process
        self.problem = ""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        texts = [str(text) for text in batch["item"]]
        # "!": the run is over, and a message travels to the driver
        ended = self._run(read_item(text) for text in texts if not text.startswith("!"))
        return {"item": [text if text.startswith("!") else next(ended) for text in texts]}

    def _run(self, items: Iterator[Item]) -> Iterator[str]:
        if not self.problem:
            try:
                yield from map(write_item, self.pool.run(items))
            except StoreError as error:
                self.problem = f"!store {error}"
            except WorkerError as error:
                self.problem = f"!setup {error}"
        while True:
            yield self.problem


def run_on_ray(
    items: Iterator[Item],
    stages: Sequence[Stage],
    folder: str | os.PathLike[str],
    *,
    timeout: float = 300.0,
    attempts: int = 3,
) -> Iterator[Item]:
    """The items, ended, in the same order.

    Args:
        items: of the source; those that have ended already pass through.
        stages: with their `cpus` and `gpus` per copy.
        folder: of the dataset, shared by all nodes.
        timeout: seconds that an item may take in one stage.
        attempts: tries of an item in one stage, where it hangs, crashes, or may succeed another time.

    Raises:
        WorkerError: a stage cannot be set up. StoreError: the disk refuses.
    """
    import ray

    if not ray.is_initialized():
        ray.init(ignore_reinit_error=True, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    place = Path(folder).resolve() / PENDING
    try:
        files = _write_pending(items, place)
        if not files:
            return
        data = ray.data.read_text(files, override_num_blocks=len(files)).rename_columns({"text": "item"})
        cores = ray.cluster_resources().get("CPU", 1)
        for stage in stages:
            most = max(1, int(cores / max(stage.cpus, 0.01)))
            data = data.map_batches(
                _Actor,
                fn_constructor_args=(stage, str(Path(folder).resolve()), timeout, attempts),
                batch_size=BLOCK,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
                num_cpus=stage.cpus,
                num_gpus=stage.gpus,
            )
        for row in data.iter_rows():
            text = str(row["item"])
            if text.startswith("!"):
                kind, _, message = text[1:].partition(" ")
                raise StoreError(message) if kind == "store" else WorkerError(message)
            yield read_item(text)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write_pending(items: Iterator[Item], place: Path) -> list[str]:
    """Files of `BLOCK` items each, a line an item."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    files: list[str] = []
    lines: list[str] = []

    def flush() -> None:
        if lines:
            path = place / f"{len(files):08d}.txt"
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            files.append(str(path))
            lines.clear()

    for item in items:
        lines.append(write_item(item))
        if len(lines) == BLOCK:
            flush()
    flush()
    return files


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
