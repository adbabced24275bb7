"""X-Codec: the codes and the audio of transformers, alone or in a batch; chunks and streams are refused."""

import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import XcodecConfig, XcodecModel

from anyglot_tokenizers import AnyglotError, CheckpointError, CodesError, LicenseWarning, UnsupportedError, load
from anyglot_tokenizers.chunks import encode_chunked
from anyglot_tokenizers.xcodec import XCodec

pytestmark = pytest.mark.filterwarnings("ignore::anyglot_tokenizers.errors.LicenseWarning")
HOP = 320


def published(kind: str = "hubert") -> XcodecModel:
    """A small random model: all strides and kernels as published, few channels and layers."""
    torch.manual_seed(0)
    acoustic = {
        "model_type": "dac", "encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [8, 5, 4, 2],
        "upsampling_ratios": [8, 5, 4, 2], "hidden_size": 8,
    }  # fmt: skip
    speech = {
        "model_type": kind, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    config = XcodecConfig(
        codebook_size=32, target_bandwidths=[0.25, 1], acoustic_model_config=acoustic, semantic_model_config=speech
    )
    model = XcodecModel(config).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("embed"):
                buffer.normal_()
        for name, weights in model.named_parameters():
            if name.endswith("alpha"):
                weights.uniform_(0.5, 2)
            elif name.startswith("acoustic") and weights.ndim == 3:
                torch.nn.init.kaiming_normal_(weights, nonlinearity="linear").mul_(0.6)
    return model


REFERENCE = published()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("xcodec")
    REFERENCE.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def xcodec(folder) -> XCodec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LicenseWarning)
        return load(folder)


def sound(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_codes_and_audio_are_those_of_transformers(kind, tmp_path):
    reference, media = published(kind), sound(2, 1, 40 * HOP)
    reference.save_pretrained(tmp_path)
    xcodec = load(tmp_path)
    assert xcodec.spec.codebook_sizes == (32,) * 4 and xcodec.spec.frame_rate == 50
    with torch.no_grad():
        codes = reference.encode(media).audio_codes
        assert torch.equal(xcodec.encode(media).codes, codes)
        lowest = reference.encode(media, bandwidth=0.25).audio_codes
        assert torch.equal(xcodec.encode(media, num_quantizers=1).codes, lowest)
        audio = reference.decode(codes).audio_values
        assert audio.std() > 0.01
        torch.testing.assert_close(xcodec.decode(codes), audio, atol=1e-5, rtol=0)
    assert min(len(column.unique()) for column in codes.unbind(1)) > 4  # the comparison is not of constants


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 12 * HOP), min_size=1, max_size=4))
def test_alone_equals_in_a_padded_batch(xcodec, lengths):
    media, lengths = sound(len(lengths), 1, max(lengths) + 7), torch.tensor(lengths)
    codes = xcodec.encode(media, lengths)
    audio = xcodec.decode(codes)
    for row, length in enumerate(lengths.tolist()):
        alone = xcodec.encode(media[row : row + 1, :, :length])
        assert torch.equal(codes.item(row), alone.codes[0])
        end = int(codes.lengths[row]) * HOP
        torch.testing.assert_close(audio[row, :, :end], xcodec.decode(alone)[0], atol=1e-5, rtol=0)
        assert not audio[row, :, end:].any()


def test_chunks_and_streams_are_refused(xcodec):
    assert xcodec.spec.context is None
    with pytest.raises(UnsupportedError, match="unbounded"):
        xcodec.stream()
    with pytest.raises(UnsupportedError, match="unbounded"):
        encode_chunked(xcodec, sound(1, 1, 4 * HOP))


def test_only_what_serves_encoding_and_decoding_is_kept(xcodec, folder, tmp_path):
    names = set(xcodec.state_dict())
    assert not any(name.startswith(("decoder_semantic", "fc1")) for name in names)
    fingerprint = xcodec.save_pretrained(tmp_path)
    again, media = load(tmp_path), sound(1, 1, 9 * HOP)
    assert again.fingerprint == fingerprint == xcodec.fingerprint
    assert torch.equal(again.encode(media).codes, xcodec.encode(media).codes)
    assert not again.train().training and not again.semantic_model.training


def test_older_spelling_of_weight_norm(xcodec, folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    spelling = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    assert any(new in name for name in tensors for new in spelling)
    for new, old in spelling.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path).fingerprint == xcodec.fingerprint


def test_bad_input(xcodec, folder, tmp_path):
    for k in (0, 5):
        with pytest.raises(CodesError):
            xcodec.encode(sound(1, 1, HOP), num_quantizers=k)
    with pytest.raises(CodesError):
        xcodec.decode(torch.full((1, 1, 2), 32))
    model = xcodec.config["model"]
    for change in (
        {"strides": [2, 1]}, {"channel_ratios": [1, 2]}, {"codebook_size": 0}, {"num_quantizers": 10**6},
        {"semantic_model_config": {"model_type": "bert"}}, {"semantic_model_config": {}, "sample_rate": -1},
        {"semantic_model_config": {**model["semantic_model_config"], "num_hidden_layers": 10**9}},
        {"semantic_model_config": {**model["semantic_model_config"], "conv_stride": [5, 2, 2, 2, 2, 2, 1]}},
        {"semantic_model_config": {**model["semantic_model_config"], "hidden_size": "many"}},
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            XCodec(model={**model, **change})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if "codebook" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="embed"):
        load(tmp_path)


def test_without_transformers_the_extra_is_named(xcodec, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AnyglotError, match=r"anyglot\[lm\]"):
        XCodec(model=xcodec.config["model"])
