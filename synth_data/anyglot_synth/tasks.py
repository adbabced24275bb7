"""Tasks: an example (media with words) -> turns that teach one thing: transcribing, drawing, cloning, editing, ...

A task is a small function by its name in `TASKS`. Media that an example lacks are left as words, for later stages to
speak, draw or play; tasks that compute on a file (edges, a prompt of three seconds, times) need the file. What is true
of an example is not judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.dialogue import (
    ASSISTANT,
    IMAGE,
    MODALITIES,
    SPEECH,
    TEXT,
    USER,
    Dialogue,
    MediaFile,
    Part,
    Turn,
    address,
)
from anyglot_synth.seeds import rng_of
from anyglot_synth.store import Store
from anyglot_synth.templates import instruction
from anyglot_tokenizers.errors import AnyglotError

PROMPT_SECONDS = 3.0
"""Of the recording that shows a voice, as in AnyGPT's and VALL-E's evaluation."""


class TaskError(AnyglotError):
    """A task that there is not, or an example that lacks what a task needs."""


@dataclass(frozen=True)
class Example:
    """Media that mean the same, with their words.

    Args:
        text: caption, or transcript.
        image, speech, music: the medium as a part, with its file or only its words.
        prompt: a recording of the speaker of `speech` that says something else, of at least `PROMPT_SECONDS`.
        question, answer: about the image.
        edit, edited: an instruction and the image after it.
        steps: sentences, each with its image.
        words: (word, start in seconds) of `speech`, where they are known.
        frames: (second, image) seen during `speech`.
        source, licence, language, meta: as of a `Dialogue`.
    """

    text: str = ""
    image: Part | None = None
    speech: Part | None = None
    music: Part | None = None
    prompt: Part | None = None
    question: str = ""
    answer: str = ""
    edit: str = ""
    edited: Part | None = None
    steps: tuple[tuple[str, Part], ...] = ()
    words: tuple[tuple[str, float], ...] = ()
    frames: tuple[tuple[float, Part], ...] = ()
    source: str = "examples"
    licence: str = "unknown"
    language: str = "en"
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Content address of its words and files: what draws depend on."""
        media = [self.image, self.speech, self.music, self.prompt, self.edited]
        marks = [part and (part.text, part.media.sha256 if part.media else "") for part in media]
        return address([self.source, self.text, marks, self.question, self.edit, [step[0] for step in self.steps]])

    def part(self, modality: str) -> Part:
        """The part of a modality; text is its caption. Raises `TaskError`."""
        if modality == TEXT:
            return Part(TEXT, self.need("text"))
        found: Part = self.need(modality)
        return found

    def need(self, name: str) -> Any:
        """One of its fields. Raises `TaskError` where it has none."""
        value = getattr(self, name)
        if not value:
            raise TaskError(f"the example has no {name!r}")
        return value

    def file(self, name: str) -> MediaFile:
        """The file of one of its media. Raises `TaskError`."""
        part: Part = self.need(name)
        if part.media is None:
            raise TaskError(f"the {name} of the example has no file yet")
        return part.media


@dataclass(frozen=True)
class Asking:
    """How instructions are chosen: by seed, from the training or the held-out templates, written or spoken."""

    seed: int = 0
    held_out: bool = False
    spoken: float = 0.0
    """Share of instructions that are spoken, of those that hold no text to work on."""

    def __call__(self, direction: str, example: Example, text: str = "") -> Part:
        """The instruction as a part."""
        words = instruction(direction, text, self.seed, example.id, held_out=self.held_out)
        return self.part(words, example, spoken=not text)

    def part(self, words: str, example: Example, spoken: bool = True) -> Part:
        """Words of an instruction as text or speech."""
        aloud = spoken and float(rng_of(self.seed, example.id, "spoken").random()) < self.spoken
        return Part(SPEECH if aloud else TEXT, words)


Turns = tuple[Turn, ...]
Task = Callable[[Example, Asking, Store], Turns]
TASKS: dict[str, Task] = {}
"""Name -> function. The twelve pairs are called "image-to-music" and so on; the usual ones have a second name."""


