"""SpeechTokenizer: the published layout, equality with the publisher's formulas, padding, refusals, bad input."""

import hashlib
import importlib.util
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anyglot_tokenizers import CheckpointError, Codes, CodesError, MediaError, UnsupportedError, load
from anyglot_tokenizers.chunks import encode_chunked
from anyglot_tokenizers.speechtokenizer import EMBED, SpeechTokenizer

SMALL = {
    "sample_rate": 16000, "strides": [5, 4, 2], "n_filters": 4, "dimension": 16, "semantic_dimension": 12,
    "bidirectional": True, "dilation_base": 2, "residual_kernel_size": 3, "n_residual_layers": 1, "lstm_layers": 2,
    "activation": "ELU", "codebook_size": 32, "n_q": 4,
    "semantic_model_path": "/somewhere", "epochs": 10,
}  # fmt: skip
SNAKE = {**SMALL, "activation": "Snake", "strides": [3, 2], "n_residual_layers": 2}
ONE_WAY = {**SMALL, "bidirectional": False, "dimension": 12}
PUBLISHED = {
    **SMALL, "strides": [8, 5, 4, 2], "n_filters": 64, "dimension": 1024, "semantic_dimension": 768,
    "codebook_size": 1024, "n_q": 8,
}  # fmt: skip
VARIANTS = pytest.mark.parametrize("model", [SMALL, SNAKE, ONE_WAY], ids=["elu", "snake", "one_way"])


