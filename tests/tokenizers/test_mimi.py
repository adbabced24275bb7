"""Mimi: the codes and the audio of transformers, whatever the batch, the chunks or the stream."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MimiConfig, MimiModel

from anyglot_tokenizers import CheckpointError, CodesError, LicenseWarning, MediaError, UnsupportedError, load
from anyglot_tokenizers.chunks import decode_chunked, encode_chunked
from anyglot_tokenizers.mimi import Mimi

pytestmark = pytest.mark.filterwarnings("ignore::anyglot_tokenizers.errors.LicenseWarning")
HOP = 48
SMALL = {
    "hidden_size": 32, "num_filters": 4, "upsampling_ratios": [4, 3, 2], "codebook_size": 32, "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8, "num_quantizers": 4, "upsample_groups": 32, "num_hidden_layers": 2,
    "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 7,
    "num_residual_layers": 2,
}  # fmt: skip


def published(**changes) -> MimiModel:
    """A small random model with lively codebooks and a window that is much shorter than the clips."""
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("embed_sum"):
                buffer.normal_()
            elif name.endswith("cluster_usage"):
                buffer.uniform_(0.0, 2.0)
        for name, weights in model.named_parameters():
            if name.endswith("layer_scale.scale"):
                weights.uniform_(0.2, 0.6)
            elif "layers" in name and weights.ndim == 3:
                weights.mul_(0.6)
    return model


REFERENCE = published()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mimi")
    REFERENCE.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mimi(folder) -> Mimi:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LicenseWarning)
        return load(folder)


def sound(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def test_codes_and_audio_are_those_of_transformers(mimi):
    media = sound(2, 1, 60 * HOP)
    with torch.no_grad():
        for k in (1, 3, None):
            codes = REFERENCE.encode(media, num_quantizers=k).audio_codes
            assert torch.equal(mimi.encode(media, num_quantizers=k).codes, codes)
            audio = REFERENCE.decode(codes).audio_values
            assert audio.std() > 0.05
            torch.testing.assert_close(mimi.decode(codes), audio, atol=1e-5, rtol=0)
    assert min(len(column.unique()) for column in codes.unbind(1)) > 3  # the comparison is not of constants


def test_a_frame_rate_of_its_own(tmp_path):
    reference, media = published(frame_rate=250), sound(1, 1, 40 * 4 * 24)
    reference.save_pretrained(tmp_path)
    mimi = load(tmp_path)
    assert mimi.spec.frame_rate == 250 and mimi.hop_length == 4 * 24
    with torch.no_grad():
        codes = reference.encode(media).audio_codes
        assert torch.equal(mimi.encode(media).codes, codes)
        torch.testing.assert_close(mimi.decode(codes), reference.decode(codes).audio_values, atol=1e-5, rtol=0)
    again = Mimi(model=mimi.config["model"])
    assert again.hop_length == mimi.hop_length


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 30 * HOP), min_size=1, max_size=4), st.integers(1, 4))
def test_alone_equals_in_a_padded_batch(mimi, lengths, k):
    media, lengths = sound(len(lengths), 1, max(lengths) + 7), torch.tensor(lengths)
    codes = mimi.encode(media, lengths, num_quantizers=k)
    audio = mimi.decode(codes)
    for row, length in enumerate(lengths.tolist()):
        alone = mimi.encode(media[row : row + 1, :, :length], num_quantizers=k)
        assert torch.equal(codes.item(row), alone.codes[0])
        end = int(codes.lengths[row]) * HOP
        torch.testing.assert_close(audio[row, :, :end], mimi.decode(alone)[0], atol=1e-5, rtol=0)
        assert not audio[row, :, end:].any()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 20 * HOP), min_size=1, max_size=8), st.integers(1, 2), st.integers(1, 9))
def test_streamed_equals_whole(mimi, pieces, batch, step):
    pieces = [*pieces, 1]
    media = sound(batch, 1, sum(pieces))
    whole = mimi.encode(media).codes
    stream = mimi.stream(batch)
    parts = [stream.encode(part).codes for part in media.split(pieces, 2)]
    assert sum(part.shape[2] for part in parts) == sum(pieces) // HOP  # no lag
    assert torch.equal(torch.cat([*parts, stream.flush().codes], 2), whole)

    stream = mimi.stream(batch)
    parts = [stream.decode(part) for part in whole.split(step, 2)]
    assert stream.flush().shape[2] == 0
    torch.testing.assert_close(torch.cat(parts, 2), mimi.decode(whole), atol=1e-5, rtol=0)


def test_chunked_equals_whole_and_context_is_needed(mimi):
    context, right = mimi.spec.context
    assert right == 0 and mimi.spec.causal
    media = sound(2, 1, 60 * HOP)
    whole = mimi.encode(media)
    assert torch.equal(encode_chunked(mimi, media, chunk_codes=11).codes, whole.codes)
    torch.testing.assert_close(decode_chunked(mimi, whole, chunk_codes=11), mimi.decode(whole), atol=1e-5, rtol=0)
    short = torch.cat([mimi.encode(media[:, :, at * HOP :]).codes[:, :, 1:2] for at in range(20)], 2)
    assert not torch.equal(short, whole.codes[:, :, 1:21])
    changed = media.clone()
    changed[:, :, : 10 * HOP] += 1
    assert torch.equal(mimi.encode(changed).codes[:, :, 10 + context :], whole.codes[:, :, 10 + context :])


def test_long_items_go_through_in_pieces(mimi, monkeypatch):
    media = sound(2, 1, 60 * HOP)
    whole = mimi.encode(media)
    audio = mimi.decode(whole)
    monkeypatch.setattr(mimi, "max_samples", 18 * HOP)
    assert torch.equal(mimi.encode(media).codes, whole.codes)
    torch.testing.assert_close(mimi.decode(whole), audio, atol=1e-5, rtol=0)


def test_nothing_depends_on_later_input(mimi):
    media = sound(1, 1, 40 * HOP)
    codes = mimi.encode(media).codes
    for end in (1, 17):
        assert torch.equal(mimi.encode(media[:, :, : end * HOP]).codes, codes[:, :, :end])
        torch.testing.assert_close(
            mimi.decode(codes[:, :, :end]), mimi.decode(codes)[:, :, : end * HOP], atol=1e-5, rtol=0
        )


def test_streams_go_one_way_and_check_their_input(mimi):
    stream = mimi.stream(num_quantizers=2)
    assert stream.encode(sound(1, 1, HOP)).codes.shape == (1, 2, 1)
    with pytest.raises(UnsupportedError):
        stream.decode(torch.zeros(1, 2, 1, dtype=torch.int64))
    with pytest.raises(MediaError):
        stream.encode(sound(1, 1, HOP) * torch.nan)
    with pytest.raises(MediaError):
        stream.encode(sound(2, 1, HOP))
    with pytest.raises(CodesError):
        mimi.stream().decode(torch.full((1, 1, 1), 99))


def test_own_folder_form(mimi, tmp_path):
    fingerprint = mimi.save_pretrained(tmp_path)
    again, media = load(tmp_path), sound(1, 1, 9 * HOP)
    assert isinstance(again, Mimi) and again.fingerprint == fingerprint == mimi.fingerprint
    assert torch.equal(again.encode(media).codes, mimi.encode(media).codes)


def test_changed_codebooks_are_noticed(folder):
    mimi, media = load(folder), sound(1, 1, 9 * HOP)
    before = mimi.encode(media)
    for quantizer in mimi.quantizer.children():
        quantizer.embed.copy_(quantizer.embed.flip(1))
    assert torch.equal(mimi.encode(media).codes, SMALL["codebook_size"] - 1 - before.codes)


def test_spec_of_the_published_model():
    with torch.device("meta"):
        entries = Mimi(model={"frame_rate": 12.5, "rope_theta": 10000.0})._spec_entries()
    assert entries["strides"] == (1920,) and entries["codebook_sizes"] == (2048,) * 32
    assert 8 * 249 / 2 < entries["context"][0] < 8 * 249 / 2 + 9


def test_variants_that_were_never_published_are_refused():
    for entry, value in (
        ("use_causal_conv", False), ("pad_mode", "reflect"), ("num_quantizers", 1), ("num_quantizers", 10**9),
        ("frame_rate", 0), ("frame_rate", 1e-9), ("rope_parameters", {"rope_type": "yarn"}),
        ("upsampling_ratios", [9999] * 8), ("codebook_dim", 9), ("num_attention_heads", 3), ("rope_parameters", 5),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            Mimi(model={**SMALL, entry: value})


def test_a_folder_without_codebooks_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if "codebook" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="embed"):
        load(tmp_path)


@pytest.mark.slow
def test_compiled_gives_the_same():
    model = {**SMALL, "upsampling_ratios": [3], "num_hidden_layers": 1, "num_residual_layers": 1}
    compiled, plain, media = Mimi(model=model), Mimi(model=model), sound(1, 1, 300)
    for part in (compiled.encoder, compiled.decoder_transformer, compiled.decoder):
        part.compile(dynamic=True)
    for samples in (300, 99):
        codes = compiled.encode(media[:, :, :samples])
        assert torch.equal(codes.codes, plain.encode(media[:, :, :samples]).codes)
        torch.testing.assert_close(compiled.decode(codes), plain.decode(codes.codes), atol=1e-5, rtol=0)
    stream = compiled.stream()
    parts = [stream.encode(part).codes for part in media.split(50, 2)]
    assert torch.equal(torch.cat([*parts, stream.flush().codes], 2), plain.encode(media).codes)
