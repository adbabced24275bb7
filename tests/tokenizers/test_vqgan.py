"""VQGAN: both published layouts, equality with other implementations, any size, bad input."""

import hashlib
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from anyglot_tokenizers import CheckpointError, Codes, CodesError, FingerprintError, MediaError, load
from anyglot_tokenizers.chunks import encode_chunked
from anyglot_tokenizers.errors import UnsupportedError
from anyglot_tokenizers.vqgan import VQGAN, renamed

LLAMAGEN = {
    "codebook_size": 64, "codebook_embed_dim": 8, "codebook_l2_norm": True, "encoder_ch_mult": [1, 2, 2],
    "decoder_ch_mult": [1, 2, 2], "z_channels": 16, "ch": 32, "dropout_p": 0.0,
}  # fmt: skip
NETWORK = {
    "ch": 32, "out_ch": 3, "ch_mult": [1, 2, 2], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0,
    "in_channels": 3, "resolution": 64, "z_channels": 16, "double_z": False,
}  # fmt: skip
TAMING = {"n_embed": 64, "embed_dim": 12, "ddconfig": NETWORK, "monitor": "val/rec_loss"}
TWICE = {**TAMING, "ddconfig": {**NETWORK, "attn_resolutions": [32, 16], "num_res_blocks": 1}}


