"""`QueryImageVQ`: an image as a short row of codes without a grid, one per learnt query.

Patches and N learnt query tokens go through a transformer together; the quantized query outputs and one learnt mask
token per patch go through another, which paints the patches (TiTok, Yu et al., arXiv 2406.07550; here the decoder
paints pixels at once instead of another tokenizer's codes). A code can so speak of the whole image, and far fewer codes
do than a grid has cells; the price is a fixed image size. With `causal`, a query sees the queries before it only, as in
SEED (Ge et al., arXiv 2307.08041), and the tail of the row is dropped at random in training (nested dropout, Rippel et
al., arXiv 1402.0915), so that any first n codes paint the image, ever finer: an order that suits a language model.
Codes are learnt from pixels; nothing here aligns them with text, as SEED does.

Beside each transformer runs a linear map, of every patch to a few numbers and of these to all queries, or back. It
learns what principal components would (with a dropped tail, in their order) long before attention has found its way
through so few tokens. This file holds no losses and reads no files.

Shapes: B items, H x W pixels, P patches, N queries, C channels, D latent dims, K quantizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.checks import check_images
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import CodesError
from anyglot_tokenizers.quantizers import make_quantizer
from anyglot_tokenizers.tokenizer import Reconstruction, Tokenizer, full_precision, seeded


class QueryImageVQ(Tokenizer):
    """Images float32 `[B, 3, H, W]` in [0, 1] of one size to codes int64 `[B, K, N]`.

    Args:
        image_size: (H, W), pixels.
        patch: pixels per side of a patch; divides H and W.
        width: channels of both transformers.
        heads: attention heads; divide `width`.
        encoder_depth: transformer blocks before the quantizer.
        decoder_depth: transformer blocks after it.
        linear_dim: numbers per patch in the linear maps beside; 0 leaves the maps out.
        num_queries: N.
        causal: order the queries from coarse to fine; then the first n <= N codes decode alone.
        tail_dropout: with `causal`, the probability that a training item keeps only its first n queries, n uniform in
            1..N.
        quantizer: kind, see `make_quantizer`.
        quantizer_options: further options of that kind.
        num_quantizers: K, residual codes per query.
        codebook_size: entries per codebook.
        codebook_dim: latent dims D.
        dropout: see `Quantizer`.
        stage_steps: see `ResidualQuantizer`.
        seed: of the initial weights.
        license: of the weights.
    """

    mean_C11: Tensor
    deviation: Tensor

    def __init__(
        self,
        *,
        image_size: Sequence[int] = (64, 64),
        patch: int = 8,
        width: int = 192,
        heads: int = 6,
        encoder_depth: int = 4,
        decoder_depth: int = 4,
        linear_dim: int = 16,
        num_queries: int = 32,
        causal: bool = False,
        tail_dropout: float = 0.5,
        quantizer: str = "rvq",
        quantizer_options: Mapping[str, Any] | None = None,
        num_quantizers: int = 1,
        codebook_size: int = 1024,
        codebook_dim: int = 16,
        dropout: float = 0.1,
        stage_steps: int = 50,
        seed: int = 0,
        license: str = "apache-2.0",
    ) -> None:
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        if len(image_size) != 2 or min(*image_size, patch) < 1 or any(side % patch for side in image_size):
            raise ValueError(f"patch {patch} must divide both sides of image_size {tuple(image_size)}")
        if heads < 1 or width % heads or num_queries < 1 or not 0.0 <= tail_dropout <= 1.0:
            raise ValueError(
                f"need heads {heads} that divide width {width}, num_queries {num_queries} >= 1, "
                f"tail_dropout {tail_dropout} in 0..1"
            )
        self.modality = "image"
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.patch = patch
        self.num_queries = num_queries
        self.causal = causal
        self.tail_dropout = tail_dropout
        self.linear_dim = linear_dim
        self.num_patches = self.image_size[0] * self.image_size[1] // patch**2
        with seeded(seed):
            self.patch_in = nn.Linear(3 * patch**2, width)
            self.place_1PC = nn.Parameter(0.5 * torch.randn(1, self.num_patches, width))
            self.query_1NC = nn.Parameter(0.5 * torch.randn(1, num_queries, width))
            self.encoder = nn.ModuleList(Block(width, heads) for _ in range(encoder_depth))
            self.latent_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, codebook_dim))
            self.quantizer = make_quantizer(
                quantizer,
                codebook_dim,
                num_quantizers,
                codebook_size,
                dropout=dropout,
                stage_steps=stage_steps,
                **(quantizer_options or {}),
            )
            self.latent_in = nn.Linear(codebook_dim, width)
            self.order_1NC = nn.Parameter(0.5 * torch.randn(1, num_queries, width))
            self.mask_1PC = nn.Parameter(0.5 * torch.randn(1, self.num_patches, width))
            self.decoder = nn.ModuleList(Block(width, heads) for _ in range(decoder_depth))
            self.patch_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * patch**2))
            if linear_dim:
                features, latents = self.num_patches * linear_dim, num_queries * codebook_dim
                self.linear_in = nn.Linear(3 * patch**2, linear_dim)
                self.linear_mix = nn.Linear(features, latents, bias=False)
                self.linear_unmix = nn.Linear(latents, features, bias=False)
                self.linear_out = nn.Linear(linear_dim, 3 * patch**2)
                self._start_linear()
        self.register_buffer("mean_C11", torch.full((3, 1, 1), 0.5))
        self.register_buffer("deviation", torch.tensor(0.5))

    @torch.no_grad()
    def _start_linear(self) -> None:
        """Start as the linear maps, which together project: they lose much but distort nothing."""
        for there, back in ((self.linear_in, self.linear_out), (self.linear_mix, self.linear_unmix)):
            nn.init.orthogonal_(there.weight)
            back.weight.copy_(there.weight.T)
        for name in ("latent_out.1.weight", "patch_out.1.weight"):
            self.get_parameter(name).mul_(0.1)  # what the transformers add

    def _spec_entries(self) -> dict[str, Any]:
        return {
            "modality": "image",
            "codebook_sizes": self.quantizer.codebook_sizes,
            "axes": ("query",),
            "strides": (None,),
            "fixed_grid": (self.num_queries,),
            "channels": 3,
            "license": self.config["license"],
        }

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of images of `image_size`.

        Raises MediaError for other sizes, ranges, and lengths (images have none).
        """
        x_BCHW = check_images(media, lengths, size=self.image_size).to(self.device)
        with full_precision(self.device):
            return Codes(self.quantizer.encode(self._latents(x_BCHW), num_quantizers), None, self.spec)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Images float32 `[B, 3, H, W]` in [0, 1] of codes `[B, k, n]`, any k <= K.

        n is N, or with `causal` any n <= N; so may be the lengths of `Codes`, item by item.
        """
        codes_BKN, count_B = self._unpack(codes)
        count, shortest = codes_BKN.shape[2], int(count_B.min())
        if shortest < 1 or count > self.num_queries or (shortest < self.num_queries and not self.causal):
            raise CodesError(
                f"codes of {shortest}..{count} queries; need "
                + (f"1..{self.num_queries}" if self.causal else f"all {self.num_queries}: the order has no meaning")
            )
        with full_precision(self.device):
            shown_BN = torch.arange(count, device=self.device) < count_B.to(self.device)[:, None]
            x_BCHW = self._pixels(self.quantizer.decode(codes_BKN), shown_BN)
        return x_BCHW.clamp(0, 1)

    def forward(self, media: Tensor, lengths: Tensor | None = None) -> Reconstruction:
        """Reconstruct with gradients; the reconstruction is not clamped to [0, 1]."""
        q_BDN, codes_BKN, commit, stats = self.quantizer(self._latents(media))
        batch = len(media)
        count_B = torch.full((batch,), self.num_queries, device=media.device)
        if self.training and self.causal and self.tail_dropout > 0:
            cut_B = torch.rand(batch, device=media.device) < self.tail_dropout
            count_B = torch.where(cut_B, torch.randint(1, self.num_queries + 1, (batch,), device=media.device), count_B)
        shown_BN = torch.arange(self.num_queries, device=media.device) < count_B[:, None]
        return Reconstruction(self._pixels(q_BDN, shown_BN), codes_BKN, commit, stats)

    @torch.no_grad()
    def fit_statistics(self, media: Tensor) -> None:
        """Centre and scale the input by the mean colour and the deviation of typical images."""
        if int(self.quantizer.steps) == 0:
            self.mean_C11.copy_(media.float().mean(dim=(0, 2, 3))[:, None, None])
            self.deviation.copy_((media.float() - self.mean_C11).std().clamp(min=0.05))

    def _latents(self, x_BCHW: Tensor) -> Tensor:
        """Latents `[B, D, N]`, one per query."""
        x_BCHW = (x_BCHW - self.mean_C11) / self.deviation
        x_BPC = F.pixel_unshuffle(x_BCHW, self.patch).flatten(2).transpose(1, 2)
        queries_BNC = self.query_1NC.expand(len(x_BPC), -1, -1)
        x_BTC = torch.cat([self.patch_in(x_BPC) + self.place_1PC, queries_BNC], dim=1)
        sees_TT = self._sees() if self.causal else None
        for block in self.encoder:
            x_BTC = block(x_BTC, sees_TT)
        latents_BND: Tensor = self.latent_out(x_BTC[:, self.num_patches :])
        if self.linear_dim:
            latents_BND = latents_BND + self.linear_mix(self.linear_in(x_BPC).flatten(1)).view_as(latents_BND)
        return latents_BND.transpose(1, 2)

    def _sees(self) -> Tensor:
        """Who sees whom in a causal encoder, bool `[T, T]`: patches see patches, a query also those up to itself.

                   patches   queries
        patches    1 1 1 1   0 0 0
        queries    1 1 1 1   1 0 0
                   1 1 1 1   1 1 0
                   1 1 1 1   1 1 1
        """
        place_T = torch.arange(self.num_patches + self.num_queries, device=self.device)
        return place_T <= place_T[:, None].clamp(min=self.num_patches - 1)

    def _pixels(self, z_BDN: Tensor, shown_BN: Tensor) -> Tensor:
        """Pixels of quantized latents `[B, D, n]` of which each item shows its first ones only."""
        batch, count = shown_BN.shape
        z_BND = z_BDN.transpose(1, 2) * shown_BN[..., None]
        codes_BNC = self.latent_in(z_BND) + self.order_1NC[:, :count]
        x_BTC = torch.cat([codes_BNC, self.mask_1PC.expand(batch, -1, -1)], dim=1)
        sees_B11T = F.pad(shown_BN, (0, self.num_patches), value=True)[:, None, None]
        for block in self.decoder:
            x_BTC = block(x_BTC, sees_B11T)
        x_BPC = self.patch_out(x_BTC[:, count:])
        if self.linear_dim:
            z_BND = F.pad(z_BND, (0, 0, 0, self.num_queries - count))
            x_BPC = x_BPC + self.linear_out(self.linear_unmix(z_BND.flatten(1)).unflatten(1, (self.num_patches, -1)))
        rows = self.image_size[0] // self.patch
        x_BCHW = F.pixel_shuffle(x_BPC.float().transpose(1, 2).unflatten(2, (rows, -1)), self.patch)
        return x_BCHW * self.deviation + self.mean_C11


class Block(nn.Module):
    """Transformer block, norms first: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_in = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mid = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor, sees: Tensor | None) -> Tensor:
        """`sees` is bool, broadcast to `[B, heads, T, T]`: whether a row's token attends to a column's."""
        q_BhTc, k_BhTc, v_BhTc = (
            self.query_key_value(self.norm_in(x_BTC)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed_BhTc = F.scaled_dot_product_attention(q_BhTc, k_BhTc, v_BhTc, attn_mask=sees)
        x_BTC = x_BTC + self.out(mixed_BhTc.transpose(1, 2).flatten(2))
        return x_BTC + self.down(F.gelu(self.up(self.norm_mid(x_BTC))))
