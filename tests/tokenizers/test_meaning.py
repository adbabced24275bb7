"""Codes for reading: the same alone or in a batch, at any level, kept by the folder form, and never decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from anyglot_tokenizers import load
from anyglot_tokenizers.errors import MediaError, UnsupportedError
from anyglot_tokenizers.meaning import HeardVQ, Normalize, SeenVQ, mask_spans
from anyglot_tokenizers.tokenizer import seeded


@pytest.fixture(scope="module", params=get_args(Normalize))
def heard(request: pytest.FixtureRequest) -> HeardVQ:
    """Untrained, but with a codebook whose entries lie where latents do."""
    sizes: dict[str, Any] = {"dim": 32, "depth": 2, "channels": 8, "codebook_size": 16, "codebook_dim": 8}
    tokenizer = HeardVQ(**sizes, stage_steps=1, normalize=request.param)
    with seeded(0):
        tokenizer.train()
        z_BDN, valid_BN = tokenizer.latents(tokenizer.power(_sounds()), torch.tensor([100, 60]))
        for _ in range(3):
            tokenizer.quantize(z_BDN, valid_BN)
    return tokenizer.eval()


def _sounds() -> torch.Tensor:
    with seeded(1):
        noise_BS = torch.randn(2, 16000) * 0.1
    times_S = torch.arange(16000) / 16000
    sweep_S = torch.sin(2 * torch.pi * (200 + 800 * times_S) * times_S)
    sounds_BS = 0.1 * noise_BS + 0.3 * sweep_S * torch.tensor([[1.0], [0.5]])
    sounds_BS[1, 9600:] = 0
    return sounds_BS


def test_codes_of_speech_do_not_depend_on_the_batch_or_the_level(heard: HeardVQ) -> None:
    x_BCS = _sounds()[:, None]
    both = heard.encode(x_BCS, torch.tensor([16000, 9600]))
    assert both.item(0).shape == (1, 25) and both.item(1).shape == (1, 15)
    alone = heard.encode(x_BCS[1:, :, :9600])
    assert torch.equal(alone.item(0), both.item(1))
    assert len(both.item(0).unique()) > 2  # or the comparison would say nothing
    assert torch.equal(heard.encode(x_BCS[:1] * 0.2).item(0), both.item(0))


def _features(normalize: Normalize, power_tM: torch.Tensor) -> torch.Tensor:
    tokenizer = HeardVQ(dim=32, depth=1, channels=8, normalize=normalize).eval()
    with torch.no_grad():
        return tokenizer.latents(power_tM[None], torch.tensor([len(power_tM)]))[0]


def test_the_mean_of_a_sound_is_heard_unless_it_is_taken_off() -> None:
    """Two steady vowels differ in nothing but their mean; another microphone changes it, too."""
    with seeded(2):
        power_tM = torch.rand(40, 40) + 0.1
    vowel_M = torch.linspace(2, -2, 40).exp()
    apart = {
        kind: float((_features(kind, power_tM * vowel_M) - _features(kind, power_tM)).abs().max())
        for kind in get_args(Normalize)
    }
    assert apart["level"] > 0.03 and apart["level"] > 20 * apart["spectrum"]
    louder = _features("level", power_tM * 9)
    assert torch.allclose(louder, _features("level", power_tM), atol=1e-4)
    with pytest.raises(ValueError, match="normalize 'mean' must be one of level, spectrum"):
        HeardVQ(normalize="mean")  # type: ignore[arg-type]


def test_what_lies_above_the_highest_band_is_not_heard(heard: HeardVQ) -> None:
    x_BCS = _sounds()[:1, None]
    hiss = 0.3 * torch.sin(2 * torch.pi * 6500 * torch.arange(16000) / 16000)
    changed = (heard.encode(x_BCS + hiss).codes != heard.encode(x_BCS).codes).float().mean()
    assert float(changed) < 0.2


@pytest.mark.parametrize("kind", ["heard", "seen"])
def test_the_folder_form_keeps_the_codes(kind: str, heard: HeardVQ, tmp_path: Path) -> None:
    tokenizer = (
        heard if kind == "heard" else SeenVQ(channels=(8, 16, 16, 16), num_quantizers=2, codebook_size=16).eval()
    )
    x = _sounds()[:, None] if kind == "heard" else torch.rand(2, 3, 64, 64)
    tokenizer.save_pretrained(tmp_path / kind)
    again = load(tmp_path / kind)
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(x).codes, tokenizer.encode(x).codes)
    with pytest.raises(UnsupportedError, match="only read"):
        again.decode(again.encode(x))


def test_pictures_give_a_grid_and_wrong_ones_are_refused() -> None:
    seen = SeenVQ(channels=(8, 16, 16, 16), num_quantizers=2, codebook_size=16).eval()
    assert seen.encode(torch.rand(3, 3, 64, 64)).codes.shape == (3, 2, 4, 4)
    with pytest.raises(MediaError, match="not divisible by 16"):
        seen.encode(torch.rand(1, 3, 60, 64))


def test_gradients_reach_the_encoder_through_the_codebook() -> None:
    seen = SeenVQ(channels=(8, 16, 16, 16), codebook_size=16, stage_steps=0).train()
    q_BDhw, commit = seen.quantize(seen.latents(torch.rand(2, 3, 64, 64)))
    (q_BDhw.square().mean() + commit).backward()
    first = next(seen.encoder.parameters())
    assert first.grad is not None and float(first.grad.abs().max()) > 0


def test_masks_hide_a_span_of_one_axis() -> None:
    with seeded(0):
        hidden = mask_spans(torch.ones(50, 30, 12), 1, 10) == 0
    assert torch.equal(hidden.any(2), hidden.all(2))
    lengths = hidden[..., 0].sum(1)
    assert int(lengths.max()) <= 10 and len(lengths.unique()) > 4
    assert mask_spans(torch.ones(2, 30, 12, device="meta"), 1, 10).device.type == "meta"