def images(*size, count=2, seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def vqgan(model):
    """A small tokenizer whose every tensor matters and whose codes differ."""
    tokenizer = VQGAN(model=model, license="mit")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tokenizer.named_parameters():
        parameter.data += (0.02 if parameter.ndim > 1 else 0.1) * torch.randn(parameter.shape, generator=generator)
        if name.startswith("quant_conv"):
            parameter.data *= 3
    return tokenizer


def published(tokenizer, llamagen):
    """Its tensors as the publisher writes them."""
    tensors = {name: tensor.contiguous() for name, tensor in tokenizer.state_dict().items()}
    if not llamagen:
        return {**tensors, "loss.discriminator.main.0.weight": torch.zeros(3)}
    last = tokenizer.factor.bit_length() - 1
    middle = {"block_1": "0", "attn_1": "1", "block_2": "2"}

    def rename(name):
        name = re.sub(r"\.mid\.(\w+)", lambda m: f".mid.{middle[m[1]]}", name)
        name = re.sub(r"encoder\.down\.", "encoder.conv_blocks.", name)
        name = re.sub(r"decoder\.up\.(\d)", lambda m: f"decoder.conv_blocks.{last - int(m[1])}", name)
        return re.sub(r"(conv_blocks\.\d)\.block", r"\1.res", name)

    return {rename(name): tensor for name, tensor in tensors.items()} | {"quantize.codebook_used": torch.zeros(65536)}


class Plain:
    """The published formulas for taming's names, written down once more with plain functions."""

    def __init__(self, tensors, model):
        self.tensors, self.network, self.l2 = tensors, model["ddconfig"], model.get("l2_norm", False)

    def conv(self, x, name, **options):
        weight = self.tensors[f"{name}.weight"]
        return F.conv2d(x, weight, self.tensors[f"{name}.bias"], **{"padding": weight.shape[2] // 2, **options})

    def norm(self, x, name):
        return F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], 1e-6)

    def swish(self, x):
        return x * torch.sigmoid(x)

    def block(self, x, name):
        h = self.conv(self.swish(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self.conv(self.swish(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.tensors else x)

    def attention(self, x, name):
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, 2)
        return x + self.conv((v @ weights.transpose(1, 2)).view_as(x), f"{name}.proj_out")

    def level(self, x, name, level, count):
        for index in range(count):
            x = self.block(x, f"{name}.block.{index}")
            if self.network["resolution"] // 2**level in self.network["attn_resolutions"]:
                x = self.attention(x, f"{name}.attn.{index}")
        return x

    def middle(self, x, name):
        return self.block(self.attention(self.block(x, f"{name}.block_1"), f"{name}.attn_1"), f"{name}.block_2")

    def encode(self, images):
        x, levels = self.conv(2 * images - 1, "encoder.conv_in"), len(self.network["ch_mult"])
        for level in range(levels):
            x = self.level(x, f"encoder.down.{level}", level, self.network["num_res_blocks"])
            if level < levels - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", stride=2, padding=0)
        x = self.swish(self.norm(self.middle(x, "encoder.mid"), "encoder.norm_out"))
        x = self.conv(self.conv(x, "encoder.conv_out"), "quant_conv").permute(0, 2, 3, 1)
        x, book = (F.normalize(x, dim=3) if self.l2 else x), self.book()
        return (x[..., None, :] - book).square().sum(4).argmin(3)

    def book(self):
        book = self.tensors["quantize.embedding.weight"]
        return F.normalize(book) if self.l2 else book

    def decode(self, codes):
        x = self.conv(self.conv(self.book()[codes].permute(0, 3, 1, 2), "post_quant_conv"), "decoder.conv_in")
        x = self.middle(x, "decoder.mid")
        for level in reversed(range(len(self.network["ch_mult"]))):
            x = self.level(x, f"decoder.up.{level}", level, self.network["num_res_blocks"] + 1)
            if level:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(x, f"decoder.up.{level}.upsample.conv")
        return (self.conv(self.swish(self.norm(x, "decoder.norm_out")), "decoder.conv_out") + 1) / 2


def read(tokenizer, model, llamagen, folder):
    save_file(published(tokenizer, llamagen), folder / "model.safetensors")
    return VQGAN.from_published(folder, model, license="mit")


@pytest.fixture(scope="module")
def tokenizer():
    return vqgan(LLAMAGEN)


FULL_TAMING = {
    "n_embed": 16384, "embed_dim": 256,
    "ddconfig": {**NETWORK, "ch": 128, "ch_mult": [1, 1, 2, 2, 4], "resolution": 256, "z_channels": 256},
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "count", "digest"),
    [
        ({"encoder_ch_mult": [1, 1, 2, 2, 4]}, 344, "25666a85ab873be9"),  # LlamaGen's VQ-16
        ({"encoder_ch_mult": [1, 2, 2, 4]}, 300, "6824de071ade312b"),  # VQ-8
        (FULL_TAMING, 343, "13bfc5f136ffdf23"),  # taming's ImageNet f16, 16384
    ],
    ids=["vq16", "vq8", "taming"],
)
def test_published_layout(model, count, digest):
    """Names and shapes are those of the publishers' code, measured once."""
    with torch.device("meta"):
        tokenizer = VQGAN(model=model)
    tensors = published(tokenizer, llamagen="encoder_ch_mult" in model)
    tensors.pop("loss.discriminator.main.0.weight", None)
    layout = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
    assert len(tensors) == count and hashlib.sha256(layout.encode()).hexdigest()[:16] == digest
    assert set(renamed(tensors)) == set(tokenizer.state_dict())
    assert tokenizer._spec_entries()["strides"] == ((16, 16) if len(tokenizer.encoder.down) == 5 else (8, 8))


@pytest.mark.parametrize("size", [(16, 16), (32, 48)])
@pytest.mark.parametrize("model", [LLAMAGEN, TAMING, TWICE], ids=["llamagen", "taming", "twice"])
def test_equals_the_published_formulas(model, size, tmp_path):
    llamagen = "encoder_ch_mult" in model
    ours = read(vqgan(model), model, llamagen, tmp_path)
    formulas = {**TAMING, "l2_norm": True} if llamagen else model
    plain = Plain(renamed(published(ours, llamagen)), formulas)
    media = images(*size)
    codes = ours.encode(media)
    assert torch.equal(codes.codes[:, 0], plain.encode(media)) and len(codes.codes.unique()) > 4
    decoded = ours.decode(codes)
    torch.testing.assert_close(decoded, plain.decode(codes.codes[:, 0]).clamp(0, 1), atol=1e-4, rtol=0)
    assert decoded.shape == media.shape and torch.equal(decoded, ours.decode(codes.codes))
    assert 0 <= decoded.min() < decoded.max() <= 1


def test_equals_transformers(tmp_path):
    """Janus took over LlamaGen's network: another implementation, whose weights ours reads under LlamaGen's names."""
    transformers = pytest.importorskip("transformers")
    config = transformers.JanusVQVAEConfig(
        embed_dim=8, num_embeddings=64, latent_channels=16, base_channels=32, channel_multiplier=[1, 2, 2],
        num_res_blocks=2, num_patches=8, projection_dim=8, num_hidden_layers=1, hidden_size=8, image_token_embed_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.JanusVQVAE(config).eval()
    theirs.quantize.embedding.weight.data.normal_()
    theirs.quant_conv.weight.data *= 5
    names = {name.replace("decoder.up.", "decoder.stage."): x for name, x in theirs.state_dict().items()}
    tensors = {}
    for name, tensor in names.items():  # theirs are stored from coarse to fine
        name = re.sub(r"^decoder\.stage\.(\d)", lambda m: f"decoder.up.{2 - int(m[1])}", name)
        tensors[name] = tensor.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    ours = VQGAN.from_published(tmp_path, LLAMAGEN, license="mit")
    media = images(32, 32)
    with torch.no_grad():
        latents = theirs.quant_conv(theirs.encoder(2 * media - 1))
        entries = F.normalize(theirs.quantize.embedding.weight)
        codes = torch.einsum("bdhw,cd->bhwc", F.normalize(latents, dim=1), entries).argmax(3)
        quantized = entries[codes].permute(0, 3, 1, 2)
        pixels = theirs.decoder(theirs.post_quant_conv(quantized))
    assert torch.equal(ours.encode(media).codes[:, 0], codes) and len(codes.unique()) > 4
    torch.testing.assert_close(ours.decode(codes[:, None]), ((pixels + 1) / 2).clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", [LLAMAGEN, TAMING, TWICE], ids=["llamagen", "taming", "twice"])
def test_config_from_weights(model, tmp_path):
    """LlamaGen publishes no config: the weights say it, all but how codes are looked up."""
    llamagen = "encoder_ch_mult" in model
    known = vqgan(model)
    read_back = read(known, {"l2_norm": llamagen}, llamagen, tmp_path)
    assert read_back.config == known.config and read_back.fingerprint == known.fingerprint


def test_folders(tokenizer, tmp_path):
    fingerprint = tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, VQGAN) and again.fingerprint == fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(images(16, 16)).codes, tokenizer.encode(images(16, 16)).codes)


def test_spec(tokenizer):
    spec = tokenizer.spec
    assert spec.axes == ("height", "width") and spec.downsample_factor == 4 and spec.codebook_size == 64
    assert spec.channels == 3 and spec.license == "mit" and spec.grid(64, 32) == (16, 8)
    with pytest.raises(UnsupportedError):
        encode_chunked(tokenizer, images(16, 16))


def test_batch_equals_single(tokenizer):
    media = images(16, 32, count=3)
    codes = tokenizer.encode(media)
    for row in range(3):
        assert torch.equal(tokenizer.encode(media[row : row + 1]).codes[0], codes.codes[row])
        one = tokenizer.decode(codes.codes[row : row + 1])[0]
        torch.testing.assert_close(one, tokenizer.decode(codes)[row], atol=1e-5, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(media).codes, codes.codes)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "config", "nan", "levels", "gumbel"])
