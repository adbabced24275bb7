"""Measures of reconstruction, one item at a time, and of code usage over a whole set.

A measure that does not exist for an item (silence, too short) or whose package is missing raises `Unmeasurable`, with
the reason; it never returns a made-up score. Short closed forms are our own, so that the base install measures them;
PESQ, STOI, ViSQOL and WER come from the packages of the `eval` extra. This file knows no tokenizers, sets or reports.

Shapes: C channels, H x W pixels, S samples, T frames, F frequency bins, M mels, N items, D feature dims. `output` is
the reconstruction, `target` the original: images float `[3, H, W]` in [0, 1], audio float `[C, S]`.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from anyglot_tokenizers.errors import AnyglotError

Array = NDArray[Any]
MapsOf = Callable[[Tensor], Tensor | Sequence[Tensor]]
"""A feature network: images `[B, 3, H, W]` in [0, 1] to feature maps `[B, D, h, w]` (or `[B, D]`), one or several."""

DAC_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))
"""(window, mels) of the loss that DAC is trained with: log10 of mel magnitudes only."""
AUDIOTOOLS_SCALES = ((2048, 150), (512, 80))
"""(window, mels) behind the tables of DAC and of Codec-SUPERB: log10 of mel power, plus mel magnitudes."""
PESQ_SECONDS = 15.0  # longer input can hold more utterances than the 50 that the reference code has room for
YIN_FRAMES = 2000  # analysed at once
SSIM_ROWS = 32  # compared at once
MIN_VOICED = 10  # frames of 10 ms voiced in both, below which a correlation says nothing


class Unmeasurable(AnyglotError):
    """A measure that does not exist for this item, or whose package is not installed; the message is the reason."""


class MissingExtra(Unmeasurable):
    """The package of a measure is not installed, so no item can be measured."""


def extra(name: str) -> Any:
    """Import a package of the `eval` extra. Raises MissingExtra if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f"{name} is not installed; pip install 'anyglot[eval]'") from error


# Images


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1]; at most 100, for equal images."""
    error = (output.clamp(0, 1).double() - target.double()).square().mean()
    return float(-10 * error.clamp(min=1e-10).log10())


def ssim(output: Tensor, target: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), -1 to 1: Gaussian window of 11 pixels, sigma 1.5, mean over RGB.

    Only windows that lie wholly inside the image count. Raises Unmeasurable below 11 pixels.
    """
    if min(target.shape[1:]) < 11:
        raise Unmeasurable(f"SSIM needs 11 x 11 pixels, got {target.shape[1]} x {target.shape[2]}")
    offsets = torch.arange(11, dtype=torch.float64) - 5
    kernel = torch.exp(-offsets.square() / (2 * 1.5**2))
    kernel = kernel / kernel.sum()
    rows = target.shape[1] - 10
    strips = (slice(start, min(start + SSIM_ROWS, rows) + 10) for start in range(0, rows, SSIM_ROWS))
    total = sum(_ssim_sum(output[:, strip], target[:, strip], kernel) for strip in strips)
    return total / (len(target) * rows * (target.shape[2] - 10))


def _ssim_sum(output: Tensor, target: Tensor, kernel: Tensor) -> float:
    """The sum over all windows that lie inside."""
    x, y = output.clamp(0, 1).double(), target.double()
    planes = torch.cat([x, y, x * x, y * y, x * y])[:, None]
    planes = F.conv2d(F.conv2d(planes, kernel.reshape(1, 1, 11, 1)), kernel.reshape(1, 1, 1, 11))
    mean_x, mean_y, xx, yy, xy = planes[:, 0].chunk(5)
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    ratio = ratio / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return float(ratio.sum())


