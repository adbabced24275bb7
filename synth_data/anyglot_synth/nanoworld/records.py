"""Records: every scene of nanoworld as text, image, speech and music, in memory or on disk.

Record number `index` of a split is a function of (seed, split, index) and the speech engine, whatever the
number of workers and however often the work was interrupted. On disk a record is a line of `records.jsonl`
next to plain media files, all named by the record's id, a sha256 over its content. The line is appended after
its media are in place, so a run killed at any moment leaves whole records behind, and the next run makes the
rest.

This file only composes: sentences, pictures, melodies and voices are made by the sibling modules. It makes no codes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anyglot_synth.nanoworld import melody
from anyglot_synth.nanoworld.draw import draw
from anyglot_synth.nanoworld.language import NUMBERS, all_spoken_clauses, describe, questions
from anyglot_synth.nanoworld.scene import (
    COLORS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Split,
    Thing,
    sample_scene,
)
from anyglot_synth.nanoworld.voices import (
    SAMPLE_RATE,
    VOICES,
    SpeechCache,
    Voice,
    default_cache_dir,
    engine_version,
    write_sound,
)
from anyglot_tokenizers.errors import AnyglotError, ManifestError
from anyglot_tokenizers.files import atomic_write, is_temporary

FORMAT = 1  # counts changes of what a record holds: part of its id
RECORDS = "records.jsonl"
PARTS = ("image", "speech", "music")
_SPLITS: tuple[Split, ...] = ("train", "test")
_STREAMS = ("scene", "text", "spoken_text", "voice", "image", "speech", "music")
_MEDIA = {"image": ".png", "speech": ".speech.wav", "music": ".music.wav", "midi": ".mid"}

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Record:
    """One scene in every modality, in memory. A part that was not asked for is an empty array."""

    id: str
    split: Split
    seed: int
    index: int
    scene: Scene
    text: str
    spoken_text: str  # the words of `speech`
    voice: str
    image: NDArray[np.uint8] = field(repr=False)  # [64, 64, 3]
    speech: NDArray[np.float32] = field(repr=False)  # [samples] at 16 kHz
    music: NDArray[np.float32] = field(repr=False)  # [samples] at 16 kHz


@dataclass(frozen=True)
class StoredRecord:
    """One line of `records.jsonl`; the media are paths of files."""

    id: str
    split: Split
    seed: int
    index: int
    scene: Scene
    text: str
    spoken_text: str
    voice: str
    image: Path  # PNG
    speech: Path  # WAV, 16 kHz, 16 bits
    music: Path  # WAV, 16 kHz, 16 bits
    midi: Path


@dataclass(frozen=True)
class _Outline:
    """What a record says, before any medium is made."""

    split: Split
    seed: int
    index: int
    scene: Scene
    text: str
    spoken_text: str
    voice: Voice

    def rng(self, stream: str) -> np.random.Generator:
        return stream_of(self.split, self.seed, self.index, stream)

    def id(self, parts: Collection[str]) -> str:
        """Content address. The engine counts only where there is speech: the rest needs no engine."""
        spoken = "speech" in parts
        content = {
            "engine": [engine_version(self.voice.engine), dict(self.voice.params)] if spoken else None,
            "format": FORMAT,
            "index": self.index,
            "scene": self.scene.to_dict(),
            "seed": self.seed,
            "split": self.split,
            "spoken_text": self.spoken_text,
            "text": self.text,
            "voice": self.voice.name,
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def stream_of(split: Split, seed: int, index: int, stream: str) -> np.random.Generator:
    """One stream of randomness per record and purpose: a change to one purpose leaves the others as they were."""
    return np.random.default_rng([seed, _SPLITS.index(split), index, _STREAMS.index(stream)])


def _outline(split: Split, seed: int, index: int) -> _Outline:
    rng = partial(stream_of, split, seed, index)
    scene = sample_scene(rng("scene"), split)
    return _Outline(
        split,
        seed,
        index,
        scene,
        describe(scene, rng("text"), style="text"),
        describe(scene, rng("spoken_text"), style="spoken"),
        VOICES[int(rng("voice").integers(len(VOICES)))],
    )


def _outlines(split: Split, num: int, seed: int) -> list[_Outline]:
    if split not in _SPLITS:
        raise AnyglotError(f"split is {split!r}; use one of {', '.join(_SPLITS)}")
    if num < 0 or seed < 0:
        raise AnyglotError(f"num is {num} and seed is {seed}; both must be 0 or more")
    return [_outline(split, seed, index) for index in range(num)]


def spoken_sentences() -> list[str]:
    """Every clause, question and answer that is said about nanoworld (some 1100): what `SpeechCache.prefetch` takes."""
    alone = [Scene((Thing(*values),)) for values in product(SHAPES, COLORS, SIZES, ROWS, COLUMNS)]
    asked = [pair for scene in alone for pair in questions(scene)]
    return list(
        dict.fromkeys([*all_spoken_clauses(), *sorted(q for q, _ in asked), *sorted(a for _, a in asked), *NUMBERS[1:]])
    )


def _prefetch(outlines: list[_Outline], cache: SpeechCache) -> None:
    cache.prefetch_said((outline.spoken_text, outline.voice) for outline in outlines)


def _compose(outline: _Outline, cache: SpeechCache, parts: Collection[str]) -> Record:
    return Record(
        outline.id(parts),
        outline.split,
        outline.seed,
        outline.index,
        outline.scene,
        outline.text,
        outline.spoken_text,
        outline.voice.name,
        draw(outline.scene, outline.rng("image")) if "image" in parts else np.zeros((0, 0, 3), np.uint8),
        cache.say(outline.spoken_text, outline.voice, outline.rng("speech"))
        if "speech" in parts
        else np.zeros(0, np.float32),
        melody.render(outline.scene, outline.rng("music"), sample_rate=SAMPLE_RATE)
        if "music" in parts
        else np.zeros(0, np.float32),
    )


# --- processes ---


class _Worker:
    """State of one worker process: its view of the clip cache."""

    cache: SpeechCache

    @classmethod
    def start(cls, cache_dir: Path) -> None:
        cls.cache = SpeechCache(cache_dir)
        parent = multiprocessing.parent_process()
        if parent is not None:  # a worker must not outlive a parent that was killed
            threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _compose_here(outline: _Outline, parts: Collection[str]) -> Record:
    return _compose(outline, _Worker.cache, parts)


def _store_here(outline: _Outline, out_dir: Path) -> dict[str, Any]:
    return _store(outline, _Worker.cache, out_dir)


def _map(function: Callable[[_Outline], Any], outlines: list[_Outline], cache: SpeechCache) -> Iterator[Any]:
    """Apply `function` in order, in as many processes as the cache has workers (in this one when that is 1)."""
    folder = cache.cache_dir
    assert folder is not None
    if cache.workers == 1 or len(outlines) < 2 * cache.workers:
        _Worker.cache = cache
        yield from map(function, outlines)
        return
    with ProcessPoolExecutor(
        cache.workers, multiprocessing.get_context("spawn"), initializer=_Worker.start, initargs=(folder,)
    ) as pool:
        yield from pool.map(function, outlines, chunksize=min(32, max(1, len(outlines) // (4 * cache.workers))))


def generate(
    split: Split,
    num: int,
    seed: int = 0,
    *,
    cache_dir: PathLike | None = None,
    workers: int = 1,
    parts: Collection[str] = PARTS,
) -> Iterator[Record]:
    """Make `num` records in memory, one after the other.

    Args:
        split: "train" or "test".
        num: how many; record i is the same whatever `num` is.
        seed: another seed gives other records.
        cache_dir: folder of spoken clips, filled first where needed; None takes `default_cache_dir()`.
        workers: processes; with 1 the work is done in this one.
        parts: which media to make, of "image", "speech" and "music".

    Raises:
        AnyglotError: bad arguments. SpeechError: speech is asked for and there is no engine.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise AnyglotError(f"parts holds {sorted(unknown)}; use some of {', '.join(PARTS)}")
    outlines = _outlines(split, num, seed)
    cache = SpeechCache(default_cache_dir() if cache_dir is None else cache_dir, workers)
    if "speech" in parts:
        _prefetch(outlines, cache)
    yield from _map(partial(_compose_here, parts=tuple(parts)), outlines, cache)


