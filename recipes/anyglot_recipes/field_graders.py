"""The judges of the field trial: of photos of signs, spoken digits, keys of music, and intervals for what they find.

`train_photo_classifier`, `train_digit_listener` and `train_key_listener` learn from training pictures, human training
clips and training chorales alone and share no weights with the model; `sphinx_digits` knows nothing of this project,
`lowest_tone` nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_recipes.field import SAMPLE_RATE, WORDS, Clip, Picture, vary_speech
from anyglot_recipes.field_meaning import to_tensor, vary_images
from anyglot_recipes.field_music import Chorale, play
from anyglot_tokenizers.audio import mel_filters

TEST_TAKES = 5
"""Takes 0 to 4 of each digit are the official test clips of the Free Spoken Digit Dataset."""
SECONDS = 1.0
MELS = 48
NETWORKS = 4
"""The judge of photos is the mean of so many."""
LOWEST, TONES = 28, 64
"""MIDI pitch of the lowest semitone that is heard, and how many are."""


def train_photo_classifier(photos: Sequence[Picture], seed: int, steps: int = 1000) -> Callable[[Tensor], list[int]]:
    """A classifier of signed digits: the mean of convolutional networks trained on `photos`, half of the time blurred.

    The photos are varied too, for each network differently. One network has luck: four of them, as good as each other
    on held-out photos, found 0.89 to 0.94 of the same drawings right.

    Returns:
        A function from images float32 [N, 3, 64, 64] in [0, 1] to digits.
    """
    rng = np.random.default_rng([seed, 11])
    x_NCHW, digit_N = to_tensor(photos), torch.tensor([WORDS.index(p.word) for p in photos])
    flip_B = torch.ones(48, dtype=torch.bool)

    def batch() -> tuple[Tensor, Tensor]:
        chosen = rng.integers(len(photos), size=len(flip_B))
        x_BCHW = vary_images(x_NCHW[chosen], flip_B)
        if rng.random() < 0.5:
            x_BCHW = F.avg_pool2d(F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return x_BCHW, digit_N[chosen]

    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(seed + 1)
        networks = []
        for _ in range(NETWORKS):
            layers: list[nn.Module] = []
            for inputs, outputs in ((3, 32), (32, 64), (64, 96), (96, 128)):
                layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.GELU()]
            network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.4), nn.Linear(128 * 16, 10))
            networks.append(_fit(network, batch, steps))
    return lambda x_NCHW: _classify(networks, x_NCHW)


def train_digit_listener(clips: Sequence[Clip], seed: int, steps: int = 600) -> Callable[[Sequence[Any]], list[int]]:
    """A convolutional classifier of spoken digits, trained on human clips without their official test takes.

    Returns:
        A function from mono sounds at 16 kHz to digits.
    """
    rng = np.random.default_rng([seed, 12])
    learnt = [c for c in clips if c.take >= TEST_TAKES]
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(seed + 2)
        heard = [_spectrum(c.audio) for c in learnt]
        heard += [_spectrum(vary_speech(c.audio, rng)) for _ in range(4) for c in learnt]
        digit_N = torch.tensor([c.digit for c in learnt] * 5)

        def batch() -> tuple[Tensor, Tensor]:
            chosen = rng.integers(len(heard), size=32)
            x_BtM = torch.stack([heard[i].roll(int(rng.integers(-4, 5)), 0) for i in chosen])
            x_BtM = x_BtM + 0.3 * torch.randn(x_BtM.shape)
            return x_BtM[:, None], digit_N[chosen]

        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 24), (24, 48), (48, 96)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.GELU()]
        network = nn.Sequential(*layers, nn.Dropout(0.3), nn.AdaptiveAvgPool2d((6, 3)), nn.Flatten())
        network.append(nn.Linear(96 * 18, 10))
        _fit(network, batch, steps)
    return lambda sounds: _classify([network], torch.stack([_spectrum(np.ravel(s)) for s in sounds])[:, None])


def train_key_listener(
    chorales: Sequence[Chorale], seed: int, steps: int = 1500
) -> Callable[[Sequence[Any]], list[int]]:
    """A classifier of the key that music is in, trained on chorales.

    Returns:
        A function from mono sounds at 16 kHz to the digits of their keys.
    """
    rng = np.random.default_rng([seed, 13])
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(seed + 3)
        x_NF = torch.stack([_tones(play(c, rng)).flatten() for c in chorales])
        digit_N = torch.tensor([c.digit for c in chorales])

        def batch() -> tuple[Tensor, Tensor]:
            chosen = rng.integers(len(chorales), size=64)
            return x_NF[chosen] + 0.3 * torch.randn(len(chosen), x_NF.shape[1]), digit_N[chosen]

        width = x_NF.shape[1]
        network = nn.Sequential(nn.Linear(width, 192), nn.GELU(), nn.Dropout(0.3), nn.Linear(192, len(WORDS)))
        _fit(network, batch, steps)
    return lambda sounds: _classify([network], torch.stack([_tones(np.ravel(s)).flatten() for s in sounds]))


def lowest_tone(sound: Any) -> int | None:
    """The digit of the key whose tone is the lowest of the last half of a second of a mono sound at 16 kHz.

    None in silence, and where it is the tone of no digit.
    """
    if not np.abs(np.asarray(sound)).max(initial=0.0) > 1e-4:
        return None
    power_T = _tones(np.asarray(sound).reshape(-1))[-1].exp()
    pitch = LOWEST + int((power_T > 0.1 * power_T.max()).nonzero()[0])
    return pitch % 12 if pitch % 12 < len(WORDS) else None


def _tones(audio: np.ndarray) -> Tensor:
    """Log-power of `TONES` semitones `[2, TONES]`, about their mean: of a whole sound, and of its last half second."""
    x_S = torch.from_numpy(np.asarray(audio, np.float32))
    size = SAMPLE_RATE // 2
    x_S = F.pad(x_S, (max(size - len(x_S), 0), 0))
    power_tF = torch.fft.rfft(x_S.flip(0).unfold(0, size, size // 4) * torch.hann_window(size), 2 * size).abs().square()
    semitone_F = 69 + 12 * (torch.arange(1, power_tF.shape[1]) * SAMPLE_RATE / (2 * size) / 440).log2()
    near_F = semitone_F.round().long() - LOWEST
    heard_F = (near_F >= 0) & (near_F < TONES) & ((semitone_F - semitone_F.round()).abs() < 0.3)
    power_tT = torch.zeros(len(power_tF), TONES).index_add(1, near_F[heard_F], power_tF[:, 1:][:, heard_F])
    power_2T = torch.stack([power_tT.mean(0), power_tT[0]])
    log_2T = (power_2T + 1e-4 * power_2T.amax(1, keepdim=True) + 1e-9).log()
    return log_2T - log_2T.mean(1, keepdim=True)


def _fit(network: nn.Module, batch: Callable[[], tuple[Tensor, Tensor]], steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        x, target = batch()
        loss = F.cross_entropy(network(x), target, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.inference_mode()
def _classify(networks: Sequence[nn.Module], x: Tensor) -> list[int]:
    """The likeliest class of each, by the mean of the networks' probabilities."""
    means = [torch.stack([network(part).softmax(1) for network in networks]).mean(0) for part in x.split(128)]
    return [int(digit) for mean in means for digit in mean.argmax(1)]


