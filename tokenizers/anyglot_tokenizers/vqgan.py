"""`VQGAN`: the image tokenizers of taming-transformers (arXiv 2012.09841) and LlamaGen (arXiv 2406.06525).

One network, two layouts of its checkpoints. Both are residual convolutions with group norm and attention at the
coarsest resolutions; LlamaGen looks codes up by direction among entries of 8 dims, taming by distance among entries of
4 to 256. Group norm and attention see the whole image, so every code depends on all of it, and images of any size
divisible by the factor work. The publishers give pickles, of which `convert.py` makes safetensors once. taming's Gumbel
models, whose codes are drawn at random, are not among those that load. Inference only.

Shapes: B images, H x W pixels, h x w codes, C channels, D dims of an entry, E entries, N positions of an image.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_tokenizers.checks import check_count, check_images
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import CheckpointError
from anyglot_tokenizers.image import image_entries
from anyglot_tokenizers.published import PublishedTokenizer, fitted_weights, read_safetensors
from anyglot_tokenizers.published_audio import check_sizes
from anyglot_tokenizers.quantize import nearest
from anyglot_tokenizers.tokenizer import full_precision, seeded

GROUPS = 32
CODEBOOK = "quantize.embedding.weight"
NOT_USED = ("loss.", "quantize.codebook_used", "colorize")  # losses, statistics and pictures of training
MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}


class VQGAN(PublishedTokenizer):
    """Images float32 `[B, 3, H, W]` in [0, 1] to codes int64 `[B, 1, H/f, W/f]`, for any H, W divisible by f.

    Args:
        model: taming's `params` (`n_embed`, `embed_dim`, `ddconfig`), with `l2_norm` if codes are looked up by
            direction; or LlamaGen's config.json (`codebook_size`, `codebook_embed_dim`, `encoder_ch_mult`, ...).
        license: of the weights.
    """

    def __init__(self, *, model: dict[str, Any], license: str = "unknown") -> None:
        settings = vqgan_settings(model)
        super().__init__({"model": settings, "license": license})
        network = settings["ddconfig"]
        self.modality = "image"
        self.factor = 2 ** (len(network["ch_mult"]) - 1)
        self.codebook_size, self.l2_norm = settings["n_embed"], settings["l2_norm"]
        dim, latent = settings["embed_dim"], network["z_channels"]
        with seeded(0):
            self.encoder, self.decoder = Encoder(network), Decoder(network)
            self.quant_conv = nn.Conv2d(latent, dim, 1)
            self.post_quant_conv = nn.Conv2d(dim, latent, 1)
            self.quantize = nn.ModuleDict({"embedding": nn.Embedding(self.codebook_size, dim)})
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False).eval()

    @classmethod
    def from_published(cls, folder: Path, entries: dict[str, Any], *, license: str) -> Self:
        """Read safetensors in either layout; see `PublishedTokenizer.from_published`.

        What `entries` do not say of the network is taken from the shapes of the weights.
        """
        tensors = read_safetensors(folder)
        try:
            tensors = renamed(tensors)
            known = "ddconfig" in entries or "encoder_ch_mult" in entries
            model = entries if known else settings_of(tensors, entries)
            with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
                tokenizer = cls(model=model, license=license)
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise CheckpointError(f"{folder}: config and weights do not describe a VQGAN ({error!r})") from error
        tensors = fitted_weights(tensors, tokenizer.state_dict(), folder)
        tokenizer.to_empty(device="cpu").load_state_dict(tensors)
        return tokenizer

    def _spec_entries(self) -> dict[str, Any]:
        return image_entries((self.codebook_size,), self.factor, self.config["license"])

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of images of one size.

        Raises MediaError for wrong sizes, ranges, and lengths (images have none), CodesError for another
        `num_quantizers` than 1.
        """
        check_count(num_quantizers, 1)
        x_BCHW = check_images(media, lengths, factor=self.factor).to(self.device)
        with full_precision(self.device):
            x_BCHW = (2 * x_BCHW - 1).contiguous(memory_format=torch.channels_last)
            z_BhwD = self.quant_conv(self.encoder(x_BCHW)).permute(0, 2, 3, 1)
            z_ND, entries_ED = z_BhwD.flatten(0, 2), self._entries()
            z_ND = F.normalize(z_ND) if self.l2_norm else z_ND
            codes_N = nearest(z_ND, entries_ED, entries_ED.square().sum(1) / 2)
        return Codes(codes_N.view(len(media), 1, *z_BhwD.shape[1:3]), None, self.spec)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Images float32 `[B, 3, H, W]` in [0, 1] of codes `[B, 1, h, w]`, of any h and w.

        Raises CodesError for codes of another shape or range, FingerprintError for those of another tokenizer.
        """
        codes_B1hw, _ = self._unpack(codes)
        with full_precision(self.device):
            q_BDhw = F.embedding(codes_B1hw[:, 0], self._entries()).permute(0, 3, 1, 2)
            x_BCHW = self.decoder(self.post_quant_conv(q_BDhw))
        return ((x_BCHW + 1) / 2).clamp(0, 1).contiguous()

    def _entries(self) -> Tensor:
        entries_ED = cast(nn.Embedding, self.quantize["embedding"]).weight
        return F.normalize(entries_ED) if self.l2_norm else entries_ED


def vqgan_settings(model: dict[str, Any]) -> dict[str, Any]:
    """taming's form of either publisher's config, only what shapes the network. Raises ValueError."""
    if "encoder_ch_mult" in model:
        model = _from_llamagen(model)
    network = model.get("ddconfig")
    if not isinstance(network, dict):
        raise ValueError("neither ddconfig (taming) nor encoder_ch_mult (LlamaGen) is there")
    if network.get("double_z") or (network.get("in_channels", 3), network.get("out_ch", 3)) != (3, 3):
        raise ValueError("double_z must be false, and in_channels and out_ch 3")
    sizes: dict[str, Any] = {
        name: network.get(name) for name in ("ch", "ch_mult", "num_res_blocks", "resolution", "z_channels")
    }
    sizes |= {name: model.get(name) for name in ("n_embed", "embed_dim")}
    check_sizes({**sizes, "attention": network.get("attn_resolutions") or 1}, n_embed=2**20, num_res_blocks=16)
    multipliers, attention = sizes["ch_mult"], network.get("attn_resolutions") or []
    settings: dict[str, Any] = {
        "n_embed": sizes["n_embed"],
        "embed_dim": sizes["embed_dim"],
        "l2_norm": bool(model.get("l2_norm", False)),
        "ddconfig": {
            "ch": sizes["ch"],
            "ch_mult": multipliers,
            "num_res_blocks": sizes["num_res_blocks"],
            "attn_resolutions": [256 >> i for i in range(len(multipliers)) if sizes["resolution"] >> i in attention],
            "resolution": 256,  # only says at what levels there is attention: any size works
            "z_channels": sizes["z_channels"],
        },
    }
    width = settings["ddconfig"]["ch"]
    if width % GROUPS or width * max(multipliers) > 2**14 or len(multipliers) > 8:
        raise ValueError(f"ch {width} must be a multiple of {GROUPS}, and not times ch_mult beyond {2**14}")
    return settings


def _from_llamagen(model: dict[str, Any]) -> dict[str, Any]:
    """Attention at the last level, which taming's config says by its resolution. `ch` and blocks are fixed there."""
    multipliers = model["encoder_ch_mult"]
    check_sizes({"encoder_ch_mult": multipliers})
    if not isinstance(multipliers, list) or model.get("decoder_ch_mult", multipliers) != multipliers:
        raise ValueError(f"decoder_ch_mult must be the list encoder_ch_mult {multipliers}")
    network = {
        "ch": model.get("ch", 128),
        "ch_mult": multipliers,
        "num_res_blocks": model.get("num_res_blocks", 2),
        "attn_resolutions": [256 >> (len(multipliers) - 1)],
        "resolution": 256,
        "z_channels": model.get("z_channels", 256),
    }
    return {
        "n_embed": model.get("codebook_size", 16384),
        "embed_dim": model.get("codebook_embed_dim", 8),
        "l2_norm": model.get("codebook_l2_norm", True),
        "ddconfig": network,
    }


