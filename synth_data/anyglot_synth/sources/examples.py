"""Media with words -> tasks: rows that name files and what they say become dialogues of the tasks asked for.

    {"speech": "a.wav", "text": "hello there", "speaker": "ann"}
    {"image": "cat.png", "text": "a cat", "question": "What animal is it?", "answer": "a cat"}

Fields: text (or caption, transcript), image, speech (or audio), music, speaker, question, answer, edit, edited, words
([[word, second], ...]), frames ([[second, file], ...]). A medium given as {"text": ...} has no file yet and is made
later.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anyglot_synth.dialogue import IMAGE, MUSIC, SPEECH, Dialogue, DialogueError, Part
from anyglot_synth.forms import checked_weights, draw
from anyglot_synth.sources.base import RowSource, SourceError, folder_name, text_of
from anyglot_synth.sources.media import take_picture, take_sound
from anyglot_synth.store import Store
from anyglot_synth.tasks import PROMPT_SECONDS, TASKS, Asking, Example, TaskError, build

MAX_SPEAKERS = 100_000
"""Voices that are remembered for cloning; the one not heard for longest is forgotten first."""


@dataclass(kw_only=True)
class Examples(RowSource):
    """Rows of media with words, as tasks.

    Args:
        tasks: names of `TASKS`, or weights by name. With `each` false one is drawn per row.
        each: whether every row gives all of the tasks that it has what they need for.
        media: folder that files are relative to; the folder of the data otherwise.
        held_out: use the templates that are held out for tests.
        spoken_instructions: share of the instructions that are spoken, from 0 to 1.
        seed: of tasks, templates and the form.

    All others: see `RowSource`.
    """

    name: ClassVar[str] = "examples"
    tasks: str | Sequence[str] | Mapping[str, float] = "caption"
    each: bool = False
    media: str = ""
    held_out: bool = False
    spoken_instructions: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weights = task_weights(self.tasks, self.name)
        self.asking = asking_of(self.seed, self.held_out, self.spoken_instructions, self.name)
        self._heard: OrderedDict[str, Part] = OrderedDict()

    def options(self) -> dict[str, Any]:
        """See `RowSource`."""
        asking = {"held_out": self.asking.held_out, "spoken": self.asking.spoken}
        own = {"tasks": self.weights, "each": self.each, "seed": self.asking.seed, "media": folder_name(self.media)}
        return {**own, **asking}

    def begin(self) -> None:
        """Forgets all voices. A speaker's prompt is an earlier recording, so the first of each cannot be cloned."""
        self._heard.clear()

    def build(self, row: Mapping[str, Any], store: Store, folder: Path) -> Iterator[Dialogue]:
        """See `RowSource`."""
        example = self._example(row, store, Path(self.media) if self.media else folder)
        names = list(self.weights) if self.each else [draw(self.weights, self.asking.seed, example.id, "task")]
        problems: list[str] = []
        for name in names:
            try:
                yield build(name, example, self.asking, store)
            except TaskError as error:
                problems.append(f"task {name}: {error}")
        if len(problems) == len(names):
            raise DialogueError(problems[0])

    def _example(self, row: Mapping[str, Any], store: Store, folder: Path) -> Example:
        text = text_of(row, "text", "caption", "transcript", needed=False)

        def medium(modality: str, *names: str) -> Part | None:
            given = next((row[name] for name in names if row.get(name) not in (None, "")), None)
            if given is None:
                return None
            if isinstance(given, Mapping) and "bytes" not in given and "path" not in given:
                return Part(modality, text_of(given, "text"))
            take = take_picture if modality == IMAGE else take_sound
            speaker = {"speaker": str(row["speaker"])} if modality == SPEECH and row.get("speaker") is not None else {}
            return Part(modality, text, media=take(store, given, folder, speaker))

        speech = medium(SPEECH, "speech", "audio")
        return Example(
            text,
            medium(IMAGE, "image"),
            speech,
            medium(MUSIC, "music"),
            self._prompt(row, speech),
            question=text_of(row, "question", needed=False),
            answer=text_of(row, "answer", needed=False),
            edit=text_of(row, "edit", needed=False),
            edited=medium(IMAGE, "edited"),
            words=_timed(row, "words", str),
            frames=tuple(
                (second, Part(IMAGE, "", media=take_picture(store, file, folder)))
                for file, second in _timed(row, "frames", str)
            ),
            source=self.data_name,
            language=self.language,
        )

    def _prompt(self, row: Mapping[str, Any], speech: Part | None) -> Part | None:
        """An earlier recording of the same speaker; this one is remembered for later ones, if it is long enough."""
        speaker = row.get("speaker")
        if speaker is None or speech is None or speech.media is None:
            return None
        found = self._heard.pop(str(speaker), None)
        if found and found.media and found.media.sha256 == speech.media.sha256:
            found = None
        keep = speech if (speech.media.seconds or 0) >= PROMPT_SECONDS else found
        if keep:
            self._heard[str(speaker)] = keep
            if len(self._heard) > MAX_SPEAKERS:
                self._heard.popitem(last=False)
        return found


def task_weights(tasks: str | Sequence[str] | Mapping[str, float], source: str) -> dict[str, float]:
    """Weights by name, from a name, names or weights. Raises `SourceError` for what is no task."""
    names = [tasks] if isinstance(tasks, str) else tasks
    given = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    unknown = [name for name in given if name not in TASKS]
    if unknown:
        raise SourceError(f"source {source}: there is no task {unknown[0]!r}; use some of: {', '.join(TASKS)}")
    return checked_weights(given, tuple(TASKS), "task")


def asking_of(seed: int, held_out: bool, spoken: float, source: str) -> Asking:
    """How to ask. Raises `SourceError` where the share of spoken instructions is none."""
    if not 0 <= spoken <= 1:
        raise SourceError(f"source {source}: spoken_instructions is {spoken}; use a share from 0 to 1")
    return Asking(seed, held_out, spoken)


def _timed(row: Mapping[str, Any], name: str, kind: type) -> tuple[tuple[Any, float], ...]:
    """Pairs of a string and a second, written in either order. Raises `DialogueError`."""
    found = []
    pairs = row.get(name) or ()
    if not isinstance(pairs, list | tuple):
        raise DialogueError(f"{name!r} is a {type(pairs).__name__}, not a list of pairs of a string and a second")
    for pair in pairs:
        first, second = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
        if isinstance(first, int | float):
            first, second = second, first
        if not isinstance(first, kind) or isinstance(second, bool) or not isinstance(second, int | float):
            raise DialogueError(f"{name!r} holds {pair!r:.60}; pairs of a string and a second are needed")
        found.append((first, float(second)))
    return tuple(found)
