"""Snac: the published layout, equality with the publisher's package, columns, padding, chunks, noise, bad input."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anyglot_tokenizers import CheckpointError, Codes, CodesError, MediaError, UnsupportedError, load
from anyglot_tokenizers.chunks import decode_chunked, encode_chunked
from anyglot_tokenizers.snac import Snac

SMALL = {
    "sampling_rate": 24000, "encoder_dim": 8, "encoder_rates": [2, 3], "decoder_dim": 16, "decoder_rates": [3, 2],
    "attn_window_size": None, "codebook_size": 32, "codebook_dim": 4, "vq_strides": [4, 2, 1],
    "noise": True, "depthwise": True,
}  # fmt: skip
ATTENTION = {**SMALL, "sampling_rate": 32000, "encoder_dim": 16, "decoder_dim": 64, "attn_window_size": 8}
ODD = {**SMALL, "encoder_rates": [3, 5], "decoder_rates": [5, 3], "vq_strides": [2, 1], "depthwise": False}
PUBLISHED_24K = {
    **SMALL, "encoder_dim": 48, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 1024, "decoder_rates": [8, 8, 4, 2],
    "codebook_size": 4096, "codebook_dim": 8,
}  # fmt: skip
PUBLISHED_32K = {
    **PUBLISHED_24K, "sampling_rate": 32000, "encoder_dim": 64, "encoder_rates": [2, 3, 8, 8], "decoder_dim": 1536,
    "decoder_rates": [8, 8, 3, 2], "attn_window_size": 32, "vq_strides": [8, 4, 2, 1],
}  # fmt: skip


def sound(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def enliven(module):
    """Random weights with small biases, so that codes differ from one another and every tensor matters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        parameter.data *= 0 if name.endswith("bias") else 1
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def codec(model):
    return enliven(Snac(model=model, license="mit"))


def published(tokenizer):
    """Its tensors as the publisher's package writes them: weight norm on every convolution."""
    tensors = {}
    for name, tensor in tokenizer.state_dict().items():
        stem = name.removesuffix("weight")
        convolution = name.endswith("weight") and tensor.ndim == 3
        if convolution:
            tensors[f"{stem}parametrizations.weight.original0"] = torch.norm_except_dim(tensor, 2, 0)
            tensors[f"{stem}parametrizations.weight.original1"] = 2 * tensor.contiguous()
        else:
            tensors[name] = tensor
        if name.endswith("to_out.weight"):
            tensors[name.replace("to_out.weight", "rel_pos.inv_freq")] = torch.zeros(32)
    return tensors


@pytest.fixture(scope="module", params=[SMALL, ATTENTION, ODD], ids=["small", "attention", "odd"])
def tokenizer(request):
    return codec(request.param)


SNAC, ATTENTIVE = codec(SMALL), codec(ATTENTION)
HOP = SNAC.hop_length


@pytest.mark.parametrize(
    ("model", "count", "digest", "million"),
    [(PUBLISHED_24K, 269, "3517877cb07e0bbe", 19.8), (PUBLISHED_32K, 286, "fa01b91197f7e633", 54.5)],
)
def test_published_layout(model, count, digest, million):
    """Names and shapes are those of the publisher's package, and as many numbers as the model cards say."""
    tensors = published(Snac(model=model))
    layout = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
    assert len(tensors) == count and hashlib.sha256(layout.encode()).hexdigest()[:16] == digest
    numbers = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("inv_freq"))
    assert int(numbers / 1e5) / 10 == million


def test_spec():
    spec = Snac(model=SMALL, license="mit").spec
    assert spec.num_quantizers == 7 and spec.codebook_size == 32 and spec.hop_length == 24
    assert spec.modality == "speech" and spec.license == "mit" and not spec.causal and spec.context is not None
    assert (
        ATTENTIVE.spec.context is not None and ATTENTIVE.spec.chunk_multiple == 2 and ATTENTIVE.spec.modality == "music"
    )
    entries = Snac(model=PUBLISHED_24K)._spec_entries()
    assert entries["strides"] == (2048,) and entries["context"] == (3, 3)
    assert round(24000 / 2048 * 7 * 12) == 984  # bit/s, 0.98 kbps on the model card


