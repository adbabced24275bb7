"""Trains what the `field` recipe reads with: `HeardVQ` learns digit words, `SeenVQ` learns signs and captions.

Labels are those of the training split. What has to be learnt from three speakers is made wider: tempo, formants
(the mel axis stretched), noise and silence around, at random and anew at every step. The heads stay here; nothing
is measured here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_recipes.field_voices import WORDS, Voices
from anyglot_tokenizers.meaning import FRAMES, HOP, RATE, HeardVQ, SeenVQ
from anyglot_tokenizers.optim import MuonAdamW
from anyglot_tokenizers.precision import native_bf16
from anyglot_tokenizers.tokenizer import seeded

if TYPE_CHECKING:
    from anyglot_recipes.field import Clip, Picture

WARMUP = 50


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


def vary_power(power_tM: Tensor, rng: np.random.Generator, warp: float = 0.12) -> Tensor:
    """Mel power `[t, M]` of another voice: tempo by 25 %, formants by `warp`, noise, silence before and after."""
    frames, mels = power_tM.shape
    size = max(12, int(frames * math.exp(rng.uniform(-0.25, 0.25))))
    power_tM = F.interpolate(power_tM.T[None], size=size, mode="linear", align_corners=False)[0].T
    place_M = (np.arange(mels) * (1 + warp * rng.uniform(-1, 1))).clip(0, mels - 1.001)
    low_M = place_M.astype(int)
    power_tM = torch.lerp(power_tM[:, low_M], power_tM[:, low_M + 1], torch.from_numpy(place_M - low_M).float())
    noise = torch.from_numpy(rng.random(tuple(power_tM.shape), dtype=np.float32))
    power_tM = power_tM + power_tM.mean() * 10 ** (-rng.uniform(10, 45) / 10) * 2 * noise
    lead, tail = rng.integers(0, 12, 2)
    floor = float(power_tM.min(0).values.mean())
    return F.pad(power_tM, (0, 0, int(lead), int(tail)), value=floor)


def heard_sources(tokenizer: HeardVQ, clips: Sequence[Clip], voices: Voices) -> list[list[tuple[int, Tensor]]]:
    """(digit, mel power `[t, M]`) of human clips, and of synthetic ones, each at several speeds, pitch included."""
    people = [(c.digit, c.audio) for c in clips]
    made = list(zip(voices.digits, voices.audio, strict=True))
    return [_powers(tokenizer, people, 7), _powers(tokenizer, made, 5)]


@torch.no_grad()
def _powers(tokenizer: HeardVQ, spoken: Sequence[tuple[int, np.ndarray]], speeds: int) -> list[tuple[int, Tensor]]:
    found = []
    for ratio in np.exp(np.linspace(-0.2, 0.2, speeds)):
        for digit, audio in spoken:
            audio = soxr.resample(audio, RATE, RATE * float(ratio)).astype(np.float32)
            frames = -(-len(audio) // HOP)
            found.append((digit, tokenizer.power(torch.from_numpy(audio)[None])[0, :frames]))
    return found


def train_heard(
    tokenizer: HeardVQ,
    sources: Sequence[Sequence[tuple[int, Tensor]]],
    steps: int,
    seed: int,
    batch_size: int = 48,
    lr: float = 3e-3,
    most: int = 104,
) -> Pool:
    """Train on (digit, mel power `[t, M]`) of sources that share every batch evenly.

    Args:
        tokenizer: to train; it is left in evaluation mode.
        sources: as `heard_sources` gives them; empty ones are left out.
        steps: optimizer steps.
        seed: of batches, augmentation and the head.
        batch_size: clips per step.
        lr: peak learning rate.
        most: frames of a clip, 10 ms each.

    Returns:
        The head: digits of quantized latents.
    """
    sources = [source for source in sources if source]
    rng = np.random.default_rng([seed, 21])
    count = batch_size // len(sources)
    with seeded(seed):
        head = Pool(tokenizer.config["codebook_dim"], 10)
        both = nn.ModuleList([tokenizer.train(), head])

        def loss_at(step: int) -> Tensor:
            chosen = [s[i] for s in sources for i in rng.integers(len(s), size=count)]
            varied = [vary_power(power, rng)[:most] for _, power in chosen]
            frames_B = torch.tensor([len(v) for v in varied])
            size = -(-int(frames_B.max()) // FRAMES) * FRAMES
            power_BtM = torch.stack([F.pad(v, (0, 0, 0, size - len(v))) for v in varied])
            with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16("cpu")):
                z_BDN, valid_BN = tokenizer.latents(power_BtM, frames_B)
            q_BDN, commit = tokenizer.quantize(z_BDN.float(), valid_BN)
            logits = head(q_BDN, valid_BN)
            return F.cross_entropy(logits, torch.tensor([d for d, _ in chosen]), label_smoothing=0.05) + commit

        fit(both, loss_at, steps, lr)
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
    people, made = heard_sources(tokenizer, clips, voices)
    for powers, wanted, own in ((people, variants, len(clips)), (made, variants // 2, len(voices.digits))):
        middle = len(powers) // 2 // max(own, 1) * own  # as recorded
        for variant in range(wanted):
            chosen = [powers[middle + i if variant == 0 else int(rng.integers(len(powers)))] for i in range(own)]
            varied = [power if variant == 0 else vary_power(power, rng) for _, power in chosen]
            order = sorted(range(own), key=lambda i: len(varied[i]))
            for start in range(0, own, 64):
                part = [varied[i] for i in order[start : start + 64]]
                frames_B = torch.tensor([len(p) for p in part])
                size = -(-int(frames_B.max()) // FRAMES) * FRAMES
                power_BtM = torch.stack([F.pad(p, (0, 0, 0, size - len(p))) for p in part])
                z_BDN, valid_BN = tokenizer.latents(power_BtM, frames_B)
                codes_BKN = tokenizer.quantizer.encode(z_BDN).numpy()
                for row, i in enumerate(order[start : start + 64]):
                    yield chosen[i][0], codes_BKN[row][:, : int(valid_BN[row].sum())]


@torch.no_grad()
def seen_variants(
    tokenizer: SeenVQ, pictures: Sequence[Picture], variants: int, seed: int
) -> Iterator[tuple[Picture, np.ndarray]]:
    """(picture, codes `[K, h, w]`) of every picture as it is and in augmented versions."""
    x_NCHW = to_tensor(pictures)
    flip_N = torch.tensor([p.kind == "sign" for p in pictures])
    with seeded(seed):
        for variant in range(variants):
            varied_NCHW = x_NCHW if variant == 0 else vary_images(x_NCHW, flip_N)
            codes = [tokenizer.encode(part).codes.numpy() for part in varied_NCHW.split(128)]
            yield from zip(pictures, np.concatenate(codes), strict=True)
