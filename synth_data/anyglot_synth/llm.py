"""`Writer`: one small interface to language models that write data, with a cache on disk and checked answers.

A request names all that its answer depends on (messages, seed, limits), and a writer's `identity` names the model, so
an answer has a content address and is never paid for twice. What a model writes is not trusted: `ask_all` takes only
what a parser accepts, tries other seeds for the rest and says why each was refused. No model and no prompt is here.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

from anyglot_synth.backends import BackendError
from anyglot_synth.dialogue import Json, address
from anyglot_synth.registry import Registry
from anyglot_synth.seeds import seed_of
from anyglot_synth.store import StoreError
from anyglot_tokenizers.files import atomic_write

T = TypeVar("T")


class WriterError(BackendError):
    """A language model is not here, or gave no answer."""

    answers: Mapping[int, str] = MappingProxyType({})
    """Of a batch, those that there are nevertheless, by place."""


@dataclass(frozen=True)
class Request:
    """What a writer is asked.

    Args:
        messages: `(role, content)` pairs; roles are "system", "user" and "assistant".
        seed: of the sampling.
        max_tokens: of the answer.
        temperature: 0 takes the likeliest word each time.
        stop: the answer ends before the first of these strings.
        prefix: the answer's own first words. The answer that comes back begins with them, except from a server, which
            is only asked to.
    """

    messages: tuple[tuple[str, str], ...]
    seed: int = 0
    max_tokens: int = 256
    temperature: float = 0.8
    stop: tuple[str, ...] = ()
    prefix: str = ""


class Writer(ABC):
    """A language model that answers chats. Light until its first answer."""

    name: ClassVar[str]
    licence: str = "unknown"
    """SPDX name under which what it writes may be used, as far as its own licence says."""
    batch_size: int = 1
    """Requests that `complete_all` takes at once."""
    independent: bool = False
    """Whether an answer is the same whatever else is in its batch."""

    @abstractmethod
    def identity(self) -> Json:
        """JSON of all that changes what it writes: engine, version, weights, sampling. Raises `WriterError`."""

    @abstractmethod
    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        """Answers of up to `batch_size` requests, in order. Raises `WriterError`, with the answers that there are."""

    def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        seed: int,
        max_tokens: int = 256,
        temperature: float = 0.8,
        stop: Sequence[str] = (),
        prefix: str = "",
    ) -> str:
        """The answer to `[{"role": ..., "content": ...}, ...]`; the rest is as in `Request`."""
        pairs = tuple((message["role"], message["content"]) for message in messages)
        return self.complete_all([Request(pairs, seed, max_tokens, temperature, tuple(stop), prefix)])[0]


WRITERS: Registry[Writer] = Registry(
    "writer",
    WriterError,
    {
        "transformers": "anyglot_synth.transformers_writer:TransformersWriter",
        "openai": "anyglot_synth.openai_writer:OpenAIWriter",
    },
    key="engine",
)
"""Name in a recipe -> class, imported on first use."""


def build_writer(config: Any) -> Writer:
    """A writer from a recipe: `{engine: transformers, model: folder}`. Raises `WriterError`."""
    return WRITERS.make(config, "writer")


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop strings."""
    return text[: min((at for at in (text.find(s) for s in stop) if at >= 0), default=len(text))]


class CachedWriter(Writer):
    """Keeps another writer's answers in a folder, one JSON file each, by content address.

    A batch is asked again as a whole when one of its answers is missing: numbers of a batched model depend a little on
    what else is in the batch, and a run that was killed must go on as it would have. Of a writer whose answers are
    `independent` only those that are missing are asked for, and what a batch that broke off has given is kept.
    Halves of characters (lone surrogates, which a server's JSON may hold) become question marks: no file could hold
    them.

    Args:
        writer: the one that writes.
        folder: made when needed. Any number of processes may share it.
    """

    name = "cached"

    def __init__(self, writer: Writer, folder: str | os.PathLike[str]) -> None:
        self.writer, self.folder = writer, Path(folder)
        self.licence, self.batch_size, self.independent = writer.licence, writer.batch_size, writer.independent
        self.asked = 0
        """Requests that were not in the folder."""
        self._identity: Json | None = None

    def identity(self) -> Json:
        """Of the writer behind it."""
        if self._identity is None:
            self._identity = self.writer.identity()
        return self._identity

    def path(self, request: Request) -> Path:
        """Where the answer of a request is kept."""
        key = address([self.identity(), asdict(request)])
        return self.folder / key[:2] / f"{key}.json"

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        """From the folder where all are there, else from the writer. Raises `WriterError`, `StoreError`."""
        kept = {number: _kept(self.path(request)) for number, request in enumerate(requests)}
        answers = {number: answer for number, answer in kept.items() if answer is not None}
        missing = [number for number in kept if number not in answers]
        if missing:
            asked = missing if self.independent else list(kept)
            self.asked += len(asked)
            try:
                found = self.writer.complete_all([requests[number] for number in asked])
            except WriterError as error:
                if self.independent:
                    for place, answer in error.answers.items():
                        self._keep(requests[asked[place]], answer)
                raise
            for number, answer in zip(asked, found, strict=True):
                answers[number] = self._keep(requests[number], answer)
        return [answers[number] for number in kept]

    def _keep(self, request: Request, answer: str) -> str:
        """Writes an answer into the folder; returns it as it is there."""
        answer, path = answer.encode(errors="replace").decode(), self.path(request)
        content = {"request": asdict(request), "writer": self.identity(), "answer": answer}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise StoreError(
                f"{path}: an answer cannot be kept ({error.strerror}); free some space and run again"
            ) from error
        return answer


def _kept(path: Path) -> str | None:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise WriterError(f"{path}: a damaged answer ({error}); delete it and run again") from error
    return str(answer)


class Unusable(Exception):
    """Raised by a parser that does not accept an answer.

    Args:
        reason: a short word for counts.
        detail: one line with what was wrong.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Refused:
    """An answer that a parser did not accept."""

    reason: str
    detail: str
    text: str


@dataclass(frozen=True)
class Asked(Generic[T]):
    """What became of a request: its value (None where no try was accepted), the seed that gave it, and refusals."""

    value: T | None
    seed: int
    refused: tuple[Refused, ...] = field(default=())


def ask_all(
    writer: Writer, requests: Sequence[Request], parse: Callable[[int, str], T], tries: int = 3
) -> list[Asked[T]]:
    """Asks until a parser accepts, each time with another seed.

    Args:
        writer: who is asked, in batches of its size.
        requests: any number.
        parse: makes a value of (number of the request, answer), or raises `Unusable`.
        tries: most answers per request.

    Raises:
        WriterError: the writer gives no answers at all.
    """
    results: list[Asked[T]] = [Asked(None, request.seed) for request in requests]
    waiting = list(range(len(requests)))
    for attempt in range(tries):
        again = []
        for start in range(0, len(waiting), writer.batch_size):
            batch = waiting[start : start + writer.batch_size]
            seeds = [requests[i].seed if not attempt else seed_of(requests[i].seed, "try", attempt) for i in batch]
            answers = writer.complete_all(
                [replace(requests[i], seed=seed) for i, seed in zip(batch, seeds, strict=True)]
            )
            for i, seed, answer in zip(batch, seeds, answers, strict=True):
                try:
                    results[i] = replace(results[i], value=parse(i, answer), seed=seed)
                except Unusable as no:
                    refusal = Refused(no.reason, no.detail, answer)
                    results[i] = replace(results[i], refused=(*results[i].refused, refusal))
                    again.append(i)
        waiting = again
    return results
