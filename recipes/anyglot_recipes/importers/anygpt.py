"""AnyGPT's JSONL, whose codes are token strings: to samples and shards, and back byte for byte.

Rows are pairs, `{"text": ..., "image": "<soim>...<eoim>"}` with `image`, `speech` or `music` in either order, or
conversations, `{"id": 1, "conversation": [[{"role": "user", "message": ...}, ...]]}`. A row keeps all of its line but
the codes as it was spelled, so that other keys, escapes, white space and line ends survive the way back.

Strings like `<-Ins->` in messages stay text: the template of a model decides how turns look, not the data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from anyglot_lm.segments import CHAT, ROLES, Role, Sample, Segment, Template, TextCodec
from anyglot_lm.shards import ShardWriter
from anyglot_lm.token_strings import ANYGPT, SpanForm, check_block, vocabulary_of
from anyglot_lm.vocabulary import Vocabulary
from anyglot_recipes.importers.rows import HALF, BadRow, RowError, is_unicode
from anyglot_tokenizers.errors import AnyglotError, CodesError, ManifestError
from anyglot_tokenizers.files import atomic_write

KEYS = ("text", *(form.modality for form in ANYGPT.forms))


@dataclass(frozen=True)
class Imported:
    """One row of AnyGPT's JSONL.

    Attributes:
        source, row: the file, and the line, from 1.
        sample: the row's segments in the order of the file. Of a pair the first is the user's, the second the
            assistant's; codes are int64 `[K, *grid]`.
        literals: the line as it is spelled, cut at the spans: one more than there are spans.
        forms: how each span is spelled.
        is_conversation: whether it is one; else it is a pair.
    """

    source: str
    row: int
    sample: Sample
    literals: tuple[str, ...]
    forms: tuple[SpanForm, ...]
    is_conversation: bool

    @property
    def line(self) -> str:
        """The line, line end included, with the codes of `sample` in it (texts are as they were read)."""
        media = [segment for segment in self.sample.segments if segment.modality != "text"]
        spans = [form.write(segment.content) for form, segment in zip(self.forms, media, strict=True)]
        return self.literals[0] + "".join(a + b for a, b in zip(spans, self.literals[1:], strict=True))

    def tasks(self) -> Iterator[tuple[str, Sample]]:
        """(task, sample) to train on: a conversation as it is, a pair both ways (AnyGPT draws one way at random)."""
        modalities = [segment.modality for segment in self.sample.segments]
        if self.is_conversation or len(modalities) != 2:
            yield "conversation" if self.is_conversation else "->".join(modalities), self.sample
            return
        for given, asked in permutations(self.sample.segments):
            pair = [replace(given, role="user", loss=None), replace(asked, role="assistant", loss=None)]
            yield f"{given.modality}->{asked.modality}", Sample(pair)


def read_anygpt(path: Path) -> Iterator[Imported | RowError]:
    """The rows of a file, in order; blank lines go with the row before them.

    A row that is no JSON, of another form, or with a broken span (no end, a number outside its codebook, music that is
    no whole frames) is a `RowError` that names it.

    Raises:
        ManifestError: the file is missing, no UTF-8, or has no rows.
    """
    number = 0
    try:
        for number, raw in _lines(path):
            try:
                yield _read_row(path, number, raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield RowError(str(path), number, str(path), f"is not UTF-8 text ({error})")
            except (ValueError, RecursionError) as error:
                yield RowError(str(path), number, str(path), f"is not JSON: {error}")
            except (BadRow, CodesError) as error:
                yield RowError(str(path), number, str(path), str(error))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if number == 0:
        raise ManifestError(f"{path}: holds no rows; put one sample on each line")


def is_anygpt(path: Path) -> bool:
    """Whether the first row of a `.jsonl` file is one of AnyGPT's with token strings."""
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as file:
        line = next((line for line in file if line.strip()), b"")
    return any(spelling in line for form in ANYGPT.forms for spelling in (form.start.encode(), _escaped(form.start)))


def write_anygpt(rows: Iterable[Imported | Sample], path: Path) -> int:
    """Write rows as AnyGPT's JSONL, atomically; returns how many.

    Imported rows come out byte for byte as they were, with the codes they now hold; samples of ours as pairs where they
    are two segments of different kinds, else as conversations.
    """
    count = 0
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        for row in rows:
            line = row.line if isinstance(row, Imported) else json.dumps(to_values(row), ensure_ascii=False) + "\n"
            file.write(line)
            count += 1
    return count


