"""Denoising: spoiled media comes to have the codes of clean media, and nothing but the encoder changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from anyglot_tokenizers import AudioCodec, ImageVQ, ManifestError, TwoToneVQ, UnsupportedError
from anyglot_tokenizers.denoise import Pair, agreement, code_loss, fit_denoising
from anyglot_tokenizers.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
SMALL = {"n_fft": 64, "hop": 16, "num_mels": 12, "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "stage_steps": 2}


def sounds(step: int) -> Pair:
    """Tones of eight pitches, 512 samples, the last one shorter; and the same with noise."""
    drawn = torch.Generator().manual_seed(step)
    hertz_B1 = 400.0 * (1 + torch.randint(8, (16, 1), generator=drawn))
    clean_BCS = 0.5 * torch.sin(2 * torch.pi * hertz_B1 * torch.arange(512) / 16000)[:, None]
    spoiled_BCS = (clean_BCS + 0.2 * torch.randn(clean_BCS.shape, generator=drawn)).clamp(-1, 1)
    return Pair(clean_BCS, spoiled_BCS, torch.tensor([512] * 15 + [400]))


def pictures(step: int) -> Pair:
    """Squares of 8 pixels in six colors, and the same with grain."""
    drawn = torch.Generator().manual_seed(step)
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [1, 1, 1], [0, 0, 0]])
    cells_BhwC = colors[torch.randint(6, (16, 4, 4), generator=drawn)]
    clean_BCHW = F.interpolate(cells_BhwC.permute(0, 3, 1, 2), scale_factor=6, mode="nearest")[:, :, :16, :16]
    grain = 0.25 * torch.randn(clean_BCHW.shape, generator=drawn)
    return Pair(clean_BCHW, (clean_BCHW + grain).clamp(0, 1))


def started(tokenizer: Tokenizer, pairs) -> Tokenizer:
    """With codebooks from what its random encoder makes of clean media."""
    tokenizer.train()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for step in range(12):
            tokenizer(pairs(step).clean, pairs(step).lengths)
    return tokenizer.eval()


def codec() -> Tokenizer:
    return started(AudioCodec(**SMALL, num_quantizers=2, codebook_size=8, codebook_dim=8, dropout=0.0), sounds)


def picture_vq(kind: type[Tokenizer]) -> Tokenizer:
    sizes = {"num_patterns": 16, "num_tones": 8} if kind is TwoToneVQ else {"codebook_size": 16, "num_quantizers": 2}
    return started(kind(downsample_factor=8, patch=4, channels=(16, 16), stage_steps=2, **sizes), pictures)


CASES = {
    "sound": (codec, sounds, "latents", 2e-3),
    "sound, codes": (codec, sounds, "codes", 2e-3),
    "picture": (lambda: picture_vq(ImageVQ), pictures, "latents", 2e-3),
    "digits": (lambda: picture_vq(TwoToneVQ), pictures, "codes", 4e-3),
}


@pytest.mark.parametrize("case", CASES)
def test_spoiled_media_gets_the_codes_of_clean_media(case: str, tmp_path: Path) -> None:
    build, pairs, aim, lr = CASES[case]
    teacher = build()
    student = copy.deepcopy(teacher)
    held_out = pairs(10**6)
    assert agreement(teacher, teacher, held_out)[0] == [1.0] * teacher.spec.num_quantizers
    _, before = agreement(teacher, teacher, held_out)
    fitted = fit_denoising(student, pairs, run_dir=tmp_path, max_steps=150, aim=aim, lr=lr, log_every=50)
    assert fitted is student and not student.training
    clean, after = agreement(student, teacher, held_out)
    assert before[0] < 0.8 and after[0] > before[0] + 0.3 * (1 - before[0]), (before, after)
    assert clean[0] > 0.7
    assert student.fingerprint != teacher.fingerprint
    codes = teacher.encode(held_out.clean, held_out.lengths).codes
    assert torch.equal(student.decode(codes), teacher.decode(codes))
    assert (tmp_path / "logs" / "metrics.csv").is_file()


def test_a_run_is_repeatable_and_leaves_the_callers_randomness(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made = [fit_denoising(codec(), sounds, run_dir=tmp_path / str(i), max_steps=5).fingerprint for i in range(2)]
    assert made[0] == made[1]
    assert torch.equal(torch.rand(3), expected)


def test_code_loss_is_least_at_the_entries_and_counts_every_codebook() -> None:
    tokenizer = codec()
    quantizer = tokenizer.quantizer
    z_BDN, counts_BN = tokenizer.unquantized(*sounds(3)[::2])
    assert not counts_BN[-1].all() and counts_BN[:-1].all()
    clean_MD = z_BDN.detach().movedim(1, -1)[counts_BN]
    entries_MD = quantizer.decode(quantizer.encode(clean_MD.T[None])).movedim(1, -1)[0]
    losses = [float(code_loss(quantizer, clean_MD, given)) for given in (entries_MD, clean_MD, clean_MD.flip(0))]
    assert losses[0] < losses[1] < losses[2]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for wrong in ({"max_steps": 0}, {"max_steps": 1, "lr": 0.0}, {"max_steps": 1, "aim": "pixels"}):
        with pytest.raises(ManifestError, match=r"max_steps|aim"):
            fit_denoising(codec(), sounds, run_dir=tmp_path, **wrong)
    other = AudioCodec(**SMALL, num_quantizers=2, codebook_size=8, codebook_dim=8, quantizer="fsq")
    with pytest.raises(UnsupportedError, match="no codebooks"):
        fit_denoising(other, sounds, run_dir=tmp_path, max_steps=1, aim="codes")