def build(name: str, example: Example, asking: Asking, store: Store) -> Dialogue:
    """The dialogue of one task.

    Raises:
        TaskError: no such task, or the example lacks what it needs. StoreError, MediaError: a file is damaged.
    """
    if name not in TASKS:
        raise TaskError(f"there is no task {name!r}; use one of: {', '.join(TASKS)}")
    turns = TASKS[name](example, asking, store)
    meta = {**example.meta, **({"templates": "held-out"} if asking.held_out else {})}
    if name in ("timed-transcript", "timed-frames"):
        meta["times"] = "given" if example.words else "equal-division"
    return Dialogue(turns, example.source, example.licence, name, example.language, meta)


def task(name: str) -> Callable[[Task], Task]:
    """Registers a function under a name."""

    def register(function: Task) -> Task:
        assert name not in TASKS, name
        TASKS[name] = function
        return function

    return register


def _exchange(asked: tuple[Part, ...], *answer: Part) -> Turns:
    return Turn(USER, asked), Turn(ASSISTANT, answer)


# --- the twelve pairs ---


def _pair(source: str, target: str) -> Task:
    direction = f"{source}->{target}"

    def make(example: Example, ask: Asking, store: Store) -> Turns:
        given, wanted = example.part(source), example.part(target)
        if source == TEXT:
            return _exchange((ask(direction, example, given.text),), wanted)
        return _exchange((ask(direction, example), given), wanted)

    return make


for _source, _target in permutations(MODALITIES, 2):
    TASKS[f"{_source}-to-{_target}"] = _pair(_source, _target)
TASKS["asr"] = TASKS["speech-to-text"]
TASKS["tts"] = TASKS["text-to-speech"]
TASKS["caption"] = TASKS["image-to-text"]
TASKS["generation"] = TASKS["text-to-image"]
TASKS["music-caption"] = TASKS["music-to-text"]
TASKS["music-generation"] = TASKS["text-to-music"]


# --- speech ---


@task("voice-clone")
def voice_clone(example: Example, ask: Asking, store: Store) -> Turns:
    """Three seconds of a speaker and a text -> that speaker says the text.

    The prompt has no words of its own: which of the recording's words fall into three seconds is not known.
    """
    prompt = Part(SPEECH, "", media=cut(store, example.file("prompt"), PROMPT_SECONDS))
    words = example.need("text")
    return _exchange((ask("clone", example, words), prompt), example.part(SPEECH))