def settings_of(tensors: dict[str, Tensor], entries: dict[str, Any]) -> dict[str, Any]:
    """taming's form of the config that weights (`renamed`) speak of, as LlamaGen publishes them without one.

    `entries` may say `l2_norm`, which shapes do not tell: what nobody says is false. Raises KeyError, ValueError.
    """
    ch = len(tensors["encoder.conv_in.weight"])
    levels = sorted({int(name.split(".")[2]) for name in tensors if name.startswith("encoder.down.")})[:8]
    attention = [level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in tensors]
    return {
        "n_embed": len(tensors[CODEBOOK]),
        "embed_dim": tensors[CODEBOOK].shape[1],
        "l2_norm": entries.get("l2_norm", False),
        "ddconfig": {
            "ch": ch,
            "ch_mult": [len(tensors[f"encoder.down.{level}.block.0.conv1.weight"]) // ch for level in levels],
            "num_res_blocks": len(
                {name for name in tensors if re.match(r"encoder\.down\.0\.block\.\d+\.conv1.w", name)}
            ),
            "attn_resolutions": [256 >> level for level in attention],
            "resolution": 256,
            "z_channels": len(tensors["encoder.conv_out.weight"]),
        },
    }


def is_llamagen(tensors: dict[str, Tensor]) -> bool:
    """Whether names are LlamaGen's, who looks codes up by direction."""
    return any(name.startswith("encoder.conv_blocks.") for name in tensors)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under taming's names, without those that only training uses. Those of LlamaGen are translated."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(NOT_USED)}
    if not is_llamagen(kept):
        return kept
    last = max(int(name.split(".")[2]) for name in kept if re.match(r"decoder\.conv_blocks\.\d+\.", name))

    def rename(name: str) -> str:
        name = re.sub(r"^((?:en|de)coder\.mid)\.([012])\.", lambda m: f"{m[1]}.{MIDDLE[m[2]]}.", name)
        name = re.sub(r"^encoder\.conv_blocks\.(\d+)\.", lambda m: f"encoder.down.{m[1]}.", name)
        name = re.sub(r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", name)
        return re.sub(r"^(\w+\.(?:down|up)\.\d+)\.res\.", r"\1.block.", name)

    return {rename(name): tensor for name, tensor in kept.items()}


class Encoder(nn.Module):
    """Pixels in [-1, 1] to latents `[B, z_channels, h, w]`."""

    def __init__(self, network: dict[str, Any]) -> None:
        super().__init__()
        widths = [network["ch"] * multiplier for multiplier in network["ch_mult"]]
        self.conv_in = nn.Conv2d(3, network["ch"], 3, padding=1)
        self.down = nn.ModuleList()
        width = network["ch"]
        for level, outputs in enumerate(widths):
            change = Down(outputs) if level < len(widths) - 1 else None
            self.down.append(Level(width, outputs, network, level, network["num_res_blocks"], downsample=change))
            width = outputs
        self.mid = Middle(width)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, network["z_channels"], 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            x_BCHW = level(x_BCHW)
        z_BCHW: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))
        return z_BCHW


