"""Which measures fit a tokenizer, and how their scores over a set are kept: values, and reasons where there is none.

The measures themselves are in `metrics.py`. This file reads specs; it runs no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_tokenizers import metrics
from anyglot_tokenizers.metrics import MapsOf, MissingExtra, Unmeasurable, interval
from anyglot_tokenizers.spec import CodeSpec

Recogniser = Callable[[Tensor, int], str]
"""Audio float32 `[1, samples]` and its rate in Hz to text."""
SpeakerOf = Callable[[Tensor, int], Tensor]
"""Audio float32 `[1, samples]` and its rate in Hz to an embedding of the voice, `[D]`."""
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
            if len(self.outputs) < 2:
                raise Unmeasurable("the Frechet distance needs at least 2 items")
            return metrics.frechet_distance(torch.stack(self.outputs), torch.stack(self.targets))

        note = "rFID if the network is Inception; not comparable between networks, image counts or sizes"
        metric = Metric("frechet", "", "lower", distance, note)
        metric.score(torch.empty(0), torch.empty(0), 0)
        return {"frechet": metric.row() | ({"n": len(self.outputs)} if metric.values else {})}


def measures_for(
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
