"""A conversation in the terminal, with files dropped in as paths: what `anyglot chat` does with lines.

A line is what the user says: words, and paths of pictures and sounds among them. Text is printed as it is written;
pictures and sounds are written next to the transcript, and their paths printed. Lines that begin with / and one word
are commands. The conversation itself is `anyglot_lm.chat`'s.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_lm.chat import Chat
from anyglot_lm.engine import Sampling
from anyglot_lm.grammar import TEXT, Request, read_order
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.unified import MAX_TEXT, Output, UnifiedModel
from anyglot_tokenizers.errors import AnyglotError, ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.media import write_audio, write_image

FORMAT, VERSION = "anyglot-chat", 1
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff"}
WORDS = re.compile(r"""'[^']+'(?!\w)|"[^"]+"(?!\w)|(?:\\.|\S)+""")
"""What is said, and paths with spaces in quotes or behind backslashes, as terminals drop them."""
COMMAND = re.compile(r"/\w*(?!\S)")
HELP = """\
words and paths         photos/cat.png what is this?      music:song.wav says that a sound is music, not speech
/to text,speech         what answers consist of, in order; /to any leaves it to the model,
/to chain               is text,text,speech: what was heard, the answer, and the answer spoken
/temperature 0.8        of sampling; 0 takes the likeliest
/seed 3                 of the next answer
/save FILE  /load FILE  the conversation as JSON
/new  /help  /quit"""


def _to_stdout(text: str) -> None:
    print(text, end="", flush=True)