def sound(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def codec(model):
    """A small codec whose every tensor matters and whose codes differ."""
    tokenizer = SpeechTokenizer(model=model)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tokenizer.state_dict().items():
        tensor *= 0 if name.endswith(("bias", "embed")) or ".bias_" in name else 1.5
        tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    return tokenizer


def published(tokenizer, model):
    """Its tensors as the publisher's package writes them: old weight norm, deeper names, what training keeps."""
    tensors = {}
    for name, tensor in tokenizer.state_dict().items():
        if name == "quantizer.embed":
            for index, book in enumerate(tensor):
                prefix = EMBED.format(index).removesuffix("embed")
                entries = {"embed": book, "embed_avg": book, "inited": torch.ones(1), "cluster_size": book[:, 0]}
                tensors |= {f"{prefix}{key}": value.clone() for key, value in entries.items()}
        elif ".conv." in name:
            stem = name.rpartition(".conv.")[0]
            up = isinstance(tokenizer.get_submodule(f"{stem}.conv"), type(UP))
            stem += ".convtr.convtr." if up else ".conv.conv."
            if name.endswith("bias"):
                tensors[f"{stem}bias"] = tensor
            else:
                tensors[f"{stem}weight_g"] = torch.norm_except_dim(tensor, 2, 0)
                tensors[f"{stem}weight_v"] = 3 * tensor.contiguous()
        else:
            tensors[name] = tensor
    if model["dimension"] != model["semantic_dimension"]:
        tensors["transform.weight"] = torch.zeros(model["semantic_dimension"], model["dimension"])
        tensors["transform.bias"] = torch.zeros(model["semantic_dimension"])
    return tensors


class Plain:
    """The published formulas, written down once more with plain functions over `[B, C, L]` and the published names."""

    def __init__(self, tensors, model):
        self.tensors, self.model = tensors, model

    def weight(self, name):
        g, v = self.tensors[f"{name}.weight_g"], self.tensors[f"{name}.weight_v"]
        return g * v / v.flatten(1).norm(dim=1)[:, None, None], self.tensors[f"{name}.bias"]

    def conv(self, x, name, stride=1, dilation=1):
        weight, bias = self.weight(f"{name}.conv.conv")
        total = (weight.shape[2] - 1) * dilation - (stride - 1)
        right = total // 2 + math.ceil(x.shape[2] / stride) * stride - x.shape[2]
        short = max(max(total - total // 2, right) + 1 - x.shape[2], 0)
        x = F.pad(F.pad(x, (0, short)), (total - total // 2, right), mode="reflect")
        return F.conv1d(x[..., : x.shape[2] - short], weight, bias, stride, dilation=dilation)

    def up(self, x, name, stride):
        y = F.conv_transpose1d(x, *self.weight(f"{name}.convtr.convtr"), stride)
        left = stride - stride // 2
        return y[..., left : y.shape[2] - stride // 2]

    def act(self, x, name):
        if self.model["activation"] == "ELU":
            return F.elu(x)
        alpha = self.tensors[f"{name}.alpha"]
        return x + torch.sin(alpha * x) ** 2 / (alpha + 1e-9)

    def residual(self, x, name, dilation):
        h = self.conv(self.act(x, f"{name}.block.0"), f"{name}.block.1", dilation=dilation)
        h = self.conv(self.act(h, f"{name}.block.2"), f"{name}.block.3")
        return h + self.conv(x, f"{name}.shortcut")

    def lstm(self, x, name, both_ways):
        x = x.transpose(1, 2)
        rows = x
        for layer in range(self.model["lstm_layers"]):
            ways = [self.direction(rows, f"{name}.lstm", f"l{layer}")]
            if both_ways:
                ways.append(self.direction(rows.flip(1), f"{name}.lstm", f"l{layer}_reverse").flip(1))
            rows = torch.cat(ways, 2)
        return (rows + torch.cat([x] * (1 + both_ways), 2)).transpose(1, 2)

    def direction(self, x, name, suffix):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w, u, b, c = (self.tensors[f"{name}.{part}_{suffix}"] for part in names)
        hidden = cell = torch.zeros(len(x), u.shape[1])
        out = []
        for step in x.unbind(1):
            i, f, g, o = (step @ w.T + b + hidden @ u.T + c).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            out.append(hidden)
        return torch.stack(out, 1)

    def residuals(self, x, part, index):
        for number in range(self.model["n_residual_layers"]):
            x = self.residual(x, f"{part}.model.{index + number}", self.model["dilation_base"] ** number)
        return x, index + self.model["n_residual_layers"]

    def encode(self, x):
        x, index = self.conv(x, "encoder.model.0"), 1
        for stride in reversed(self.model["strides"]):
            x, index = self.residuals(x, "encoder", index)
            x = self.conv(self.act(x, f"encoder.model.{index}"), f"encoder.model.{index + 1}", stride)
            index += 2
        x = self.lstm(x, f"encoder.model.{index}", self.model["bidirectional"])
        x = self.conv(self.act(x, f"encoder.model.{index + 1}"), f"encoder.model.{index + 2}")
        codes = []
        for number in range(self.model["n_q"]):
            book = self.tensors[EMBED.format(number)]
            codes.append((x.transpose(1, 2)[:, :, None] - book).square().sum(3).argmin(2))
            x = x - book[codes[-1]].transpose(1, 2)
        return torch.stack(codes, 1)

    def decode(self, codes):
        x = sum(self.tensors[EMBED.format(number)][part] for number, part in enumerate(codes.unbind(1)))
        x = self.lstm(self.conv(x.transpose(1, 2), "decoder.model.0"), "decoder.model.1", False)
        index = 2
        for stride in self.model["strides"]:
            x = self.up(self.act(x, f"decoder.model.{index}"), f"decoder.model.{index + 1}", stride)
            x, index = self.residuals(x, "decoder", index + 2)
        return self.conv(self.act(x, f"decoder.model.{index}"), f"decoder.model.{index + 1}")


SPEECH = codec(SMALL)
UP = SPEECH.decoder.model[3].conv
HOP = SPEECH.hop_length


@pytest.mark.parametrize(
    ("activation", "count", "digest"), [("ELU", 166, "753077bcda83b71d"), ("Snake", 192, "20a034af54a1a3b7")]
)
def test_published_layout(activation, count, digest):
    """Names and shapes are those of the publisher's package, measured once (103.7 M numbers)."""
    model = {**PUBLISHED, "activation": activation}
    with torch.device("meta"):
        tensors = published(SpeechTokenizer(model=model), model)
    layout = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
    assert len(tensors) == count and hashlib.sha256(layout.encode()).hexdigest()[:16] == digest


def test_spec():
    spec = SPEECH.spec
    assert spec.num_quantizers == 4 and spec.codebook_size == 32 and spec.hop_length == 40 and spec.modality == "speech"
    assert spec.context is None and not spec.causal and spec.license == "unknown"
    assert "epochs" not in SPEECH.config["model"] and "semantic_model_path" not in SPEECH.config["model"]
    with torch.device("meta"):
        entries = SpeechTokenizer(model=PUBLISHED)._spec_entries()
    assert entries["strides"] == (320,) and entries["codebook_sizes"] == (1024,) * 8  # 50 Hz, 4 kbit/s


@VARIANTS
def test_equals_the_published_formulas(model, tmp_path):
    tensors = published(codec(model), model)
    save_file(tensors, tmp_path / "model.safetensors")
    ours, plain = SpeechTokenizer.from_published(tmp_path, model, license="x"), Plain(tensors, model)
    for samples in (1, 2, 7, ours.hop_length - 1, ours.hop_length, 9 * ours.hop_length + 3):
        media = sound(2, 1, samples, seed=samples)
        codes = ours.encode(media).codes
        assert torch.equal(codes, plain.encode(media)) and codes.shape[2] == ours.spec.num_codes(samples)
        torch.testing.assert_close(ours.decode(codes), plain.decode(codes), atol=1e-5, rtol=0)
    assert len(codes.unique()) > 8  # not all the same, which would prove nothing


@VARIANTS
def test_equals_the_publishers_package(model, tmp_path):
    found = importlib.util.find_spec("speechtokenizer")
    if found is None:
        pytest.skip("pip install --no-deps speechtokenizer")
    package = types.ModuleType("speechtokenizer")  # its own __init__ wants torchaudio and trainers
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["speechtokenizer"] = package
    try:
        module = importlib.import_module("speechtokenizer.model")
        reference = module.SpeechTokenizer(model).eval()
        reference.load_state_dict(published(codec(model), model))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "speechtokenizer"]:
            del sys.modules[name]
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    ours = SpeechTokenizer.from_published(tmp_path, model, license="x")
    for samples in (1, 3, 40, 1001):
        media = sound(2, 1, samples, seed=samples)
        with torch.no_grad():
            theirs = reference.encode(media)
            assert torch.equal(ours.encode(media).codes, theirs.transpose(0, 1))
            assert torch.equal(
                ours.encode(media, num_quantizers=2).codes, reference.encode(media, n_q=2).transpose(0, 1)
            )
            torch.testing.assert_close(ours.decode(theirs.transpose(0, 1)), reference.decode(theirs), atol=1e-5, rtol=0)


def test_folders(tmp_path):
    fingerprint = SPEECH.save_pretrained(tmp_path)
    with pytest.warns(match="licence"):
        again = load(tmp_path)
    assert isinstance(again, SpeechTokenizer) and again.fingerprint == fingerprint
    media = sound(1, 1, 300)
    assert torch.equal(again.encode(media).codes, SPEECH.encode(media).codes)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "norm", "book", "no_books", "nan"])
def test_weights_that_do_not_fit(change, tmp_path):
    tensors = published(SPEECH, SMALL)
    if change == "missing":
        tensors.pop("encoder.model.0.conv.conv.bias")
    elif change == "extra":
        tensors["surprise"] = torch.zeros(1)
    elif change == "shape":
        tensors["decoder.model.1.lstm.bias_ih_l0"] = torch.zeros(3)
    elif change == "norm":
        tensors["encoder.model.0.conv.conv.weight_g"] = torch.zeros(3, 1, 1)
    elif change == "book":
        tensors[EMBED.format(2)] = torch.zeros(31, 16)
    elif change == "no_books":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("embed")}
    else:
        tensors["encoder.model.0.conv.conv.bias"] = torch.full((4,), torch.nan)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        SpeechTokenizer.from_published(tmp_path, SMALL, license="x")


@pytest.mark.parametrize(
    "wrong",
    [
        {"strides": []}, {"strides": [2] * 17}, {"strides": [10**9]}, {"n_filters": 2**15}, {"dimension": 0},
        {"dilation_base": 100}, {"lstm_layers": None}, {"activation": "exec"}, {"n_q": 1.5}, {"codebook_size": True},
    ],
)  # fmt: skip
def test_impossible_configs(wrong, tmp_path):
    with pytest.raises(ValueError):
        SpeechTokenizer(model={**SMALL, **wrong})
    save_file(published(SPEECH, SMALL), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        SpeechTokenizer.from_published(tmp_path, {**SMALL, **wrong}, license="x")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12 * HOP), min_size=2, max_size=4))