def cut(store: Store, sound: MediaFile, seconds: float) -> MediaFile:
    """The first seconds of a sound of the store, faded out over 20 ms, as a file of its own.

    Raises:
        TaskError: it is shorter.
    """
    audio, rate = store.sound(sound)
    count = round(seconds * rate)
    if len(audio) < count:
        raise TaskError(f"{sound.file} lasts {len(audio) / rate:.2f} s; {seconds:g} s are needed")
    piece = audio[:count].copy()
    fade = min(count, rate // 50)
    piece[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    origin = {**sound.origin, "cut": f"first {seconds:g} s"}
    return store.put_sound(address(["cut", sound.sha256, seconds]), piece, rate, origin)


@task("timed-transcript")
def timed_transcript(example: Example, ask: Asking, store: Store) -> Turns:
    """Speech -> its words, each after the second at which it begins: "0.00 a 0.21 small 0.55 dog"."""
    said = " ".join(f"{start:.2f} {word}" for word, start in word_times(example))
    return _exchange((ask("speech->times", example), example.part(SPEECH)), Part(TEXT, said))


@task("timed-frames")
def timed_frames(example: Example, ask: Asking, store: Store) -> Turns:
    """Speech and pictures with their times -> for each picture the words that begin while it is seen."""
    frames = sorted(example.need("frames"), key=lambda frame: frame[0])
    shown: list[Part] = []
    for second, picture in frames:
        shown += [Part(TEXT, f"{second:.2f} s"), picture]
    ends = [second for second, _ in frames[1:]] + [float("inf")]
    words = word_times(example)
    lines = []
    for (start, _), end in zip(frames, ends, strict=True):
        said = " ".join(word for word, at in words if start <= at < end)
        lines.append(f"{start:.2f} s: {said or '-'}")
    return _exchange((ask("frames->times", example), example.part(SPEECH), *shown), Part(TEXT, "\n".join(lines)))


def word_times(example: Example) -> list[tuple[str, float]]:
    """(word, start in seconds): those that came with the data, else equal shares of the recording by letters.

    Equal division is a guess, and `meta["times"]` says so; forced alignment is not done here.
    """
    if example.words:
        return [(word, float(start)) for word, start in example.words]
    seconds = example.file("speech").seconds
    if not seconds:
        raise TaskError("the speech of the example has no length")
    words = example.need("text").split()
    ends = np.cumsum([len(word) + 1 for word in words])
    return [(word, float(seconds * (end - len(word) - 1) / ends[-1])) for word, end in zip(words, ends, strict=True)]


# --- pictures ---


@task("vqa")
def vqa(example: Example, ask: Asking, store: Store) -> Turns:
    """A picture and a written question -> a written answer."""
    asked = (example.part(IMAGE), Part(TEXT, example.need("question")))
    return _exchange(asked, Part(TEXT, example.need("answer")))


@task("spoken-vqa")
def spoken_vqa(example: Example, ask: Asking, store: Store) -> Turns:
    """A picture and a spoken question -> a written answer."""
    asked = (example.part(IMAGE), Part(SPEECH, example.need("question")))
    return _exchange(asked, Part(TEXT, example.need("answer")))


@task("spoken-vqa-spoken")
def spoken_vqa_spoken(example: Example, ask: Asking, store: Store) -> Turns:
    """A picture and a spoken question -> a spoken answer."""
    asked = (example.part(IMAGE), Part(SPEECH, example.need("question")))
    return _exchange(asked, Part(SPEECH, example.need("answer")))


@task("image-editing")
def image_editing(example: Example, ask: Asking, store: Store) -> Turns:
    """A picture and what to change -> the changed picture."""
    return _exchange((example.part(IMAGE), ask.part(example.need("edit"), example)), example.need("edited"))


@task("story")
def story(example: Example, ask: Asking, store: Store) -> Turns:
    """A wish -> sentences and pictures by turns."""
    told = [part for words, picture in example.need("steps") for part in (Part(TEXT, words), picture)]
    return _exchange((ask("story", example),), *told)


@task("image-to-edges")
def image_to_edges(example: Example, ask: Asking, store: Store) -> Turns:
    """A picture -> its edges: a modality of few data made from one of many."""
    edges = edge_part(store, example.file(IMAGE))
    return _exchange((ask("image->edges", example), example.part(IMAGE)), edges)


@task("edges-to-image")
def edges_to_image(example: Example, ask: Asking, store: Store) -> Turns:
    """Edges -> a picture that has them."""
    edges = edge_part(store, example.file(IMAGE))
    return _exchange((ask("edges->image", example), edges), example.part(IMAGE))


def edge_part(store: Store, picture: MediaFile) -> Part:
    """The edges of a picture of the store, white on black, as a picture of its own."""
    pixels = edges_of(store.picture(picture))
    origin = {"backend": "sobel", "of": picture.sha256, **{k: v for k, v in picture.origin.items() if k == "licence"}}
    return Part(IMAGE, "", media=store.put_picture(address(["sobel", picture.sha256]), pixels, origin))


def edges_of(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Edges by Sobel's 3 x 3 operator: the largest gradient of the channels, uint8 `[H, W, 3]`, scaled to 255.

    A picture of one color has no edges: it gives black.
    """
    padded = np.pad(pixels.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth_rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    smooth_columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across = smooth_rows[:, 2:] - smooth_rows[:, :-2]
    down = smooth_columns[2:] - smooth_columns[:-2]
    length = np.hypot(across, down).max(axis=2)
    scaled = np.round(255 * length / max(float(length.max()), 1e-6)).astype(np.uint8)
    return np.repeat(scaled[:, :, None], 3, axis=2)
