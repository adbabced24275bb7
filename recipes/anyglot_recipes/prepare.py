"""Raw media and text to codes on disk: manifests and folders in, safetensors shards and `records.jsonl` out.

A bad row never ends a run: it goes to `errors.jsonl` and the next row follows. Rows are encoded a shard at a
time; a shard is one file, written atomically and named by what went into it, so that an interrupted run goes
on where it was and a finished one does nothing. The result is exactly that of the latest call, for any batch
size and any interruptions.

Makes no ids and runs no language model: `read_prepared` gives text and codes, and others make samples of it.
The files are described in docs/formats.md.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from anyglot_recipes.importers.rows import HALF, Media, Row, RowError, is_unicode, modality_of
from anyglot_recipes.manifest import read_manifest
from anyglot_tokenizers.errors import AnyglotError, ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.media import MediaBytes, read_audio, read_image
from anyglot_tokenizers.spec import CodeSpec
from anyglot_tokenizers.tokenizer import Tokenizer

__all__ = [
    "PreparedRow",
    "Report",
    "Row",
    "RowError",
    "prepare",
    "prepared_specs",
    "read_manifest",
    "read_prepared",
]

FORMAT = "anyglot.prepared"
VERSION = "1"
INDEX, RECORDS, ERRORS, SHARDS = "prepared.json", "records.jsonl", "errors.jsonl", "codes"
HELD_BYTES = 256 * 2**20
"""A shard ends early when its rows hold so many bytes of media in memory (tars and tables)."""


@dataclass(frozen=True)
class Report:
    """What a call of `prepare` did: rows in, rows left out, and how many shards an earlier run had made."""

    out_dir: Path
    num_good: int
    num_bad: int
    num_shards: int
    num_reused_shards: int

    def to_dict(self) -> dict[str, str | int]:
        """JSON-able form."""
        return {
            "out": str(self.out_dir),
            "good": self.num_good,
            "bad": self.num_bad,
            "shards": self.num_shards,
            "reused_shards": self.num_reused_shards,
        }


@dataclass(frozen=True)
class PreparedRow:
    """One good row read back: text or None, and int64 codes `[num_quantizers, *grid]` by modality (or name: `Row`)."""

    id: str
    source: str
    row: int
    text: str | None
    codes: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Settings:
    """What decides the codes of a row besides the row itself."""

    image_size: int | None
    max_pixels: int
    max_seconds: float


def prepare(
    sources: Sequence[Path],
    tokenizers: Mapping[str, Tokenizer],
    out_dir: Path,
    *,
    columns: Mapping[str, str] | None = None,
    images: Path | None = None,
    read: Callable[[Path], Iterator[Row | RowError]] | None = None,
    strict: bool = False,
    image_size: int | None = None,
    max_pixels: int = 64_000_000,
    max_seconds: float = 600.0,
    batch_size: int = 32,
    rows_per_shard: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Encode the rows of `sources` (see `read_manifest`) into `out_dir`.

    Args:
        sources: manifests, tars, tables or folders, in the order their rows get.
        tokenizers: modality -> tokenizer; they are put into eval mode. Rows of other modalities are bad rows.
        out_dir: holds `prepared.json`, `records.jsonl`, `errors.jsonl` and `codes/` afterwards. A folder that
            an earlier call wrote is brought up to date.
        columns: column -> modality or `ignore`, on top of the default names.
        images: the folder of the pictures of COCO captions, where it is not beside them.
        read: reads a source, instead of `read_manifest`; its rows may hold several files of a modality, see `Row`.
        strict: raise if any row is bad, after all rows were tried and `errors.jsonl` was written.
        image_size: side in pixels of the square that images are resized and cropped to; None = each as it is.
        max_pixels: images above this are bad rows, and are refused before they are decoded.
        max_seconds: audio above this is a bad row.
        batch_size: most items of one modality encoded at once; it never changes the codes.
        rows_per_shard: rows per file of codes, the unit of resuming.
        progress: called with (rows done, bad rows among them) after each shard.

    Raises:
        ManifestError: no row is good, or `strict` and one is bad; both after `errors.jsonl` was written.
            Also if `out_dir` holds records of something else.
    """
    if batch_size < 1 or rows_per_shard < 1:
        raise ManifestError(f"batch_size {batch_size} and rows_per_shard {rows_per_shard} must be at least 1")
    out_dir = Path(out_dir)
    sources = [Path(source) for source in sources]
    _check_out_dir(out_dir, sources)
    settings = _Settings(image_size, max_pixels, max_seconds)
    for tokenizer in tokenizers.values():
        tokenizer.eval()
    shards: list[str] = []
    num_good = num_bad = num_reused = 0
    first_error: RowError | None = None
    rows = _all_rows(sources, read or (lambda source: read_manifest(source, columns, images=images)))
    with atomic_write(out_dir / RECORDS) as records_path, atomic_write(out_dir / ERRORS) as errors_path:
        with (
            records_path.open("w", encoding="utf-8") as records,
            errors_path.open("w", encoding="utf-8") as errors,
        ):
            while chunk := _next_chunk(rows, rows_per_shard):
                name = f"{SHARDS}/{_chunk_key(chunk, tokenizers, settings)[:32]}.safetensors"
                outcome = _read_outcome(out_dir / name)
                num_reused += outcome is not None
                if outcome is None:
                    outcome = _encode_chunk(out_dir / name, chunk, tokenizers, settings, batch_size)
                good, bad = outcome
                shards.append(name)
                records.writelines(_json(record | {"shard": name}) + "\n" for record in good)
                errors.writelines(_json(error.to_dict()) + "\n" for error in bad)
                num_good, num_bad = num_good + len(good), num_bad + len(bad)
                first_error = first_error or (bad[0] if bad else None)
                if progress is not None:
                    progress(num_good + num_bad, num_bad)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "good": num_good,
        "bad": num_bad,
        "shards": shards,
        "specs": {name: tokenizer.spec.to_dict() for name, tokenizer in sorted(tokenizers.items())},
    }
    with atomic_write(out_dir / INDEX) as path:
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    kept = set(shards)
    for stale in (out_dir / SHARDS).glob("*.safetensors"):
        if f"{SHARDS}/{stale.name}" not in kept:
            stale.unlink()
    if first_error is not None and (strict or num_good == 0):
        row = f"{first_error.source}, row {first_error.row}: " if first_error.row else ""
        count = (
            f"none of {num_bad} rows is good" if num_good == 0 else f"{num_bad} of {num_good + num_bad} rows are bad"
        )
        raise ManifestError(f"{count}; the first: {row}{first_error.error}; all of them are in {out_dir / ERRORS}")
    if num_good == 0:
        raise ManifestError("no sources to prepare; name at least one manifest or folder of media")
    return Report(out_dir, num_good, num_bad, len(shards), num_reused)