def to_values(sample: Sample) -> dict[str, Any]:
    """The JSON values of a sample of ours in AnyGPT's form."""

    def spelled(segment: Segment) -> str:
        return segment.content if isinstance(segment.content, str) else ANYGPT.write(segment.modality, segment.content)

    modalities = [segment.modality for segment in sample.segments]
    roles = [segment.role for segment in sample.segments]
    if roles == list(ROLES) and "text" in modalities and len(set(modalities)) == 2:
        return {segment.modality: spelled(segment) for segment in sample.segments}
    turns: list[dict[str, str]] = []
    for segment in sample.segments:
        if not turns or turns[-1]["role"] != segment.role:
            turns.append({"role": segment.role, "message": ""})
        turns[-1]["message"] += spelled(segment)
    return {"conversation": [turns]}


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line with something in it, together with the blank lines after it (before the first)."""
    held, first = b"", 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                if first:
                    yield first, held
                    held = b""
                first = number
            held += line
    if first:
        yield first, held


def _read_row(path: Path, number: int, line: str) -> Imported:
    values = json.loads(line.removeprefix("\ufeff"), object_pairs_hook=_unique)
    if not isinstance(values, dict):
        raise BadRow(f"is a JSON {type(values).__name__}, not an object")
    segments: list[Segment] = []
    if "conversation" in values:
        if both := [key for key in KEYS if key in values]:
            raise BadRow(f"has both 'conversation' and {both[0]!r}; keep one of them")
        for role, message in _turns(values["conversation"]):
            segments += _segments(message, role)
    else:
        for key in (key for key in values if key in KEYS):
            found = _segments(values[key], ROLES[1] if segments else ROLES[0])
            if key != "text" and [segment.modality for segment in found] != [key]:
                raise BadRow(f"{key!r} is {values[key]!r:.60}, not one span {ANYGPT.form(key).start}...")
            segments += found
    if not segments:
        raise BadRow(f"has the keys {', '.join(map(repr, values))[:200]}; needs 'conversation', or some of {KEYS}")
    literals, forms = _spelling(line, [segment for segment in segments if segment.modality != "text"])
    return Imported(str(path), number, Sample(segments), literals, forms, "conversation" in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice; keep one of them")
    return values


def _turns(conversation: Any) -> Iterator[tuple[Role, str]]:
    """(role, message) of each turn: a list of turns, or a list of lists of them."""
    if not isinstance(conversation, list):
        raise BadRow(f"'conversation' is {conversation!r:.60}, not a list of turns")
    for entry in conversation:
        for turn in entry if isinstance(entry, list) else [entry]:
            role = turn.get("role") if isinstance(turn, dict) else None
            message = turn.get("message") if isinstance(turn, dict) else None
            if role not in ROLES or not isinstance(message, str):
                raise BadRow(f"the turn {turn!r:.80} is no {{'role': 'user' or 'assistant', 'message': '...'}}")
            yield role, message


def _segments(text: Any, role: Role) -> list[Segment]:
    if not isinstance(text, str):
        raise BadRow(f"{text!r:.60} is not a string")
    if not is_unicode(text):
        raise BadRow(HALF)
    pieces = ANYGPT.read(text)
    return [Segment("text", p, role) if isinstance(p, str) else Segment(p[0], p[1], role) for p in pieces]


def _spelling(line: str, media: Sequence[Segment]) -> tuple[tuple[str, ...], tuple[SpanForm, ...]]:
    """The line cut at its spans, and how each of them is spelled there."""
    literals: list[str] = []
    forms: list[SpanForm] = []
    at = 0
    for match in _raw_spans().finditer(line):
        names = {name.partition("_")[2]: value for name, value in match.groupdict().items() if value is not None}
        modality = match.lastgroup or ""
        form = ANYGPT.form(modality.partition("_")[0])
        forms.append(
            replace(form, start=names["start"], prefix=names["prefix"], suffix=names["suffix"], end=names["end"])
        )
        literals.append(line[at : match.start()])
        at = match.end()
        if len(forms) <= len(media) and form.modality == media[len(forms) - 1].modality:
            if forms[-1].write(media[len(forms) - 1].content) == match[0]:
                continue
            raise BadRow(f"a {form.modality} span is spelled in two ways; write all of its codes the same way")
    literals.append(line[at:])
    if [form.modality for form in forms] != [segment.modality for segment in media]:
        raise BadRow(
            f"has {len(forms)} spans in its line but {len(media)} in {', '.join(KEYS)} and conversation; take token "
            "strings out of other keys"
        )
    return tuple(literals), tuple(forms)


def _escaped(start: str) -> bytes:
    """A start string as JSON with escaped angle brackets has it, such as `\\u003csoim\\u003e`."""
    return start.replace("<", "\\u003c").replace(">", "\\u003e").encode()


@cache
def _raw_spans() -> re.Pattern[str]:
    """Matches a span as JSON may spell it, each character itself or escaped."""

    def escaped(text: str) -> str:
        units = text.encode("utf-16-be")
        escapes = (f"\\\\u(?i:{units[i : i + 2].hex()})" for i in range(0, len(units), 2))
        return f"(?:{re.escape(text)}|{''.join(escapes)})"

    def spelled(text: str) -> str:
        return "".join(escaped(character) for character in text)

    spans = []
    for form in ANYGPT.forms:
        name = form.modality
        prefixes = "|".join(spelled(prefix) for prefix in (form.prefix, *form.aliases))
        suffix = spelled(form.suffix)
        spans.append(
            f"(?P<{name}>(?P<{name}_start>{spelled(form.start)})(?P<{name}_prefix>{prefixes})[0-9]+"
            f"(?P<{name}_suffix>{suffix})(?:(?:{prefixes})[0-9]+{suffix})*(?P<{name}_end>{spelled(form.end)}))"
        )
    return re.compile("|".join(spans))


class SizedText(TextCodec, Protocol):
    """A text tokenizer that knows its size and fingerprint."""

    @property
    def size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class TokenReport:
    """What `write_token_shards` did: rows read, rows left out (`errors.jsonl`), samples in the shards."""

    out_dir: Path
    num_good: int
    num_bad: int
    num_samples: int

    def to_dict(self) -> dict[str, str | int]:
        """JSON-able form."""
        return {"out": str(self.out_dir), "good": self.num_good, "bad": self.num_bad, "samples": self.num_samples}


def write_token_shards(
    sources: Sequence[Path],
    out_dir: Path,
    text: SizedText,
    *,
    vocabulary: Vocabulary | None = None,
    template: Template = CHAT,
    strict: bool = False,
) -> TokenReport:
    """AnyGPT's JSONL files to `out_dir/shards`, ready to train on; bad rows to `out_dir/errors.jsonl`.

    Args:
        sources: the files, in the order their rows get.
        out_dir: a folder that an earlier call wrote is written anew.
        text: the text tokenizer.
        vocabulary: of the model; by default `vocabulary_of("anygpt", text.size)`.
        template: of the model.
        strict: raise if any row is bad, after all were tried and `errors.jsonl` was written.

    Raises:
        ManifestError: no row is good, or `strict` and one is bad; or the blocks of `vocabulary` are not AnyGPT's.
    """
    vocabulary = vocabulary or vocabulary_of("anygpt", text.size, text_fingerprint=text.fingerprint)
    for form in ANYGPT.forms:
        if form.modality in vocabulary.modalities:
            check_block(ANYGPT, vocabulary, form.modality)
    if not sources:
        raise ManifestError("no sources to prepare; name at least one JSONL file")
    out_dir.mkdir(parents=True, exist_ok=True)
    num_good = num_bad = 0
    first: RowError | None = None
    with ShardWriter(out_dir / "shards", vocabulary, template, text=text, overwrite=True) as writer:
        with atomic_write(out_dir / "errors.jsonl") as path, path.open("w", encoding="utf-8") as errors:
            for row in _all_rows(sources):
                problem = row if isinstance(row, RowError) else _add(writer, row)
                if problem is None:
                    num_good += 1
                    continue
                num_bad, first = num_bad + 1, first or problem
                errors.write(json.dumps(problem.to_dict(), sort_keys=True, separators=(",", ":")) + "\n")
        if first is not None and (strict or num_good == 0):
            writer.abort()
            raise ManifestError(
                f"{num_bad} of {num_good + num_bad} rows are bad; the first: {first.source}, row {first.row}: "
                f"{first.error}; all of them are in {out_dir / 'errors.jsonl'}"
            )
        num_samples = len(writer)
    return TokenReport(out_dir, num_good, num_bad, num_samples)


def prepare_tokens(sources: Sequence[Path], model_dir: Path, out_dir: Path, *, strict: bool = False) -> TokenReport:
    """`write_token_shards` for the model in `model_dir`, or for a plain language model that has no vocabulary yet.

    The latter gets the vocabulary of AnyGPT beside its text; the shards hold it as `vocabulary.json`.
    """
    from anyglot_lm.hf_text import load_text

    named, template = model_dir / "vocabulary.json", model_dir / "template.json"
    return write_token_shards(
        sources,
        out_dir,
        load_text(model_dir),
        vocabulary=Vocabulary.load(named) if named.is_file() else None,
        template=Template.load(template) if template.is_file() else CHAT,
        strict=strict,
    )


def _all_rows(sources: Sequence[Path]) -> Iterator[Imported | RowError]:
    for source in sources:
        try:
            yield from read_anygpt(source)
        except ManifestError as error:
            yield RowError(str(source), 0, str(source), str(error))


def _add(writer: ShardWriter, row: Imported) -> RowError | None:
    """Adds all samples of a row, or none and says why."""
    try:
        rendered = [
            (*writer.template.render(sample, writer.vocabulary, writer.text), task, sample)
            for task, sample in row.tasks()
        ]
        if not all(bool(np.any(loss[1:])) for _, loss, _, _ in rendered):
            raise ManifestError("nothing in it is said by the assistant; there is nothing to learn")
    except AnyglotError as error:
        return RowError(row.source, row.row, row.source, str(error))
    for ids, loss, task, sample in rendered:
        writer.add(ids, loss, task, sample)
    return None
