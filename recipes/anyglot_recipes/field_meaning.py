"""Trains what the `field` recipe reads with: `HeardVQ` learns digit words, `SeenVQ` learns signs and captions.

Labels are those of the training split. What has to be learnt from three speakers is made wider: by synthetic voices,
by the phones of hundreds of people whom a teacher has heard (`field_phones.py`), by clips between two of the same
word, and by tempo, formants (the mel axis stretched), microphones, noise and silence around, at random and anew
at every step. The heads stay here; nothing is measured here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_recipes.field_phones import LEXICON, Phones, align
from anyglot_recipes.field_voices import WORDS, Voices
from anyglot_tokenizers.meaning import FLOOR, FRAMES, HOP, RATE, HeardVQ, SeenVQ
from anyglot_tokenizers.optim import MuonAdamW
from anyglot_tokenizers.precision import native_bf16
from anyglot_tokenizers.tokenizer import Tokenizer, seeded

if TYPE_CHECKING:
    from anyglot_recipes.field import Clip, Picture

WARMUP = 50
BETWEEN = 0.6
"""Share of digits that are first mixed with another clip of the same digit."""
MICROPHONE = 1.0
"""Amplitude of the slowest wave of a random microphone: a deviation, nats of power. That of a band is 0.84 (3.7 dB)."""


def fit(modules: nn.Module, loss_at: Callable[[int], Tensor], steps: int, lr: float) -> None:
    """Minimise `loss_at(step)`: linear warm-up, then a cosine to zero."""
    optimizer = MuonAdamW(modules, lr, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss_at(step).backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()


class Pool(nn.Module):
    """Logits `[B, outputs]` of quantized latents `[B, D, N]`: a layer, and a mean with learnt weights."""

    def __init__(self, inputs: int, outputs: int, width: int = 128) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv1d(inputs, width, 3, padding=1), nn.GELU(), nn.Dropout(0.2))
        self.weight, self.head = nn.Conv1d(width, 1, 1), nn.Linear(width, outputs)

    def forward(self, q_BDN: Tensor, valid_BN: Tensor) -> Tensor:
        h_BEN = self.layer(q_BDN * valid_BN[:, None])
        share_B1N = self.weight(h_BEN).masked_fill(~valid_BN[:, None], -1e4).softmax(2)
        logits: Tensor = self.head((h_BEN * share_B1N).sum(2))
        return logits


@dataclass
class Heard:
    """A sound to learn from.

    Args:
        power: mel power `[t, M]`.
        phone: of each frame, int64 `[t]`, or None where nobody knows; 0 is silence.
        digit: what is said, or None where it is no digit.
    """

    power: Tensor
    phone: np.ndarray | None = None
    digit: int | None = None


def microphone(mels: int, rng: np.random.Generator) -> Tensor:
    """A smooth random gain of the power of each mel band, float32 `[mels]`.

    Waves of one to four half periods over the bands, the faster ones weaker.
    """
    angle_M = np.pi * np.arange(mels) / mels
    waves = [rng.normal(0, MICROPHONE / k) * np.cos(k * angle_M + rng.uniform(0, 2 * np.pi)) for k in range(1, 5)]
    return torch.from_numpy(np.exp(np.sum(waves, 0))).float()


def vary_power(heard: Heard, rng: np.random.Generator, warp: float = 0.12) -> Heard:
    """Another voice, another microphone: tempo by 25 %, formants by `warp`, noise, silence around (0.1 s at most)."""
    frames, mels = heard.power.shape
    size = max(12, int(frames * math.exp(rng.uniform(-0.25, 0.25))))
    power_tM = F.interpolate(heard.power.T[None], size=size, mode="linear", align_corners=False)[0].T
    place_M = (np.arange(mels) * (1 + warp * rng.uniform(-1, 1))).clip(0, mels - 1.001)
    low_M = place_M.astype(int)
    power_tM = torch.lerp(power_tM[:, low_M], power_tM[:, low_M + 1], torch.from_numpy(place_M - low_M).float())
    power_tM = power_tM * microphone(mels, rng)
    noise = torch.from_numpy(rng.random(tuple(power_tM.shape), dtype=np.float32))
    power_tM = power_tM + power_tM.mean() * 10 ** (-rng.uniform(10, 45) / 10) * 2 * noise
    lead, tail = (int(n) for n in rng.integers(0, 12, 2))
    floor = float(power_tM.min(0).values.mean())
    phone = heard.phone
    if phone is not None:
        phone = np.pad(phone[(np.arange(size) * frames) // size], (lead, tail), constant_values=0)  # silence
    return Heard(F.pad(power_tM, (0, 0, lead, tail), value=floor), phone, heard.digit)


def _runs(phone_t: np.ndarray) -> list[np.ndarray]:
    """Frames of each phone, silence left out, in order."""
    runs = np.split(np.arange(len(phone_t)), np.flatnonzero(np.diff(phone_t)) + 1)
    return [run for run in runs if phone_t[run[0]]]


def _matching_frames(heard: Heard, other: Heard) -> np.ndarray | None:
    """The frame of `other`, with one of silence added at each end, that belongs to each frame of `heard`, int64 `[t]`.

    Phone by phone where phones are known (None: as many cannot be told apart), else evenly.
    """
    size, other_size = len(heard.power), len(other.power)
    if heard.phone is None or other.phone is None:
        return (np.arange(size) * other_size) // size + 1
    runs, other_runs = _runs(heard.phone), _runs(other.phone)
    if not runs or len(runs) != len(other_runs):
        return None
    # Where each phone begins, where the last one ends, and both ends.
    edges = [0, *(int(run[0]) for run in runs), int(runs[-1][-1]) + 1, size]
    other_edges = [0, *(int(run[0]) + 1 for run in other_runs), int(other_runs[-1][-1]) + 2, other_size + 2]
    found: np.ndarray = np.interp(np.arange(size), edges, other_edges).astype(int)
    return found


def between(heard: Heard, other: Heard, share: float) -> Heard:
    """A clip between two of the same word, with the frames, phones and digit of the first.

    Args:
        heard: the first; power `[t, M]`.
        other: the second; power `[u, M]`.
        share: of the first's log power, 0 to 1; the rest is the other's.

    Returns:
        Power `[t, M]`, each clip's in units of its mean, with `FLOOR` added. Where both have phones, but not as many,
        the first as it is.
    """
    frame_t = _matching_frames(heard, other)
    if frame_t is None:
        return heard
    ours_tM, theirs_uM = ((h.power / h.power.mean().clamp(min=1e-10) + FLOOR).log() for h in (heard, other))
    theirs_uM = F.pad(theirs_uM, (0, 0, 1, 1), value=math.log(FLOOR))
    return Heard(torch.lerp(theirs_uM[torch.from_numpy(frame_t)], ours_tM, share).exp(), heard.phone, heard.digit)


Spoken = Sequence[tuple[int, np.ndarray]]
"""Digits and their audio, mono at 16 kHz."""


def spoken(clips: Sequence[Clip], voices: Voices) -> list[Spoken]:
    """Digits of people, and of synthetic voices."""
    return [[(c.digit, c.audio) for c in clips], list(zip(voices.digits, voices.audio, strict=True))]


@torch.no_grad()
def at_speeds(
    tokenizer: HeardVQ,
    sounds: Sequence[np.ndarray],
    speeds: int,
    phones: Sequence[np.ndarray | None],
    digits: Sequence[int | None],
) -> list[Heard]:
    """Sounds at several speeds of 0.82 to 1.22, pitch included; all of them at one speed, then at the next.

    Args:
        tokenizer: gives the mel power.
        sounds: mono at 16 kHz.
        speeds: how many.
        phones: int64 `[t]` of each sound, one each 10 ms, or None.
        digits: of each sound, or None.
    """
    found = []
    for ratio in np.exp(np.linspace(-0.2, 0.2, speeds)):
        for audio, phone, digit in zip(sounds, phones, digits, strict=True):
            audio = soxr.resample(audio, RATE, RATE * float(ratio)).astype(np.float32)
            frames = -(-len(audio) // HOP)
            if phone is not None:
                phone = phone[(np.arange(frames) / ratio).astype(int).clip(max=len(phone) - 1)]
            found.append(Heard(tokenizer.power(torch.from_numpy(audio)[None])[0, :frames], phone, digit))
    return found


def _batch(powers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mel power `[B, t, M]`, t divisible by `FRAMES`, and the frames of each."""
    frames_B = torch.tensor([len(power) for power in powers])
    size = -(-int(frames_B.max()) // FRAMES) * FRAMES
    return torch.stack([F.pad(power, (0, 0, 0, size - len(power))) for power in powers]), frames_B


@torch.no_grad()
def spell(tokenizer: HeardVQ, head: nn.Conv1d, names: Sequence[str], word: str, audio: np.ndarray) -> np.ndarray:
    """The phone of each 10 ms of a digit word, int64 `[t]`: the path of `LEXICON` that the head likes best."""
    frames = -(-len(audio) // HOP)
    z_BDN, valid_BN = tokenizer.latents(tokenizer.power(torch.from_numpy(audio)[None]), torch.tensor([frames]))
    log_NP = head(z_BDN).log_softmax(1)[0].T[valid_BN[0]].numpy()
    said = [[0, *map(names.index, phones), 0] for phones in LEXICON[word]]
    _, path = max((align(log_NP, phones) for phones in said), key=lambda found: found[0])
    return np.repeat(path, FRAMES)[:frames]


def train_heard(
    tokenizer: HeardVQ,
    digits: Sequence[Spoken],
    steps: int,
    seed: int,
    batch_size: int = 48,
    lr: float = 3e-3,
    most: int = 104,
    phones: Phones | None = None,
    phone_steps: int = 0,
) -> Pool:
    """Train on spoken digits and, where a teacher has heard others, on their phones.

    With phones, the encoder learns them for `phone_steps` steps; then it tells where the digits' phones are, and learns
    digits and all phones together, from codes. Of the digits, `BETWEEN` are first mixed with another clip of the same
    digit, perhaps by the same speaker.

    Args:
        tokenizer: to train; it is left in evaluation mode.
        digits: sources that share every batch evenly, as `spoken` gives them; empty ones are left out.
        steps: optimizer steps.
        seed: of batches, augmentation and the heads.
        batch_size: digits per step; half as many stretches of `phones`, and as many as this while only they are learnt.
        lr: peak learning rate.
        most: frames of a stretch or clip, 10 ms each.
        phones: of a teacher.
        phone_steps: optimizer steps before the digits; 0 leaves the phones out.

    Returns:
        The head: digits of quantized latents.
    """
    digits = [source for source in digits if source]
    rng = np.random.default_rng([seed, 21])
    count = batch_size // len(digits)
    names = phones.names if phones and phones.clips and phone_steps else []
    read: list[Heard] = []
    if names:
        assert phones is not None
        said, labels = zip(*phones.clips, strict=True)
        read = at_speeds(tokenizer, said, 3, labels, [None] * len(said))

    def stretches(number: int) -> list[Heard]:
        found = []
        for i in rng.integers(len(read), size=number):
            whole = read[i]
            start = int(rng.integers(max(1, len(whole.power) - most + 1)))
            assert whole.phone is not None
            part = Heard(whole.power[start : start + most], whole.phone[start : start + most])
            found.append(vary_power(part, rng))
        return found

    def latents(heard: Sequence[Heard]) -> tuple[Tensor, Tensor]:
        power_BtM, frames_B = _batch([h.power[:most] for h in heard])
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16("cpu")):
            z_BDN, valid_BN = tokenizer.latents(power_BtM, frames_B)
        return z_BDN.float(), valid_BN

    def phone_loss(q_BDN: Tensor, heard: Sequence[Heard]) -> Tensor:
        target_BN = torch.full((len(heard), q_BDN.shape[2]), -100)
        for row, h in enumerate(heard):
            assert h.phone is not None
            middle = torch.from_numpy(h.phone[:most][FRAMES // 2 :: FRAMES])
            target_BN[row, : len(middle)] = middle
        return F.cross_entropy(phone_head(q_BDN), target_BN)

    with seeded(seed):
        head = Pool(tokenizer.config["codebook_dim"], 10)
        phone_head = nn.Conv1d(tokenizer.config["codebook_dim"], max(len(names), 1), 3, padding=1)
        tokenizer.train()
        if names:

            def hear_phones(step: int) -> Tensor:
                heard = stretches(batch_size)
                return phone_loss(latents(heard)[0], heard)

            fit(nn.ModuleList([tokenizer, phone_head]), hear_phones, phone_steps, lr)
        tokenizer.eval()
        sources = []
        for source, speeds in zip(digits, (7, 5), strict=False):
            where = [spell(tokenizer, phone_head, names, WORDS[d], a) if names else None for d, a in source]
            sources.append(at_speeds(tokenizer, [a for _, a in source], speeds, where, [d for d, _ in source]))
        of_digit: dict[int | None, list[Heard]] = {}
        for made in sources:
            for h in made:
                of_digit.setdefault(h.digit, []).append(h)
        tokenizer.train()

        def vary_digit(heard: Heard) -> Heard:
            if rng.random() < BETWEEN:
                others = of_digit[heard.digit]
                heard = between(heard, others[rng.integers(len(others))], rng.uniform())
            return vary_power(heard, rng)

        def hear_digits(step: int) -> Tensor:
            heard = [vary_digit(s[i]) for s in sources for i in rng.integers(len(s), size=count)]
            said = torch.tensor([h.digit for h in heard])
            if names:
                heard += stretches(batch_size // 2)
            z_BDN, valid_BN = latents(heard)
            q_BDN, loss = tokenizer.quantize(z_BDN, valid_BN)
            logits = head(q_BDN[: len(said)], valid_BN[: len(said)])
            loss = loss + F.cross_entropy(logits, said, label_smoothing=0.05)
            return loss + phone_loss(q_BDN, heard) if names else loss

        fit(nn.ModuleList([tokenizer, head, phone_head]), hear_digits, steps, lr)
    tokenizer.eval()
    head.eval()
    return head


def vary_images(x_BCHW: Tensor, flip_B: Tensor) -> Tensor:
    """Turn by 12 degrees, scale by 15 %, shift by 5 pixels, brightness and contrast by 20 %; `flip_B` may be mirrored.

    Draws from torch's global random state.
    """
    batch = len(x_BCHW)
    angle_B, scale_B = (torch.rand(2, batch) * 2 - 1) * torch.tensor([[0.21], [0.15]])
    scale_B = 1 + scale_B
    mirror_B = torch.where(flip_B & (torch.rand(batch) < 0.5), -1.0, 1.0)
    shift_B2 = (torch.rand(batch, 2) * 2 - 1) * 0.16
    cosine_B, sine_B = scale_B * angle_B.cos(), scale_B * angle_B.sin()
    rows = [cosine_B * mirror_B, -sine_B, shift_B2[:, 0], sine_B * mirror_B, cosine_B, shift_B2[:, 1]]
    grid_BHW2 = F.affine_grid(torch.stack(rows, 1).view(batch, 2, 3), list(x_BCHW.shape), align_corners=False)
    moved_BCHW = F.grid_sample(x_BCHW, grid_BHW2, padding_mode="border", align_corners=False)
    gain_B111, bias_B111 = ((torch.rand(2, batch) * 2 - 1) * torch.tensor([[0.2], [0.1]]))[..., None, None, None]
    return ((moved_BCHW - 0.5) * (1 + gain_B111) + 0.5 + bias_B111).clamp(0, 1)


def to_tensor(pictures: Sequence[Picture]) -> Tensor:
    """Pixels float32 `[n, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.stack([p.pixels for p in pictures])).permute(0, 3, 1, 2).float() / 255


def caption_words(captions: Sequence[str], least: int = 3) -> list[str]:
    """Words of at least `least` captions, sorted."""
    counts = Counter(word for caption in captions for word in set(caption.split()))
    return sorted(word for word, count in counts.items() if count >= least)


class SeenHead(nn.Module):
    """Logits of signs `[B, 10]` and of captions' words `[B, words]` from quantized latents `[B, D, h, w]`."""

    def __init__(self, inputs: int, places: int, words: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.sign, self.words = nn.Linear(inputs * places, 10), nn.Linear(inputs * places, words)

    def forward(self, q_BDhw: Tensor) -> tuple[Tensor, Tensor]:
        flat_BE = self.drop(q_BDhw.flatten(1))
        return self.sign(flat_BE), self.words(flat_BE)


def train_seen(
    tokenizer: SeenVQ, pictures: Sequence[Picture], steps: int, seed: int, batch_size: int = 48, lr: float = 3e-3
) -> SeenHead:
    """Train on photos of signs and on emoji with their captions, half and half.

    Args:
        tokenizer: to train; it is left in evaluation mode.
        pictures: of the training split.
        steps: optimizer steps.
        seed: of batches, augmentation and the head.
        batch_size: pictures per step.
        lr: peak learning rate.

    Returns:
        The head: signs and captions' words of quantized latents.
    """
    photos, drawn = ([p for p in pictures if p.kind == kind] for kind in ("sign", "emoji"))
    signs = to_tensor(photos), torch.tensor([WORDS.index(p.word) for p in photos])
    emoji = to_tensor(drawn), [p.word for p in drawn]
    rng = np.random.default_rng([seed, 22])
    words = caption_words(emoji[1])
    target_nW = torch.tensor([[float(word in caption.split()) for word in words] for caption in emoji[1]])
    half = batch_size // 2
    with seeded(seed):
        head = SeenHead(tokenizer.config["codebook_dim"], 16, len(words))
        both = nn.ModuleList([tokenizer.train(), head])

        def loss_at(step: int) -> Tensor:
            sign_B, emoji_B = rng.integers(len(signs[0]), size=half), rng.integers(len(emoji[0]), size=half)
            x_BCHW = vary_images(torch.cat([signs[0][sign_B], emoji[0][emoji_B]]), torch.arange(2 * half) < half)
            with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16("cpu")):
                z_BDhw = tokenizer.latents(x_BCHW)
            q_BDhw, commit = tokenizer.quantize(z_BDhw.float())
            digits, said = head(q_BDhw)
            loss = F.cross_entropy(digits[:half], signs[1][sign_B], label_smoothing=0.05)
            return loss + 20 * F.binary_cross_entropy_with_logits(said[half:], target_nW[emoji_B]) + commit

        fit(both, loss_at, steps, lr)
    tokenizer.eval()
    head.eval()
    return head


@torch.no_grad()
def heard_variants(
    tokenizer: HeardVQ, clips: Sequence[Clip], voices: Voices, variants: int, rng: np.random.Generator
) -> Iterator[tuple[int, np.ndarray]]:
    """(digit, codes `[K, N]`) of every human clip in `variants` versions and of synthetic ones in half as many."""
    for source, speeds, wanted in zip(spoken(clips, voices), (7, 5), (variants, variants // 2), strict=True):
        own = len(source)
        digits = [digit for digit, _ in source]
        powers = at_speeds(tokenizer, [audio for _, audio in source], speeds, [None] * own, digits)
        middle = speeds // 2 * own  # as recorded
        for variant in range(wanted):
            chosen = [powers[middle + i if variant == 0 else int(rng.integers(len(powers)))] for i in range(own)]
            varied = chosen if variant == 0 else [vary_power(heard, rng) for heard in chosen]
            order = sorted(range(own), key=lambda i: len(varied[i].power))
            for start in range(0, own, 64):
                part = order[start : start + 64]
                z_BDN, valid_BN = tokenizer.latents(*_batch([varied[i].power for i in part]))
                codes_BKN = tokenizer.quantizer.encode(z_BDN).numpy()
                for row, i in enumerate(part):
                    digit = chosen[i].digit
                    assert digit is not None
                    yield digit, codes_BKN[row][:, : int(valid_BN[row].sum())]


@torch.no_grad()
def seen_variants(
    tokenizer: Tokenizer, pictures: Sequence[Picture], variants: int, seed: int
) -> Iterator[tuple[Picture, np.ndarray]]:
    """(picture, codes `[K, h, w]`) of every picture as it is and in augmented versions."""
    x_NCHW = to_tensor(pictures)
    flip_N = torch.tensor([p.kind == "sign" for p in pictures])
    with seeded(seed):
        for variant in range(variants):
            varied_NCHW = x_NCHW if variant == 0 else vary_images(x_NCHW, flip_N)
            codes = [tokenizer.encode(part).codes.numpy() for part in varied_NCHW.split(128)]
            yield from zip(pictures, np.concatenate(codes), strict=True)
