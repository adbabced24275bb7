"""Meaning in the first codebook: teachers of speech, and the loss by which a codec's first codebook learns from them.

A codec trained for reconstruction alone spends its first codebook on loudness and voice. When the output of that
codebook must also predict the features of a model of speech, it becomes a code of sounds, and the later codebooks carry
the rest: SpeechTokenizer (Zhang et al., arXiv 2308.16692) and Mimi (Défossez et al., arXiv 2410.00037). Teachers are
HuBERT, WavLM or wav2vec 2.0 through transformers, or `SpeechTeacher`, small enough to be trained here from the user's
own unlabelled speech: HuBERT's masked prediction of clustered cepstra (Hsu et al., arXiv 2106.07447) on inputs whose
formants are moved at random, so that what it learns is not the voice.

Use, in any training loop that adds `AudioReconstruction.extra_losses` to its loss:

    teacher = train_teacher(sounds)                    # or load_teacher("facebook/hubert-base-ls960"), or a folder
    codec = AudioCodec(semantic_dim=teacher.dim)
    codec.learn_from(Distillation(teacher, weight=1.0))
    fit_tokenizer(codec, sounds, ...)

Teachers are frozen and stay outside the codec: a saved codec holds one more matrix, `semantic`, and needs no teacher.

Shapes: B items, C channels, S samples, T teacher frames, N codes, M mels, E feature dims, R rows, K clusters.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.audio import AudioCodec, Backbone, mel_filters
from anyglot_tokenizers.errors import AnyglotError, CheckpointError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.optim import MuonAdamW
from anyglot_tokenizers.quantize import spread_seeds
from anyglot_tokenizers.tokenizer import seeded

FORMAT = "anyglot.teacher"
CEPSTRA = 13
SPLICE = 3  # features to each side whose cepstra a cluster sees


class Teacher(nn.Module, ABC):
    """A frozen model of speech: audio float32 `[B, S]` at `sample_rate` to features float32 `[B, T, dim]`.

    Feature t is centred on sample `first + t * step`.
    """

    dim: int
    sample_rate: int
    step: int
    first: float

    @abstractmethod
    def features(self, x_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """Features `[B, T, dim]`; what lies beyond an item's length does not count."""