def prepared_specs(out_dir: Path) -> dict[str, CodeSpec]:
    """Modality -> spec (with the fingerprint) of the tokenizer that wrote the codes of `out_dir`."""
    return {name: CodeSpec.from_dict(entries) for name, entries in _read_index(Path(out_dir))["specs"].items()}


def read_prepared(out_dir: Path) -> Iterator[PreparedRow]:
    """Yield the good rows that `prepare` wrote to `out_dir`, in the order of the sources.

    Raises:
        ManifestError: `out_dir` was not written by `prepare`, or a shard is gone or damaged.
    """
    out_dir = Path(out_dir)
    _read_index(out_dir)
    shard_name, shard = "", None
    with (out_dir / RECORDS).open(encoding="utf-8") as records:
        for line in records:
            record = json.loads(line)
            try:
                if shard is None or record["shard"] != shard_name:
                    shard_name = record["shard"]
                    shard = safe_open(str(out_dir / shard_name), framework="numpy")
                codes = {
                    name: torch.from_numpy(shard.get_tensor(f"{record['id']}.{name}").astype(np.int64))
                    for name in record["media"]
                }
            except (SafetensorError, OSError) as error:
                problem = f"{out_dir / shard_name}: codes cannot be read ({error}); run prepare again to renew them"
                raise ManifestError(problem) from error
            yield PreparedRow(record["id"], record["source"], record["row"], record["text"], codes)


def _all_rows(sources: Iterable[Path], read: Callable[[Path], Iterator[Row | RowError]]) -> Iterator[Row | RowError]:
    for source in sources:
        try:
            for row in read(source):
                if isinstance(row, Row) and not is_unicode(row.text or ""):
                    yield RowError(row.source, row.number, row.source, HALF)
                else:
                    yield row
        except ManifestError as error:
            yield RowError(str(source), 0, str(source), str(error))


