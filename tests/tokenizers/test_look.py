"""`LookVQ`: names of new pictures from a few known ones, its features, and its folder form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from anyglot_tokenizers import load
from anyglot_tokenizers.errors import MediaError, UnsupportedError
from anyglot_tokenizers.look import LookVQ, look


def _pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Disks and bars in four colors, anywhere, on white, and which of the eight each is."""
    generator = torch.Generator().manual_seed(seed)
    color_4C = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [0.1, 0.2, 0.9], [0.9, 0.8, 0.1]])
    kind_n = torch.arange(count) % 8
    x_nCHW = torch.ones(count, 3, 64, 64)
    y_HW, x_HW = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    for x_CHW, kind in zip(x_nCHW, kind_n.tolist(), strict=True):
        y, x = torch.randint(24, 40, (2,), generator=generator).tolist()
        disk_HW = (y_HW - y) ** 2 + (x_HW - x) ** 2 < 16**2
        bar_HW = ((y_HW - y).abs() < 5) & ((x_HW - x).abs() < 24)
        x_CHW[:, disk_HW if kind < 4 else bar_HW] = color_4C[kind % 4][:, None]
    return (x_nCHW + 0.05 * torch.randn(x_nCHW.shape, generator=generator)).clamp(0, 1), kind_n


def _fitted() -> LookVQ:
    x_nCHW, kind_n = _pictures(80, 0)
    tokenizer = LookVQ(num_quantizers=2)
    tokenizer.fit(x_nCHW, kind_n, torch.eye(8))
    return tokenizer


def test_new_pictures_are_known_by_shape_and_color() -> None:
    tokenizer = _fitted()
    x_nCHW, kind_n = _pictures(40, 1)
    assert tokenizer.latents(x_nCHW).flatten(1).argmax(1).tolist() == kind_n.tolist()
    codes = tokenizer.encode(x_nCHW)
    assert codes.codes.shape == (40, 2, 1, 1) and codes.codes[:, 0].flatten().tolist() == kind_n.tolist()
    assert tuple(tokenizer.spec.codebook_sizes) == (8, 8) and codes.spec == tokenizer.spec
    assert torch.equal(tokenizer.encode(x_nCHW, num_quantizers=1).codes, codes.codes[:, :1])


def test_second_codes_are_what_a_picture_is_like_as_well() -> None:
    tokenizer = _fitted()
    first_n, second_n = tokenizer.encode(_pictures(40, 1)[0]).codes.flatten(1).T
    assert bool((first_n != second_n).all())
    alike_n = (first_n % 4 == second_n % 4) | (first_n // 4 == second_n // 4)  # in color or in shape
    assert float(alike_n.float().mean()) > 0.9


def test_names_without_a_picture_are_never_given() -> None:
    x_nCHW, kind_n = _pictures(80, 0)
    tokenizer = LookVQ(num_quantizers=3)
    tokenizer.fit(x_nCHW[kind_n != 5], kind_n[kind_n != 5], torch.eye(8))
    given = tokenizer.encode(x_nCHW).codes
    assert set(given.flatten().tolist()) == {0, 1, 2, 3, 4, 6, 7}
    with pytest.raises(ValueError, match="2 names with a picture; needs 3"):
        tokenizer.fit(x_nCHW[kind_n < 2], kind_n[kind_n < 2], torch.eye(8))


def test_every_64_pixels_are_a_place() -> None:
    tokenizer = _fitted()
    x_BCHW = _pictures(6, 2)[0]
    wide_BCHW = torch.cat([torch.cat(list(row), 2)[None] for row in x_BCHW.split(3)], 2)  # two rows of three
    codes = tokenizer.encode(wide_BCHW).codes
    assert tokenizer.spec.downsample_factor == 64 and codes.shape == (1, 2, 2, 3)
    assert torch.equal(codes[0].flatten(1).T, tokenizer.encode(x_BCHW).codes.flatten(1))
    with pytest.raises(MediaError, match="not divisible by 64"):
        tokenizer.encode(torch.rand(1, 3, 80, 64))


def test_features_are_four_histograms() -> None:
    x_BCHW = torch.zeros(1, 3, 64, 64)
    x_BCHW[:, 0, :, 32:] = 1.0  # black, then red: one upright edge
    edges4, edges8, color1, color3 = look(x_BCHW)[0].split([9 * 16, 9 * 64, 64, 9 * 64])
    for part in (edges4, edges8, color1, color3):
        torch.testing.assert_close(part.norm(), torch.tensor(1.0))
    assert float(edges4.view(9, 16)[1:].abs().max()) == 0  # all of one direction
    assert edges8.view(9, 8, 8)[0].any(0).nonzero().flatten().tolist() == [3, 4]
    torch.testing.assert_close(color1[[0, 48]], torch.full((2,), 0.5**0.5))
    left_K, right_K = color3.view(3, 3, 64)[:, [0, 2]].sum(0)
    assert left_K.nonzero().flatten().tolist() == [0] and right_K.nonzero().flatten().tolist() == [48]
    assert torch.equal(look(x_BCHW.expand(3, -1, -1, -1))[2:], look(x_BCHW))


def test_the_folder_form_keeps_examples_and_codes(tmp_path: Path) -> None:
    tokenizer = _fitted()
    before = tokenizer.fingerprint
    x_BCHW = _pictures(6, 3)[0]
    tokenizer.save_pretrained(tmp_path / "look")
    again = load(tmp_path / "look")
    assert again.fingerprint == before and again.config["examples"] == 80
    assert torch.equal(again.encode(x_BCHW).codes, tokenizer.encode(x_BCHW).codes)
    with pytest.raises(UnsupportedError, match="only read"):
        again.decode(again.encode(x_BCHW))
    tokenizer.fit(x_BCHW, torch.arange(6), torch.eye(6))
    assert tokenizer.fingerprint != before and tokenizer.config["examples"] == 6


def test_what_cannot_be_learnt_is_refused() -> None:
    tokenizer = LookVQ(num_quantizers=1)
    for shape, count in (((2, 3, 32, 32), 2), ((2, 3, 64, 64), 3)):
        with pytest.raises(ValueError, match=r"needs \[n, 3, 64, 64\] and \[n\]"):
            tokenizer.fit(torch.zeros(shape), torch.zeros(count, dtype=torch.long), torch.eye(2))
    with pytest.raises(ValueError, match="num_quantizers must be between 1 and codebook_size 4: 5"):
        LookVQ(num_quantizers=5, codebook_size=4)