class Session:
    """What `anyglot chat` does with lines.

    Args:
        model: the unified model.
        out: folder for `transcript.jsonl` and media; numbers go on after those that are there.
        to: modalities of an answer, joined by commas, or "any".
        temperature: of sampling.
        seed: of the first answer; each answer takes the next one.
        write: where output goes.
    """

    def __init__(
        self,
        model: UnifiedModel,
        out: Path,
        *,
        to: str = "any",
        temperature: float = 0.0,
        seed: int = 0,
        write: Callable[[str], None] = _to_stdout,
    ) -> None:
        self.model, self.out, self.write, self.seed = model, out, write, seed % 2**64
        self.out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to shows now
        self.chat = Chat(model)
        self.set_to(to)
        self.set_temperature(temperature)

    def run(self, lines: Iterable[str]) -> None:
        """Reads lines to the end, or to /quit. A mistake of the user is one line, and the conversation goes on."""
        for line in lines:
            line = line.strip()
            try:
                if line == "/quit":
                    return
                if COMMAND.match(line):  # an absolute path is none
                    self.command(line)
                elif line:
                    self.say(line)
            except AnyglotError as error:
                self.write(f"! {error}\n")

    def command(self, line: str) -> None:
        """Runs a command. Raises `ManifestError` for an unknown one, or an argument that does not fit."""
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name == "to":
            self.set_to(argument)
        elif name == "temperature":
            self.set_temperature(_number(argument, float))
        elif name == "seed":
            self.seed = _number(argument, int) % 2**64
        elif name == "new":
            self.chat = Chat(self.model, self.chat.engine)
        elif name == "save":
            self.save(_path(argument))
        elif name == "load":
            self.load(_path(argument))
        elif name == "help":
            self.write(f"{HELP}\n")
        else:
            raise ManifestError(f"/{name} is no command; /help lists them")

    def set_to(self, to: str) -> None:
        """Fixes what answers consist of. Raises `ManifestError` for an unknown modality."""
        known = (TEXT, *self.model.vocabulary.modalities)
        order = None if to == "any" else read_order(to)
        unknown = [name for name in order or () if name not in known]
        if unknown:
            raise ManifestError(f"/to {to}: no modality {unknown[0]!r}; there are {', '.join(known)}, or any")
        self.model.check_request(Request(order=order))
        self.order = order

    def set_temperature(self, temperature: float) -> None:
        """Fixes how ids are chosen."""
        self.sampling = dict.fromkeys((TEXT, *self.model.vocabulary.modalities), Sampling(temperature))

    def say(self, line: str) -> None:
        """Says a line and writes the answer."""
        segments = self.read(line)
        room = self.chat.engine.capacity // 2
        writable = {name for name, t in self.model.tokenizers.items() if t.spec.decodes}
        allowed = None if self.order else frozenset({TEXT, *writable})
        request = Request(order=self.order, allowed=allowed, max_ids=room, max_length={TEXT: min(MAX_TEXT, room)})
        number = self._next_number()
        outputs: list[Output] = []
        before = self.chat.left_out
        for event in self.chat.say(segments, request, self.sampling, self.seed):
            if event.kind == "text":
                self.write(event.text)
            elif event.kind == "end" and event.output is not None:
                outputs.append(event.output)
                path = self._write_media(event.output, number, len(outputs))
                self.write(f"[{event.modality}: {path}]\n" if path is not None else "\n")
        self.seed += 1
        if self.chat.left_out > before:
            self.write("(the oldest turns no longer fit and are left out)\n")
        self._note(number, line, outputs)

    def read(self, line: str) -> list[Segment]:
        """What is said, as it stands in the line, and media at the paths among it, in order.

        Raises:
            MediaError: a picture or sound that cannot be read.
        """
        segments: list[Segment] = []
        start = 0  # of what is not yet in segments
        for word in WORDS.finditer(line):
            found = self._medium(_bare(word[0]))
            if found is not None:
                segments += [*_said(line[start : word.start()]), found]
                start = word.end()
        return [*segments, *_said(line[start:])]

    def _medium(self, word: str) -> Segment | None:
        modality, _, rest = word.partition(":")
        modalities = self.model.vocabulary.modalities
        if modality in modalities and rest:
            return self.model.segment(modality, _path(rest))
        ending = Path(word).suffix.lower()
        if ending not in PICTURES | SOUNDS or not os.path.isfile(_path(word)):
            return None
        timed = [m for m in modalities if self.model.tokenizers[m].spec.sample_rate is not None]
        still = [m for m in modalities if m not in timed]
        kinds = still if ending in PICTURES else ["speech"] if "speech" in timed else timed
        if not kinds:
            raise ManifestError(f"{word}: this model knows no such media; it has {', '.join(modalities)}")
        return self.model.segment(kinds[0], _path(word))

    def save(self, path: Path) -> None:
        """Writes the conversation as JSON."""
        said = [
            {
                "role": s.role,
                "modality": s.modality,
                "content": s.content if isinstance(s.content, str) else s.content.tolist(),
            }
            for s in self.chat.segments
        ]
        content = {
            "format": FORMAT,
            "version": VERSION,
            "vocabulary": self.model.vocabulary.fingerprint,
            "segments": said,
        }
        try:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(content), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path}: cannot be written ({error}); give another file") from error
        self.write(f"(saved {path})\n")

    def load(self, path: Path) -> None:
        """Goes on with a saved conversation. Raises `ManifestError` if it is none, or of another model."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ManifestError(f"{path}: no conversation that this version of anyglot wrote")
            if content["vocabulary"] != self.model.vocabulary.fingerprint:
                raise ManifestError(f"{path}: this conversation was with a model of another vocabulary; load that one")
            segments = [
                Segment(
                    s["modality"], s["content"] if isinstance(s["content"], str) else np.array(s["content"]), s["role"]
                )
                for s in content["segments"]
            ]
            if segments:  # codes that this model cannot say are found here
                self.model.template.render(Sample(segments), self.model.vocabulary, self.model.text)
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(f"{path}: cannot be read ({error})") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ManifestError(f"{path}: no conversation that /save wrote ({error!r})") from error
        self.chat = Chat(self.model, self.chat.engine, segments)
        self.write(f"(loaded {path}: {len(segments)} segments)\n")

    def _write_media(self, output: Output, number: int, part: int) -> Path | None:
        if output.media is None:
            return None
        spec = self.model.tokenizers[output.modality].spec
        ending = "png" if spec.sample_rate is None else "wav"
        path = self.out / f"{number:03d}-{part}-{output.modality}.{ending}"
        self.out.mkdir(parents=True, exist_ok=True)
        if spec.sample_rate is None:
            write_image(path, output.media)
        else:
            write_audio(path, output.media, spec.sample_rate)
        return path

    def _next_number(self) -> int:
        transcript = self.out / "transcript.jsonl"
        return 1 + (transcript.read_bytes().count(b"\n") if transcript.exists() else 0)

    def _note(self, number: int, line: str, outputs: list[Output]) -> None:
        """A line of the transcript."""
        self.out.mkdir(parents=True, exist_ok=True)
        answer = [{"modality": o.modality, **({"text": o.text} if o.text is not None else {})} for o in outputs]
        entry = json.dumps({"turn": number, "user": line, "assistant": answer}, ensure_ascii=False)
        with (self.out / "transcript.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{entry}\n")


def _said(text: str) -> list[Segment]:
    return [Segment(TEXT, text.strip(), "user")] if text.strip() else []


def _bare(word: str) -> str:
    """A path without the quotes or backslashes that a terminal drops it with."""
    if word[0] in "'\"" and word[-1] == word[0] and len(word) > 2:
        return word[1:-1]
    return re.sub(r"\\(.)", r"\1", word)


def _number(argument: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(argument)
    except ValueError as error:
        raise ManifestError(f"{argument!r} is no number") from error


def _path(argument: str) -> Path:
    if not argument:
        raise ManifestError("give a file, as in /save talk.json")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:  # ~ of nobody
        raise ManifestError(f"{argument}: {error}") from error