@pytest.mark.parametrize("model", [SMALL, ATTENTION, ODD], ids=["small", "attention", "odd"])
def test_equals_the_publishers_package(model, tmp_path):
    snac = pytest.importorskip("snac", reason="pip install --no-deps snac")
    reference = enliven(snac.SNAC(**model).eval())
    for module in reference.decoder.modules():
        if type(module).__name__ == "NoiseBlock":
            module.forward = lambda x: x  # it draws anew at every call
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    ours = Snac.from_published(tmp_path, model, license="mit")
    media = sound(2, 1, ours.hop_length * 21 + 5)
    with torch.no_grad():
        theirs = reference.encode(media)
        columns = [
            part.unflatten(1, (-1, n)).transpose(1, 2) for part, n in zip(theirs, ours.quantizer.columns, strict=True)
        ]
        packed = torch.cat(columns, 1)
        codes = ours.encode(media)
        assert torch.equal(codes.codes, packed[:, :, : codes.codes.shape[2]])
        assert codes.codes.shape[2] == ours.spec.num_codes(media.shape[2])
        assert len(codes.codes.unique()) > 10  # not all the same, which would prove nothing
        torch.testing.assert_close(ours.decode(packed), reference.decode(theirs), atol=1e-5, rtol=0)


def test_folders(tokenizer, tmp_path):
    save_file(published(tokenizer), tmp_path / "model.safetensors")
    read = Snac.from_published(tmp_path, tokenizer.config["model"], license="mit")
    for name, tensor in tokenizer.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    fingerprint = tokenizer.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert isinstance(again, Snac) and again.fingerprint == fingerprint == tokenizer.fingerprint
    media = sound(1, 1, 300)
    assert torch.equal(again.encode(media).codes, tokenizer.encode(media).codes)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "norm"])
def test_weights_that_do_not_fit(change, tmp_path):
    tensors = published(SNAC)
    if change == "missing":
        tensors.pop("encoder.block.0.bias")
    elif change == "extra":
        tensors["surprise"] = torch.zeros(1)
    elif change == "shape":
        tensors["quantizer.quantizers.0.codebook.weight"] = torch.zeros(31, 4)
    else:
        tensors["encoder.block.0.parametrizations.weight.original0"] = torch.zeros(3, 1, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        Snac.from_published(tmp_path, SMALL, license="mit")


@pytest.mark.parametrize(
    "wrong",
    [
        {"encoder_dim": 0}, {"encoder_dim": 10**9}, {"encoder_rates": []}, {"encoder_rates": [2] * 9},
        {"encoder_rates": "23"}, {"decoder_rates": [2, 2]}, {"vq_strides": [4, 3, 1]}, {"codebook_size": True},
        {"latent_dim": 5}, {"attn_window_size": 8}, {"decoder_dim": 15}, {"sampling_rate": None},
    ],
)  # fmt: skip
def test_impossible_configs(wrong, tmp_path):
    with pytest.raises(ValueError):
        Snac(model={**SMALL, **wrong})
    save_file(published(SNAC), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        Snac.from_published(tmp_path, {**SMALL, **wrong}, license="mit")


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 30 * HOP), min_size=2, max_size=3), st.booleans())
def test_padding_never_changes_an_item(lengths, attention):
    tokenizer = ATTENTIVE if attention else SNAC
    batch = torch.full((len(lengths), 1, max(lengths)), 9.0)  # garbage in the padding
    for row, length in enumerate(lengths):
        batch[row, :, :length] = sound(1, length, seed=row)
    together = tokenizer.encode(batch, torch.tensor(lengths))
    audio = tokenizer.decode(together)
    for row, length in enumerate(lengths):
        alone = tokenizer.encode(sound(1, 1, length, seed=row))
        assert torch.equal(together.item(row), alone.codes[0]) and alone.codes.shape[2] == -(-length // HOP)
        samples = alone.codes.shape[2] * HOP
        torch.testing.assert_close(audio[row, :, :samples], tokenizer.decode(alone)[0], atol=1e-5, rtol=0)
        assert not audio[row, :, samples:].any()


@settings(max_examples=16, deadline=None)
@given(st.integers(1, 40 * HOP), st.integers(3, 30), st.booleans())
def test_chunked_and_streamed_equal_whole(samples, chunk_codes, attention):
    tokenizer = ATTENTIVE if attention else SNAC
    media = sound(2, 1, samples)
    whole = tokenizer.encode(media)
    assert torch.equal(encode_chunked(tokenizer, media, chunk_codes=chunk_codes).codes, whole.codes)
    audio = tokenizer.decode(whole)
    torch.testing.assert_close(decode_chunked(tokenizer, whole, chunk_codes=chunk_codes), audio, atol=1e-5, rtol=0)
    stream = tokenizer.stream(2)
    parts = [stream.encode(part).codes for part in media.split(chunk_codes * 7, 2)]
    assert torch.equal(torch.cat([*parts, stream.flush().codes], 2), whole.codes)
    stream = tokenizer.stream(2)
    parts = [stream.decode(part) for part in whole.codes.split(chunk_codes, 2)]
    torch.testing.assert_close(torch.cat([*parts, stream.flush()], 2), audio, atol=1e-5, rtol=0)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.booleans())
