"""Every measure against a reference implementation or a closed form; worse is worse; nothing is a score that is not."""

import sys

import numpy as np
import pytest
import torch

from anyglot_tokenizers import metrics
from anyglot_tokenizers.metrics import CodeCounter, MissingExtra, Unmeasurable, interval

RATE = 16000


def voice(seconds=1.5, rate=RATE, seed=0):
    """A gliding, pulsing buzz with a little noise: speech enough for every measure. `[1, samples]`."""
    time = torch.arange(int(seconds * rate)) / rate
    pitch = 140 + 40 * torch.sin(2 * torch.pi * 0.9 * time)
    phase = 2 * torch.pi * torch.cumsum(pitch, 0) / rate
    buzz = sum(torch.sin(k * phase) / k for k in range(1, 12))
    pulse = (0.5 - 0.5 * torch.cos(2 * torch.pi * 4 * time)).clamp(min=0.02)
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(seed))
    return (0.2 * buzz * pulse + 0.002 * noise)[None]


def noisy(audio, amount, seed=1):
    return audio + amount * torch.randn(audio.shape, generator=torch.Generator().manual_seed(seed))


def picture(seed=0):
    smooth = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(smooth, (36, 48), mode="bicubic")[0].clamp(0, 1)


# Images


def test_psnr():
    target = torch.full((3, 8, 8), 0.5)
    assert metrics.psnr(target + 0.1, target) == pytest.approx(20.0, abs=1e-4)
    assert metrics.psnr(target, target) == pytest.approx(100.0)
    assert metrics.psnr(target + 9, target) == metrics.psnr(torch.ones(3, 8, 8), target), "values are clipped first"


@pytest.mark.parametrize("amount", [0.02, 0.3])
def test_ssim_is_that_of_torchmetrics(amount):
    from torchmetrics.functional.image import structural_similarity_index_measure as reference

    target = picture()
    output = noisy(target, amount).clamp(0, 1)
    pair = output[None].double(), target[None].double()
    _, everywhere = reference(*pair, data_range=1.0, return_full_image=True)  # it reflects edges; Wang et al. do not
    assert metrics.ssim(output, target) == pytest.approx(float(everywhere[..., 5:-5, 5:-5].mean()), abs=1e-9)
    with pytest.raises(Unmeasurable, match="11 x 11"):
        metrics.ssim(output[:, :10], target[:, :10])


def test_ssim_of_a_large_picture_is_made_strip_by_strip(monkeypatch):
    target = picture().repeat(1, 5, 1)[:, : metrics.SSIM_ROWS * 3 + 5]
    output = noisy(target, 0.1)
    sizes, convolve = [], metrics.F.conv2d
    monkeypatch.setattr(metrics.F, "conv2d", lambda x, kernel: sizes.append(x.shape[2]) or convolve(x, kernel))
    strips = metrics.ssim(output, target)
    assert max(sizes) <= metrics.SSIM_ROWS + 10 < len(target[0])
    monkeypatch.setattr(metrics, "SSIM_ROWS", 10**6)
    assert metrics.ssim(output, target) == pytest.approx(strips, abs=1e-12)