class Decoder(nn.Module):
    """Latents to pixels, nearly all in [-1, 1]."""

    def __init__(self, network: dict[str, Any]) -> None:
        super().__init__()
        widths = [network["ch"] * multiplier for multiplier in network["ch_mult"]]
        width = widths[-1]
        self.conv_in = nn.Conv2d(network["z_channels"], width, 3, padding=1)
        self.mid = Middle(width)
        levels = []
        for level in reversed(range(len(widths))):
            change = Up(widths[level]) if level else None
            levels.append(Level(width, widths[level], network, level, network["num_res_blocks"] + 1, upsample=change))
            width = widths[level]
        self.up = nn.ModuleList(reversed(levels))  # published from fine to coarse
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        y_BCHW: Tensor = self.conv_out(F.silu(self.norm_out(x_BCHW)))
        return y_BCHW


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the config has it; then on to the next."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        network: dict[str, Any],
        level: int,
        count: int,
        *,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(outputs if index else inputs, outputs) for index in range(count))
        attends = network["resolution"] >> level in network["attn_resolutions"]
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(count if attends else 0))
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[index](x_BCHW)
        for change in (self.downsample, self.upsample):
            x_BCHW = change(x_BCHW) if change is not None else x_BCHW
        return x_BCHW


class Middle(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResidualBlock(width, width),
            Attention(width),
            ResidualBlock(width, width),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.block_2(self.attn_1(self.block_1(x_BCHW)))
        return y_BCHW


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a pointwise convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW), inplace=True))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW), inplace=True))
        return h_BCHW.add_(x_BCHW if self.nin_shortcut is None else self.nin_shortcut(x_BCHW))


class Attention(nn.Module):
    """x + attention of every position to every other, one head as wide as the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        q_B1NC, k_B1NC, v_B1NC = (
            layer(h_BCHW).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v)
        )
        y_BCN = F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC)[:, 0].transpose(1, 2)
        y_BCHW: Tensor = self.proj_out(y_BCN.unflatten(2, x_BCHW.shape[2:]))
        return y_BCHW.add_(x_BCHW)


class Down(nn.Module):
    """Half the resolution, with zeros at the right and at the bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        return y_BCHW


class Up(nn.Module):
    """Twice the resolution: each position four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return y_BCHW


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)
