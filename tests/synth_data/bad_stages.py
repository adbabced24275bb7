"""Stages that behave badly on some items; in a module of their own, so that worker processes find them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_synth.backends import BackendError
from anyglot_synth.stages import Filtered, Item, Stage
from anyglot_synth.store import Store


class Marks(Stage):
    """Writes a small file per item, and does what the text asks for: "hang", "die", "defect", ..."""

    name = "marks"

    def __init__(self, seconds: float = 0.0, remember: str = "") -> None:
        self.seconds, self.remember = seconds, remember

    def config(self) -> dict[str, Any]:
        return {"stage": "marks"}

    def run(self, item: Item, store: Store) -> Item:
        text = item.dialogue.turns[0].parts[0].text
        time.sleep(self.seconds * (1 + 7 * (item.index % 5 == 0)))  # those after a slow one are ready before it
        first = self._first(item)
        if ("hang once" in text and first) or "hang always" in text:
            time.sleep(600)
        if ("die once" in text and first) or "die always" in text:
            os._exit(9)
        if "defect" in text:
            raise KeyError("nobody foresaw this")
        if ("busy once" in text and first) or "busy always" in text:
            raise BackendError("the engine is busy", retryable=True)
        if "broken" in text:
            raise BackendError("the engine is broken")
        if "share as detail" in text:
            raise Filtered("unwanted", 0.5)  # type: ignore[arg-type]
        if "unwanted" in text:
            raise Filtered("unwanted", "not this one", share=0.5)
        if "full" in text:
            raise_full(store)
        if "hang in the middle" in text:
            store.put(item.dialogue.id, ".png", hang)
        if "program" in text:
            program = subprocess.Popen(["sleep", "600"])
            (Path(self.remember) / "program").write_text(str(program.pid))
            program.wait()
        if "half in a message" in text:
            raise BackendError("the engine said \ud800")
        if "half in a trace" in text:
            raise ValueError("the engine said \ud800")
        if "half in a fact" in text:
            return item.with_facts(heard="\ud800")
        if "no number" in text:
            return item.with_facts(loudness=float("nan"))
        pixels = np.full((4, 4, 3), item.index % 256, np.uint8)
        media = store.put_picture(item.dialogue.id, pixels, {"licence": "CC0-1.0"})

        def change(i: int, j: int, turn: Any, part: Any) -> Any:
            return part if part.modality != "image" else type(part)(part.modality, part.text, None, media)

        return Item(item.index, item.dialogue.map_parts(change), facts={**item.facts, "index": item.index})

    def _first(self, item: Item) -> bool:
        """Whether no process has seen this item yet."""
        if not self.remember:
            return True
        try:
            os.close(os.open(Path(self.remember) / str(item.index), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class Ordered(Stage):
    """Runs in the parent: counts the letters it has seen, and has a defect or a full disk where asked."""

    name = "ordered"
    ordered = True

    def config(self) -> dict[str, Any]:
        return {}

    def setup(self) -> None:
        self.letters = 0

    def run(self, item: Item, store: Store) -> Item:
        text = item.dialogue.turns[0].parts[0].text
        self.letters += len(text)
        if "defect in order" in text:
            raise KeyError("nobody foresaw this in order")
        if "full in order" in text:
            raise_full(store)
        return item.with_facts(letters=self.letters)


class Later(Stage):
    """Comes after others, and may ask for another part of a cluster than they."""

    def __init__(self, name: str = "later", cpus: float = 1.0) -> None:
        self.name, self.cpus = name, cpus  # type: ignore[misc]

    def config(self) -> dict[str, Any]:
        return {}

    def run(self, item: Item, store: Store) -> Item:
        text = item.dialogue.turns[0].parts[0].text
        if f"late trouble in {self.name}" in text:
            raise KeyError("nobody foresaw this later")
        if f"late death in {self.name}" in text:
            os._exit(9)
        if f"late end in {self.name}" in text:
            raise Filtered("late")
        return item.with_facts(**{self.name: text})


class EndsItsCopy(Stage):
    """Of a cluster: ends the process that its worker belongs to, where asked."""

    name = "ends-its-copy"

    def config(self) -> dict[str, Any]:
        return {}

    def run(self, item: Item, store: Store) -> Item:
        if item.dialogue.turns[0].parts[0].text == "worse":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        return item


class Noise(Stage):
    """Writes five seconds of noise: more than 100 kB."""

    name = "noise"

    def config(self) -> dict[str, Any]:
        return {}

    def run(self, item: Item, store: Store) -> Item:
        audio = np.random.default_rng(item.index).normal(0, 0.1, 80_000).astype(np.float32)
        media = store.put_sound(item.dialogue.id, audio, 16_000, {"licence": "CC0-1.0"})

        def change(i: int, j: int, turn: Any, part: Any) -> Any:
            return part if part.modality != "image" else type(part)("music", part.text, None, media)

        return Item(item.index, item.dialogue.map_parts(change))


class NoEngine(Stage):
    """Cannot be set up."""

    name = "no-engine"

    def config(self) -> dict[str, Any]:
        return {}

    def setup(self) -> None:
        raise BackendError("the engine is not here; install it")

    def run(self, item: Item, store: Store) -> Item:
        raise AssertionError


def hang(path: Path) -> None:
    """Writes half of a file."""
    path.write_bytes(b"half")
    time.sleep(600)


def raise_full(store: Store) -> None:
    """What a full disk does to a write in the store."""

    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.put("f" * 32, ".bin", write)


class SlowEngine(NoEngine):
    """Takes long to be set up."""

    def setup(self) -> None:
        time.sleep(60)


class BadEngine(NoEngine):
    """Has a defect in its setup."""

    name = "bad-engine"

    def setup(self) -> None:
        raise KeyError("engine")