def _next_chunk(rows: Iterator[Row | RowError], rows_per_shard: int) -> list[Row | RowError]:
    """The rows of the next shard, a function of the rows alone: up to `rows_per_shard`, or `HELD_BYTES` of media."""
    chunk: list[Row | RowError] = []
    held = 0
    for row in rows:
        chunk.append(row)
        if isinstance(row, Row):
            held += sum(len(file.content) for file in row.media.values() if isinstance(file, MediaBytes))
        if len(chunk) == rows_per_shard or held >= HELD_BYTES:
            break
    return chunk


def _check_out_dir(out_dir: Path, sources: Iterable[Path]) -> None:
    for source in sources:
        folder = source if source.is_dir() else source.parent
        if folder.resolve() == out_dir.resolve():
            raise ManifestError(f"{out_dir}: is also the folder of a source; write to a folder of its own")
    begun = (out_dir / SHARDS).is_dir() and (out_dir / ERRORS).exists()  # stopped before the index was written
    if (out_dir / RECORDS).exists() and not (out_dir / INDEX).exists() and not begun:
        raise ManifestError(f"{out_dir}: holds a {RECORDS} that prepare did not write; write to a folder of its own")
    (out_dir / SHARDS).mkdir(parents=True, exist_ok=True)


def _chunk_key(chunk: Iterable[Row | RowError], tokenizers: Mapping[str, Tokenizer], settings: _Settings) -> str:
    """Hash of all that decides a shard: rows, states of their files, tokenizers, settings."""
    entries: list[Any] = [
        [FORMAT, VERSION, settings.image_size, settings.max_pixels, settings.max_seconds],
        [[name, tokenizer.spec.fingerprint] for name, tokenizer in sorted(tokenizers.items())],
    ]
    for row in chunk:
        if isinstance(row, RowError):
            entries.append(row.to_dict())
        else:
            files = [[modality, str(path), _file_state(path)] for modality, path in sorted(row.media.items())]
            entries.append([row.source, row.number, row.text, files])
    return hashlib.sha256(_json(entries).encode()).hexdigest()


