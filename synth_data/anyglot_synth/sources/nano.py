"""Tasks of nanoworld: scenes with descriptions, questions, edits and stories, whose truth a program knows.

Nothing is drawn or spoken here: pictures and melodies are parts with the description of their scene, which nanoworld's
own backends make. Dialogue number i depends on (seed, split, i) and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, ClassVar

from anyglot_synth.dialogue import IMAGE, MUSIC, SPEECH, Dialogue, Part
from anyglot_synth.forms import draw
from anyglot_synth.nanoworld.language import describe, edit, question
from anyglot_synth.nanoworld.scene import Scene, sample_scene
from anyglot_synth.seeds import rng_of
from anyglot_synth.sources.base import BadRow, Source, SourceError
from anyglot_synth.sources.examples import asking_of, task_weights
from anyglot_synth.store import Store
from anyglot_synth.tasks import Example, build

NEEDS_FILES = frozenset({"voice-clone", "timed-transcript", "timed-frames", "image-to-edges", "edges-to-image"})
STEPS = 3


class NanoworldTasks(Source):
    """Dialogues about scenes of nanoworld.

    Args:
        tasks: names of `TASKS`, or weights by name, of those that need no file.
        num: how many dialogues; without end where it is None, as a job says how many it wants.
        split: "train" or "test": the latter has held-out things and held-out templates.
        seed: another seed gives other dialogues.
        spoken_instructions: share of the instructions that are spoken, from 0 to 1.
        licence: of what comes out; the world is ours.
    """

    name: ClassVar[str] = "nanoworld-tasks"

    def __init__(
        self,
        tasks: str | Sequence[str] | Mapping[str, float] = ("image-editing", "story", "spoken-vqa", "image-to-music"),
        *,
        num: int | None = None,
        split: str = "train",
        seed: int = 0,
        spoken_instructions: float = 0.0,
        licence: str = "CC0-1.0",
    ) -> None:
        self.tasks = task_weights(tasks, self.name)
        if without := sorted(NEEDS_FILES & self.tasks.keys()):
            raise SourceError(f"source {self.name}: task {without[0]!r} needs files; scenes are words")
        if split not in ("train", "test"):
            raise SourceError(f"source {self.name}: split is {split!r}; use train or test")
        self.num, self.split, self.seed, self.licence = num, split, seed, licence
        self.asking = asking_of(seed, split == "test", spoken_instructions, self.name)

    def config(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "kind": self.name,
            "tasks": self.tasks,
            "num": self.num,
            "split": self.split,
            "seed": self.seed,
            "spoken": self.asking.spoken,
            "licence": self.licence,
        }

    def read(self, store: Store) -> Iterator[Dialogue | BadRow]:
        """See `Source`."""
        for index in count() if self.num is None else range(self.num):
            example = self.example(index)
            name = draw(self.tasks, self.seed, self.split, index, "task")
            yield build(name, example, self.asking, store)

    def example(self, index: int) -> Example:
        """Scene number `index` as an example; `meta["scene"]` is its truth."""
        rng = rng_of(self.seed, self.split, index, "scene")
        scene = sample_scene(rng, "train" if self.split == "train" else "test")
        text = describe(scene, rng)
        asked, answer = question(scene, rng)
        change, changed = edit(scene, rng)
        meta: dict[str, Any] = {"scene": scene.to_dict(), "edited": changed.to_dict(), "index": index}
        steps = [(sentence(text), Part(IMAGE, text))]
        at: Scene = scene
        for _ in range(STEPS - 1):
            said, at = edit(at, rng)
            steps.append((sentence(said), Part(IMAGE, describe(at, rng))))
        return Example(
            text,
            Part(IMAGE, text),
            Part(SPEECH, text),
            Part(MUSIC, text),
            question=asked,
            answer=answer,
            edit=change,
            edited=Part(IMAGE, describe(changed, rng)),
            steps=tuple(steps),
            source="nanoworld",
            licence=self.licence,
            meta=meta,
        )


def sentence(text: str) -> str:
    """ "make it red" -> "Make it red."."""
    return text[:1].upper() + text[1:].rstrip(".") + "."
