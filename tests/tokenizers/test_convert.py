"""convert: every publisher's form of checkpoint becomes a folder that loads; nothing in a file is ever run."""

import argparse
import builtins
import json
import os
import pickle
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyglot_tokenizers import AnyglotError, CheckpointError, load
from anyglot_tokenizers.convert import convert, read_checkpoint
from anyglot_tokenizers.snac import Snac
from anyglot_tokenizers.speechtokenizer import SpeechTokenizer
from anyglot_tokenizers.vqgan import VQGAN

SNAC = {
    "sampling_rate": 24000, "encoder_dim": 8, "encoder_rates": [2, 3], "decoder_dim": 16, "decoder_rates": [3, 2],
    "attn_window_size": None, "codebook_size": 32, "codebook_dim": 4, "vq_strides": [2, 1],
}  # fmt: skip
SPEECH = {
    "sample_rate": 16000, "strides": [4, 2], "n_filters": 4, "dimension": 8, "semantic_dimension": 8,
    "bidirectional": True, "dilation_base": 2, "residual_kernel_size": 3, "n_residual_layers": 1, "lstm_layers": 1,
    "activation": "ELU", "codebook_size": 16, "n_q": 2,
}  # fmt: skip
TAMING = {
    "n_embed": 32, "embed_dim": 4,
    "ddconfig": {
        "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [8], "resolution": 16, "z_channels": 4,
    },
}  # fmt: skip


def snac_tensors():
    """As the publisher writes them: weight norm in the newer spelling."""
    tensors = {}
    for name, tensor in Snac(model=SNAC).state_dict().items():
        if tensor.ndim == 3 and name.endswith("weight"):
            stem = name.removesuffix("weight") + "parametrizations.weight.original"
            tensors |= {f"{stem}0": torch.norm_except_dim(tensor, 2, 0), f"{stem}1": tensor.contiguous()}
        else:
            tensors[name] = tensor
    return tensors


def speech_tensors():
    """As the publisher names them."""
    tensors = {}
    for name, tensor in SpeechTokenizer(model=SPEECH).state_dict().items():
        if name == "quantizer.embed":
            tensors |= {f"quantizer.vq.layers.{i}._codebook.embed": book.clone() for i, book in enumerate(tensor)}
        else:
            up = name.startswith(("decoder.model.3.", "decoder.model.6."))
            tensors[name.replace(".conv.", ".convtr.convtr." if up else ".conv.conv.")] = tensor
    return tensors


def same(tokenizer, folder, media):
    """What was returned is what the folder holds, and it works."""
    again = load(folder)
    assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint
    codes = again.encode(media)
    assert torch.equal(codes.codes, tokenizer.encode(media).codes) and again.decode(codes).isfinite().all()
    return again