@dataclass(eq=False)
class Distillation:
    """The loss that makes the first codebook predict a teacher's features.

    Features are standardised over the batch, each dimension by itself, so that only what varies has to be predicted.

    Attributes:
        teacher: frozen.
        weight: of the loss beside the others.
        axis: `"frame"`: one minus the cosine between prediction and features of a code (Mimi); `"dim"`: minus the log
            sigmoid of the cosine, over time, of each dimension (SpeechTokenizer).
    """

    teacher: Teacher
    weight: float = 1.0
    axis: Literal["frame", "dim"] = "frame"

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)

    def __call__(self, guess_BNE: Tensor, media_BCS: Tensor, lengths_B: Tensor, codec: AudioCodec) -> Tensor:
        """Weighted loss of the predictions for all codes of a batch of `codec`."""
        target_BNE, valid_BN1 = self.target(media_BCS, lengths_B, codec.sample_rate, codec.hop_length)
        guess_BNE = guess_BNE.float() * valid_BN1
        if self.axis == "frame":
            far_BN = 1 - F.cosine_similarity(guess_BNE, target_BNE, dim=2)
            return self.weight * (far_BN * valid_BN1[..., 0]).sum() / valid_BN1.sum()
        return -self.weight * F.logsigmoid(F.cosine_similarity(guess_BNE, target_BNE, dim=1)).mean()

    @torch.no_grad()
    def target(self, media_BCS: Tensor, lengths_B: Tensor, sample_rate: int, hop_length: int) -> tuple[Tensor, Tensor]:
        """Standardised features `[B, N, E]` at the codes' places, zero where not valid, and validity `[B, N, 1]`."""
        teacher = self.teacher.to(media_BCS.device)
        with torch.autocast(media_BCS.device.type, enabled=False):
            x_BS = media_BCS.float().mean(1)
            counts = torch.arange(-(-x_BS.shape[1] // hop_length), device=x_BS.device)
            valid_BN1 = (counts * hop_length < lengths_B[:, None])[..., None].float()
            ratio = teacher.sample_rate / sample_rate
            if ratio != 1:
                x_BS, lengths_B = resample(x_BS, sample_rate, teacher.sample_rate), (lengths_B * ratio).ceil().long()
            features_BTE = teacher.features(x_BS, lengths_B.clamp(max=x_BS.shape[1]))
            places_T = teacher.first + teacher.step * torch.arange(features_BTE.shape[1], device=x_BS.device)
            places_N = (counts + 0.5) * hop_length * ratio
            target_BNE = at_places(features_BTE, places_T, places_N, max(hop_length * ratio, teacher.step))
            total = valid_BN1.sum()
            mean_E = (target_BNE * valid_BN1).sum((0, 1)) / total
            spread_E = ((target_BNE - mean_E).square() * valid_BN1).sum((0, 1)).div(total).sqrt().clamp(min=1e-5)
            return (target_BNE - mean_E) / spread_E * valid_BN1, valid_BN1


def at_places(features_BTE: Tensor, places_T: Tensor, places_N: Tensor, reach: float) -> Tensor:
    """Features at other places, `[B, N, E]`: means weighted by a triangle of `reach` samples to each side."""
    inside_N1 = places_N.clamp(float(places_T[0]), float(places_T[-1]))[:, None]
    weight_NT = (1 - (inside_N1 - places_T).abs() / reach).clamp(min=0)
    return (weight_NT / weight_NT.sum(1, keepdim=True)) @ features_BTE


def resample(x_BS: Tensor, source: int, target: int) -> Tensor:
    """Audio at another sample rate, on the CPU (soxr), `[B, ceil(S * target / source)]`."""
    import soxr

    made = soxr.resample(x_BS.cpu().numpy().T, source, target).T
    size = math.ceil(x_BS.shape[1] * target / source)
    made = np.pad(made, ((0, 0), (0, max(0, size - made.shape[1]))))[:, :size]
    return torch.from_numpy(np.ascontiguousarray(made, np.float32)).to(x_BS.device)


class PublishedTeacher(Teacher):
    """HuBERT, WavLM or wav2vec 2.0 through transformers.

    Args:
        name_or_path: folder or hub id of a model of 16 kHz speech with hidden states.
        layer: which hidden state (0 = before the first transformer layer); `"average"` = the mean of all, as
            SpeechTokenizer has it.

    Raises:
        CheckpointError: the folder or the hub does not give such a model.
    """

    def __init__(self, name_or_path: str | os.PathLike[str], layer: int | Literal["average"] = "average") -> None:
        super().__init__()
        try:
            from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
        except ImportError as error:
            raise AnyglotError("a published teacher needs transformers: pip install 'anyglot[lm]'") from error
        try:
            config = AutoConfig.from_pretrained(name_or_path)
            self.kernels, self.strides = list(config.conv_kernel), list(config.conv_stride)
            self.model = AutoModel.from_pretrained(name_or_path, config=config, dtype=torch.float32).eval()
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{name_or_path}: not a HuBERT, WavLM or wav2vec 2.0 model ({str(error).splitlines()[0]}); "
                "give a folder or hub id such as facebook/hubert-base-ls960"
            ) from error
        try:
            extractor = AutoFeatureExtractor.from_pretrained(name_or_path)
            self.sample_rate, self.normalise = extractor.sampling_rate, extractor.do_normalize
        except (OSError, ValueError):
            self.sample_rate, self.normalise = 16000, True
        self.masks = config.feat_extract_norm == "layer"  # the others were trained on zero-padded batches
        self.layer = layer
        self.dim = config.hidden_size
        self.step = math.prod(self.strides)
        spans = [(kernel - 1) * math.prod(self.strides[:i]) for i, kernel in enumerate(self.kernels)]
        self.first = sum(spans) / 2

    def features(self, x_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """See `Teacher`. Audio shorter than one frame is filled up with silence."""
        valid_BS = torch.arange(x_BS.shape[1], device=x_BS.device) < lengths_B[:, None]
        if self.normalise:  # to mean 0 and variance 1 per item, as in pretraining
            mean_B1 = (x_BS * valid_BS).sum(1, keepdim=True) / lengths_B[:, None]
            square_B1 = ((x_BS - mean_B1) * valid_BS).square().sum(1, keepdim=True) / lengths_B[:, None]
            x_BS = (x_BS - mean_B1) / (square_B1 + 1e-7).sqrt()
        short = max(0, int(2 * self.first) + 1 - x_BS.shape[1])
        x_BS, valid_BS = F.pad(x_BS * valid_BS, (0, short)), F.pad(valid_BS, (0, short))
        mask = {"attention_mask": valid_BS.long()} if self.masks else {}
        hidden = self.model(x_BS, output_hidden_states=True, **mask).hidden_states
        found: Tensor = torch.stack(hidden).mean(0) if self.layer == "average" else hidden[self.layer]
        return found


class SpeechTeacher(Teacher):
    """A small masked-prediction model of 20 ms frames, trained by `train_teacher`. About 2 M parameters.

    Its features are the hidden state before the last layer that predicts clusters.

    Args:
        sample_rate: Hz, at least 8000.
        num_mels: bands of its input.
        dim: width and feature dims.
        depth: ConvNeXt blocks.
        clusters: of cepstra, what it learns to predict.
        seed: of the initial weights.
    """

    mel_FM: Tensor
    window: Tensor
    cosine_MQ: Tensor

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        num_mels: int = 40,
        dim: int = 192,
        depth: int = 6,
        clusters: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.sample_rate, self.dim = sample_rate, dim
        self.hop = round(sample_rate / 100)
        self.step, self.first = 2 * self.hop, float(self.hop)
        size = 2 * round(sample_rate / 80)  # 25 ms
        self.register_buffer("window", torch.hann_window(size), persistent=False)
        self.register_buffer("mel_FM", mel_filters(size, num_mels, sample_rate, 60.0), persistent=False)
        place_M1 = torch.arange(num_mels)[:, None] + 0.5
        self.register_buffer(
            "cosine_MQ", torch.cos(place_M1 * torch.arange(CEPSTRA) * (math.pi / num_mels)), persistent=False
        )
        with seeded(seed):
            self.backbone = Backbone(2 * num_mels, dim, depth)
            self.head = nn.Linear(dim, clusters)

    @torch.no_grad()
    def features(self, x_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """See `Teacher`."""
        mel_BTM, valid_BT1 = self.log_mel(x_BS, lengths_B)
        hidden: Tensor = self.backbone(mel_BTM, valid_BT1)
        return hidden

    def forward(self, mel_BTM: Tensor, valid_BT1: Tensor) -> Tensor:
        """Logits of the clusters `[B, T, K]`."""
        logits: Tensor = self.head(self.backbone(mel_BTM, valid_BT1))
        return logits

    def log_mel(self, x_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel frames, two per feature, mean 0 and variance 1 over the item in each band; validity `[B, T, 1]`.

        Recording, loudness and much of the voice go with mean and variance.
        """
        batch, samples = x_BS.shape
        count = -(-samples // self.step)
        valid_BT1 = (torch.arange(count, device=x_BS.device) * self.step < lengths_B[:, None])[..., None]
        margin = len(self.window) - self.hop
        x_BS = x_BS * (torch.arange(samples, device=x_BS.device) < lengths_B[:, None])
        x_BS = F.pad(x_BS, (margin // 2, count * self.step - samples + margin - margin // 2))
        power_BtF = torch.fft.rfft(x_BS.unfold(1, len(self.window), self.hop) * self.window).abs().square()
        mel_BtM = (power_BtF @ self.mel_FM).clamp(min=1e-5).log()
        weight_Bt1 = valid_BT1.repeat_interleave(2, 1).float()
        total_B11 = weight_Bt1.sum(1, keepdim=True)
        mel_BtM = (mel_BtM - (mel_BtM * weight_Bt1).sum(1, keepdim=True) / total_B11) * weight_Bt1
        spread_B1M = (mel_BtM.square().sum(1, keepdim=True) / total_B11).sqrt()
        return (mel_BtM / spread_B1M.clamp(min=0.1)).reshape(batch, count, -1), valid_BT1

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`; `load_teacher` reads them."""
        from safetensors.torch import save

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "model.safetensors") as temporary:
            temporary.write_bytes(save({name: tensor.cpu() for name, tensor in self.state_dict().items()}))
        with atomic_write(folder / "config.json") as temporary:
            temporary.write_text(
                json.dumps({"format": FORMAT, "config": self.config}, indent=2) + "\n", encoding="utf-8"
            )

    def cepstra(self, mel_BTM: Tensor) -> Tensor:
        """What is clustered: cepstra of the features around, `[B, T, (2 * SPLICE + 1) * 2 * CEPSTRA]`."""
        cepstra_BTQ = (mel_BTM.unflatten(2, (2, -1)) @ self.cosine_MQ).flatten(2)
        padded_BTQ = F.pad(cepstra_BTQ, (0, 0, SPLICE, SPLICE))
        return padded_BTQ.unfold(1, 2 * SPLICE + 1, 1).flatten(2)


def load_teacher(name_or_path: str | os.PathLike[str]) -> Teacher:
    """A teacher from a folder that `SpeechTeacher.save_pretrained` wrote, else a `PublishedTeacher`.

    Raises CheckpointError if it is neither, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(name_or_path) / "config.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            return PublishedTeacher(name_or_path)
        teacher = SpeechTeacher(**entries["config"])
        teacher.load_state_dict(load_file(path.with_name("model.safetensors")))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name_or_path}: not a readable teacher ({reason}); train or save it again") from error
    return teacher.eval().requires_grad_(False)


def train_teacher(
    sounds: Any,
    *,
    sample_rate: int = 16000,
    steps: int = 600,
    batch_size: int = 32,
    crop_seconds: float = 2.0,
    lr: float = 2e-3,
    warp: float = 0.15,
    seed: int = 0,
    precision: str = "auto",
    device: torch.device | str = "cpu",
    **model: Any,
) -> SpeechTeacher:
    """A `SpeechTeacher` trained on unlabelled speech; a function of its arguments, a few minutes on two CPU cores.

    Clusters of the cepstra around each 20 ms are found by k-means; the model sees the same speech with half of the time
    masked in spans of 160 ms and the mel axis stretched at random (another voice), and learns to tell the clusters of
    what is masked.

    Args:
        sounds: mono speech as `fit_tokenizer` takes it: float arrays `[samples]`, or a `MediaSet`.
        sample_rate: theirs, Hz.
        steps: optimizer steps.
        batch_size: items per step.
        crop_seconds: length of items.
        lr: peak learning rate of `MuonAdamW`; it falls to zero on a cosine.
        warp: the mel axis is stretched by up to this share, either way.
        seed: of weights, order, crops, masks and clusters.
        precision: see `fit_tokenizer`.
        device: to train on.
        model: further options of `SpeechTeacher`.

    Raises MediaError for unusable sounds.
    """
    from anyglot_tokenizers.batches import StepBatches
    from anyglot_tokenizers.precision import resolve_precision

    device = torch.device(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(precision) == "bf16-mixed")
    batches = StepBatches(sounds, batch_size=batch_size, seed=seed, crop=round(crop_seconds * sample_rate))
    teacher = SpeechTeacher(sample_rate=sample_rate, seed=seed, **model).to(device)
    optimizer = MuonAdamW(teacher, lr, weight_decay=0.01)
    with seeded(seed):
        clean_RQ = torch.cat([_cepstra(teacher, batches[step]) for step in range(max(1, 256 // batch_size))])
        centres_KQ = cluster(clean_RQ, teacher.config["clusters"])
        for step in range(steps):
            batch = batches[step]
            mel_BTM, valid_BT1 = teacher.log_mel(batch["media"].mean(1).to(device), batch["lengths"].to(device))
            target_BT = torch.cdist(teacher.cepstra(mel_BTM), centres_KQ).argmin(2)
            hidden_BT = _spans(mel_BTM.shape[:2]).to(device) & valid_BT1[..., 0]
            with autocast:
                logits_BTK = teacher(stretch(mel_BTM, warp) * ~hidden_BT[..., None], valid_BT1)
            loss = F.cross_entropy(logits_BTK[hidden_BT].float(), target_BT[hidden_BT])
            if not bool(torch.isfinite(loss)):
                raise AnyglotError(f"teacher, step {step}: loss is {float(loss)}; use a lower learning rate")
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
            optimizer.step()
    return teacher.eval().requires_grad_(False)


def stretch(mel_BTM: Tensor, most: float) -> Tensor:
    """Two frames per feature with their mel axis stretched by a random factor per item, 1 - most to 1 + most."""
    batch, count, width = mel_BTM.shape
    mels = width // 2
    factor_B1 = 1 + most * (2 * torch.rand(batch, 1) - 1).to(mel_BTM.device)
    place_BM = (torch.arange(mels, device=mel_BTM.device) * factor_B1).clamp(max=mels - 1)
    low_BM = place_BM.floor().long().clamp(max=mels - 2)
    share_BM = place_BM - low_BM
    mel_BtM = mel_BTM.reshape(batch, 2 * count, mels)
    index_BtM = low_BM[:, None].expand_as(mel_BtM)
    low_BtM, high_BtM = mel_BtM.gather(2, index_BtM), mel_BtM.gather(2, index_BtM + 1)
    return torch.lerp(low_BtM, high_BtM, share_BM[:, None]).reshape(batch, count, width)


def cluster(x_RE: Tensor, count: int, rounds: int = 20) -> Tensor:
    """Centres `[K, E]` of `count` clusters of rows: k-means (Lloyd) from k-means++ seeds; empty clusters stay."""
    centres_KE = spread_seeds(x_RE, count)
    for _ in range(rounds):
        nearest_R = torch.cdist(x_RE, centres_KE).argmin(1)
        sums_KE = torch.zeros_like(centres_KE).index_add_(0, nearest_R, x_RE)
        sizes_K1 = nearest_R.bincount(minlength=count)[:, None]
        centres_KE = torch.where(sizes_K1 > 0, sums_KE / sizes_K1.clamp(min=1), centres_KE)
    return centres_KE


def _cepstra(teacher: SpeechTeacher, batch: dict[str, Tensor]) -> Tensor:
    device = teacher.window.device
    mel_BTM, valid_BT1 = teacher.log_mel(batch["media"].mean(1).to(device), batch["lengths"].to(device))
    return teacher.cepstra(mel_BTM)[valid_BT1[..., 0]]


def _spans(shape: Sequence[int], length: int = 8, share: float = 0.5) -> Tensor:
    """Random mask bool `[B, T]`: spans of `length` frames that cover about `share` of the time."""
    starts_BT = torch.rand(*shape) < -math.log(1 - share) / length
    return F.max_pool1d(F.pad(starts_BT.float(), (length - 1, 0)), length, 1) > 0