def world(
    split: Split,
    num: int,
    seed: int = 0,
    *,
    cache_dir: PathLike | None = None,
    workers: int = 1,
    parts: Collection[str] = PARTS,
) -> list[Record]:
    """The records of `generate` as a list: about 0.4 MB each with all parts."""
    return list(generate(split, num, seed, cache_dir=cache_dir, workers=workers, parts=parts))


# --- on disk ---


def _store(outline: _Outline, cache: SpeechCache, out_dir: Path) -> dict[str, Any]:
    """Write the media of a record, return its line."""
    record = _compose(outline, cache, PARTS)
    names = _names(record.id)
    (out_dir / names["image"]).parent.mkdir(parents=True, exist_ok=True)  # of all of them
    with atomic_write(out_dir / names["image"]) as path:
        Image.fromarray(record.image).save(path, format="PNG")
    for part, audio in (("speech", record.speech), ("music", record.music)):
        with atomic_write(out_dir / names[part]) as path:
            write_sound(path, audio, "WAV")
    with atomic_write(out_dir / names["midi"]) as path:
        melody.write_midi(path, melody.notes(record.scene))
    return {
        "id": record.id,
        "split": record.split,
        "seed": record.seed,
        "index": record.index,
        "scene": record.scene.to_dict(),
        "text": record.text,
        "spoken_text": record.spoken_text,
        "voice": record.voice,
        "engine": engine_version(outline.voice.engine),
        **names,
    }