def _file_state(path: Media) -> list[int | str] | None:
    if isinstance(path, MediaBytes):
        return [len(path.content), hashlib.sha256(path.content).hexdigest()]
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _read_outcome(path: Path) -> tuple[list[dict[str, Any]], list[RowError]] | None:
    """Records and errors of a shard that an earlier run finished; None if there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="numpy") as file:
            _, records, errors = json.loads((file.metadata() or {})[FORMAT])
        return records, [RowError(**error) for error in errors]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None  # damaged from outside: encoded again


def _encode_chunk(
    path: Path,
    chunk: Sequence[Row | RowError],
    tokenizers: Mapping[str, Tokenizer],
    settings: _Settings,
    batch_size: int,
) -> tuple[list[dict[str, Any]], list[RowError]]:
    """Encode the rows of one shard and write it: records of the good rows, errors of the bad ones."""
    failed: dict[int, RowError] = {}
    first_of: dict[tuple[str, Media], tuple[int, str]] = {}  # a file that several rows name is encoded once
    results: dict[tuple[int, str], np.ndarray | AnyglotError] = {}
    queues: dict[str, list[tuple[tuple[int, str], Tensor]]] = defaultdict(list)

    def flush(modality: str) -> None:
        queue, queues[modality] = queues[modality], []
        items = [item for _, item in queue]
        for (which, _), result in zip(queue, _encode_queue(tokenizers[modality], items), strict=True):
            results[which] = result

    for position, row in enumerate(chunk):
        if isinstance(row, RowError):
            failed[position] = row
            continue
        media = _read_media(row, tokenizers, settings, first_of)
        if isinstance(media, RowError):
            failed[position] = media
            continue
        for name, file in row.media.items():
            first_of.setdefault((modality_of(name), file), (position, name))
        for name, item in media.items():
            modality = modality_of(name)
            waiting = [one for _, one in queues[modality]]
            if waiting and (
                len(waiting) == batch_size or not _fits(tokenizers[modality].spec, waiting, item, settings)
            ):
                flush(modality)
            queues[modality].append(((position, name), item))
    for modality in list(queues):
        flush(modality)

    tensors: dict[str, np.ndarray] = {}
    records: list[dict[str, Any]] = []
    for position, row in enumerate(chunk):
        if isinstance(row, RowError) or position in failed:
            continue
        record = _make_record(row)
        row_tensors = {}
        for name, file in row.media.items():
            result = results[first_of[modality_of(name), file]]
            if isinstance(result, AnyglotError):
                failed[position] = RowError(row.source, row.number, str(file), str(result))
                break
            row_tensors[f"{record['id']}.{name}"] = result
        else:
            tensors |= row_tensors
            records.append(record)
    errors = [failed[position] for position in sorted(failed)]
    # One key only: safetensors writes several in random order, and equal shards are to be equal files.
    metadata = {FORMAT: _json([VERSION, records, [error.to_dict() for error in errors]])}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=metadata))
    return records, errors


def _make_record(row: Row) -> dict[str, Any]:
    media = {modality: str(path) for modality, path in sorted(row.media.items())}
    identity = _json([row.source, row.number, row.text, media])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:24]
    return {"id": digest, "source": row.source, "row": row.number, "text": row.text, "media": media}


def _read_media(
    row: Row,
    tokenizers: Mapping[str, Tokenizer],
    settings: _Settings,
    skip: Container[tuple[str, Media]],
) -> dict[str, Tensor] | RowError:
    """The media of a row, but those in `skip`: images float32 `[3, H, W]` in [0, 1], audio `[channels, samples]`."""
    media: dict[str, Tensor] = {}
    for name, path in row.media.items():
        modality = modality_of(name)
        if modality not in tokenizers:
            known = ", ".join(sorted(tokenizers)) or "none"
            message = (
                f"no tokenizer for {modality!r}, only for: {known}; say what the column holds, such as "
                f"--column {modality}={next(iter(sorted(tokenizers)), 'image')}, or leave it out with "
                f"--column {modality}=ignore"
            )
            return RowError(row.source, row.number, str(path), message)
        if (modality, path) in skip:
            continue
        spec = tokenizers[modality].spec
        try:
            if spec.sample_rate is None:
                media[name] = read_image(path, size=settings.image_size, max_pixels=settings.max_pixels)
            else:
                media[name] = read_audio(
                    path,
                    sample_rate=spec.sample_rate,
                    channels=spec.channels,
                    max_seconds=settings.max_seconds,
                )
        except (AnyglotError, OSError) as error:
            return RowError(row.source, row.number, str(path), str(error))
    return media


def _fits(spec: CodeSpec, waiting: Sequence[Tensor], item: Tensor, settings: _Settings) -> bool:
    """Whether `item` can join the batch: images of one size; `max_seconds` of audio, padding included."""
    if spec.sample_rate is None:
        return item.shape == waiting[0].shape
    longest = max(item.shape[-1], *(one.shape[-1] for one in waiting))
    return longest * (len(waiting) + 1) <= settings.max_seconds * spec.sample_rate


def _encode_queue(tokenizer: Tokenizer, items: list[Tensor]) -> list[np.ndarray | AnyglotError]:
    """Codes `[num_quantizers, *grid]` of each item, or the error the tokenizer has with this very item."""
    spec = tokenizer.spec
    try:
        with torch.inference_mode():
            if spec.sample_rate is None:
                batch = tokenizer.encode(torch.stack(items))
            else:
                lengths = torch.tensor([item.shape[-1] for item in items])
                padded = torch.zeros(len(items), items[0].shape[0], int(lengths.max()))
                for target, item in zip(padded, items, strict=True):
                    target[:, : item.shape[-1]] = item
                batch = tokenizer.encode(padded, lengths)
    except AnyglotError as error:
        if len(items) == 1:
            return [error]
        return [result for item in items for result in _encode_queue(tokenizer, [item])]
    dtype = np.uint16 if max(spec.codebook_sizes) <= 2**16 else np.int32
    return [batch.item(index).cpu().numpy().astype(dtype) for index in range(len(items))]


def _read_index(out_dir: Path) -> dict[str, Any]:
    path = out_dir / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read ({error}); run prepare with --out {out_dir} first") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ManifestError(f"{path}: is not {FORMAT} version {VERSION}; run prepare with --out {out_dir} again")
    return index


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))  # ASCII: file names need not be UTF-8
