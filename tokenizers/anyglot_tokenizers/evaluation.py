"""Evaluation of any tokenizer: what is lost, what codes cost, how fast, how repeatable, how much meaning they carry.

`evaluate` gives one JSON-able dictionary; with `out` it also writes a report with pictures and players (`report.py`).
Everything follows from the tokenizer's spec: images, speech, other audio, plain series, encode-only tokenizers (code
statistics only). Whatever cannot be measured is counted with its reason, never turned into a score. The measures are in
`metrics.py`, `measures.py`, `misses.py`, `probe.py` and `clock.py`; this file only applies them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_tokenizers.clock import Clock
from anyglot_tokenizers.errors import AnyglotError, MediaError
from anyglot_tokenizers.folder import AUDIO_FILES, IMAGE_FILES, files_below
from anyglot_tokenizers.measures import Features, Recogniser, SpeakerOf, measures_for
from anyglot_tokenizers.media import PathLike, read_audio, read_image
from anyglot_tokenizers.metrics import CodeCounter, MapsOf
from anyglot_tokenizers.misses import miss_rates
from anyglot_tokenizers.probe import bag_of_codes, linear_probe
from anyglot_tokenizers.spec import CodeSpec
from anyglot_tokenizers.tokenizer import Tokenizer

FORMAT = "anyglot.evaluation"
VERSION = "1"
MAX_SECONDS = 1200.0  # of one sound
MISS_ITEMS = 8
MISS_SECONDS = 10.0  # of each
PROBE_ITEMS = 2000
PROBE_PARTS = 3  # histograms over time, so that the probe knows a little of the order


def evaluate(
    tokenizer: Tokenizer,
    media: PathLike | Sequence[PathLike | Tensor],
    *,
    out: PathLike | None = None,
    recogniser: Recogniser | None = None,
    speaker: SpeakerOf | None = None,
    feature: MapsOf | None = None,
    num_quantizers: int | None = None,
    limit: int | None = None,
    texts: Sequence[str] | None = None,
    labels: str | None = None,
    shown: int = 8,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a tokenizer on media it was not trained on.

    Args:
        tokenizer: any; its spec says what is measured.
        media: files, folders (searched to the bottom), or tensors: images `[3, H, W]`, audio `[C, samples]`.
        out: folder for `report.json`, `report.md`, `index.html` and `media/`; None writes nothing.
        recogniser: for the word error rate, against `texts` or, without them, against what it hears in the original.
        speaker: for the cosine similarity of voices.
        feature: network for LPIPS and the Frechet distance; any callable from images to feature maps.
        num_quantizers: use only the first so many.
        limit: measure only so many items, evenly spaced over the list.
        texts: what is said in each of `media` (files or tensors, no folders).
        labels: regular expression searched in each file's path, whose named groups `label` and, where there is
            something to hold out such as the speaker, `group` make a linear probe on up to 2000 of the files.
        shown: items in the report.
        progress: called with one line per part.

    Returns:
        `metrics` (name -> unit, better, n, mean, low, high, skipped, reasons, note), `codes` (a row per quantizer),
        `cost`, `speed`, `misses` (of the first 8 items, 10 s of each), `probe`, `items` (the scores of each),
        `failures` (unreadable or refused items, with the reason), `samples`, `settings` and `tokenizer`.

    Raises:
        AnyglotError: no medium at all could be used, or wrong arguments.
    """
    spec = tokenizer.spec
    found = _listed(media, spec)
    if texts is not None and len(texts) != len(found):
        raise AnyglotError(f"{len(texts)} texts for {len(found)} media; give one each, and files instead of folders")
    expression = None if labels is None else _expression(labels)
    chosen = _spaced(len(found), limit)
    features = Features(feature)
    table = measures_for(spec, recogniser, speaker, features, texts)
    counter = CodeCounter(spec.codebook_sizes[:num_quantizers])
    clock = Clock(tokenizer.device)
    failures: list[dict[str, str]] = []
    items: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    kept: list[Tensor] = []
    for place, index in enumerate(chosen):
        name = _name(found[index], index)
        try:
            medium = read_medium(found[index], tokenizer)
            if not items:  # the first call pays for allocations and caches
                _coded(tokenizer, medium, num_quantizers, Clock(tokenizer.device))
            codes, output = _coded(tokenizer, medium, num_quantizers, clock)
        except AnyglotError as error:
            failures.append({"item": name, "reason": str(error)})
            continue
        counter.add(codes)
        clock.count(codes, medium)
        if len(kept) < MISS_ITEMS:
            kept.append(
                medium if spec.sample_rate is None else medium[:, : int(MISS_SECONDS * spec.sample_rate)].clone()
            )
        scores: dict[str, float] = {}
        if output is not None:
            output, target = _aligned(output, medium)
            found_scores = {metric.name: metric.score(output, target, index) for metric in table}
            scores = {key: score for key, score in found_scores.items() if score is not None}
            if out is not None and len(samples) < shown and place * shown >= len(samples) * len(chosen):
                from anyglot_tokenizers.report import write_sample

                files = write_sample(out, len(samples), target, output, spec.sample_rate)
                samples.append({"item": name, "scores": scores, **files})
        items.append({"item": name, "scores": scores})
        if (place + 1) % 20 == 0:
            progress(f"{place + 1} of {len(chosen)} items")
    if not items:
        raise MediaError("evaluation", f"none of {len(chosen)} items could be used", failures[0]["reason"])
    progress(f"miss rates of {len(kept)} items")
    misses = miss_rates(tokenizer, kept, num_quantizers=num_quantizers)
    rows = {metric.name: metric.row() for metric in table} | features.frechet_row(spec)
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
            "spec": spec.to_dict(),
        },
        "settings": {
            "num_quantizers": len(counter.counts),
            "items": len(items),
            "of": len(found),
            "device": str(tokenizer.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "metrics": rows if spec.decodes else {},
        "codes": counter.rows(),
        "cost": _cost(spec, counter, clock),
        "speed": clock.row(spec),
        "misses": misses,
        "probe": None if expression is None else _probe(tokenizer, found, expression, num_quantizers),
        "failures": failures,
        "items": items,
        "samples": samples,
    }
    if out is not None:
        from anyglot_tokenizers.report import write_report

        write_report(result, out)
    return result


def evaluate_command(arguments: argparse.Namespace, tokenizer: Tokenizer) -> int:
    """`anyglot tokenizer eval`: prints the report (Markdown, or one JSON object), writes it with `--out`."""
    from anyglot_tokenizers import plugs, report

    result = evaluate(
        tokenizer,
        arguments.media,
        out=arguments.out,
        recogniser=plugs.recogniser(arguments.recogniser) if arguments.recogniser else None,
        speaker=plugs.speaker_encoder(arguments.speaker) if arguments.speaker else None,
        feature=plugs.feature_network(arguments.feature) if arguments.feature else None,
        num_quantizers=arguments.num_quantizers,
        limit=arguments.limit,
        labels=arguments.labels,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(result) if arguments.json else report.markdown(result), end="" if not arguments.json else "\n")
    if arguments.out:
        print(Path(arguments.out) / "index.html", file=sys.stderr)
    return 0


# Media


def _listed(media: PathLike | Sequence[PathLike | Tensor], spec: CodeSpec) -> list[Path | Tensor]:
    """Files and tensors, folders replaced by what they hold."""
    given = [media] if isinstance(media, str | os.PathLike) else list(media)
    suffixes = IMAGE_FILES if spec.sample_rate is None else AUDIO_FILES
    found: list[Path | Tensor] = []
    for entry in given:
        if isinstance(entry, Tensor):
            found.append(entry)
        elif Path(entry).is_dir():
            found += [file for _, file in files_below(Path(entry), suffixes)]
        else:
            found.append(Path(entry))
    if not found:
        raise MediaError("evaluation", f"no media in {given or 'an empty list'}", f"need {', '.join(suffixes)}")
    return found


def _spaced(count: int, limit: int | None) -> list[int]:
    if limit is not None and limit < 1:
        raise AnyglotError(f"limit {limit}: measure at least 1 item")
    kept = count if limit is None else min(limit, count)
    return [place * count // kept for place in range(kept)]


def _name(entry: Path | Tensor, index: int) -> str:
    return f"item {index}" if isinstance(entry, Tensor) else f"{entry.parent.name}/{entry.name}"


def read_medium(entry: Path | Tensor, tokenizer: Tokenizer, *, max_seconds: float = MAX_SECONDS) -> Tensor:
    """One medium as the tokenizer takes it: at its rate; cropped to sides that its factor divides, or to its size."""
    spec = tokenizer.spec
    if spec.sample_rate is not None:
        if isinstance(entry, Tensor):
            return entry
        return read_audio(entry, sample_rate=spec.sample_rate, channels=spec.channels, max_seconds=max_seconds)
    if spec.axes == ("time",):
        if isinstance(entry, Tensor):
            return entry
        raise MediaError(entry, f"no reader for modality {spec.modality!r}", "give tensors")
    image = entry if isinstance(entry, Tensor) else read_image(entry)
    if isinstance(entry, Path) and spec.fixed_grid:
        return _resized(image, *tokenizer.config["image_size"])
    if spec.fixed_grid or image.ndim != 3:
        return image
    sides = [size // (stride or 1) * (stride or 1) for size, stride in zip(image.shape[1:], spec.strides, strict=True)]
    if 0 in sides:
        raise MediaError(str(entry)[:200], f"{tuple(image.shape[1:])} pixels", f"need at least {spec.strides}")
    return image[:, : sides[0], : sides[1]]


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """The largest centred window of that aspect, resized (bicubic, antialiased) to `height` x `width`."""
    share = min(image.shape[1] / height, image.shape[2] / width)
    down, across = (max(round(share * side), 1) for side in (height, width))
    top, left = (image.shape[1] - down) // 2, (image.shape[2] - across) // 2
    window = image[None, :, top : top + down, left : left + across]
    return F.interpolate(window, (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)


def _coded(
    tokenizer: Tokenizer, medium: Tensor, num_quantizers: int | None, clock: Clock
) -> tuple[Tensor, Tensor | None]:
    """Codes `[K, *grid]` and, where there is a decoder, the reconstruction of one medium, both timed."""
    with clock("encode"):
        codes = tokenizer.encode(medium[None], num_quantizers=num_quantizers)
    if not tokenizer.spec.decodes:
        return codes.item(0), None
    with clock("decode"):
        output = tokenizer.decode(codes)
    return codes.item(0), output[0]


def _aligned(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU and cut to the smaller: codecs fill the last hop, and some drop it."""
    window = tuple(slice(min(sizes)) for sizes in zip(output.shape, target.shape, strict=True))
    return output[window].float().cpu(), target[window].float().cpu()


# Cost and meaning


def _cost(spec: CodeSpec, counter: CodeCounter, clock: Clock) -> dict[str, Any]:
    """Bits as stored (log2 of the codebook sizes) and as an ideal entropy coder with these frequencies would need."""
    rows = counter.rows()
    stored = sum(math.log2(row["codebook_size"]) for row in rows)
    coded = sum(row["entropy"] for row in rows)
    cost: dict[str, Any] = {"tokens_per_item": clock.codes / clock.items, "bits_per_position": [stored, coded]}
    per_unit = clock.positions / clock.units
    if spec.sample_rate is not None:
        cost |= {
            "tokens_per_second": clock.codes / clock.units * spec.sample_rate,
            "bitrate": stored * per_unit * spec.sample_rate,
            "entropy_coded_bitrate": coded * per_unit * spec.sample_rate,
        }
    else:
        unit = "sample" if spec.axes == ("time",) else "pixel"
        cost |= {f"bits_per_{unit}": stored * per_unit, f"entropy_coded_bits_per_{unit}": coded * per_unit}
    return cost


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise AnyglotError(f"labels {pattern!r} is not a regular expression ({error})") from error
    if "label" not in expression.groupindex:
        raise AnyglotError(f"labels {pattern!r} needs a group (?P<label>...), and may have (?P<group>...)")
    return expression


def _probe(
    tokenizer: Tokenizer, found: Sequence[Path | Tensor], expression: re.Pattern[str], num_quantizers: int | None
) -> dict[str, Any]:
    """Linear probes for the classes in the file names, on the first codebook and on all."""
    books = tokenizer.spec.codebook_sizes[:num_quantizers]
    parts = PROBE_PARTS if tokenizer.spec.axes == ("time",) else 1
    first, every, labels, groups, skipped = [], [], [], [], Counter[str]()
    for index in _spaced(len(found), PROBE_ITEMS):
        entry = found[index]
        match = expression.search(entry.as_posix()) if isinstance(entry, Path) else None
        if match is None:
            skipped["no label in the path"] += 1
            continue
        try:
            codes = tokenizer.encode(read_medium(entry, tokenizer)[None], num_quantizers=num_quantizers).item(0)
        except AnyglotError as error:
            skipped[str(error)] += 1
            continue
        first.append(bag_of_codes(codes[:1], books[:1], parts))
        every.append(bag_of_codes(codes, books, parts))
        labels.append(match["label"])
        groups.append(match.groupdict().get("group") or str(index))
    known = groups if "group" in expression.groupindex else None
    probes = {"first codebook": first} | ({"all codebooks": every} if len(books) > 1 else {})
    rows = {}
    for name, x_ND in probes.items():
        try:
            rows[name] = linear_probe(_met(torch.stack(x_ND)), labels, known) if x_ND else None
        except AnyglotError as error:
            skipped[f"{name}: {error}"] += 1
    rows = {name: row for name, row in rows.items() if row is not None}
    return {"labels": expression.pattern, "rows": rows, "skipped": sum(skipped.values()), "reasons": dict(skipped)}


def _met(x_ND: Tensor) -> Tensor:
    """Only the features that ever occur."""
    return x_ND[:, (x_ND != 0).any(0)]