def _spectrum(audio: np.ndarray) -> Tensor:
    """Log-mel frames `[100, MELS]` of the loudest second, 10 ms each, mean of every band taken off; up to 4 kHz."""
    size, hop = 512, SAMPLE_RATE // 100
    x_S = torch.from_numpy(np.asarray(audio, np.float32))
    short = int(SECONDS * SAMPLE_RATE) - len(x_S)
    x_S = F.pad(x_S, (short // 2, short - short // 2)) if short > 0 else _loudest(x_S, int(SECONDS * SAMPLE_RATE))
    x_S = F.pad(x_S, (size // 2, size // 2))
    power_tF = torch.fft.rfft(x_S.unfold(0, size, hop) * torch.hann_window(size)).abs().square()[:100]
    mel_tM = power_tF[:, : size // 4 + 1] @ mel_filters(size // 2, MELS, SAMPLE_RATE // 2, 100.0)
    log_tM = (mel_tM + 1e-3 * mel_tM.mean() + 1e-9).log()
    return log_tM - log_tM.mean(0)


def _loudest(x_S: Tensor, size: int) -> Tensor:
    energy_W = F.avg_pool1d(x_S.square()[None, None], size, 160)[0, 0]
    start = int(energy_W.argmax()) * 160
    return x_S[start : start + size]


def sphinx_digits() -> Callable[[Any], int | None]:
    """A function from mono audio at 16 kHz to the digit pocketsphinx hears in it, or None."""
    from pocketsphinx import Decoder

    decoder = Decoder(lm=None, samprate=16000, loglevel="FATAL")
    decoder.add_jsgf_string("digits", f"#JSGF V1.0; grammar digits; public <digit> = {' | '.join(WORDS)};")
    decoder.activate_search("digits")

    def listen(audio: Any) -> int | None:
        samples = np.asarray(audio, dtype=np.float32).reshape(-1)
        quiet = np.zeros(3200, np.float32)
        pcm = (np.concatenate([quiet, samples, quiet]).clip(-1, 1) * 32767).astype("<i2").tobytes()
        decoder.start_utt()
        decoder.process_raw(pcm, full_utt=True)
        decoder.end_utt()
        hypothesis = decoder.hyp()
        return WORDS.index(hypothesis.hypstr) if hypothesis and hypothesis.hypstr in WORDS else None

    return listen


def interval(right: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % of the means of `draws` resamples with replacement (Efron 1979)."""
    values = np.asarray(right, float)
    means = values[np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