def test_perceptual_distance_by_hand():
    one = [torch.randn(1, 4, 3, 5), torch.randn(1, 6, 2, 2)]
    other = [torch.randn(1, 4, 3, 5), torch.randn(1, 6, 2, 2)]
    heads = [torch.rand(4), torch.rand(6)]
    want = 0.0
    for x, y, head in zip(one, other, heads, strict=True):
        positions = []
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                a, b = x[0, :, row, column].numpy(), y[0, :, row, column].numpy()
                positions.append((head.numpy() * (a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum())
        want += np.mean(positions)
    assert metrics.perceptual_distance(one, other, heads) == pytest.approx(want, rel=1e-5)
    assert metrics.perceptual_distance(one, one) == 0.0 < metrics.perceptual_distance(one, other)


def test_frechet_distance_is_that_of_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    mixing = torch.randn(5, 5, dtype=torch.float64)
    x, y = torch.randn(60, 5, dtype=torch.float64) @ mixing, torch.randn(50, 5, dtype=torch.float64) + 0.3
    want = _compute_fid(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert metrics.frechet_distance(x, y) == pytest.approx(float(want), rel=1e-6)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(x + 2, x) == pytest.approx(20, rel=1e-6), "a shift of 2 in 5 dims"
    assert metrics.frechet_distance(x[:3], x[3:6]) >= 0, "fewer items than dims"
    assert metrics.frechet_distance(x[:, :1], x[:, :1] * 3) == pytest.approx(
        float((x[:, 0].mean() * 2) ** 2 + (x[:, 0].std() * 2) ** 2), rel=1e-6
    )
    with pytest.raises(Unmeasurable):
        metrics.frechet_distance(x[:1], x)


# Audio


def test_si_sdr_is_that_of_torchmetrics():
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as reference

    target = torch.cat([voice(seed=0), noisy(voice(seed=0), 0.1, seed=3)])
    output = 0.3 * noisy(target, 0.05) + 0.02
    want = reference(output.double(), target.double(), zero_mean=True).mean()
    assert metrics.si_sdr(output, target) == pytest.approx(float(want), abs=1e-4)
    assert metrics.si_sdr(5 * target, target) == 100
    silence = torch.zeros_like(target)
    for pair, reason in (((output, silence), "original is silent"), ((silence, target), "reconstruction is silent")):
        with pytest.raises(Unmeasurable, match=reason):
            metrics.si_sdr(*pair)


@pytest.mark.parametrize(
    ("rate", "n_fft", "mels"), [(16000, 2048, 320), (24000, 512, 80), (44100, 32, 5), (1500, 64, 8)]
)
def test_mel_filters_are_those_of_librosa(rate, n_fft, mels):
    from transformers.audio_utils import mel_filter_bank

    want = mel_filter_bank(n_fft // 2 + 1, mels, 0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    assert np.abs(metrics.slaney_filters(n_fft, mels, rate).numpy() - want).max() < 1e-6 * want.max() + 1e-9


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.parametrize(("scales", "power", "weight"), [("DAC_SCALES", 1, 0), ("AUDIOTOOLS_SCALES", 2, 1)])
def test_mel_distance_by_hand(scales, power, weight):
    """numpy's FFT and the filters of transformers, by the definition of DAC's loss."""
    from transformers.audio_utils import mel_filter_bank

    target = voice(0.4)
    output = noisy(target, 0.03)
    want = 0.0
    for window, mels in getattr(metrics, scales):
        bank = mel_filter_bank(window // 2 + 1, mels, 0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
        spectra = []
        for audio in (output, target):
            padded = np.pad(audio[0].double().numpy(), window // 2, mode="reflect")
            frames = np.lib.stride_tricks.sliding_window_view(padded, window)[:: window // 4]
            spectra.append(np.abs(np.fft.rfft(frames * hann)) @ bank)
        logs = [np.log10(np.maximum(spectrum, 1e-5) ** power) for spectrum in spectra]
        want += np.abs(logs[0] - logs[1]).mean() + weight * np.abs(spectra[0] - spectra[1]).mean()
    got = metrics.mel_distance(output, target, RATE, getattr(metrics, scales), power=power, magnitude_weight=weight)
    assert got == pytest.approx(want, rel=1e-4)
    assert metrics.mel_distance(target, target, RATE) == 0
    with pytest.raises(Unmeasurable, match="1025 samples"):
        metrics.mel_distance(target[:, :1024], target[:, :1024], RATE)


def test_pesq_is_that_of_the_package():
    package = pytest.importorskip("pesq")
    target, output = voice(), noisy(voice(), 0.02)
    want = package.pesq(RATE, target[0].numpy(), output[0].numpy(), "wb")
    assert metrics.pesq(output, target, RATE) == pytest.approx(want)
    assert metrics.pesq(output, target, RATE, "nb") != pytest.approx(want)
    long = torch.cat([target] * 11, 1)  # 16.5 s: two parts, of which the second has a silent half
    assert metrics.pesq(noisy(long, 0.02), long, RATE) == pytest.approx(want, abs=0.2)
    with pytest.raises(Unmeasurable, match="no utterances"):
        metrics.pesq(output, 0 * target, RATE)
    with pytest.raises(Unmeasurable, match="quarter of a second"):
        metrics.pesq(output[:, :2000], target[:, :2000], RATE)


def test_pesq_over_parts_leaves_silent_parts_out():
    pytest.importorskip("pesq")
    target = torch.cat([*[voice()] * 10, torch.zeros(1, 15 * RATE)], 1)
    output = torch.cat([noisy(target[:, : 15 * RATE], 0.02), torch.zeros(1, 15 * RATE)], 1)
    alone = metrics.pesq(output[:, : 15 * RATE], target[:, : 15 * RATE], RATE)
    assert metrics.pesq(output, target, RATE) == pytest.approx(alone)


def test_stoi_is_that_of_the_package():
    package = pytest.importorskip("pystoi")
    target, output = voice(), noisy(voice(), 0.05)
    assert metrics.stoi(output, target, RATE) == pytest.approx(package.stoi(target[0].numpy(), output[0].numpy(), RATE))
    with pytest.raises(Unmeasurable, match=r"0\.4 s"):
        metrics.stoi(output[:, :5000], target[:, :5000], RATE)
    with pytest.raises(Unmeasurable, match="silent"):
        metrics.stoi(output, 0 * target, RATE)


@pytest.mark.parametrize("mode", ["speech", "audio"])
def test_visqol(mode):
    pytest.importorskip("visqol")
    target = voice(1.0)
    same, worse = (metrics.visqol(output, target, RATE, mode) for output in (target, noisy(target, 0.1)))
    assert 1 <= worse < same <= 5 and same > 4
    with pytest.raises(Unmeasurable, match="silence"):
        metrics.visqol(target, 0 * target, RATE, mode)
    with pytest.raises(Unmeasurable, match="half a second"):
        metrics.visqol(target[:, :2000], target[:, :2000], RATE, mode)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("partials", [1, 8])
def test_yin_finds_a_gliding_pitch(rate, partials):
    time = np.arange(rate) / rate
    pitch = 200 + 90 * np.sin(2 * np.pi * time)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    found = metrics.yin(sum(np.sin(k * phase) / k for k in range(1, partials + 1)), rate)
    middle = pitch[(np.arange(len(found)) * round(0.01 * rate) + round(0.02 * rate))]
    assert (found > 0).mean() > 0.95
    assert np.median(np.abs(found / middle - 1)[found > 0]) < 0.01


def test_yin_of_a_long_sound_is_made_block_by_block(monkeypatch):
    time = np.arange(8000 * 45) / 8000
    sound = np.sin(2 * np.pi * (200 * time + 20 * np.sin(time)))
    counts, transform = [], np.fft.rfft
    monkeypatch.setattr(np.fft, "rfft", lambda x, size: counts.append(len(x)) or transform(x, size))
    blocks = metrics.yin(sound, 8000)
    assert max(counts) <= metrics.YIN_FRAMES < 4400 < len(blocks)
    monkeypatch.setattr(metrics, "YIN_FRAMES", 10**6)
    assert np.array_equal(metrics.yin(sound, 8000), blocks)


def test_yin_hears_no_pitch_in_noise_silence_or_nothing():
    noise = np.random.default_rng(0).normal(size=RATE)
    assert (metrics.yin(noise, RATE) > 0).mean() < 0.05
    assert (metrics.yin(np.zeros(RATE), RATE) == 0).all()
    assert len(metrics.yin(np.zeros(10), RATE)) == 0


def test_f0_correlation():
    target = voice()
    assert metrics.f0_correlation(noisy(target, 0.002), target, RATE) > 0.99
    rising = torch.sin(2 * torch.pi * torch.cumsum(torch.linspace(100, 300, RATE), 0) / RATE)[None]
    assert metrics.f0_correlation(rising.flip(1), rising, RATE) < -0.99
    for output, reason in ((torch.randn_like(target), "voiced in both"), (0 * target, "voiced in both")):
        with pytest.raises(Unmeasurable, match=reason):
            metrics.f0_correlation(output, target, RATE)
    flat = torch.sin(2 * torch.pi * 160 * torch.arange(RATE) / RATE)[None]
    with pytest.raises(Unmeasurable, match="does not move"):
        metrics.f0_correlation(flat, flat, RATE)


def test_word_errors():
    pytest.importorskip("jiwer")
    assert metrics.word_errors("the CAT sat", "The cat, sat!") == (0, 3)
    assert metrics.word_errors("a cat sat down", "the cat sat") == (2, 3)
    assert metrics.word_errors("", "don't go") == (2, 2)
    with pytest.raises(Unmeasurable, match="no words"):
        metrics.word_errors("something", " ?! ")


MEASURES = {
    "psnr": (metrics.psnr, "image", 1),
    "ssim": (metrics.ssim, "image", 1),
    "snr": (metrics.snr, "audio", 1),
    "si_sdr": (metrics.si_sdr, "audio", 1),
    "mel": (lambda x, y: metrics.mel_distance(x, y, RATE), "audio", -1),
    "pesq": (lambda x, y: metrics.pesq(x, y, RATE), "audio", 1),
    "stoi": (lambda x, y: metrics.stoi(x, y, RATE), "audio", 1),
    "visqol": (lambda x, y: metrics.visqol(x, y, RATE), "audio", 1),
    "f0": (lambda x, y: metrics.f0_correlation(x, y, RATE), "audio", 1),
}


@pytest.mark.parametrize("name", MEASURES)
def test_worse_is_worse(name):
    measure, kind, sign = MEASURES[name]
    target = picture() if kind == "image" else voice()
    levels = (0.005, 0.05, 0.2)
    try:
        scores = [sign * measure(noisy(target, level), target) for level in levels]
    except MissingExtra as error:
        pytest.skip(str(error))
    except Unmeasurable:
        assert name == "f0", "only a pitch may drown in noise"
        scores = [sign * measure(noisy(target, level), target) for level in levels[:2]]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)


@pytest.mark.parametrize(
    ("package", "measure"),
    [
        ("pesq", lambda: metrics.pesq(voice(), voice(), RATE)),
        ("pystoi", lambda: metrics.stoi(voice(), voice(), RATE)),
        ("jiwer", lambda: metrics.word_errors("a", "a")),
    ],
)
def test_missing_package_names_the_extra(package, measure, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package} is not installed; pip install 'anyglot\[eval\]'"):
        measure()


# Codes and intervals


def test_snr():
    target = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert metrics.snr(target * 0.9, target) == pytest.approx(20, abs=1e-3)
    with pytest.raises(Unmeasurable, match="constant"):
        metrics.snr(target, torch.ones(1, 4))


def test_code_counter_counts_the_whole_set():
    """Each item uses one code only: perplexity 1 per item, 4 over the set."""
    counter = CodeCounter([8, 1, 4])
    for code in range(4):
        counter.add(torch.stack([torch.full((5,), code), torch.zeros(5, dtype=torch.int64), torch.arange(5) % 2]))
    first, single, last = counter.rows()
    assert (first["used"], first["usage"], first["positions"]) == (4, 0.5, 20)
    assert first["perplexity"] == pytest.approx(4) and first["entropy"] == pytest.approx(2)
    assert first["normalised_entropy"] == pytest.approx(2 / 3)
    assert [rank for rank, _ in first["ranked"]] == [1, 2, 3, 4]
    assert single["entropy"] == 0 and single["perplexity"] == 1 and single["normalised_entropy"] == 0
    shares = np.array([0.6, 0.4])
    assert last["entropy"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert last["ranked"] == [[1, pytest.approx(0.6)], [2, pytest.approx(0.4)]]


def test_interval_is_near_theory():
    values = np.random.default_rng(1).normal(3, 2, 200)
    mean, low, high = interval(list(values))
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.05) and high == pytest.approx(mean + half, abs=0.05)
    assert interval([1.0, 0.0], [9.0, 1.0])[0] == pytest.approx(0.9)
    assert interval(list(values)) == interval(list(values)), "the same every time"
