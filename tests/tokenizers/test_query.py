"""QueryImageVQ: shapes, prefixes of a causal row, learning, folder form, and errors."""

import numpy as np
import pytest
import torch

from anyglot_tokenizers import Codes, CodesError, MediaError, fit_tokenizer, load
from anyglot_tokenizers.chunks import encode_chunked
from anyglot_tokenizers.errors import FingerprintError, UnsupportedError
from anyglot_tokenizers.losses import psnr
from anyglot_tokenizers.query import QueryImageVQ

SMALL = {"image_size": (16, 24), "patch": 4, "width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1}
SMALL |= {"num_queries": 6, "num_quantizers": 2, "codebook_size": 16, "codebook_dim": 8}


def tokenizer(**options):
    return QueryImageVQ(**{**SMALL, **options}).eval()


def images(count=3, seed=0):
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def blends(count, seed=0):
    """Pictures uint8 `[count, 16, 16, 3]` of four random colours, one in each corner, that blend into each other."""
    colours = np.random.default_rng(seed).uniform(0, 255, (count, 2, 2, 3))
    share = np.linspace(0, 1, 16)
    near = np.stack([1 - share, share])
    return np.einsum("nabc,ay,bx->nyxc", colours, near, near).astype(np.uint8)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["rvq", "fsq", "lfq", "simvq"])
def test_codes(causal, kind):
    ours = tokenizer(causal=causal, quantizer=kind)
    codes = ours.encode(images())
    assert codes.codes.shape == (3, 2, 6) and codes.codes.dtype == torch.int64 and codes.lengths is None
    assert codes.spec == ours.spec and ours.spec.grid(16, 24) == (6,) and ours.spec.axes == ("query",)
    decoded = ours.decode(codes)
    assert decoded.shape == (3, 3, 16, 24) and decoded.min() >= 0 and decoded.max() <= 1
    assert torch.equal(ours.decode(codes.codes), decoded)
    for row in range(3):
        assert torch.equal(ours.encode(images()[row : row + 1]).codes[0], codes.codes[row])
    first = ours.encode(images(), num_quantizers=1)
    assert torch.equal(first.codes, codes.codes[:, :1]) and ours.decode(first).shape == decoded.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours.train().encode(images()).codes, codes.codes)


def test_forward_is_encode_and_decode():
    ours = tokenizer(causal=True)
    output = ours(images())
    assert torch.equal(output.codes, ours.encode(images()).codes)
    assert torch.allclose(output.media.clamp(0, 1), ours.decode(output.codes), atol=1e-6)


def test_queries_see_those_before_them_only():
    """What a later query starts from changes nothing in the earlier ones if, and only if, the order is causal."""
    for causal in (True, False):
        ours = tokenizer(causal=causal)
        before = ours._latents(images())
        with torch.no_grad():
            ours.query_1NC[:, 3] += 1
        after = ours._latents(images())
        assert torch.equal(before[..., :3], after[..., :3]) == causal
        assert (before[..., 3:] != after[..., 3:]).any()


def test_any_first_codes_decode():
    ours = tokenizer(causal=True)
    codes = ours.encode(images()).codes
    lengths = torch.tensor([1, 6, 4])
    together = ours.decode(Codes(codes, lengths))
    for row, length in enumerate(lengths.tolist()):
        alone = ours.decode(codes[row : row + 1, :, :length])
        assert torch.allclose(together[row], alone[0], atol=1e-6)
    assert not torch.allclose(ours.decode(codes[:, :, :3]), ours.decode(codes), atol=1e-3)
    garbage = torch.where(torch.arange(6) < 4, codes, 0)
    cut = torch.tensor([4, 4, 4])
    assert torch.equal(ours.decode(Codes(garbage, cut)), ours.decode(Codes(codes, cut)))


def test_learns(tmp_path):
    """Held-out pictures come out better than the mean picture, the more codes the better; and a folder keeps it all."""
    ours = QueryImageVQ(
        image_size=(16, 16), patch=4, width=32, heads=2, encoder_depth=1, decoder_depth=1, num_queries=8, causal=True,
        codebook_size=64, codebook_dim=8, stage_steps=40,
    )  # fmt: skip
    train, held_out = blends(2000), torch.from_numpy(blends(64, seed=1)).permute(0, 3, 1, 2).float() / 255
    fit_tokenizer(
        ours, train, run_dir=tmp_path / "run", max_steps=150, batch_size=32, lr=1e-2, warmup_steps=20,
        precision="32-true", foreground_weight=0.0,
    )  # fmt: skip
    codes = ours.encode(held_out).codes
    mean = torch.from_numpy(train).float().mean(0).permute(2, 0, 1) / 255
    baseline = psnr(mean.expand_as(held_out), held_out)
    got = [psnr(ours.decode(codes[:, :, :count]), held_out) for count in (1, 4, 8)]
    assert got == sorted(got) and got[-1] > baseline + 4
    assert len(codes.unique()) > 32
    fingerprint = ours.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert type(again) is QueryImageVQ and again.fingerprint == fingerprint and again.config == ours.config
    assert torch.equal(again.encode(held_out).codes, codes)


def test_statistics_are_set_before_the_first_step_only():
    ours = tokenizer()
    ours.fit_statistics(images() / 4)
    assert 0.1 < ours.mean_C11.mean() < 0.15
    ours.train()(images())
    ours.fit_statistics(images())
    assert ours.mean_C11.mean() < 0.15


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (torch.rand(1, 3, 16, 16), "16x16 is not 16x24"),
        (torch.rand(1, 1, 16, 24), "3 channels"),
        (torch.rand(3, 16, 24), "shape"),
        (torch.zeros(0, 3, 16, 24), "empty"),
        (torch.zeros(1, 3, 16, 24, dtype=torch.uint8), "floating"),
        (torch.rand(1, 3, 16, 24) * 255, "scale images"),
        (torch.full((1, 3, 16, 24), torch.nan), "NaN"),
    ],
)
def test_bad_images(bad, match):
    with pytest.raises(MediaError, match=match):
        tokenizer().encode(bad)


def test_bad_codes():
    ours, causal = tokenizer(), tokenizer(causal=True)
    codes = torch.zeros(2, 2, 6, dtype=torch.int64)
    for bad in (codes[:, :, :5], codes[..., None], codes[0], codes.repeat(1, 1, 2), codes.repeat(1, 2, 1), codes + 16):
        with pytest.raises(CodesError):
            ours.decode(bad)
    with pytest.raises(CodesError, match="no meaning"):
        ours.decode(Codes(codes, torch.tensor([6, 5])))
    for bad in (codes[:, :, :0], codes.repeat(1, 1, 2)):
        with pytest.raises(CodesError):
            causal.decode(bad)
    with pytest.raises(CodesError, match=r"1\.\.6"):
        causal.decode(Codes(codes, torch.tensor([6, 0])))
    with pytest.raises(FingerprintError):
        ours.decode(causal.encode(images()))
    with pytest.raises(MediaError, match="no lengths"):
        ours.encode(images(1), torch.tensor([1]))
    with pytest.raises(UnsupportedError):
        encode_chunked(ours, images())
    with pytest.raises(UnsupportedError):
        ours.stream()


@pytest.mark.parametrize(
    "options",
    [{"patch": 5}, {"image_size": (16,)}, {"heads": 3}, {"num_queries": 0}, {"tail_dropout": 2.0}, {"quantizer": "vq"}],
)
def test_bad_settings(options):
    with pytest.raises(ValueError):
        tokenizer(**options)
