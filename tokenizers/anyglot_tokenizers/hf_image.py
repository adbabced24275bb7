"""The image tokenizers inside Emu3, Janus and Chameleon, run through transformers.

Each is published inside a whole language model, its tensors under a prefix such as `model.vqmodel.`. Only those tensors
are read, only the shards that hold them are downloaded, and the language model is never built. A folder with the
tokenizer alone (`save_pretrained` of its transformers class) loads too. This file resizes nothing and trains nothing.

Sources: Emu3 (arXiv 2409.18869), Janus (arXiv 2410.13848; its tokenizer is that of LlamaGen, arXiv 2406.06525),
Chameleon (arXiv 2405.09818). All three see pixels in [-1, 1], as their authors' own code feeds them.

Shapes: B items, H x W pixels, h x w codes, D latent dims, C codes, T frames.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_tokenizers.bounds import bounded_by
from anyglot_tokenizers.checks import check_count, check_images
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.errors import AnyglotError, CheckpointError, UnsupportedError
from anyglot_tokenizers.image import image_entries
from anyglot_tokenizers.published import PublishedTokenizer, fitted_weights, read_safetensors
from anyglot_tokenizers.quantize import nearest
from anyglot_tokenizers.tokenizer import CONFIG_FILE, WEIGHTS_FILE, full_precision, seeded

INDEX_FILE = "model.safetensors.index.json"
MARK = "quantize.embedding.weight"  # the codebook: whatever comes before it in a name is the prefix of all tensors


class PublishedImageVQ(PublishedTokenizer):
    """Images float32 `[B, 3, H, W]` in [0, 1], H and W divisible by the factor, to codes int64 `[B, 1, h, w]` and back.

    Codes are a function of the whole image (attention and group norms span it), so there is no chunking.

    Args:
        model: the `vq_config` of the published config.json, or that whole config.json.
        license: of the weights.
    """

    kind: ClassVar[str]
    size_entry: ClassVar[str] = "num_embeddings"
    unused: ClassVar[tuple[str, ...]] = ()
    decodes: ClassVar[bool] = True

    def __init__(self, *, model: dict[str, Any], license: str = "unknown", **options: Any) -> None:
        try:
            import transformers
        except ImportError as error:
            raise AnyglotError(f"{type(self).__name__} needs transformers: pip install 'anyglot[lm]'") from error
        from huggingface_hub.errors import StrictDataclassError

        vq = model.get("vq_config", model) if isinstance(model, dict) else model
        if not isinstance(vq, dict):
            raise ValueError(f"not a {self.kind} config: {str(vq)[:40]}")
        config = getattr(transformers, f"{self.kind}Config")
        known = set(signature(config).parameters) - set(signature(transformers.PreTrainedConfig).parameters)
        vq = {name: value for name, value in vq.items() if name in known}  # leaves out versions, dtypes and the like
        super().__init__({"model": vq, "license": license, **options})
        try:
            settings = config(**vq)
            with seeded(0):
                self.model = getattr(transformers, self.kind)(settings)
        except (StrictDataclassError, RuntimeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a {self.kind} config ({error})") from error
        self.modality = "image"
        self.codebook_size = int(getattr(settings, self.size_entry))
        self.factor = 2 ** (len(settings.channel_multiplier) - 1)
        self.eval()

    @classmethod
    def from_published(cls, folder: Path, entries: dict[str, Any], *, license: str) -> Self:
        """Read a whole model's folder, or one with the tokenizer alone; see `PublishedTokenizer.from_published`."""
        tensors = read_safetensors(folder, _prefix(_names(folder), folder))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(cls.unused)}
        try:
            with bounded_by(tensors, folder), torch.device("meta"):  # a config that does not fit takes no memory
                tokenizer = cls(model=entries, license=license)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
        tensors = fitted_weights(tensors, tokenizer.model.state_dict(), folder)
        tokenizer.model.load_state_dict(tensors, assign=True)
        return tokenizer

    @classmethod
    def fetch(cls, hub_id: str, revision: str | None) -> Path:
        """Download config.json, the model card and, of the weights, only the shards that hold the tokenizer."""
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import EntryNotFoundError

        weights = {WEIGHTS_FILE}
        try:
            index = Path(hf_hub_download(hub_id, INDEX_FILE, revision=revision))
            table = _weight_map(index)
            prefix = _prefix(list(table), index)
            weights = {INDEX_FILE} | {shard for name, shard in table.items() if name.startswith(prefix)}
        except EntryNotFoundError:
            pass  # the weights are in one file
        wanted = [CONFIG_FILE, "README.md", *sorted(weights)]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))

    def _spec_entries(self) -> dict[str, Any]:
        return image_entries((self.codebook_size,), self.factor, self.config["license"]) | {"decodes": self.decodes}

    @torch.no_grad()
    def encode(self, media: Tensor, lengths: Tensor | None = None, *, num_quantizers: int | None = None) -> Codes:
        """Codes of images of one size.

        Raises MediaError for wrong sizes, ranges, and lengths (images have none).
        """
        check_count(num_quantizers, 1)
        x_BCHW = check_images(media, lengths, factor=self.factor).to(self.device)
        with full_precision(self.device):
            codes_Bhw = self._encode(x_BCHW * 2 - 1)
        return Codes(codes_Bhw[:, None], None, self.spec)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Images float32 `[B, 3, H, W]` in [0, 1] of codes `[B, 1, h, w]`.

        Raises UnsupportedError where no decoder was published.
        """
        codes_B1hw, _ = self._unpack(codes)
        with full_precision(self.device):
            return (self._decode(codes_B1hw[:, 0]) / 2 + 0.5).clamp(0, 1)

    @abstractmethod
    def _encode(self, x_BCHW: Tensor) -> Tensor:
        """Codes `[B, h, w]` of pixels in [-1, 1]."""

    def _decode(self, codes_Bhw: Tensor) -> Tensor:
        """Pixels, nearly all in [-1, 1]."""
        raise UnsupportedError(f"{type(self).__name__} only encodes: its publisher gave no decoder")


class Emu3Image(PublishedImageVQ):
    """Emu3's tokenizer: factor 8, one of 32,768 codes. See `PublishedImageVQ`.

    It is a video tokenizer, to which an image is T = 4 equal frames. Frame by frame layers run on one of them here, and
    only the first frame is decoded: a quarter of the work and memory of transformers, for the same codes and pixels.
    """

    kind = "Emu3VQVAE"
    size_entry = "codebook_size"

    def __init__(self, *, model: dict[str, Any], license: str = "unknown") -> None:
        super().__init__(model=model, license=license)

    def _encode(self, x_BCHW: Tensor) -> Tensor:
        encoder = self.model.encoder
        h_BDhw = encoder.middle_block(encoder.down_block(encoder.conv_in(x_BCHW)))
        h_BDhw = encoder.conv_out(_swish(encoder.norm_out(h_BDhw)))
        h_BDThw = h_BDhw[:, :, None].repeat(1, 1, self.model.config.temporal_downsample_factor, 1, 1)
        for layer in encoder.time_conv:
            h_BDThw = _swish(layer(h_BDThw))
        for layer in encoder.time_res_stack:
            h_BDThw = layer(h_BDThw)
        return _codes_of(self.model.quant_conv(h_BDThw)[:, :, 0], self.model.quantize.embedding.weight)

    def _decode(self, codes_Bhw: Tensor) -> Tensor:
        decoder = self.model.decoder
        q_BDThw = self.model.quantize.embedding(codes_Bhw).permute(0, 3, 1, 2)[:, :, None].contiguous()
        both_BDThw = torch.cat([self.model.post_quant_conv(q_BDThw), q_BDThw])
        for layer in decoder.time_res_stack:
            both_BDThw = layer(both_BDThw)
        for layer in decoder.time_conv:
            both_BDThw = _swish(layer(both_BDThw))
        h_BDhw, q_BDhw = both_BDThw[:, :, 0].chunk(2)
        h_BDhw = decoder.up_block(decoder.middle_block(decoder.conv_in(h_BDhw), q_BDhw), q_BDhw)
        x_BCHW: Tensor = decoder.conv_out(_swish(decoder.norm_out(h_BDhw, q_BDhw)))
        return x_BCHW


class JanusImage(PublishedImageVQ):
    """Janus' tokenizer: factor 16, one of 16,384 codes; any size, where transformers decodes 24 x 24 codes only.

    Args:
        model, license: see `PublishedImageVQ`.
        cosine: find the nearest entry by direction, as it was trained (LlamaGen, and DeepSeek's own code); decoding
            normalises entries in any case. False finds it by distance, as transformers does, which is another code
            wherever entries differ in length.
    """

    kind = "JanusVQVAE"

    def __init__(self, *, model: dict[str, Any], license: str = "unknown", cosine: bool = True) -> None:
        super().__init__(model=model, license=license, cosine=cosine)
        self.cosine = cosine

    def _encode(self, x_BCHW: Tensor) -> Tensor:
        z_BDhw = self.model.quant_conv(self.model.encoder(x_BCHW))
        entries_CD = self.model.quantize.embedding.weight
        return _codes_of(z_BDhw, F.normalize(entries_CD, dim=1) if self.cosine else entries_CD)

    def _decode(self, codes_Bhw: Tensor) -> Tensor:
        q_BDhw = F.normalize(self.model.quantize.embedding(codes_Bhw), dim=3).permute(0, 3, 1, 2).contiguous()
        x_BCHW: Tensor = self.model.decoder(self.model.post_quant_conv(q_BDhw))
        return x_BCHW


class ChameleonImage(PublishedImageVQ):
    """Chameleon's tokenizer: factor 16, one of 8,192 codes; encode only. See `PublishedImageVQ`."""

    kind = "ChameleonVQVAE"
    decodes = False
    unused = ("decoder.",)  # in models that put the decoder back, which transformers has no class for

    def __init__(self, *, model: dict[str, Any], license: str = "unknown") -> None:
        super().__init__(model=model, license=license)

    def _encode(self, x_BCHW: Tensor) -> Tensor:
        return _codes_of(self.model.quant_conv(self.model.encoder(x_BCHW)), self.model.quantize.embedding.weight)


def _codes_of(z_BDhw: Tensor, entries_CD: Tensor) -> Tensor:
    """The entry nearest to each latent, `[B, h, w]`; among entries of one length, that is the nearest direction."""
    rows_ND = z_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
    return nearest(rows_ND, entries_CD, entries_CD.square().sum(1) / 2).view(len(z_BDhw), *z_BDhw.shape[2:])


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _names(folder: Path) -> list[str]:
    """Names of all tensors of a folder, from the headers alone; none if there are no safetensors."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        return list(_weight_map(folder / INDEX_FILE)) if (folder / INDEX_FILE).is_file() else []
    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); download it again") from error


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard. Raises CheckpointError for anything but a table of plain file names."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(shard).name != shard for shard in table.values()):
            raise ValueError("shards outside the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a readable index of shards ({error}); download it again") from error
    return dict(table)


def _prefix(names: list[str], where: Path) -> str:
    """What precedes the names of the tokenizer's tensors, such as `model.vqmodel.`; "" where they stand alone."""
    found = {name.removesuffix(MARK) for name in names if name == MARK or name.endswith(f".{MARK}")}
    if len(found) > 1 or (names and not found):
        raise CheckpointError(f"{where}: {len(found)} tensors named *{MARK}, one needed; is it another model?")
    return found.pop() if found else ""
