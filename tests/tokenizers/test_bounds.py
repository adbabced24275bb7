"""Configs that ask for far more than their weights hold are refused before memory or time is spent."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anyglot_tokenizers import AudioCodec, CheckpointError, ImageVQ, QueryImageVQ, SeriesVQ, load
from anyglot_tokenizers.bounds import bounded_by
from anyglot_tokenizers.clock import peak_bytes, reset_peak
from anyglot_tokenizers.dac import Dac
from anyglot_tokenizers.encodec import Encodec
from anyglot_tokenizers.snac import Snac

pytestmark = pytest.mark.filterwarnings("ignore::anyglot_tokenizers.errors.LicenseWarning")
CPU = torch.device("cpu")
SMALL = {"codebook_size": 16, "codebook_dim": 4}
SNAC = {
    "sampling_rate": 24000, "encoder_dim": 8, "encoder_rates": [2, 3], "decoder_dim": 16, "decoder_rates": [3, 2],
    "attn_window_size": None, "codebook_size": 32, "codebook_dim": 4, "vq_strides": [2, 1],
}  # fmt: skip
DAC = {
    "encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [2, 5], "n_codebooks": 2,
    "codebook_size": 32, "codebook_dim": 4,
}  # fmt: skip
ENCODEC = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "upsampling_ratios": [4, 3]}
BUILD = {
    "audio": lambda: AudioCodec(n_fft=64, hop=16, num_mels=12, dim=16, encoder_depth=1, decoder_depth=1, **SMALL),
    "image": lambda: ImageVQ(channels=(8, 16), downsample_factor=8, **SMALL),
    "query": lambda: QueryImageVQ(image_size=(16, 16), width=32, heads=2, encoder_depth=1, decoder_depth=1, **SMALL),
    "series": lambda: SeriesVQ(**SMALL),
    "fsq": lambda: ImageVQ(channels=(8, 16), downsample_factor=8, quantizer="fsq", codebook_size=64),
    "dac": lambda: Dac(model=DAC),
    "encodec": lambda: Encodec(model={**ENCODEC, "target_bandwidths": [30.0]}),
    "snac": lambda: Snac(model=SNAC),
}
GREEDY = [
    *[("audio", {name: 2**28}) for name in ("n_fft", "num_mels", "dim", "stride", "codebook_size", "codebook_dim")],
    *[("audio", {name: 10**7}) for name in ("encoder_depth", "decoder_depth", "num_quantizers", "semantic_dim")],
    ("audio", {"quantizer": "fsq", "num_quantizers": 2**40}),
    ("audio", {"quantizer": "lfq", "codebook_size": 2**24}),
    ("audio", {"quantizer": "simvq", "codebook_size": 2**28}),
    ("audio", {"hop": 2**40, "n_fft": 2**41}),
    *[("image", {name: 2**28}) for name in ("depth", "codebook_size", "codebook_dim", "num_quantizers")],
    ("image", {"channels": [2**20, 2**20]}),
    ("image", {"channels": [], "downsample_factor": 2}),
    ("image", {"encoder_kernel": 2**20}),
    ("image", {"patch": 2**20, "downsample_factor": 2**21}),
    ("image", {"quantizer_options": {"codebook_dim": 2**30}}),
    *[("query", {name: 2**24}) for name in ("num_queries", "width", "linear_dim", "encoder_depth")],
    ("query", {"image_size": [2**20, 2**20]}),
    *[("series", {name: 2**40}) for name in ("patch", "channels", "digits", "shapes", "codebook_size")],
    *[("fsq", {"num_quantizers": 2**40}), ("fsq", {"codebook_size": 2**24}), ("fsq", {"codebook_size": 2**60})],
    *[("dac", {"model": {**DAC, name: 2**16}}) for name in ("encoder_hidden_size", "decoder_hidden_size")],
    ("dac", {"model": {**DAC, "codebook_size": 2**16, "codebook_dim": 2**16, "n_codebooks": 1024}}),
    ("encodec", {"model": {**ENCODEC, "target_bandwidths": [30.0], "num_filters": 2**10, "num_lstm_layers": 8}}),
    ("snac", {"model": {**SNAC, "codebook_size": 2**16, "codebook_dim": 2**16}}),
    ("snac", {"model": {**SNAC, "decoder_dim": 2**16}}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small tokenizers of every class, saved."""
    found = {}
    for name, build in BUILD.items():
        found[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", BUILD)
def test_what_was_saved_loads(folders, name):
    assert load(folders[name]).fingerprint == json.loads((folders[name] / "config.json").read_text())["fingerprint"]


@pytest.mark.parametrize(("name", "change"), GREEDY)
def test_greedy_configs_are_refused(folders, tmp_path, name, change):
    entries = json.loads((folders[name] / "config.json").read_text())
    entries["config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "model.safetensors").write_bytes((folders[name] / "model.safetensors").read_bytes())
    before = reset_peak(CPU)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert peak_bytes(CPU) - before < 2**28


def test_greedy_publishers_folders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "encodec", "num_lstm_layers": 8, "num_filters": 512})
    )
    save_file({"encoder.layers.0.conv.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    before = reset_peak(CPU)
    with pytest.raises(CheckpointError, match="far more"):
        load(tmp_path)
    assert peak_bytes(CPU) - before < 2**28


def test_the_limit_is_that_of_the_weights_and_ends_with_the_block(tmp_path):
    with bounded_by({"x": torch.zeros(2**20)}, tmp_path), torch.device("meta"):
        nn.Linear(2**11, 2**11)
        with pytest.raises(CheckpointError, match="far more"):
            nn.Linear(2**11, 2**14 * 2)
    with bounded_by({}, tmp_path), pytest.raises(CheckpointError, match="far more"):
        nn.ModuleList(nn.Linear(1, 1) for _ in range(2**20))
    with torch.device("meta"):
        nn.Linear(2**12, 2**15)


class Foreign(AudioCodec):
    """A class of somebody else, which asks for values while it is built."""

    def __init__(self, **options):
        super().__init__(**options)
        assert float(self.mel_FM.sum()) > 0


def test_classes_of_others_need_no_meta_device(tmp_path):
    ours = Foreign(**AudioCodec(n_fft=64, hop=16, num_mels=12, dim=16, **SMALL).config)
    ours.save_pretrained(tmp_path)
    assert type(load(tmp_path)) is Foreign


@pytest.mark.parametrize("wound", ["half", "scale", "direction", "flat"])
def test_damaged_weight_norms_are_refused(tmp_path, wound):
    (tmp_path / "config.json").write_text(json.dumps(SNAC))
    tensors = Snac(model=SNAC).state_dict()
    g, v = "encoder.block.0.weight_g", "encoder.block.0.weight_v"
    weight = tensors.pop("encoder.block.0.weight")
    tensors |= {g: weight.flatten(1).norm(dim=1)[:, None, None], v: weight.clone()}
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "model.safetensors")
    assert Snac.from_published(tmp_path, SNAC, license="mit").num_quantizers == 3
    tensors = load_file(tmp_path / "model.safetensors")
    if wound == "half":
        del tensors[v]
    elif wound == "scale":
        tensors[g] = tensors[g][:1].clone()
    elif wound == "direction":
        tensors[v] = tensors[v][:, :, :0].clone()
    else:
        tensors[g] = tensors[g].flatten()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        Snac.from_published(tmp_path, SNAC, license="mit")
