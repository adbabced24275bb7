"""DAC: the codes and the audio of transformers, whatever the batch, the chunks or the stream."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DacConfig, DacModel

from anyglot_tokenizers import CheckpointError, CodesError, FingerprintError, LicenseWarning, MediaError, load
from anyglot_tokenizers.chunks import decode_chunked, encode_chunked
from anyglot_tokenizers.convs import decoder_context, encoder_context
from anyglot_tokenizers.dac import Dac

pytestmark = pytest.mark.filterwarnings("ignore::anyglot_tokenizers.errors.LicenseWarning")
HOP = 30


def published() -> DacModel:
    """A small random model; one stride is odd, as at 16 and 24 kHz."""
    torch.manual_seed(0)
    config = DacConfig(
        encoder_hidden_size=4, decoder_hidden_size=16, downsampling_ratios=[2, 5, 3], n_codebooks=4, codebook_size=32,
        codebook_dim=4, sampling_rate=900,
    )  # fmt: skip
    model = DacModel(config).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith("alpha"):
                weights.uniform_(0.3, 2)
            elif name.endswith("bias"):
                weights.normal_(std=0.05)
            elif name.endswith("codebook.weight"):
                weights.normal_()
            else:
                gain = 0.6 if name.startswith("decoder") else 0.9
                torch.nn.init.kaiming_normal_(weights, nonlinearity="linear").mul_(gain)
    return model


REFERENCE = published()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dac")
    REFERENCE.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dac(folder) -> Dac:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LicenseWarning)
        return load(folder)


def sound(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def test_codes_and_audio_are_those_of_transformers(dac):
    media = sound(2, 1, 40 * HOP)
    with torch.no_grad():
        for k in (1, 3, None):
            codes = REFERENCE.encode(media, k).audio_codes
            assert torch.equal(dac.encode(media, num_quantizers=k).codes, codes)
            audio = REFERENCE.decode(audio_codes=codes).audio_values
            ours = dac.decode(codes)
            assert ours.shape == (2, 1, 40 * HOP) and 0 < 40 * HOP - audio.shape[1] < HOP
            torch.testing.assert_close(ours[:, 0, : audio.shape[1]], audio, atol=1e-6, rtol=0)
            assert audio.std() > 0.01 and not ours[:, 0, audio.shape[1] :].any()
    assert min(len(column.unique()) for column in codes.unbind(1)) > 4  # the comparison is not of constants


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_weight_norms_are_folded(dac, tmp_path, spelling):
    model = published()
    model.apply_weight_norm()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any("parametrizations" in name for name in tensors)
    if spelling == "old":
        old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        for new, name in old.items():
            tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / "model.safetensors")
    folded = load(tmp_path)
    for name, weights in dac.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], weights, atol=1e-6, rtol=1e-5)
    media = sound(1, 1, 20 * HOP)
    assert torch.equal(folded.encode(media).codes, dac.encode(media).codes)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 30 * HOP), min_size=1, max_size=4), st.integers(1, 4))
def test_alone_equals_in_a_padded_batch(dac, lengths, k):
    media, lengths = sound(len(lengths), 1, max(lengths) + 7), torch.tensor(lengths)
    codes = dac.encode(media, lengths, num_quantizers=k)
    audio = dac.decode(codes)
    assert codes.lengths.tolist() == [-(-length // HOP) for length in lengths.tolist()]
    for row, length in enumerate(lengths.tolist()):
        alone = dac.encode(media[row : row + 1, :, :length], num_quantizers=k)
        assert torch.equal(codes.item(row), alone.codes[0])
        end = int(codes.lengths[row]) * HOP
        torch.testing.assert_close(audio[row, :, :end], dac.decode(alone)[0], atol=1e-6, rtol=0)
        assert not audio[row, :, end:].any()


def test_chunked_and_streamed_equal_whole(dac):
    media, lengths = sound(2, 1, 150 * HOP - 11), torch.tensor([150 * HOP - 11, 97 * HOP])
    whole, audio = dac.encode(media, lengths), dac.decode(dac.encode(media, lengths))
    for chunk_codes in (9, 70):
        assert torch.equal(encode_chunked(dac, media, lengths, chunk_codes=chunk_codes).codes, whole.codes)
        torch.testing.assert_close(decode_chunked(dac, whole, chunk_codes=chunk_codes), audio, atol=1e-6, rtol=0)
    stream = dac.stream(2)
    parts = [stream.encode(part).codes for part in media.split([HOP - 1, 20 * HOP, 60 * HOP, 69 * HOP - 10], 2)]
    assert torch.equal(torch.cat([*parts, stream.flush().codes], 2), dac.encode(media).codes)
    stream = dac.stream(2)
    parts = [stream.decode(part) for part in whole.codes.split(31, 2)]
    torch.testing.assert_close(torch.cat([*parts, stream.flush()], 2), dac.decode(whole.codes), atol=1e-6, rtol=0)


def test_long_items_go_through_in_chunks(dac, monkeypatch):
    media = sound(1, 1, 300 * HOP)
    whole, seen = dac.encode(media), []
    audio = dac.decode(whole)
    monkeypatch.setattr(dac, "max_samples", 130 * HOP)
    dac.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1] // HOP))
    dac.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    assert torch.equal(dac.encode(media).codes, whole.codes)
    torch.testing.assert_close(dac.decode(whole), audio, atol=1e-6, rtol=0)
    assert max(seen) <= 130 and len(seen) > 4


def test_context_is_enough_and_not_too_much(dac):
    left, right = encoder_context(dac.encoder.modules(), HOP)
    middle, media = 30, sound(1, 60 * HOP, 1)
    reached = dac.encoder(media)[0, middle]
    for inside, outside in ((-left, -left - 1), (right, right + 1)):
        for hop, same in ((inside, False), (outside, True)):
            other = media.clone()
            other[:, (middle + hop) * HOP : (middle + hop + 1) * HOP] += 1
            assert torch.equal(dac.encoder(other)[0, middle], reached) is same

    left, right = decoder_context(dac.decoder.modules(), HOP)
    latents = sound(1, 60, dac.config["model"]["hidden_size"])
    reached = dac.decoder(latents)[0, middle * HOP : (middle + 1) * HOP]
    for inside, outside in ((-left, -left - 1), (right, right + 1)):
        for code, same in ((inside, False), (outside, True)):
            other = latents.clone()
            other[:, middle + code] += 1
            assert torch.equal(dac.decoder(other)[0, middle * HOP : (middle + 1) * HOP], reached) is same


def test_spec_of_the_published_24khz_model():
    with torch.device("meta"):
        dac = Dac(model={"sampling_rate": 24000, "downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 32})
    entries = dac._spec_entries()
    assert entries["strides"] == (320,) and entries["codebook_sizes"] == (1024,) * 32
    assert entries["context"] == (10, 10)
    assert dac.encoder.conv2.weight.shape == (1024, 1024, 3)


def test_own_folder_form(dac, tmp_path):
    fingerprint = dac.save_pretrained(tmp_path)
    again, media = load(tmp_path), sound(1, 1, 9 * HOP)
    assert isinstance(again, Dac) and again.fingerprint == fingerprint == dac.fingerprint
    assert torch.equal(again.encode(media).codes, dac.encode(media).codes)


def test_licence_of_the_model_card(folder, tmp_path):
    with pytest.warns(LicenseWarning):
        load(folder)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path).spec.license == "mit"


def test_bad_input(dac):
    good = sound(1, 1, 2 * HOP)
    for bad in (good[0], good.expand(1, 2, -1), good.long(), good[:, :, :0], good * torch.nan):
        with pytest.raises(MediaError):
            dac.encode(bad)
    for lengths in ([0], [2 * HOP + 1], [1, 1]):
        with pytest.raises(MediaError):
            dac.encode(good, torch.tensor(lengths))
    for k in (0, 5):
        with pytest.raises(CodesError):
            dac.encode(good, num_quantizers=k)
    codes = dac.encode(good)
    for bad in (codes.codes[0], codes.codes[:, :, :0], codes.codes.float(), codes.codes - 32, codes.codes + 32):
        with pytest.raises(CodesError):
            dac.decode(bad)
    with pytest.raises(CodesError):
        dac.decode(codes.codes.repeat(1, 2, 1))
    other = Dac(model=dac.config["model"])
    with pytest.raises(FingerprintError):
        other.decode(codes)


def test_folders_that_do_not_fit(folder, tmp_path):
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    def refused(config, tensors, match):
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=match):
            load(tmp_path)

    for entry, value in (
        ("n_codebooks", 10**9), ("n_codebooks", 0), ("downsampling_ratios", []), ("upsampling_ratios", [2, 5, 4]),
        ("downsampling_ratios", "no"), ("encoder_hidden_size", 4.0), ("encoder_hidden_size", 2**16),
    ):  # fmt: skip
        refused({**config, entry: value}, tensors, "config.json")
    refused(config, {**tensors, "encoder.conv1.bias": tensors["encoder.conv1.bias"][:2].clone()}, "encoder.conv1.bias")
    refused(config, {name: tensors[name] for name in tensors if "conv2" not in name}, "conv2")
    refused(config, {**tensors, "stranger": torch.zeros(1)}, "stranger")
    refused(config, {**tensors, "encoder.conv1.bias": tensors["encoder.conv1.bias"] * torch.nan}, "NaN")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="anyglot tokenizer convert"):
        load(tmp_path)


@pytest.mark.slow
def test_compiled_halves_give_the_same():
    model = {"encoder_hidden_size": 4, "decoder_hidden_size": 8, "downsampling_ratios": [3], "n_codebooks": 2}
    compiled, plain, media = Dac(model=model), Dac(model=model), sound(1, 1, 300)
    compiled.encoder.compile(dynamic=True)
    compiled.decoder.compile(dynamic=True)
    for samples in (300, 99):
        codes = compiled.encode(media[:, :, :samples])
        assert torch.equal(codes.codes, plain.encode(media[:, :, :samples]).codes)
        torch.testing.assert_close(compiled.decode(codes.codes), plain.decode(codes.codes), atol=1e-6, rtol=0)
