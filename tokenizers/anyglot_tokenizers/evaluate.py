"""Evaluation of any tokenizer: what is lost, what codes cost, how fast, how repeatable, how much meaning they carry.

`evaluate` gives one JSON-able dictionary; with `out` it also writes a report with pictures and players (`report.py`).
Everything follows from the tokenizer's spec: images, speech, other audio, plain series, encode-only tokenizers (code
statistics only). Whatever cannot be measured is counted with its reason, never turned into a score. The measures are in
`metrics.py`, `misses.py` and `probe.py`; this file only applies them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_tokenizers import metrics
from anyglot_tokenizers.errors import AnyglotError, MediaError
from anyglot_tokenizers.media import PathLike, read_audio, read_image
from anyglot_tokenizers.metrics import CodeCounter, MapsOf, MissingExtra, Unmeasurable, interval
from anyglot_tokenizers.misses import miss_rates
from anyglot_tokenizers.probe import bag_of_codes, linear_probe
from anyglot_tokenizers.spec import CodeSpec
from anyglot_tokenizers.tokenizer import Tokenizer

FORMAT = "anyglot.evaluation"
VERSION = "1"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".au")
MAX_SECONDS = 600.0  # of one sound
MISS_ITEMS = 8
PROBE_ITEMS = 2000
PROBE_PARTS = 3  # histograms over time, so that the probe knows a little of the order

Recogniser = Callable[[Tensor, int], str]
"""Audio float32 `[1, samples]` and its rate in Hz to text."""
SpeakerOf = Callable[[Tensor, int], Tensor]
"""Audio float32 `[1, samples]` and its rate in Hz to an embedding of the voice, `[D]`."""


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
        progress: called with one line per finished part.

    Returns:
        `metrics` (name -> unit, better, n, mean, low, high, skipped, reasons, note), `codes` (a row per quantizer),
        `cost`, `speed`, `misses`, `probe`, `items` (the scores of each), `failures` (unreadable or refused items, with
        the reason), `samples`, `settings` and `tokenizer`.

    Raises:
        AnyglotError: no medium at all could be used, or wrong arguments.
    """
    spec = tokenizer.spec
    found = _listed(media, spec)
    if texts is not None and len(texts) != len(found):
        raise AnyglotError(f"{len(texts)} texts for {len(found)} media; give one each, and files instead of folders")
    chosen = _spaced(len(found), limit)
    features = Features(feature)
    table = _table(spec, recogniser, speaker, features, texts)
    counter = CodeCounter(spec.codebook_sizes[:num_quantizers])
    clock = Clock(tokenizer.device)
    failures: list[dict[str, str]] = []
    items: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    kept: list[Tensor] = []
    for place, index in enumerate(chosen):
        name = _name(found[index], index)
        try:
            medium = _read(found[index], tokenizer)
            if place == 0:  # the first call pays for allocations and caches
                _coded(tokenizer, medium, num_quantizers, Clock(tokenizer.device))
            codes, output = _coded(tokenizer, medium, num_quantizers, clock)
        except AnyglotError as error:
            failures.append({"item": name, "reason": str(error)})
            continue
        counter.add(codes)
        clock.count(codes, medium)
        kept += [medium] if len(kept) < MISS_ITEMS else []
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
        "misses": miss_rates(tokenizer, kept, num_quantizers=num_quantizers),
        "probe": None if labels is None else _probe(tokenizer, found, labels, num_quantizers),
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
    suffixes = IMAGE_SUFFIXES if spec.sample_rate is None else AUDIO_SUFFIXES
    found: list[Path | Tensor] = []
    for entry in given:
        if isinstance(entry, Tensor):
            found.append(entry)
        elif Path(entry).is_dir():
            found += sorted(file for file in Path(entry).rglob("*") if file.suffix.lower() in suffixes)
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


