"""`SeriesVQ`: time series of any unit as codes of scaled patches. A whole modality in this one file.

A patch is coded as where it is (`digits` codes of its mean), how large it is (one code) and what shape it has
(residual codes of the scaled patch): gain-shape quantization. A code is a function of its own patch alone, so nothing
is needed beside the codes, and chunks and streams are exact. Series as text are in `series_text.py`.

Shapes: B series, C channels, S samples, N patches of P samples, K codes, H of them of means and scales, D latents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.checks import check_audio, check_count
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import MediaError
from anyglot_tokenizers.quantize import ResidualQuantizer
from anyglot_tokenizers.tokenizer import Reconstruction, Tokenizer, full_precision, seeded

REACH = 32.0  # means go up to sinh(32) = 4e13 units, scales from exp(-32) to exp(32) units


class SeriesVQ(Tokenizer):
    """Series float32 `[B, C, S]` to codes int64 `[B, K, ceil(S / patch)]`, K = channels (digits + 1) + shapes.

    Args:
        patch: samples per code.
        channels: C; scaled one by one, shaped together.
        digits: codes of a mean, rounded to 64 / codebook_size^digits of itself; the shape carries the rest.
        shapes: residual codes of the shape.
        codebook_size, codebook_dim, stage_steps: of `ResidualQuantizer`; the size is that of every code.
        sample_rate: Hz, where the samples have a clock.
        seed, license: of the initial weights; of the weights.
    """

    def __init__(self, *, patch: int = 16, channels: int = 1, digits: int = 2, shapes: int = 3,
                 codebook_size: int = 256, codebook_dim: int = 16, stage_steps: int = 20,
                 sample_rate: int | None = None, seed: int = 0, license: str = "apache-2.0") -> None:  # fmt: skip
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        if min(patch, channels, digits) < 1:
            raise ValueError(f"need patch, channels, digits >= 1, got {patch}, {channels}, {digits}")
        if channels > 2**12 or digits > 62 or codebook_size**digits > 2**62:
            raise ValueError(f"{channels} channels or means in {codebook_size}^{digits} steps are too many")
        self.modality, self.patch, self.channels, self.size = "series", patch, channels, codebook_size
        self.digits, self.heads, self.total = digits, channels * (digits + 1), channels * (digits + 1) + shapes
        with seeded(seed):
            self.shapes = ResidualQuantizer(codebook_dim, shapes, codebook_size, stage_steps=stage_steps)
            self.embed = nn.Linear(channels * patch, codebook_dim)
            self.unembed = nn.Linear(codebook_dim, channels * patch)
            nn.init.orthogonal_(self.embed.weight)  # a rotation and its inverse, to begin with
            self.unembed.weight.data.copy_(self.embed.weight.data.T)
        self.unit_C1 = nn.Buffer(torch.ones(channels, 1))

    def _spec_entries(self) -> dict[str, Any]:
        time = {"axes": ("time",), "strides": (self.patch,), "causal": True, "context": (0, 0)}
        given = {name: self.config[name] for name in ("channels", "sample_rate", "license")}
        return {"modality": "series", "codebook_sizes": (self.size,) * self.total, **time, **given}

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of series of `lengths` int64 `[B]` samples; a last partial patch is filled with the last sample."""
        used = check_count(num_quantizers, self.total)
        with full_precision(self.device):
            head_BHN, shape_BNO, real_BS = self._split(media.to(self.device), lengths)
            shape_BKN = self.shapes.encode(self.embed(shape_BNO).mT)
        codes_BKN, valid_BN = torch.cat([head_BHN, shape_BKN], 1)[:, :used], real_BS[:, :: self.patch]
        return Codes(codes_BKN * valid_BN[:, None], valid_BN.sum(1), self.spec)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Series float32 `[B, C, N * patch]` of codes `[B, k, N]`, any k <= K; zeros beyond a series' end."""
        ids_BKN, lengths_B = self._unpack(codes)
        head_BHN, shape_BKN = ids_BKN[:, : self.heads], ids_BKN[:, self.heads :]
        head_BHN = F.pad(head_BHN, (0, 0, 0, self.heads - head_BHN.shape[1]), value=self.size // 2)  # unknown: middle
        with full_precision(self.device):
            plain_BDN = torch.zeros(len(ids_BKN), self.shapes.dim, ids_BKN.shape[2], device=self.device)
            x_BCS = self._join(head_BHN, self.shapes.decode(shape_BKN) if shape_BKN.numel() else plain_BDN)
        ends_B11 = lengths_B.to(self.device)[:, None, None] * self.patch
        return x_BCS * (torch.arange(x_BCS.shape[2], device=self.device) < ends_B11)

    def forward(self, media: Tensor, lengths: Tensor | None = None) -> Reconstruction:
        """Reconstruct with gradients, `[B, C, N * patch]`, zeros beyond a series' end."""
        head_BHN, shape_BNO, real_BS = self._split(media, lengths)
        q_BDN, shape_BKN, commit, stats = self.shapes(self.embed(shape_BNO).mT, mask=real_BS[:, :: self.patch])
        x_BCS = self._join(head_BHN, q_BDN) * real_BS[:, None]
        return Reconstruction(x_BCS, torch.cat([head_BHN, shape_BKN], 1), commit, stats)

    def fit_statistics(self, media: Tensor) -> None:
        """Take for the unit of a channel the size that one sample in twenty does not reach; once trained, it stays."""
        if int(self.shapes.steps) == 0:
            x_CS = media.float().abs().transpose(0, 1).flatten(1).sort(1).values
            self.unit_C1.copy_(x_CS[:, x_CS.shape[1] // 20, None].clamp(min=1e-6))

    def _split(self, media: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of means and scales `[B, H, N]`, scaled patches `[B, N, C P]`, which samples are real `[B, N P]`."""
        x_BCS, ends_B = check_audio(media, lengths, self.channels, "series batch")
        at_S = torch.arange(-(-x_BCS.shape[2] // self.patch) * self.patch, device=x_BCS.device)
        ends_B1 = ends_B.to(x_BCS.device)[:, None]
        source_BCS = torch.minimum(at_S, ends_B1 - 1)[:, None].expand(-1, self.channels, -1)
        x_BCNP = x_BCS.gather(2, source_BCS).unflatten(2, (-1, self.patch))
        if float((x_BCNP.flatten(2) / self.unit_C1).asinh().abs().max()) > REACH:
            raise MediaError("series batch", f"values reach {float(x_BCNP.abs().max()):.3g}", "scale them down")
        place_BCN = self._level((x_BCNP.mean(3) / self.unit_C1).asinh(), self.size**self.digits)
        digits = [place_BCN // self.size**power % self.size for power in reversed(range(self.digits))]
        head_BHN = torch.cat([*digits, place_BCN * 0], 1)
        rms_BCN = (x_BCNP - self._place(head_BHN)[0]).square().mean(3).sqrt()
        head_BHN[:, -self.channels :] = self._level((rms_BCN / self.unit_C1).log(), self.size)
        mean_BCN1, scale_BCN1 = self._place(head_BHN)
        return head_BHN, ((x_BCNP - mean_BCN1) / scale_BCN1).transpose(1, 2).flatten(2), at_S < ends_B1

    def _level(self, x: Tensor, count: int) -> Tensor:
        return ((x.clamp(-REACH, REACH) / REACH + 1) / 2 * (count - 1)).round().long()

    def _place(self, head_BHN: Tensor) -> tuple[Tensor, Tensor]:
        """Means and scales `[B, C, N, 1]` that the first codes stand for."""
        *digits, grade_BCN = head_BHN.chunk(self.digits + 1, 1)
        place_BCN = sum(digit_BCN * self.size**power for power, digit_BCN in enumerate(reversed(digits)))
        far_BCN = 2 * place_BCN / (self.size**self.digits - 1) - 1
        scale_BCN = ((2 * grade_BCN / (self.size - 1) - 1) * REACH).exp() * self.unit_C1
        return ((far_BCN * REACH).sinh() * self.unit_C1)[..., None], scale_BCN[..., None]

    def _join(self, head_BHN: Tensor, latents_BDN: Tensor) -> Tensor:
        mean_BCN1, scale_BCN1 = self._place(head_BHN)
        shape_BNCP = self.unembed(latents_BDN.mT).float().unflatten(2, (self.channels, self.patch))
        return (mean_BCN1 + scale_BCN1 * shape_BNCP.transpose(1, 2)).flatten(2)


class SeriesLoss(nn.Module):
    """Mean squared error, every channel of every series in units of its own deviation; `nrmse` is its root.

    For `fit_tokenizer(..., loss=SeriesLoss(), crop=samples)`, with a crop that no series is shorter than.
    """

    def forward(self, output_BCS: Tensor, target_BCS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        floor_BC1 = 1e-3 * target_BCS.abs().mean(2, keepdim=True) + 1e-12  # for constant series
        error = (output_BCS - target_BCS) / (target_BCS.std(2, keepdim=True, correction=0) + floor_BC1)
        return error.square().mean(), {"nrmse": error.detach().square().mean().sqrt()}
