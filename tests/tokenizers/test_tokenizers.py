"""ImageVQ and AudioCodec: shapes, padding invariance, alignment, chunking, folder form and fingerprints."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from anyglot_tokenizers import (
    AudioCodec,
    CheckpointError,
    Codes,
    CodesError,
    ImageVQ,
    MediaError,
    load,
)
from anyglot_tokenizers.tokenizer import _Ieee, seeded

SMALL_IMAGE = {"channels": (8, 16, 16), "codebook_size": 32, "codebook_dim": 8}
SMALL_AUDIO = {"n_fft": 64, "hop": 16, "num_mels": 12, "dim": 16, "encoder_depth": 2, "decoder_depth": 2}
SMALL_AUDIO |= {"num_quantizers": 3, "codebook_size": 32, "codebook_dim": 8}


def image_tokenizer(**options):
    return ImageVQ(**{**SMALL_IMAGE, **options}).eval()


def codec(**options):
    return AudioCodec(**{**SMALL_AUDIO, **options}).eval()


CODEC = codec()


def sound(samples, seed=0):
    return torch.randn(1, 1, samples, generator=torch.Generator().manual_seed(seed)) * 0.3


def test_default_sizes():
    for tokenizer in (ImageVQ(), AudioCodec()):
        count = sum(parameter.numel() for parameter in tokenizer.parameters())
        assert 1.5e6 < count < 4e6
    assert AudioCodec().spec.frame_rate == 25.0


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (32, 80)])
def test_image_shapes(size):
    tokenizer = image_tokenizer()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.encode(images)
    assert codes.codes.shape == (2, 2, *tokenizer.spec.grid(*size)) and codes.lengths is None
    assert codes.spec == tokenizer.spec
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    assert torch.equal(tokenizer.decode(codes.codes), decoded)
    first = tokenizer.encode(images, num_quantizers=1)
    assert torch.equal(first.codes, codes.codes[:, :1]) and tokenizer.decode(first).shape == images.shape
    assert torch.equal(tokenizer.encode(images[1:]).codes, codes.codes[1:])


def test_codes_ignore_mode_and_autocast():
    tokenizer, images = image_tokenizer(), torch.rand(2, 3, 32, 32)
    codes = tokenizer.encode(images).codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.train().encode(images).codes, codes)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=2, max_size=4), st.integers(0, 99))
def test_padding_never_changes_codes(lengths, seed):
    sounds = [sound(length, seed + index) for index, length in enumerate(lengths)]
    batch = torch.full((len(lengths), 1, max(lengths)), 9.0)  # garbage in the padding
    for row, item in enumerate(sounds):
        batch[row, :, : item.shape[2]] = item[0]
    together = CODEC.encode(batch, torch.tensor(lengths))
    decoded = CODEC.decode(together)
    for row, item in enumerate(sounds):
        alone = CODEC.encode(item)
        assert torch.equal(alone.codes[0], together.item(row))
        assert alone.codes.shape[2] == CODEC.spec.num_codes(item.shape[2])
        end = alone.codes.shape[2] * CODEC.hop_length
        assert torch.allclose(CODEC.decode(alone)[0, 0], decoded[row, 0, :end], atol=1e-5)
        assert (decoded[row, 0, end:] == 0).all()


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 640])
def test_audio_lengths(samples):
    codes = CODEC.encode(sound(samples))
    count = -(-samples // 32)
    assert codes.codes.shape == (1, 3, count) and codes.lengths.tolist() == [count]
    assert CODEC.decode(codes.codes).shape == (1, 1, count * 32)
    assert CODEC.decode(codes.codes[:, :1]).shape == (1, 1, count * 32)
    assert torch.equal(CODEC.decode(codes), CODEC.decode(codes.codes))


def test_forward_masks_like_encode():
    reconstruction = CODEC(sound(100), torch.tensor([40]))
    assert reconstruction.media.shape == (1, 1, 128)
    assert (reconstruction.media[0, 0, 64:] == 0).all() and (reconstruction.media[0, 0, :64] != 0).any()
    assert torch.equal(reconstruction.codes[:, :, :2], CODEC.encode(sound(100)[..., :40]).codes)


def test_analysis_and_synthesis_are_aligned():
    """Spectra of the analysis frames, put through the synthesis, give the same samples back."""
    x = sound(640)[0]
    margin = (CODEC.n_fft - CODEC.hop) // 2
    frames = torch.nn.functional.pad(x, (margin, margin)).unfold(1, CODEC.n_fft, CODEC.hop) * CODEC.window
    spectrum = torch.fft.rfft(frames)
    assert spectrum.shape[1] * CODEC.hop == x.shape[1]
    head = torch.cat([spectrum.abs().clamp(min=1e-9).log(), spectrum.angle()], dim=-1)
    again = CODEC._synthesise(head, torch.ones(1, spectrum.shape[1], 1, dtype=torch.bool))
    assert torch.allclose(again, x, atol=1e-4)


def test_context_suffices_for_chunks():
    left, right = CODEC.spec.context
    hop, count = CODEC.hop_length, 64
    x = sound(count * hop)
    codes = CODEC.encode(x).codes
    audio = CODEC.decode(codes)
    for start in range(0, count, 16):
        low, high = max(0, start - left), min(count, start + 16 + right)
        part = CODEC.encode(x[..., low * hop : high * hop]).codes
        assert torch.equal(part[..., start - low : start - low + 16], codes[..., start : start + 16])
        piece = CODEC.decode(codes[..., low:high])[..., (start - low) * hop : (start - low + 16) * hop]
        assert torch.allclose(piece, audio[..., start * hop : (start + 16) * hop], atol=1e-5)


def test_media_errors():
    tokenizer = image_tokenizer()
    for bad in (
        torch.rand(3, 32, 32),
        torch.rand(1, 3, 30, 32),
        torch.rand(1, 3, 32, 32) * 255,
        torch.full((1, 3, 16, 16), torch.nan),
    ):
        with pytest.raises(MediaError):
            tokenizer.encode(bad)
    with pytest.raises(MediaError):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(MediaError):
        tokenizer.encode(torch.rand(1, 3, 32, 32), torch.tensor([1]))
    for bad in (
        torch.zeros(1, 100),
        torch.zeros(1, 2, 100),
        torch.zeros(1, 1, 0),
        torch.full((1, 1, 9), torch.inf),
    ):
        with pytest.raises(MediaError):
            CODEC.encode(bad)
    for lengths in ([0], [101], [1, 2]):
        with pytest.raises(MediaError, match="lengths"):
            CODEC.encode(sound(100), torch.tensor(lengths))
    for codes in (
        torch.full((1, 1, 2), 32),
        torch.zeros(1, 4, 2).long(),
        torch.zeros(1, 2).long(),
        torch.zeros(1, 1, 0).long(),
    ):
        with pytest.raises(CodesError):
            CODEC.decode(codes)


@pytest.mark.parametrize("build", [image_tokenizer, codec])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_folder_round_trip(build, dtype, tmp_path):
    tokenizer = build()
    written = tokenizer.save_pretrained(tmp_path / "a", dtype=dtype)
    again = load(tmp_path / "a")
    assert type(again) is type(tokenizer) and again.config == tokenizer.config and not again.training
    assert all(parameter.dtype == torch.float32 for parameter in again.parameters())
    assert again.fingerprint == written == json.loads((tmp_path / "a/config.json").read_text())["fingerprint"]
    assert (written == tokenizer.fingerprint) == (dtype is None)
    assert again.save_pretrained(tmp_path / "b", dtype=dtype) == written
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    if dtype is None:
        media = torch.rand(1, 3, 32, 32) if build is image_tokenizer else sound(300)
        assert torch.equal(again.encode(media).codes, tokenizer.encode(media).codes)


def test_trained_averages_survive_the_folder(tmp_path):
    tokenizer = codec(stage_steps=0).train()
    tokenizer(sound(3000))
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    for one, other in zip(tokenizer.quantizer.layers, again.quantizer.layers, strict=True):
        assert other._codebook.initted
        assert torch.allclose(one._codebook.embed_avg, other._codebook.embed_avg, atol=1e-4)


def test_fingerprint_follows_weights():
    tokenizer = codec()
    first = tokenizer.fingerprint
    assert first == codec().fingerprint != codec(seed=1).fingerprint
    with torch.no_grad():
        tokenizer.head.bias += 1
    assert tokenizer.fingerprint != first


def test_building_leaves_the_random_state():
    before = torch.get_rng_state()
    codec(seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_folders(tmp_path):
    CODEC.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good_weights, good_config = weights.read_bytes(), config.read_text()

    def refused(match):
        with pytest.raises(CheckpointError, match=match) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
        weights.write_bytes(good_weights)
        config.write_text(good_config)

    tensors = load_file(weights)
    tensors["head.bias"][0] += 1
    save_file(tensors, weights)
    refused("changed after saving")
    weights.write_bytes(good_weights[:-100])
    refused("not a readable safetensors")
    save_file({"other": torch.zeros(1)}, weights)
    refused("missing")
    weights.unlink()
    refused("no such file")
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    refused("pickled")
    config.write_text(good_config.replace('"dim": 16', '"dim": 24'))
    refused("shape")
    config.write_text(good_config.replace('"dim": 16', '"dimension": 16'))
    refused("does not build")
    config.write_text(good_config.replace("AudioCodec", "Unheard"))
    refused("unknown tokenizer class")
    config.write_text("{}")
    refused("format")
    config.write_text("{")
    refused("not a readable")
    with pytest.raises(CheckpointError, match="AudioCodec"):
        ImageVQ.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nothing")


def test_nan_weights_are_not_saved(tmp_path):
    tokenizer = codec()
    with torch.no_grad():
        tokenizer.head.bias[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        tokenizer.save_pretrained(tmp_path)


def test_codes_file_names_its_tokenizer(tmp_path):
    codes = CODEC.encode(sound(100))
    codes.save(tmp_path / "c.safetensors")
    again = Codes.load(tmp_path / "c.safetensors")
    assert again.spec.fingerprint == CODEC.fingerprint
    assert torch.equal(CODEC.decode(again), CODEC.decode(codes))


def test_import_is_light():
    code = "import sys, anyglot_tokenizers; print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_name_of_the_package_is_what_it_says():
    code = "import anyglot_tokenizers as a, types\nfrom anyglot_tokenizers import *\n"
    code += "print([name for name in a.__all__ if isinstance(eval(name), types.ModuleType)])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_tf32_comes_back_with_the_last_to_leave(monkeypatch):
    class Part:
        fp32_precision = "tf32"

    part = Part()
    monkeypatch.setattr(_Ieee, "parts", property(lambda self: [part]))
    ieee = _Ieee()
    ieee.__enter__()
    ieee.__enter__()  # another thread
    ieee.__exit__()
    assert part.fp32_precision == "ieee"  # the first one left, the other still computes
    ieee.__exit__()
    assert part.fp32_precision == "tf32"
    with ieee:
        assert part.fp32_precision == "ieee"
    assert part.fp32_precision == "tf32"


def test_a_class_of_the_same_name_is_another(tmp_path):
    CODEC.save_pretrained(tmp_path / "ours")
    theirs = type("AudioCodec", (AudioCodec,), {"__module__": "somebody"})
    kept = theirs(**CODEC.config).eval()
    kept.load_state_dict(CODEC.state_dict())
    kept.save_pretrained(tmp_path / "theirs")
    assert type(load(tmp_path / "ours")) is AudioCodec and type(load(tmp_path / "theirs")) is theirs
    config = tmp_path / "theirs" / "config.json"
    config.write_text(config.read_text().replace('"somebody"', '"__main__"'))  # saved where it had another home
    assert type(load(tmp_path / "theirs")) is theirs


def test_weights_are_loaded_and_used_within_inference_mode(tmp_path):
    CODEC.save_pretrained(tmp_path)
    with torch.inference_mode():
        inside = load(tmp_path)
        codes = inside.encode(sound(4000)).codes
    assert torch.equal(codes, CODEC.encode(sound(4000)).codes) and inside.fingerprint == CODEC.fingerprint


def test_eval_forgets_what_was_kept_of_weights():
    tokenizer = codec()
    before, codes = tokenizer.fingerprint, tokenizer.encode(sound(4000)).codes
    for parameter in tokenizer.parameters():
        parameter.data.mul_(1.5).add_(0.01)
    tokenizer.eval()
    fresh = codec()
    fresh.load_state_dict(tokenizer.state_dict())
    assert tokenizer.fingerprint == fresh.fingerprint != before
    after = tokenizer.encode(sound(4000)).codes
    assert torch.equal(after, fresh.encode(sound(4000)).codes) and not torch.equal(after, codes)


def test_seeded_leaves_the_random_state_as_it_was(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    before = torch.random.get_rng_state()
    with seeded(7):
        drawn = torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before) and seeds == []
    with torch.random.fork_rng():
        torch.manual_seed(7)
        assert torch.equal(drawn, torch.rand(3))