def _names(record_id: str) -> dict[str, str]:
    return {part: f"media/{record_id[:2]}/{record_id}{suffix}" for part, suffix in _MEDIA.items()}


@contextmanager
def _sole_writer(out_dir: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock: there the user must not start two writers
        yield
        return
    with open(out_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AnyglotError(
                f"another process is writing records to {out_dir}; wait for it or choose another folder"
            ) from error
        yield


def _recover(path: Path) -> set[str]:
    """Ids of the whole lines of a records file. A last line that was cut off by a kill is removed from the file."""
    if not path.is_file():
        return set()
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
    return {entry["id"] for entry in _lines(path)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return  # still being written, or cut off by a kill
            try:
                entry = json.loads(line)
                if not entry.keys() >= {"id", "split", "scene", "text", "spoken_text", "voice", *_MEDIA}:
                    raise ValueError("a field is missing")
            except (ValueError, AttributeError) as error:
                raise ManifestError(
                    f"{path}, line {number} is no record ({error}); delete it and make the records again"
                ) from error
            yield entry


def make(
    out_dir: PathLike,
    split: Split = "train",
    num: int = 100,
    seed: int = 0,
    workers: int = 1,
    *,
    cache_dir: PathLike | None = None,
    progress: Progress | None = None,
) -> int:
    """Have records 0..num-1 of a split in a folder: `records.jsonl` and `media/`. Returns how many were made now.

    Records that are there already are left alone; ones whose media were deleted get them again. Splits and
    seeds may share a folder. Killed at any time and run again, the folder ends up the same.

    Args:
        out_dir: folder, made when needed.
        split, num, seed: as in `generate`.
        workers: processes.
        cache_dir: folder of spoken clips; None takes `default_cache_dir()`.
        progress: called as progress(done, total) after every record.

    Raises:
        SpeechError: no speech engine. ManifestError: `records.jsonl` is damaged.
        AnyglotError: bad arguments, or another process is writing to the folder.
    """
    outlines = _outlines(split, num, seed)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    cache = SpeechCache(default_cache_dir() if cache_dir is None else cache_dir, workers)
    with _sole_writer(out_dir):
        known = _recover(out_dir / RECORDS)
        for leftover in (out_dir / "media").glob("*/.*.tmp*"):  # of a run that was killed
            if is_temporary(leftover):
                leftover.unlink(missing_ok=True)

        def is_whole(outline: _Outline) -> bool:
            name = outline.id(PARTS)
            return name in known and all((out_dir / path).is_file() for path in _names(name).values())

        missing = [outline for outline in outlines if not is_whole(outline)]
        _prefetch(missing, cache)
        with open(out_dir / RECORDS, "ab", buffering=0) as file:
            entries = _map(partial(_store_here, out_dir=out_dir), missing, cache)
            for done, entry in enumerate(entries, start=1):
                if entry["id"] not in known:
                    file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
                if progress:
                    progress(done, len(missing))
            os.fsync(file.fileno())
    return len(missing)


def iterate(out_dir: PathLike, split: Split | None = None) -> Iterator[StoredRecord]:
    """Yield the records of a folder, in the order they were made; only those of `split` when it is given.

    Raises:
        ManifestError: there is no `records.jsonl`, or a line of it is damaged.
    """
    folder = Path(out_dir)
    if not (folder / RECORDS).is_file():
        raise ManifestError(f"{folder / RECORDS} does not exist; make records first: records.make({str(folder)!r})")
    for entry in _lines(folder / RECORDS):
        if split is None or entry["split"] == split:
            yield StoredRecord(
                entry["id"],
                entry["split"],
                entry["seed"],
                entry["index"],
                Scene.from_dict(entry["scene"]),
                entry["text"],
                entry["spoken_text"],
                entry["voice"],
                *(folder / entry[part] for part in _MEDIA),
            )