def test_weights_that_do_not_fit(tokenizer, change, tmp_path):
    tensors, model = published(tokenizer, True), LLAMAGEN
    if change == "missing":
        tensors.pop("encoder.conv_in.bias")
    elif change == "extra":
        tensors["surprise"] = torch.zeros(1)
    elif change == "shape":
        tensors["post_quant_conv.weight"] = torch.zeros(16, 8)
    elif change == "config":
        model = {**LLAMAGEN, "encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 2]}
    elif change == "nan":
        tensors["encoder.conv_in.bias"] = torch.full((32,), torch.nan)
    elif change == "levels":
        tensors = {name: x for name, x in tensors.items() if not name.startswith("decoder.conv_blocks")}
    else:
        tensors["quantize.embed.weight"], model = tensors.pop("quantize.embedding.weight"), {}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        VQGAN.from_published(tmp_path, model, license="mit")


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"encoder_ch_mult": []}, {"encoder_ch_mult": 2}, {"encoder_ch_mult": [1] * 9}, {**LLAMAGEN, "ch": 33},
        {**LLAMAGEN, "ch": 10**9}, {**LLAMAGEN, "decoder_ch_mult": [1]}, {**LLAMAGEN, "codebook_size": True},
        {**LLAMAGEN, "encoder_ch_mult": [1, 2**15], "decoder_ch_mult": [1, 2**15]},
        {**TAMING, "ddconfig": [1]}, {**TAMING, "ddconfig": {**NETWORK, "double_z": True}},
        {**TAMING, "ddconfig": {**NETWORK, "in_channels": 4}}, {**TAMING, "n_embed": None},
        {**TAMING, "ddconfig": {**NETWORK, "attn_resolutions": "16"}},
    ],
)  # fmt: skip
def test_impossible_configs(wrong):
    with pytest.raises(ValueError):
        VQGAN(model=wrong)


def test_wrong_input(tokenizer):
    for media in (
        images(16, 18), images(16, 16)[:, :1], images(16, 16)[0], 255 * images(16, 16), images(16, 16) - 2,
        images(16, 16).byte(), images(16, 16)[:0], images(16, 16) * torch.nan,
    ):  # fmt: skip
        with pytest.raises(MediaError):
            tokenizer.encode(media)
    with pytest.raises(MediaError):
        tokenizer.encode(images(16, 16), torch.tensor([16, 16]))
    with pytest.raises(CodesError):
        tokenizer.encode(images(16, 16), num_quantizers=2)
    ids = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    for wrong in (ids[0], ids[..., :0], torch.cat([ids, ids], 1), ids - 1, ids + 64, ids.float()):
        with pytest.raises(CodesError):
            tokenizer.decode(wrong)
    with pytest.raises(FingerprintError):
        tokenizer.decode(Codes(ids, None, vqgan(TAMING).spec))
