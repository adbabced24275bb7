"""Samples and templates: segments of text and media to one sequence of ids, and back.

A sample is a list of segments; a template fixes how they become ids and which ids are prediction targets.
Label masks come from the segments, never from a search in strings. Layout of `anyglot-chat` version 1:

    bos user <user segments> assistant <assistant segments> [user ... assistant ...] eos

- The marker of a role stands where the role changes, also in a conversation of many turns. One eos stands at
  the very end. So a turn of the assistant ends with eos or with the next `user` marker: a decoder stops at
  either (`sampling.join_ends`).
- Media of the user are written in the block's input pattern, media of the assistant in its output pattern.
- Targets are the ids of segments with `loss` (start and end ids included; not the filler of the delay pattern that the
  grammar forces, see `patterns`), and what follows such a segment
  at the end of its turn: eos, or the marker of the next role. So with the default flags the first
  `assistant` marker is no target.

Version 2 tells texts apart: between two texts in a row of one role its marker stands again. So an answer can hold the
transcript of what was heard and then the text of the answer (`... assistant TRANSCRIPT assistant ANSWER <speech> eos`,
the chain of modality of arXiv 2305.11000). All other samples are written as in version 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from anyglot_lm.files import read_json, write_json
from anyglot_lm.patterns import DELAY, Int64
from anyglot_lm.vocabulary import Direction, Vocabulary
from anyglot_tokenizers.errors import CodesError, ManifestError

Role = Literal["user", "assistant"]
ROLES: tuple[Role, ...] = ("user", "assistant")


class TextCodec(Protocol):
    """What a template needs of a text tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


@dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a sample.

    Args:
        modality: "text" or the name of a block.
        content: a string, or codes int `[K, *grid]`.
        role: who says it.
        loss: whether the model learns to write it; by default what the assistant says.
    """

    modality: str
    content: str | NDArray[Any]
    role: Role
    loss: bool | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ManifestError(f"role {self.role!r} of a segment; use 'user' or 'assistant'")
        if isinstance(self.content, str) != (self.modality == "text"):
            raise ManifestError(
                f"a segment of modality {self.modality!r} holds a {type(self.content).__name__}; text is a "
                "string, media are arrays of codes [quantizers, *grid]"
            )
        if self.loss is None:
            object.__setattr__(self, "loss", self.role == "assistant")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        if (self.modality, self.role, self.loss) != (other.modality, other.role, other.loss):
            return False
        if isinstance(self.content, str) or isinstance(other.content, str):
            return bool(self.content == other.content) if isinstance(self.content, type(other.content)) else False
        return np.array_equal(self.content, other.content)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Sample:
    """What one document of the training data says: segments in order."""

    segments: tuple[Segment, ...]

    def __init__(self, segments: Sequence[Segment]) -> None:
        object.__setattr__(self, "segments", tuple(segments))


def direction_of(role: Role) -> Direction:
    """Media of the user are input, media of the assistant are output."""
    return "output" if role == "assistant" else "input"


@dataclass(frozen=True)
class Template:
    """A named, versioned way to write samples as ids. Only the pairs in `Template.known()` exist."""

    name: str = "anyglot-chat"
    version: int = 1

    def __post_init__(self) -> None:
        if (self.name, self.version) not in self.known():
            known = ", ".join(f"{name} version {version}" for name, version in self.known())
            raise ManifestError(
                f"unknown template {self.name!r} version {self.version}; this anyglot knows {known}: update "
                "it or write the data again"
            )

    @staticmethod
    def known() -> tuple[tuple[str, int], ...]:
        """Names and versions of the templates."""
        return (("anyglot-chat", 1), ("anyglot-chat", 2))

    @property
    def tells_texts_apart(self) -> bool:
        """Whether two texts in a row of one role stay two."""
        return self.version >= 2

    def render(self, sample: Sample, vocabulary: Vocabulary, text: TextCodec | None) -> tuple[Int64, NDArray[np.bool_]]:
        """A sample -> `(ids int64 [N], loss bool [N])`; `loss[i]` says whether id `i` is a prediction target.

        `text` may be None for samples without text.

        Raises:
            ManifestError: an empty sample, or an unknown modality.
            CodesError: codes that do not fit the vocabulary.
        """
        if not sample.segments:
            raise ManifestError("a sample without segments; give it at least one")
        ids, loss = self._body(sample.segments, vocabulary, text)
        ids.append(np.asarray([vocabulary.controls["eos"]], dtype=np.int64))
        loss.append(np.asarray([bool(sample.segments[-1].loss)]))
        return np.concatenate(ids), np.concatenate(loss)

    def prompt(self, sample: Sample, vocabulary: Vocabulary, text: TextCodec | None) -> Int64:
        """The ids int64 `[N]` of a sample up to and including the marker of the assistant's next turn.

        Segments of the assistant at the end of the sample are left out, so that the prompt of a training
        sample is the part before its answer.
        """
        segments = list(sample.segments)
        while segments and segments[-1].role == "assistant":
            segments.pop()
        ids, _ = self._body(segments, vocabulary, text)
        if not segments:
            ids.append(np.asarray([vocabulary.controls["user"]], dtype=np.int64))
        ids.append(np.asarray([vocabulary.controls["assistant"]], dtype=np.int64))
        return np.concatenate(ids)

    def _body(
        self, segments: Sequence[Segment], vocabulary: Vocabulary, text: TextCodec | None
    ) -> tuple[list[Int64], list[NDArray[np.bool_]]]:
        ids = [np.asarray([vocabulary.controls["bos"]], dtype=np.int64)]
        loss = [np.zeros(1, dtype=np.bool_)]
        role: Role | None = None
        before = False
        after_text = False
        for segment in segments:
            piece = self.segment_ids(segment, vocabulary, text)
            another = self.tells_texts_apart and after_text and segment.modality == "text" and len(piece) > 0
            if segment.role != role or another:
                role = segment.role
                ids.append(np.asarray([vocabulary.controls[role]], dtype=np.int64))
                loss.append(np.asarray([before]))
                after_text = False
            if len(piece):
                after_text = segment.modality == "text"
            ids.append(piece)
            loss.append(_targets(segment, len(piece), vocabulary))
            before = bool(segment.loss)
        return ids, loss

    def segment_ids(self, segment: Segment, vocabulary: Vocabulary, text: TextCodec | None) -> Int64:
        """The ids int64 `[N]` of one segment, without any marker."""
        if isinstance(segment.content, str):
            if text is None:
                raise ManifestError("a sample with text needs the text tokenizer; pass the model's text.model")
            ids = np.asarray(text.encode(segment.content), dtype=np.int64)
            if len(ids) and int(ids.max()) >= vocabulary.text_size:
                raise ManifestError(
                    f"text id {int(ids.max())} is outside the vocabulary's {vocabulary.text_size} text ids; "
                    "use the text tokenizer the vocabulary was built for"
                )
            return ids
        return vocabulary.span(segment.modality, segment.content, direction_of(segment.role))

    def parse(self, ids: Any, vocabulary: Vocabulary, text: TextCodec | None, loss: Any | None = None) -> Sample:
        """Inverse of `render`: ids int `[N]` -> sample.

        Neighbouring texts of a role come back as one in version 1, empty ones in none.

        Codes come back as the pattern keeps them: pattern `first` gives `[1, *grid]`. With `loss` the
        segments get their flags from it, else from their role. Without `text`, text segments hold "" (codes can
        still be compared).

        Raises:
            CodesError: ids that no sample renders to.
        """
        array = np.asarray(ids, dtype=np.int64)
        flags = np.asarray(loss, dtype=np.bool_) if loss is not None else None
        runs = vocabulary.split(array)
        if not runs or runs[0].name != "bos" or runs[-1].name != "eos":
            raise CodesError("a document must open with bos and close with eos; it was cut or is of another template")
        role: Role | None = None
        segments: list[Segment] = []
        for before, run, after in zip(runs, runs[1:-1], runs[2:], strict=False):
            if run.kind == "control":
                apart = self.tells_texts_apart and before.kind == after.kind == "text"
                if run.name not in ROLES or (run.name == role and not apart):
                    raise CodesError(f"control {run.name!r} at position {run.start} is not allowed inside a document")
                role = "user" if run.name == "user" else "assistant"
                continue
            if role is None:
                raise CodesError(f"{run.name} at position {run.start} before any role marker")
            content: str | Int64
            if run.kind == "text":
                content = text.decode(array[run.start : run.stop]) if text is not None else ""
            else:
                content = vocabulary.codes(run.name, array[run.start + 1 : run.stop - 1], direction_of(role))
            flag = bool(flags[run.start]) if flags is not None else None
            segments.append(Segment(run.name, content, role, flag))
        return Sample(segments)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"name": self.name, "version": self.version}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Template:
        """Inverse of `to_dict`. Raises `ManifestError` for an unknown template."""
        try:
            return cls(content["name"], content["version"])
        except KeyError as error:
            raise ManifestError(f"template without {error}; write it again with Template.save") from error

    def save(self, path: str | Path) -> None:
        """Writes `template.json`, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Template:
        """Reads `template.json`."""
        return cls.from_dict(read_json(path))


def _targets(segment: Segment, length: int, vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """Which of the `length` ids of a segment are prediction targets."""
    targets = np.full(length, bool(segment.loss))
    if segment.modality != "text" and segment.role == "assistant":
        block = vocabulary.block(segment.modality)
        if block.pattern_of("output") is DELAY:
            targets[1:-1] &= ~DELAY.is_forced(length - 2, block.num_quantizers, fixed=block.length is not None)
    return targets


CHAT = Template()


def with_examples(examples: Sequence[Sample], query: Sample) -> Sample:
    """A few-shot sample: every example is a turn or more of a conversation, and the query the next one.

    Raises:
        ManifestError: an example that does not begin with the user and end with the assistant.
    """
    for number, example in enumerate(examples, 1):
        if not example.segments or (example.segments[0].role, example.segments[-1].role) != ROLES:
            raise ManifestError(
                f"example {number} must begin with what the user gives and end with what the assistant answers"
            )
    return Sample([segment for sample in (*examples, query) for segment in sample.segments])