@pytest.mark.parametrize("kind", ["snac", None])
def test_snac(kind, tmp_path):
    torch.save(snac_tensors(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(SNAC))
    tokenizer = convert(tmp_path / "pytorch_model.bin", tmp_path / "out", kind, license="mit")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert same(tokenizer, tmp_path / "out", torch.rand(1, 1, 99)).spec.license == "mit"
    expected, media = Snac(model=SNAC, license="mit"), torch.rand(1, 1, 99)
    assert torch.equal(tokenizer.encode(media).codes, expected.encode(media).codes)


@pytest.mark.parametrize("form", ["bare", "generator", "legacy"])
@pytest.mark.filterwarnings("ignore::anyglot_tokenizers.errors.LicenseWarning")
def test_speechtokenizer(form, tmp_path):
    content = {"generator": speech_tensors(), "optim_g": {"state": {}}} if form == "generator" else speech_tensors()
    torch.save(content, tmp_path / "SpeechTokenizer.pt", _use_new_zipfile_serialization=form != "legacy")
    (tmp_path / "c.json").write_text(json.dumps(SPEECH))
    tokenizer = convert(tmp_path / "SpeechTokenizer.pt", tmp_path / "out", "speechtokenizer", tmp_path / "c.json")
    same(tokenizer, tmp_path / "out", torch.rand(1, 1, 99))


def test_llamagen(tmp_path):
    """No config is published, and training arguments lie beside the weights."""
    tensors = {}
    for name, tensor in VQGAN(model={**TAMING, "l2_norm": True}).state_dict().items():
        for ours, theirs in (
            ("mid.block_1", "mid.0"), ("mid.attn_1", "mid.1"), ("mid.block_2", "mid.2"), (".block.", ".res."),
            ("encoder.down", "encoder.conv_blocks"), ("decoder.up.0", "decoder.conv_blocks.1"),
            ("decoder.up.1", "decoder.conv_blocks.0"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    tensors["quantize.codebook_used"] = torch.zeros(65536)
    averages = {name: tensor * 0 for name, tensor in tensors.items()}
    arguments = argparse.Namespace(lr=1e-4, vq_model="VQ-8")
    torch.save({"model": tensors, "discriminator": averages, "args": arguments, "steps": 5}, tmp_path / "vq.pt")
    tokenizer = convert(tmp_path / "vq.pt", tmp_path / "out", license="mit")
    assert isinstance(tokenizer, VQGAN) and tokenizer.l2_norm
    assert tokenizer.fingerprint == VQGAN(model={**TAMING, "l2_norm": True}, license="mit").fingerprint
    same(tokenizer, tmp_path / "out", torch.rand(1, 3, 16, 16))


@pytest.fixture
def lightning_like():
    """A stand-in for an old Lightning, which must not be there when the checkpoint is read."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    kept = {name: sys.modules.pop(name, None) for name in names}
    sys.modules.update({name: types.ModuleType(name) for name in names})
    module = sys.modules[names[2]]
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": names[2]})
    yield module
    for name, old in kept.items():
        sys.modules.pop(name, None)
        if old is not None:
            sys.modules[name] = old


@pytest.mark.parametrize("config", ["yaml", "none"])
def test_taming(config, tmp_path, lightning_like):
    tensors = {**VQGAN(model=TAMING).state_dict(), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(3)}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    callback = lightning_like.ModelCheckpoint()
    callback.best = torch.tensor(0.3)
    content = {"state_dict": tensors, "epoch": 3, "callbacks": {lightning_like.ModelCheckpoint: callback}}
    torch.save(content, tmp_path / "last.ckpt")
    del lightning_like.ModelCheckpoint
    path = None
    if config == "yaml":
        yaml = pytest.importorskip("yaml")
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump({"model": {"target": "taming.models.vqgan.VQModel", "params": TAMING}}))
    tokenizer = convert(tmp_path / "last.ckpt", tmp_path / "out", "vqgan", path, license="mit")
    assert tokenizer.fingerprint == VQGAN(model=TAMING, license="mit").fingerprint and not tokenizer.l2_norm
    same(tokenizer, tmp_path / "out", torch.rand(1, 3, 16, 16))


@pytest.mark.filterwarnings("ignore::anyglot_tokenizers.errors.LicenseWarning")
def test_encodec(tmp_path):
    from anyglot_tokenizers.encodec_package import from_package, import_encodec

    try:
        package = import_encodec()
    except AnyglotError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model = package.EncodecModel.encodec_model_24khz(pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "codec.th")
    tokenizer = convert(tmp_path / "codec.th", tmp_path / "out")
    media = torch.rand(1, 1, 2000)
    same(tokenizer, tmp_path / "out", media)
    assert torch.equal(tokenizer.encode(media).codes, from_package(model).encode(media).codes)


class Hostile:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle2", "pickle5"])
@pytest.mark.parametrize("call", ["os.system", "eval", "open", "import", "inside"])
def test_nothing_is_run(form, call, tmp_path):
    mark = tmp_path / "run"
    hostile = {
        "os.system": Hostile(os.system, f"touch {mark}"),
        "eval": Hostile(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
        "open": Hostile(open, str(mark), "w"),
        "import": Hostile(builtins.__import__, "this"),
        "inside": argparse.Namespace(x=Hostile(os.mkdir, str(mark))),
    }[call]
    content = {"model": {"a": torch.ones(2)}, "args": hostile}
    path = tmp_path / "model.ckpt"
    if form in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps({"a": hostile}, protocol=int(form[-1])))
    with pytest.raises(CheckpointError, match="not a checkpoint" if form == "pickle5" else "would run"):
        convert(path, tmp_path / "out", "vqgan")
    assert not mark.exists() and not (tmp_path / "out").exists() and "this" not in sys.modules


def test_trainers_are_not_run_either(tmp_path, lightning_like):
    """A name that is let through gives an empty object, even if something of that name is there."""
    ran = []

    def touch(*arguments):
        ran.append(arguments)

    touch.__module__, touch.__qualname__ = lightning_like.__name__, "touch"
    lightning_like.touch = touch
    torch.save({"model": {"a": torch.ones(2)}, "x": Hostile(touch, 1)}, tmp_path / "a.pt")
    assert torch.equal(read_checkpoint(tmp_path / "a.pt")["a"], torch.ones(2)) and not ran


def unusual(kind):
    if kind == "expanded":
        return {"a": torch.ones(1).expand(10**6, 10**6)}
    if kind == "quantized":
        return {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}
    return {
        "sparse": {"a": torch.ones(2).to_sparse()},
        "meta": {"a": torch.empty(9, device="meta")},
        "complex": {"a": torch.ones(2, dtype=torch.complex64)},
        "list": [torch.ones(2)],
        "tensor": torch.ones(2),
        "empty": {},
        "empty inside": {"model": {}},
        "numbers": {"model": {"a": 1}},
        "no names": {1: torch.ones(2)},
        "none": None,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["expanded", "quantized", "sparse", "meta", "complex", "list", "tensor", "empty", "empty inside", "numbers",
     "no names", "none"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_no_plain_tensors(kind, tmp_path):
    torch.save(unusual(kind), tmp_path / "a.pt")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "a.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    content = {"model": {"a": torch.arange(4.0), "b": torch.ones(2, 2)}, "args": argparse.Namespace(x=1)}
    torch.save(content, folder / "zip")
    torch.save(content["model"], folder / "legacy", _use_new_zipfile_serialization=False)
    return folder


@settings(max_examples=80, deadline=None)
@given(
    form=st.sampled_from(["zip", "legacy"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.floats(0, 1), max_size=3),
    data=st.data(),
)
def test_damaged_files(files, form, cut, flips, data):
    raw = bytearray((files / form).read_bytes())
    for flip in flips:
        raw[int(flip * (len(raw) - 1))] = data.draw(st.integers(0, 255))
    if not flips:
        raw = raw[: int(cut * len(raw))]
    (files / "damaged.pt").write_bytes(bytes(raw))
    try:
        tensors = read_checkpoint(files / "damaged.pt")
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def test_wrong_use(tmp_path):
    path, out = tmp_path / "a.pt", tmp_path / "out"
    torch.save({"a": torch.ones(2)}, path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "list.json").write_text("[1, 2]")
    for match, arguments in {
        "no such file": (tmp_path / "b.pt", out, "snac"),
        "choose a folder": (path, tmp_path / "file", "snac"),
        "choose one of": (path, out, "dac"),
        "needs the publisher's config.json": (path, out, "snac"),
        "say --kind": (path, out),
        "not a readable configuration": (path, out, "snac", tmp_path / "bad.json"),
        "not a table": (path, out, "snac", tmp_path / "list.json"),
        "no-such": (path, out, "snac", tmp_path / "no-such.json"),
        "weights do not fit": (path, out, "snac", SNAC),
        "no codebooks": (path, out, "speechtokenizer", SPEECH),
        "do not describe a VQGAN": (path, out, "vqgan"),
        "b.th: no such file": (tmp_path / "b.th", out, "encodec"),
    }.items():
        with pytest.raises(CheckpointError, match=match):
            convert(*arguments)
    torch.save({"a": torch.ones(2)}, tmp_path / "a.th")
    with pytest.raises(CheckpointError):
        convert(tmp_path / "a.th", out)
    assert not out.exists()
