"""Denoising: spoiled media comes to have the codes of clean media, and nothing but the encoder changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from anyglot_tokenizers import (
    AnyglotError,
    AudioCodec,
    CheckpointError,
    ImageVQ,
    ManifestError,
    MediaError,
    SeriesVQ,
    TwoToneVQ,
    UnsupportedError,
)
from anyglot_tokenizers.batches import Batch
from anyglot_tokenizers.denoise import agreement, code_loss, fit_denoising
from anyglot_tokenizers.tokenizer import Tokenizer

SMALL = {"n_fft": 64, "hop": 16, "num_mels": 12, "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "stage_steps": 2}


def sounds(step: int) -> Batch:
    """Tones of eight pitches, 512 samples, the last one shorter; and the same with noise."""
    drawn = torch.Generator().manual_seed(step)
    hertz_B1 = 400.0 * (1 + torch.randint(8, (16, 1), generator=drawn))
    clean_BCS = 0.5 * torch.sin(2 * torch.pi * hertz_B1 * torch.arange(512) / 16000)[:, None]
    spoiled_BCS = (clean_BCS + 0.2 * torch.randn(clean_BCS.shape, generator=drawn)).clamp(-1, 1)
    return {"clean": clean_BCS, "media": spoiled_BCS, "lengths": torch.tensor([512] * 15 + [400])}


def pictures(step: int) -> Batch:
    """Squares of 8 pixels in six colors, and the same with grain."""
    drawn = torch.Generator().manual_seed(step)
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [1, 1, 1], [0, 0, 0]])
    cells_BhwC = colors[torch.randint(6, (16, 4, 4), generator=drawn)]
    clean_BCHW = F.interpolate(cells_BhwC.permute(0, 3, 1, 2), scale_factor=6, mode="nearest")[:, :, :16, :16]
    grain = 0.25 * torch.randn(clean_BCHW.shape, generator=drawn)
    return {"clean": clean_BCHW, "media": (clean_BCHW + grain).clamp(0, 1)}


def started(tokenizer: Tokenizer, batches) -> Tokenizer:
    """With codebooks from what its random encoder makes of clean media."""
    tokenizer.train()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for step in range(12):
            tokenizer(batches(step)["clean"], batches(step).get("lengths"))
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
    build, batches, aim, lr = CASES[case]
    teacher = build()
    student = copy.deepcopy(teacher)
    held_out = [batches(10**6), batches(10**6 + 1)]
    before = agreement(teacher, teacher, held_out)
    assert before["clean"] == [1.0] * teacher.spec.num_quantizers
    fitted = fit_denoising(student, batches, run_dir=tmp_path, max_steps=150, aim=aim, lr=lr)
    assert fitted is student and not student.training
    after = agreement(student, teacher, held_out)
    first = before["spoiled"][0]
    assert first < 0.8 and after["spoiled"][0] > first + 0.3 * (1 - first), (before, after)
    assert after["clean"][0] > 0.7
    assert student.fingerprint != teacher.fingerprint
    codes = teacher.encode(held_out[0]["clean"], held_out[0].get("lengths")).codes
    assert torch.equal(student.decode(codes), teacher.decode(codes))


def test_agreement_counts_what_is_not_padding() -> None:
    teacher, other = codec(), codec()
    with torch.no_grad():
        other.fold.weight.neg_()
    batch = sounds(5)
    wanted, found = (t.encode(batch["clean"], batch["lengths"]) for t in (teacher, other))
    per_item = [
        (a == b).float().mean(1) * a.shape[1]
        for a, b in ((wanted.item(i), found.item(i)) for i in range(len(batch["clean"])))
    ]
    share_K = torch.stack(per_item).sum(0) / wanted.lengths.sum()
    assert agreement(other, teacher, [batch])["clean"] == pytest.approx(share_K.tolist(), abs=1e-4)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    how = {"max_steps": 7, "checkpoint_every": 3}
    whole = fit_denoising(codec(), sounds, run_dir=tmp_path / "whole", **how).fingerprint
    assert torch.equal(torch.rand(3), expected)  # the caller's randomness is left alone
    seen: list[int] = []

    def dying(step: int) -> Batch:
        seen.append(step)
        if seen.count(5) == 1 and step == 5:
            raise KeyboardInterrupt
        return sounds(step)

    with pytest.raises(KeyboardInterrupt):
        fit_denoising(codec(), dying, run_dir=tmp_path / "killed", **how)
    seen.append(-1)
    assert fit_denoising(codec(), dying, run_dir=tmp_path / "killed", **how).fingerprint == whole
    assert seen[seen.index(-1) + 1 :] == [0, 3, 4, 5, 6]  # the first one is only looked at
    with pytest.raises(CheckpointError, match="lr"):
        fit_denoising(codec(), sounds, run_dir=tmp_path / "killed", lr=1e-3, **how)


def test_another_teacher_is_followed(tmp_path: Path) -> None:
    teacher, student = codec(), codec()
    with torch.no_grad():
        student.fold.weight.add_(
            0.3 * torch.randn(student.fold.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    held_out = [sounds(10**6)]
    before = agreement(student, teacher, held_out)["clean"][0]
    fit_denoising(student, sounds, run_dir=tmp_path, max_steps=120, teacher=teacher)
    assert agreement(student, teacher, held_out)["clean"][0] > before + 0.1


def test_code_loss_is_least_at_the_entries_and_counts_every_codebook() -> None:
    tokenizer = codec()
    quantizer = tokenizer.quantizer
    batch = sounds(3)
    z_BDN, counts_BN = tokenizer.to_latents(batch["clean"], batch["lengths"])
    assert not counts_BN[-1].all() and counts_BN[:-1].all()
    clean_MD = z_BDN.detach().movedim(1, -1)[counts_BN]
    codes_1KM = quantizer.encode(clean_MD.T[None])
    first_MD, both_MD = (quantizer.decode(codes_1KM[:, :k]).movedim(1, -1)[0] for k in (1, 2))
    losses = [float(code_loss(quantizer, clean_MD, given)) for given in (both_MD, clean_MD, first_MD, clean_MD.flip(0))]
    assert losses == sorted(losses) and len(set(losses)) == 4


@pytest.mark.parametrize("wrong", [{"max_steps": 0}, {"lr": 0.0}, {"aim": "pixels"}, {"log_every": 0}])
def test_settings_that_cannot_be_are_refused(wrong: dict, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=f"{next(iter(wrong))} .*{next(iter(wrong.values()))}"):
        fit_denoising(codec(), sounds, run_dir=tmp_path, **{"max_steps": 1, **wrong})
    assert not list(tmp_path.iterdir())


def test_what_has_no_latents_or_codebooks_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    other = AudioCodec(**SMALL, num_quantizers=2, codebook_size=8, codebook_dim=8, quantizer="fsq").eval()
    with pytest.raises(UnsupportedError, match="latents"):
        fit_denoising(other, sounds, run_dir=tmp_path, max_steps=1, aim="codes")
    assert not other.training
    with pytest.raises(UnsupportedError, match="SeriesVQ gives no latents"):
        SeriesVQ(channels=1).to_latents(torch.zeros(1, 1, 64))
    lame = {**sounds(0), "media": sounds(0)["media"][..., :256]}
    with pytest.raises(MediaError, match="one shape"):
        fit_denoising(codec(), lambda _: lame, run_dir=tmp_path, max_steps=1)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    def broken(step: int) -> Batch:
        return sounds(step) if step == 0 else {**sounds(step), "media": sounds(step)["media"] * float("nan")}

    with pytest.raises(AnyglotError, match="step 1: loss is nan"):
        fit_denoising(codec(), broken, run_dir=tmp_path, max_steps=3)
