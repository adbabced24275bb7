"""Discriminators: shapes, what a score can see, independence of items, and that they can tell real from made."""

import pytest
import torch

from anyglot_tokenizers.adversarial import discriminator_loss
from anyglot_tokenizers.discriminators import (
    PatchDiscriminator,
    PeriodDiscriminator,
    STFTDiscriminator,
    audio_discriminator,
    image_discriminator,
)
from anyglot_tokenizers.errors import ManifestError

DAC_BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def sound(items=2, channels=1, samples=2000, seed=0):
    return torch.randn(items, channels, samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def small_audio(channels=1):
    return audio_discriminator(channels, periods=(2, 3), period_width=4, windows=(256, 64), width=4)


def seen_by(judge, x, score):
    """Input positions that move one score."""
    x = x.clone().requires_grad_()
    scores = judge(x)[0][0]
    scores.flatten()[score(scores)].backward()
    return x.grad.abs().sum(dim=(0, 1)) > 0


@pytest.mark.parametrize(("depth", "field"), [(2, 34), (3, 70)])
def test_a_patch_score_sees_its_patch_only(depth, field):
    judge = PatchDiscriminator(width=4, depth=depth)
    for layer in judge.layers[1:-1]:  # group norm looks at the whole image by design
        layer[1] = torch.nn.Identity()
    seen = seen_by(judge, torch.rand(1, 3, 128, 128), lambda s: (s.shape[2] // 2) * s.shape[3] + s.shape[3] // 2)
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    assert int(rows[-1] - rows[0]) + 1 == int(columns[-1] - columns[0]) + 1 == field


def test_patch_shapes():
    for side in (32, 40, 64):
        ((scores, features),) = PatchDiscriminator(width=8)(torch.rand(2, 3, side, side))
        assert scores.shape[:2] == (2, 1) and scores.shape[2] == scores.shape[3] == side // 8 - 2
        assert [f.shape[1] for f in features] == [8, 16, 32, 64] and features[0].shape[2] == side // 2


@pytest.mark.parametrize("period", [2, 3, 7])
def test_a_period_score_sees_one_phase_only(period):
    seen = seen_by(PeriodDiscriminator(1, period, width=4), sound(1), lambda s: s.numel() // 2)
    phases = {int(place) % period for place in seen.nonzero()[:, 0]}
    assert len(phases) == 1


@pytest.mark.parametrize("bands", [(0.0, 1.0), DAC_BANDS])
@pytest.mark.parametrize("channels", [1, 2])
def test_stft_shapes(bands, channels):
    judge = STFTDiscriminator(channels, 256, width=4, bands=bands)
    ((scores, features),) = judge(sound(3, channels, 2000))
    assert scores.shape[:2] == (3, 1) and scores.shape[3] == 2000 // 64 + 1
    assert len(features) == 5 * (len(bands) - 1)
    spectrum = judge._spectrum(sound(3, channels, 2000))
    assert spectrum.shape == (3, 2 * channels, 129, 32)
    options = {"window": judge.window, "normalized": True, "return_complex": True, "pad_mode": "constant"}
    expected = torch.stft(sound(3, channels)[1], 256, 64, **options)
    assert torch.allclose(spectrum[1, 0::2], expected.real) and torch.allclose(spectrum[1, 1::2], expected.imag)


def test_bands_see_their_frequencies_only():
    judge = STFTDiscriminator(1, 256, width=4, bands=(0.0, 0.5, 1.0))
    low = torch.sin(torch.arange(2000) * 0.3)[None, None]  # a twentieth of the sample rate
    quiet, loud = judge(sound(1) * 1e-3)[0][1], judge(sound(1) * 1e-3 + low)[0][1]
    moved = [(a - b).abs().max() for a, b in zip(quiet, loud, strict=True)]
    assert all(lower > 50 * upper for lower, upper in zip(moved[:5], moved[5:], strict=True))


@pytest.mark.parametrize(
    ("build", "media"),
    [(lambda: image_discriminator(width=8, depth=2), torch.rand(3, 3, 32, 32)), (small_audio, sound(3))],
)
def test_items_do_not_meet(build, media):
    judge = build()
    together, alone = judge(media), judge(media[1:2])
    for (scores, features), (own_scores, own_features) in zip(together, alone, strict=True):
        assert torch.allclose(scores[1:2], own_scores, atol=1e-5)
        for feature, own in zip(features, own_features, strict=True):
            assert torch.allclose(feature[1:2], own, atol=1e-5)


@pytest.mark.parametrize("samples", [64, 500, 1999])
def test_all_lengths_of_sound(samples):
    judgements = small_audio()(sound(2, 1, samples))
    assert len(judgements) == 4 and all(torch.isfinite(scores).all() for scores, _ in judgements)


def test_a_discriminator_learns():
    judge = small_audio()
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    tone = torch.sin(torch.arange(800) * 0.2)[None, None] * 0.1
    for step in range(20):
        real, fake = (sound(4, samples=800, seed=step + offset) * 0.1 for offset in (0, 100))
        loss = discriminator_loss(judge(tone + real), judge(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7  # 1 at chance


def test_impossible_options():
    with pytest.raises(ManifestError, match="bands"):
        STFTDiscriminator(1, 64, bands=(0.0, 0.01, 1.0))
    with pytest.raises(ManifestError, match="periods"):
        audio_discriminator(periods=(), windows=())