def test_long_items_are_computed_in_pieces(count, most, attention):
    tokenizer = codec(ATTENTION if attention else SMALL)
    media = sound(1, 1, count * HOP - 3)
    codes = tokenizer.encode(media)
    audio = tokenizer.decode(codes)
    tokenizer.max_samples = most * HOP
    assert torch.equal(tokenizer.encode(media).codes, codes.codes)
    torch.testing.assert_close(tokenizer.decode(codes), audio, atol=1e-5, rtol=0)
    assert len(list(tokenizer._pieces(1000))) > 10


def test_pieces_need_their_context():
    """The equality above is not empty."""

    class Hasty(Snac):
        def _reach(self):
            return 0, 0, super()._reach()[2]

    hasty = Hasty(model=SMALL)
    hasty.load_state_dict(SNAC.state_dict())
    hasty.max_samples = 5 * HOP
    media = sound(1, 1, 90 * HOP)
    assert not torch.equal(hasty.encode(media).codes, SNAC.encode(media).codes)


def test_context_is_needed():
    """Samples as far away as the context says do reach a code: the equality above is not empty."""
    media, changed = sound(1, 1, 40 * HOP), sound(1, 1, 40 * HOP)
    changed[:, :, 20 * HOP : 21 * HOP] = sound(1, 1, HOP, seed=5)
    different = (SNAC.encode(media).codes != SNAC.encode(changed).codes).any(1)[0].nonzero()[:, 0]
    left, right = SNAC.spec.context
    assert len(different) > 1 and different.min() >= 20 - right and different.max() <= 20 + left


def test_columns():
    media = sound(1, 1, 9 * HOP)
    codes = SNAC.encode(media).codes
    assert codes.shape == (1, 7, 9) and codes.dtype == torch.int64
    for count in (1, 3, 7):
        assert torch.equal(SNAC.encode(media, num_quantizers=count).codes, codes[:, :count])
        assert SNAC.decode(codes[:, :count]).shape == (1, 1, 9 * HOP)
    assert not torch.equal(SNAC.decode(codes[:, :3]), SNAC.decode(codes))
    for count in (2, 4, 5, 6, 0, 8):
        with pytest.raises(CodesError):
            SNAC.encode(media, num_quantizers=count)
    for count in (2, 4, 6):
        with pytest.raises(CodesError, match="incomplete"):
            SNAC.decode(codes[:, :count])


def test_columns_are_in_order_of_time():
    """Within a coarse frame, a later column of a codebook speaks of later samples."""
    codes = SNAC.encode(sound(1, 1, 9 * HOP)).codes
    reached = []
    for column in range(3, 7):
        changed = codes.clone()
        changed[0, column, 4] = (changed[0, column, 4] + 1) % 32
        difference = (SNAC.decode(changed) - SNAC.decode(codes)).abs()[0, 0]
        reached.append(float((difference * torch.arange(len(difference))).sum() / difference.sum()))
    assert reached == sorted(reached) and reached[3] - reached[0] > HOP / 2, reached


def test_noise_is_off_or_seeded():
    tokenizer = codec(SMALL)
    codes, fingerprint = tokenizer.encode(sound(2, 1, 20 * HOP)), tokenizer.fingerprint
    quiet = tokenizer.decode(codes)
    assert torch.equal(quiet, tokenizer.decode(codes))
    tokenizer.noise_seed = 3
    noisy = tokenizer.decode(codes)  # codes of the same tokenizer: the noise is not part of its identity
    assert tokenizer.fingerprint == fingerprint and not torch.equal(noisy, quiet)
    assert torch.equal(noisy, tokenizer.decode(codes))
    alone = tokenizer.decode(codes.codes[:1, :, :7])
    reach = SNAC.spec.context[1]
    torch.testing.assert_close(noisy[:1, :, : (7 - reach) * HOP], alone[:, :, : (7 - reach) * HOP], atol=1e-5, rtol=0)
    with pytest.raises(UnsupportedError):
        tokenizer.stream()
    tokenizer.noise_seed = 4
    assert not torch.equal(noisy, tokenizer.decode(codes))


def test_wrong_input():
    for media in (sound(1, 2, 100), sound(1, 100), torch.zeros(1, 1, 0), torch.full((1, 1, 9), torch.nan)):
        with pytest.raises(MediaError):
            SNAC.encode(media)
    with pytest.raises(MediaError):
        SNAC.encode(torch.zeros(1, 1, 9, dtype=torch.int16))
    for lengths in (torch.tensor([0]), torch.tensor([101]), torch.tensor([5, 5]), torch.tensor([5.0])):
        with pytest.raises(MediaError):
            SNAC.encode(sound(1, 1, 100), lengths)
    ids = torch.zeros(1, 7, 3, dtype=torch.int64)
    for wrong in (ids[0], ids[:, :, :0], ids - 1, ids + 32, ids.float()):
        with pytest.raises(CodesError):
            SNAC.decode(wrong)
    assert SNAC.decode(Codes(ids, torch.tensor([0]))).abs().max() == 0