def perceptual_distance(
    output_maps: Sequence[Tensor], target_maps: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> float:
    """LPIPS (Zhang et al., arXiv 1801.03924) on any network's feature maps `[1, D, h, w]`.

    Features are scaled to unit length at every position; squared differences are summed over D weighted by `weights`
    (one `[D]` a map, such as the published linear heads), or averaged over D without, averaged over positions and
    summed over maps.
    """
    total = 0.0
    for index, (x, y) in enumerate(zip(output_maps, target_maps, strict=True)):
        difference = (F.normalize(x.double(), dim=1, eps=1e-10) - F.normalize(y.double(), dim=1, eps=1e-10)).square()
        heads = torch.full((x.shape[1],), 1 / x.shape[1]) if weights is None else weights[index]
        total += float((difference * heads.double().reshape(1, -1, *[1] * (x.ndim - 2))).sum(1).mean())
    return total


def frechet_distance(output_ND: Tensor, target_ND: Tensor) -> float:
    """Frechet distance of two sets of features, each taken as a Gaussian (Heusel et al., arXiv 1706.08500).

    With features of the Inception network this is FID (rFID, if the outputs are reconstructions). Numbers of different
    networks, image counts or resize filters cannot be compared. Raises Unmeasurable for fewer than 2 items.
    """
    if min(len(output_ND), len(target_ND)) < 2:
        raise Unmeasurable("the Frechet distance needs at least 2 items")
    x, y = output_ND.double(), target_ND.double()
    root = _square_root(torch.cov(x.T).reshape(x.shape[1], -1))
    cross = root @ torch.cov(y.T).reshape(y.shape[1], -1) @ root
    spread = torch.cov(x.T).reshape(x.shape[1], -1).trace() + torch.cov(y.T).reshape(y.shape[1], -1).trace()
    distance = (x.mean(0) - y.mean(0)).square().sum() + spread
    return float((distance - 2 * torch.linalg.eigvalsh((cross + cross.T) / 2).clamp(min=0).sqrt().sum()).clamp(min=0))


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root


# Audio


def si_sdr(output: Tensor, target: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., arXiv 1811.02508), means removed.

    The mean over channels; at most 100. Raises Unmeasurable for silence on either side.
    """
    x, y = output.double(), target.double()
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    if bool((y.square().sum(1) < 1e-12).any()):
        raise Unmeasurable("the original is silent")
    if bool((x.square().sum(1) < 1e-12).any()):
        raise Unmeasurable("the reconstruction is silent")
    scaled = (x * y).sum(1, keepdim=True) / y.square().sum(1, keepdim=True) * y
    signal, noise = scaled.square().sum(1), (x - scaled).square().sum(1)
    if bool((signal == 0).any()):
        raise Unmeasurable("the reconstruction has nothing of the original")
    return float((10 * (signal / noise.clamp(min=1e-300)).log10()).clamp(max=100).mean())


def mel_distance(
    output: Tensor,
    target: Tensor,
    sample_rate: int,
    scales: Sequence[tuple[int, int]] = DAC_SCALES,
    *,
    power: float = 1.0,
    magnitude_weight: float = 0.0,
    floor: float = 1e-5,
) -> float:
    """Multi-scale mel distance as DAC defines it (Kumar et al., arXiv 2306.06546): a sum over scales.

    At each scale: mean absolute difference of `log10(max(mel, floor) ** power)` plus `magnitude_weight` times that of
    the mel magnitudes themselves; Hann window, hop a quarter of it, centred frames, reflected edges, unnormalised STFT
    magnitudes, Slaney mel filters. `DAC_SCALES` with the defaults is DAC's training loss; `AUDIOTOOLS_SCALES` with
    power 2 and magnitude weight 1 is what its evaluation script prints (there at 22.05 and 44.1 kHz).

    Raises Unmeasurable if the sound is shorter than half the longest window.
    """
    longest = max(window for window, _ in scales)
    if target.shape[1] <= longest // 2:
        raise Unmeasurable(f"shorter than {longest // 2 + 1} samples, half the longest window")
    total = 0.0
    for window, mels in scales:
        filters_FM = slaney_filters(window, mels, sample_rate)
        hann = torch.hann_window(window)
        x_CMT, y_CMT = (
            filters_FM.T @ torch.stft(audio.float(), window, window // 4, window=hann, return_complex=True).abs()
            for audio in (output, target)
        )
        logs = (x_CMT.clamp(min=floor).log10() - y_CMT.clamp(min=floor).log10()).abs().mean() * power
        total += float(logs + magnitude_weight * (x_CMT - y_CMT).abs().mean())
    return total


@cache
def slaney_filters(n_fft: int, num_mels: int, sample_rate: int) -> Tensor:
    """Mel filters of Slaney's Auditory Toolbox, float32 `[n_fft / 2 + 1, num_mels]`: linear below 1 kHz, then
    logarithmic; triangles of equal area, as librosa makes them."""

    def to_hz(mel: Array) -> Array:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))

    top = sample_rate / 2
    top_mel = top * 3 / 200 if top < 1000 else 15 + math.log(top / 1000) * 27 / math.log(6.4)
    edges = to_hz(np.linspace(0, top_mel, num_mels + 2))
    bins = np.linspace(0, top, n_fft // 2 + 1)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clip(min=0)
    return torch.from_numpy((triangles * 2 / (right - left)).astype(np.float32))


def pesq(output: Tensor, target: Tensor, sample_rate: int, mode: str = "wb") -> float:
    """PESQ as MOS-LQO, about 1 to 4.6 (ITU-T P.862.2 `"wb"` at 16 kHz, P.862.1 `"nb"` at 8 kHz), by the `pesq` package.

    Sounds over 15 s are cut into equal parts and averaged over those that hold speech: the reference code has room for
    50 utterances and was made for sentences. Raises Unmeasurable if no speech is found or it is too short.
    """
    package = extra("pesq")
    rate = 16000 if mode == "wb" else 8000
    x, y = resample(mono(output), sample_rate, rate), resample(mono(target), sample_rate, rate)
    scores, reasons = [], []
    parts = max(math.ceil(len(y) / rate / PESQ_SECONDS), 1)
    for part_x, part_y in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        if not (np.abs(part_y).max(initial=0) > 0 and np.abs(part_x).max(initial=0) > 0):
            reasons.append("silence: PESQ finds no utterances")
            continue
        try:
            scores.append(float(package.pesq(rate, part_y, part_x, mode)))
        except package.NoUtterancesError:
            reasons.append("PESQ finds no utterances")
        except package.BufferTooShortError:
            reasons.append("too short for PESQ (a quarter of a second)")
        except (package.PesqError, ValueError, ZeroDivisionError) as error:
            reasons.append(f"PESQ: {error}")
    if not scores:
        raise Unmeasurable(reasons[0])
    return float(np.mean(scores))


def stoi(output: Tensor, target: Tensor, sample_rate: int) -> float:
    """Short-time objective intelligibility, 0 to 1 (Taal et al. 2011), by the `pystoi` package.

    Raises Unmeasurable where the package would return 1e-5: under 0.4 s that is not silent.
    """
    package = extra("pystoi")
    x, y = mono(output), mono(target)
    if not np.any(y):
        raise Unmeasurable("the original is silent")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(package.stoi(y, x, sample_rate))
        except (RuntimeWarning, ValueError, IndexError) as error:
            short = "Not enough STFT frames" in str(error)
            raise Unmeasurable("less than 0.4 s of sound for STOI" if short else f"STOI: {error}") from error


def visqol(output: Tensor, target: Tensor, sample_rate: int, mode: str = "speech") -> float:
    """ViSQOL as MOS-LQO, 1 to 5 (Chinen et al., arXiv 2004.09584), by the `visqol-python` package.

    Mode `"speech"` works at 16 kHz, `"audio"` at 48 kHz. Raises Unmeasurable for silence and for less than the half
    second or so that one patch needs.
    """
    scorer = _visqol_scorer(mode)
    rate = 16000 if mode == "speech" else 48000
    x, y = resample(mono(output), sample_rate, rate), resample(mono(target), sample_rate, rate)
    if not (np.any(x) and np.any(y)):
        raise Unmeasurable("silence on either side")
    try:
        score = float(scorer.measure_from_arrays(y.astype(np.float64), x.astype(np.float64), rate).moslqo)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise Unmeasurable("too short or too quiet for ViSQOL, which needs over half a second") from error
    if not math.isfinite(score):
        raise Unmeasurable("ViSQOL gives no number")
    return score


@cache
def _visqol_scorer(mode: str) -> Any:
    scorer = extra("visqol").VisqolApi()
    scorer.create(mode=mode)
    return scorer


def visqol_note() -> str:
    """What the speech mode's numbers mean here: the package maps similarity to MOS in one of two ways."""
    try:
        lattice = bool(_visqol_scorer("speech")._manager.use_lattice_model)
    except MissingExtra:
        return "speech mode, 16 kHz"
    if lattice:
        return "speech mode, 16 kHz, lattice mapping"
    return (
        "speech mode, 16 kHz, polynomial mapping: 1 to 2 too high on degraded speech; visqol-python[lattice] mends it"
    )


def f0_correlation(output: Tensor, target: Tensor, sample_rate: int) -> float:
    """Pearson correlation of the fundamental frequency (Hz) over the frames that are voiced in both, -1 to 1.

    Raises Unmeasurable if fewer than 10 frames are, or if either pitch never moves.
    """
    x, y = yin(mono(output), sample_rate), yin(mono(target), sample_rate)
    both = (x > 0) & (y > 0)
    if both.sum() < MIN_VOICED:
        raise Unmeasurable(f"fewer than {MIN_VOICED} frames are voiced in both")
    if min(x[both].std(), y[both].std()) < 1e-3 * y[both].mean():
        raise Unmeasurable("the pitch does not move")
    return float(np.corrcoef(x[both], y[both])[0, 1])


def yin(
    audio_S: Array,
    sample_rate: int,
    *,
    low_hz: float = 60.0,
    high_hz: float = 500.0,
    hop_seconds: float = 0.01,
    threshold: float = 0.15,
) -> Array:
    """Fundamental frequency in Hz per frame, `[T]`, 0 where unvoiced: YIN (de Cheveigne and Kawahara 2002).

    Difference function over 40 ms, normalised by its running mean; the first dip under `threshold` counts, refined by a
    parabola. A frame without one, or below -60 dB of full scale, is unvoiced.
    """
    hop, window = max(round(hop_seconds * sample_rate), 1), round(0.04 * sample_rate)
    shortest, longest = max(int(sample_rate / high_hz), 2), int(sample_rate / low_hz) + 1
    if len(audio_S) < window + longest + 1:
        return np.zeros(0)
    frames = np.lib.stride_tricks.sliding_window_view(audio_S.astype(np.float64), window + longest + 1)[::hop]
    blocks = (frames[start : start + YIN_FRAMES] for start in range(0, len(frames), YIN_FRAMES))
    return np.concatenate([_pitches(block, sample_rate, window, shortest, longest, threshold) for block in blocks])


def _pitches(frames: Array, sample_rate: int, window: int, shortest: int, longest: int, threshold: float) -> Array:
    """`yin` of frames `[T, window + longest + 1]`, for lags from `shortest` to `longest`."""
    energy = np.cumsum(np.pad(frames**2, ((0, 0), (1, 0))), axis=1)
    lags = np.arange(longest + 2)
    size = 2 ** math.ceil(math.log2(2 * window + longest + 1))
    spectrum = np.fft.rfft(frames, size) * np.conj(np.fft.rfft(frames[:, :window], size))
    product = np.fft.irfft(spectrum, size)[:, : longest + 2]
    difference = energy[:, window, None] + energy[:, window + lags[:-1]] - energy[:, lags[:-1]] - 2 * product[:, :-1]
    difference = difference[:, : longest + 1].clip(min=0)
    mean = np.cumsum(difference[:, 1:], axis=1) / np.arange(1, longest + 1)
    normal = np.concatenate([np.ones((len(frames), 1)), difference[:, 1:] / mean.clip(min=1e-12)], axis=1)
    inner = normal[:, shortest:-1]
    dips = (inner < threshold) & (inner <= normal[:, shortest - 1 : -2]) & (inner <= normal[:, shortest + 1 :])
    voiced = dips.any(1) & (energy[:, window] / window > 1e-6)
    row, lag = np.arange(len(frames)), dips.argmax(1) + shortest
    before, at, after = (normal[row, lag + step] for step in (-1, 0, 1))
    bend = before - 2 * at + after
    shift = np.where(bend > 1e-12, (before - after) / (2 * np.where(bend > 1e-12, bend, 1)), 0).clip(-0.5, 0.5)
    return np.where(voiced, sample_rate / (lag + shift), 0.0)


def word_errors(hypothesis: str, reference: str) -> tuple[int, int]:
    """(word errors, words of the reference), by `jiwer`, without case and punctuation.

    Raises Unmeasurable if the reference has no words.
    """
    package = extra("jiwer")
    heard, said = (
        " ".join("".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split())
        for text in (hypothesis, reference)
    )
    if not said:
        raise Unmeasurable("no words in the reference")
    found = package.process_words(said, heard)
    return found.substitutions + found.deletions + found.insertions, len(said.split())


def mono(audio: Tensor) -> Array:
    """Mean over channels, float32 `[S]`."""
    return audio.detach().float().mean(0).cpu().numpy()


def resample(audio_S: Array, from_hz: int, to_hz: int) -> Array:
    """By soxr, high quality."""
    if from_hz == to_hz:
        return audio_S
    import soxr

    return np.asarray(soxr.resample(audio_S, from_hz, to_hz, quality="HQ"), dtype=np.float32)


# Anything


def snr(output: Tensor, target: Tensor) -> float:
    """Signal-to-noise ratio in dB against the mean per channel, at most 100. Raises Unmeasurable if nothing varies."""
    x, y = output.double(), target.double()
    power = (y - y.mean(1, keepdim=True)).square().sum()
    if power < 1e-20:
        raise Unmeasurable("the original is constant")
    return float((10 * (power / (x - y).square().sum().clamp(min=1e-300)).log10()).clamp(max=100))


# Codes


class CodeCounter:
    """Counts of every code of every quantizer over a whole set, and what follows from them.

    Over the set and not per batch: usage and perplexity of a batch depend on the batch size.

    Args:
        codebook_sizes: of the quantizers counted.
    """

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        self.counts = [torch.zeros(size, dtype=torch.int64) for size in codebook_sizes]

    def add(self, codes: Tensor) -> None:
        """Count one item's codes, int64 `[K, *grid]`."""
        for count, row in zip(self.counts, codes.cpu().flatten(1), strict=True):
            count += torch.bincount(row, minlength=len(count))

    def rows(self) -> list[dict[str, Any]]:
        """Per quantizer: `codebook_size`, `positions` counted, `used` entries and `usage` (their share), `entropy` in
        bits (what a code costs an ideal entropy coder that knows these frequencies), `normalised_entropy` (as a share
        of log2 of the size), `perplexity` (2 ** entropy), and `ranked`: shares of the used entries, most common first
        (at most 200 points, evenly spaced on a log scale of rank, as `[rank, share]`).
        """
        found = []
        for count in self.counts:
            positions = int(count.sum())
            share = count[count > 0].double().sort(descending=True).values / max(positions, 1)
            entropy = float(-(share * share.log2()).sum()) if positions else 0.0
            used = len(share)
            ranks = np.unique(np.geomspace(1, max(used, 1), min(used, 200)).round().astype(int))
            found.append(
                {
                    "codebook_size": len(count),
                    "positions": positions,
                    "used": used,
                    "usage": used / len(count),
                    "entropy": abs(entropy),
                    "normalised_entropy": abs(entropy) / math.log2(len(count)) if len(count) > 1 else 0.0,
                    "perplexity": 2**entropy,
                    "ranked": [[int(rank), float(share[rank - 1])] for rank in ranks],
                }
            )
        return found


# Intervals


def interval(
    values: Sequence[float], weights: Sequence[float] | None = None, *, level: float = 0.95, rounds: int = 2000
) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its percentile bootstrap interval (Efron 1979), items drawn with a fixed seed.

    With `weights` the mean is `sum(weights * values) / sum(weights)`: WER is the mean of item error rates weighted by
    their words.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.default_rng(0)
    means: list[Array] = []
    block = max(1, 1_000_000 // len(x))  # rounds that are drawn at once
    for start in range(0, rounds, block):
        drawn = rng.integers(0, len(x), (min(block, rounds - start), len(x)))
        means.append((x * w)[drawn].sum(axis=1) / w[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float((x * w).sum() / w.sum()), float(low), float(high)