def test_padding_never_changes_an_item(lengths):
    batch = torch.full((len(lengths), 1, max(lengths)), 9.0)  # garbage in the padding
    for row, length in enumerate(lengths):
        batch[row, :, :length] = sound(1, length, seed=row)
    together = SPEECH.encode(batch, torch.tensor(lengths))
    audio = SPEECH.decode(together)
    for row, length in enumerate(lengths):
        alone = SPEECH.encode(sound(1, 1, length, seed=row))
        assert torch.equal(together.item(row), alone.codes[0])
        samples = alone.codes.shape[2] * HOP
        torch.testing.assert_close(audio[row, :, :samples], SPEECH.decode(alone)[0], atol=1e-5, rtol=0)
        assert not audio[row, :, samples:].any()


def test_the_far_end_matters_and_chunks_are_refused():
    media = sound(1, 1, 40 * HOP)
    changed = media.clone()
    changed[..., -HOP:] += 3 * sound(1, 1, HOP, seed=9)
    z, other = (SPEECH.encoder(x.transpose(1, 2)) for x in (media, changed))
    assert bool((z[:, 30] != other[:, 30]).any())  # ten codes away, farther than any convolution here
    for call in (SPEECH.stream, lambda: encode_chunked(SPEECH, media)):
        with pytest.raises(UnsupportedError):
            call()


def test_quantizers():
    media = sound(2, 1, 6 * HOP)
    codes = SPEECH.encode(media).codes
    for count in (1, 2, 4):
        assert torch.equal(SPEECH.encode(media, num_quantizers=count).codes, codes[:, :count])
        assert SPEECH.decode(codes[:, :count]).shape == (2, 1, 6 * HOP)
    for count in (0, 5):
        with pytest.raises(CodesError):
            SPEECH.encode(media, num_quantizers=count)


def test_wrong_input():
    for media in (sound(1, 2, 100), sound(1, 100), torch.zeros(1, 1, 0), torch.full((1, 1, 9), torch.inf)):
        with pytest.raises(MediaError):
            SPEECH.encode(media)
    for lengths in (torch.tensor([0]), torch.tensor([101]), torch.tensor([5, 5]), torch.tensor([5.0])):
        with pytest.raises(MediaError):
            SPEECH.encode(sound(1, 1, 100), lengths)
    ids = torch.zeros(1, 4, 3, dtype=torch.int64)
    for wrong in (ids[0], ids[:, :, :0], torch.cat([ids, ids], 1), ids - 1, ids + 32, ids.float()):
        with pytest.raises(CodesError):
            SPEECH.decode(wrong)
    assert SPEECH.decode(Codes(ids, torch.tensor([0]))).abs().max() == 0
