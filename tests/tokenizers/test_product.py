"""ProductQuantizer and TwoToneVQ: digits, entries, what a code depends on, and that patterns and tones are apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from anyglot_tokenizers import ImageVQ, TwoToneVQ, fit_tokenizer, load
from anyglot_tokenizers.product import ProductQuantizer


def corners(color: tuple[float, float, float], seed: int = 0, num: int = 48) -> torch.Tensor:
    """Pictures `[num, 3, 64, 64]` of 16 rectangles in `color` on black; the same rectangles for every color."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.zeros(num * 16, 3, 16, 16)
    for cell in cells:
        y, x, height, width = (4 * torch.randint(1, 3, (4,), generator=generator)).tolist()
        cell[:, y : y + height, x : x + width] = torch.tensor(color)[:, None, None]
    return F.pixel_shuffle(cells.view(num, 4, 4, 3, 16, 16).permute(0, 3, 4, 5, 1, 2).reshape(num, -1, 4, 4), 16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TwoToneVQ:
    """Trained on rectangles of red and of green."""
    pictures = torch.cat([corners((1.0, 0.1, 0.1)), corners((0.1, 0.8, 0.1), seed=1)]).permute(0, 2, 3, 1)
    tokenizer = TwoToneVQ(
        num_patterns=32, num_tones=8, pattern_dim=8, tone_dim=8, width=64, channels=(32, 64), stage_steps=20
    )
    folder = tmp_path_factory.mktemp("run")
    fitted = fit_tokenizer(
        tokenizer,
        (pictures * 255).byte().numpy(),
        run_dir=folder,
        max_steps=320,
        batch_size=16,
        lr=4e-3,
        foreground_weight=20.0,
    )
    assert isinstance(fitted, TwoToneVQ)
    return fitted.eval()


def test_ids_are_digits_of_the_nearest_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    quantizer = ProductQuantizer((2, 3), (4, 5)).eval()
    latents = torch.randn(3, 5, 7)
    ids = quantizer.encode(latents)
    assert ids.shape == (3, 1, 7) and quantizer.codebook_sizes == (20,) and quantizer.factors == (4, 5)
    first, second = (part.codebooks[0] for part in quantizer.parts)
    rows = latents.transpose(1, 2)
    assert torch.equal(ids[:, 0] % 4, torch.cdist(rows[..., :2], first.expand(3, -1, -1)).argmin(2))
    assert torch.equal(ids[:, 0] // 4, torch.cdist(rows[..., 2:], second.expand(3, -1, -1)).argmin(2))
    table = quantizer.codebooks[0]
    monkeypatch.setattr(quantizer, "_entries", None)  # to decode, the table of all combinations is not made
    decoded = quantizer.decode(ids).transpose(1, 2)
    assert torch.equal(decoded, torch.cat([first[ids[:, 0] % 4], second[ids[:, 0] // 4]], -1))
    assert torch.equal(decoded, table[ids[:, 0]])


@pytest.mark.parametrize(("dims", "sizes"), [((2,), (4,)), ((2, 3), (4,)), ((2, 3), (1, 8)), ((2, 2), (2048, 2048))])
def test_sizes_that_cannot_be(dims: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be two or more of each"):
        ProductQuantizer(dims, sizes)
    with pytest.raises(ValueError, match="not by downsample_factor 16"):
        TwoToneVQ(downsample_factor=16)


def test_the_same_shape_in_another_color_is_the_same_pattern(trained: TwoToneVQ) -> None:
    """Also in a color that training never had."""
    red, green, blue = (
        trained.encode(corners(color, seed=2)).codes for color in ((1, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.2, 1))
    )
    assert (red // 8 == green // 8).float().mean() > 0.99 and (red // 8 == blue // 8).float().mean() > 0.99
    shown = trained.encode(corners((1, 0.1, 0.1), seed=2)).codes // 8 != red.flatten().mode().values // 8
    assert shown.float().mean() > 0.2, "there are patterns"
    assert (red % 8 != green % 8)[shown].float().mean() > 0.99, "and tones tell the colors"


def test_it_learns_and_comes_back(trained: TwoToneVQ, tmp_path: Path) -> None:
    pictures = corners((1.0, 0.1, 0.1), seed=3)
    codes = trained.encode(pictures)
    assert (trained.decode(codes) - pictures).square().mean() < 0.25 * pictures.var()
    trained.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.fingerprint == trained.fingerprint and again.factors == (8, 32)
    assert torch.equal(again.encode(pictures).codes, codes.codes)
    assert ImageVQ().factors is None and ImageVQ(quantizer="fsq", codebook_size=64).factors == (8, 8)


def test_a_code_depends_on_its_own_patch(trained: TwoToneVQ) -> None:
    pictures = torch.rand(2, 3, 16, 24)
    changed = pictures.clone()
    changed[:, :, 8:, 16:] = torch.rand(2, 3, 8, 8)
    different = trained.encode(pictures).codes != trained.encode(changed).codes
    assert not different[:, 0, 0].any() and not different[:, 0, 1, :2].any()