def _read(entry: Path | Tensor, tokenizer: Tokenizer) -> Tensor:
    """One medium as the tokenizer takes it: at its rate, or cropped to sides that its factor divides."""
    spec = tokenizer.spec
    if spec.sample_rate is not None:
        if isinstance(entry, Tensor):
            return entry
        return read_audio(entry, sample_rate=spec.sample_rate, channels=spec.channels, max_seconds=MAX_SECONDS)
    if spec.axes == ("time",):
        if isinstance(entry, Tensor):
            return entry
        raise MediaError(entry, f"no reader for modality {spec.modality!r}", "give tensors")
    side = tokenizer.config.get("image_size") if spec.fixed_grid else None
    image = entry if isinstance(entry, Tensor) else read_image(entry, size=None if side is None else int(side))
    if spec.fixed_grid or image.ndim != 3:
        return image
    down, across = (stride or 1 for stride in spec.strides)
    return image[:, : image.shape[1] // down * down, : image.shape[2] // across * across]


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


# Measures

Measure = Callable[[Tensor, Tensor, int], float | tuple[float, float]]
"""Output, target and the item's index to a score, or to (score, weight)."""


@dataclass
class Metric:
    """One measure over a set: its scores, and why some items have none."""

    name: str
    unit: str
    better: str
    measure: Measure
    note: str = ""
    values: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    missing: str = ""

    def score(self, output: Tensor, target: Tensor, index: int) -> float | None:
        """Measure one item, or count why not."""
        try:
            if self.missing:
                raise MissingExtra(self.missing)
            found = self.measure(output, target, index)
            value, weight = found if isinstance(found, tuple) else (found, 1.0)
            if not abs(value) < float("inf"):
                raise Unmeasurable(f"the score is {value}")
        except Unmeasurable as error:
            self.missing = str(error) if isinstance(error, MissingExtra) else ""
            self.reasons[str(error)] += 1
            return None
        self.values.append(value)
        self.weights.append(weight)
        return value

    def row(self) -> dict[str, Any]:
        """Mean with its 95 % bootstrap interval (from 2 items on), and skipped items by reason."""
        n = len(self.values)
        mean, low, high = interval(self.values, self.weights) if n else (None, None, None)
        return {
            "unit": self.unit,
            "better": self.better,
            "n": n,
            "mean": mean,
            "low": low if n > 1 else None,
            "high": high if n > 1 else None,
            "skipped": sum(self.reasons.values()),
            "reasons": dict(self.reasons),
            "note": self.note,
        }


class Features:
    """LPIPS item by item and the Frechet distance of the whole set, both on one network's feature maps."""

    def __init__(self, network: MapsOf | None) -> None:
        self.network = network
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def distance(self, output: Tensor, target: Tensor, index: int) -> float:
        """LPIPS of one item; remembers its features, averaged over positions."""
        if self.network is None:
            raise MissingExtra("no feature network was given")
        with torch.no_grad():
            found = [_ask("the feature network", self.network, image[None]) for image in (output, target)]
        maps = [[maps] if isinstance(maps, Tensor) else list(maps) for maps in found]
        for kept, last in zip((self.outputs, self.targets), maps, strict=True):
            kept.append(last[-1][0].flatten(1).mean(1) if last[-1].ndim > 2 else last[-1][0])
        return metrics.perceptual_distance(*maps)

    def frechet_row(self, spec: CodeSpec) -> dict[str, dict[str, Any]]:
        """`frechet`, for images: a distance of the whole set and so without an interval."""
        if spec.sample_rate is not None or spec.axes == ("time",):
            return {}

        def distance(output: Tensor, target: Tensor, index: int) -> float:
            if self.network is None:
                raise MissingExtra("no feature network was given")
            return metrics.frechet_distance(torch.stack(self.outputs), torch.stack(self.targets))

        note = "rFID if the network is Inception; not comparable between networks, image counts or sizes"
        metric = Metric("frechet", "", "lower", distance, note)
        metric.score(torch.empty(0), torch.empty(0), 0)
        return {"frechet": metric.row() | ({"n": len(self.outputs)} if metric.values else {})}


def _table(
    spec: CodeSpec,
    recogniser: Recogniser | None,
    speaker: SpeakerOf | None,
    features: Features,
    texts: Sequence[str] | None,
) -> list[Metric]:
    """The measures that fit a spec."""

    def plain(measure: Callable[[Tensor, Tensor], float]) -> Measure:
        return lambda output, target, index: measure(output, target)

    if spec.sample_rate is None:
        if spec.axes == ("time",):
            return [Metric("snr", "dB", "higher", plain(metrics.snr))]
        return [
            Metric("psnr", "dB", "higher", plain(metrics.psnr)),
            Metric("ssim", "", "higher", plain(metrics.ssim), "11 x 11 Gaussian window"),
            Metric("lpips", "", "lower", features.distance, "on the feature network given, even weights"),
        ]
    rate = spec.sample_rate

    def at_rate(measure: Callable[..., float], **options: Any) -> Measure:
        return lambda output, target, index: measure(output, target, rate, **options)

    def heard(audio: Tensor) -> str:
        if recogniser is None:
            raise MissingExtra("no recogniser was given")
        return str(_ask("the recogniser", recogniser, audio.mean(0, keepdim=True), rate))

    def wer(output: Tensor, target: Tensor, index: int) -> tuple[float, float]:
        errors, words = metrics.word_errors(heard(output), heard(target) if texts is None else texts[index])
        return errors / words, float(words)

    def voice(output: Tensor, target: Tensor, index: int) -> float:
        if speaker is None:
            raise MissingExtra("no speaker encoder was given")
        one, other = (
            _ask("the speaker encoder", speaker, audio.mean(0, keepdim=True), rate).flatten()
            for audio in (output, target)
        )
        return float(F.cosine_similarity(one.double(), other.double(), dim=0))

    audiotools = {"scales": metrics.AUDIOTOOLS_SCALES, "power": 2.0, "magnitude_weight": 1.0}
    found = [
        Metric("si_sdr", "dB", "higher", plain(metrics.si_sdr)),
        Metric(
            *("mel", "", "lower", at_rate(metrics.mel_distance)),
            f"sum over 7 scales, windows 32 to 2048 with 5 to 320 mels, log10 (the loss of DAC), at {rate} Hz",
        ),
        Metric(
            *("mel_audiotools", "", "lower", at_rate(metrics.mel_distance, **audiotools)),
            f"2 scales, windows 2048 and 512 with 150 and 80 mels, power (the tables of DAC), at {rate} Hz",
        ),
    ]
    if spec.modality not in ("speech", "audio"):
        return [*found, Metric("visqol", "MOS", "higher", at_rate(metrics.visqol, mode="audio"), "audio mode, 48 kHz")]
    source = "against its own reading of the original" if texts is None else "against the given texts"
    return [
        *found,
        *([Metric("pesq_wb", "MOS", "higher", at_rate(metrics.pesq, mode="wb"), "16 kHz")] if rate >= 16000 else []),
        Metric("pesq_nb", "MOS", "higher", at_rate(metrics.pesq, mode="nb"), "8 kHz"),
        Metric("stoi", "", "higher", at_rate(metrics.stoi)),
        Metric("visqol", "MOS", "higher", at_rate(metrics.visqol, mode="speech"), metrics.visqol_note()),
        Metric("f0_correlation", "", "higher", at_rate(metrics.f0_correlation), "YIN, frames voiced in both"),
        Metric("wer", "", "lower", wer, f"{source}; weighted by words"),
        Metric("speaker_similarity", "", "higher", voice, "cosine of voice embeddings"),
    ]


def _ask(who: str, network: Callable[..., Any], *arguments: Any) -> Any:
    """Call what the user gave. Whatever it raises (too short for it, say) makes this item unmeasurable."""
    try:
        return network(*arguments)
    except Exception as error:
        raise Unmeasurable(f"{who} failed: {type(error).__name__}: {error}") from error


# Cost, speed, meaning


class Clock:
    """Time of computing and peak memory, per kind of work: `with clock("encode"): ...`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.peak_mib: dict[str, float] = {}
        self.codes = self.positions = self.units = self.items = 0

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        before = reset_peak(self.device)
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[kind] += time.perf_counter() - started
        growth = (peak_bytes(self.device) - before) / 2**20
        self.peak_mib[kind] = max(self.peak_mib.get(kind, 0.0), growth)

    def count(self, codes: Tensor, medium: Tensor) -> None:
        """Note an item's codes `[K, *grid]` and samples or pixels."""
        self.items += 1
        self.codes += codes.numel()
        self.positions += codes[0].numel()
        self.units += medium[0].numel()

    def row(self, spec: CodeSpec) -> dict[str, Any]:
        """Items one at a time: seconds, codes per second, real-time factor (audio; below 1 is faster), memory."""
        found: dict[str, Any] = {"items": self.items}
        for kind, seconds in self.seconds.items():
            found[f"{kind}_seconds"] = seconds
            found[f"{kind}_tokens_per_second"] = self.codes / seconds
            if spec.sample_rate is not None:
                found[f"{kind}_real_time_factor"] = seconds * spec.sample_rate / self.units
            found[f"{kind}_peak_mib"] = self.peak_mib[kind]
        return found


def reset_peak(device: torch.device) -> int:
    """Start to watch memory; returns the bytes in use. On a GPU what torch holds, else this process's resident set."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM back to VmRSS
        return _status("VmRSS")
    except OSError:
        return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most bytes in use since `reset_peak` (without Linux's /proc: since the process started)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


def _cost(spec: CodeSpec, counter: CodeCounter, clock: Clock) -> dict[str, Any]:
    """Bits as stored (log2 of the codebook sizes) and as an ideal entropy coder with these frequencies would need."""
    rows = counter.rows()
    stored = sum(torch.tensor(row["codebook_size"]).double().log2().item() for row in rows)
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


def _probe(
    tokenizer: Tokenizer, found: Sequence[Path | Tensor], pattern: str, num_quantizers: int | None
) -> dict[str, Any]:
    """Linear probes for the classes in the file names, on the first codebook and on all."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise AnyglotError(f"labels {pattern!r} is not a regular expression ({error})") from error
    if "label" not in expression.groupindex:
        raise AnyglotError(f"labels {pattern!r} needs a group (?P<label>...), and may have (?P<group>...)")
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
            codes = tokenizer.encode(_read(entry, tokenizer)[None], num_quantizers=num_quantizers).item(0)
        except AnyglotError as error:
            skipped[str(error)] += 1
            continue
        first.append(bag_of_codes(codes[:1], books[:1], parts))
        every.append(bag_of_codes(codes, books, parts))
        labels.append(match["label"])
        groups.append(match.groupdict().get("group") or str(index))
    known = groups if "group" in expression.groupindex else None
    probes = {"first codebook": first} | ({"all codebooks": every} if len(books) > 1 else {})
    rows = {name: linear_probe(_met(torch.stack(x_ND)), labels, known) for name, x_ND in probes.items() if x_ND}
    return {"labels": pattern, "rows": rows, "skipped": sum(skipped.values()), "reasons": dict(skipped)}


def _met(x_ND: Tensor) -> Tensor:
    """Only the features that ever occur."""
    return x_ND[:, (x_ND != 0).any(0)]
