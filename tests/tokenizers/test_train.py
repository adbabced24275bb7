"""Losses, batches as a function of the step, and runs that are killed and resumed."""

import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from anyglot_tokenizers import (
    AudioCodec,
    CheckpointError,
    ImageVQ,
    ManifestError,
    MediaError,
    StepBatches,
    load,
)
from anyglot_tokenizers.losses import ImageLoss, SpectralLoss
from anyglot_tokenizers.train import CHECKPOINT, fit_tokenizer, resolve_precision

RUN = {
    "max_steps": 9,
    "batch_size": 4,
    "checkpoint_every": 3,
    "log_every": 5,
    "warmup_steps": 2,
    "precision": "32-true",
}
SPEECH = {
    "n_fft": 64,
    "hop": 16,
    "num_mels": 12,
    "dim": 16,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "stage_steps": 2,
}
SPEECH |= {"num_quantizers": 2, "codebook_size": 8, "codebook_dim": 8, "dropout": 0.5}


def images(count=10):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def sounds():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(count).astype(np.float32) * 0.1 for count in (500, 4000, 2400)]


def image_tokenizer():
    return ImageVQ(channels=(8, 8, 8), codebook_size=8, codebook_dim=8, stage_steps=2, dropout=0.5)


class Killed(Exception):
    pass


def kill_at(step):
    from lightning.pytorch.callbacks import Callback

    class Kill(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == step:
                raise Killed

    return Kill()


def test_batches_are_a_function_of_the_step():
    for media, crop in ((images(), None), (sounds(), 640)):
        batches = StepBatches(media, batch_size=4, seed=1, crop=crop)
        again = StepBatches(media, batch_size=4, seed=1, crop=crop)
        wanted = [batches[index] for index in range(6)]
        for index in (5, 0, 3):
            assert all(torch.equal(again[index][name], tensor) for name, tensor in wanted[index].items())
        other = StepBatches(media, batch_size=4, seed=2, crop=crop)
        assert not torch.equal(other[0]["media"], wanted[0]["media"]) and other.fingerprint != batches.fingerprint
        assert again.fingerprint == batches.fingerprint


def test_every_epoch_holds_every_item_once():
    pictures = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    batches = StepBatches(pictures, batch_size=4)
    seen = torch.cat([batches[index]["media"][:, 0, 0, 0] for index in range(5)]) * 255
    assert sorted(seen[:10].round().tolist()) == sorted(seen[10:].round().tolist()) == list(range(10))


def test_short_sounds_come_with_their_length():
    batch = StepBatches([np.ones(100, np.float32), np.ones(900, np.float32)], batch_size=8, crop=640)[0]
    assert set(batch["lengths"].tolist()) == {100, 640}
    assert torch.equal(batch["media"].sum((1, 2)).long(), batch["lengths"])


def test_bad_data():
    for media in (
        [],
        [np.zeros(0, np.float32)],
        [np.array([np.nan], np.float32)],
        [np.zeros(4, np.int16)],
        np.zeros((2, 4, 4), np.uint8),
    ):
        with pytest.raises(MediaError):
            StepBatches(media, batch_size=1, crop=4)
    with pytest.raises(ManifestError):
        StepBatches(sounds(), batch_size=1)


def test_image_loss_favours_the_foreground():
    target = torch.full((1, 3, 8, 8), 0.1)
    target[..., :2, :2] = 0.9
    flat, missed = torch.full_like(target, 0.1), target.clone()
    missed[..., 4:6, 4:6] += 0.8
    loss = ImageLoss()
    assert loss(target, target)[0] == 0
    assert loss(flat, target)[0] > 3 * loss(missed, target)[0]
    assert loss.weights(target).mean() == pytest.approx(1.0)
    plain = ImageLoss(foreground_weight=0.0)
    assert torch.allclose(plain.weights(target), torch.ones(()))


def test_spectral_loss_ranks_and_has_finite_gradients():
    time = torch.arange(8000) / 16000
    target = torch.sin(2 * torch.pi * 440 * time)[None] * 0.3
    loss = SpectralLoss(16000)
    near = loss(target * 0.9, target)[0]
    far = loss(torch.sin(2 * torch.pi * 660 * time)[None] * 0.3, target)[0]
    assert loss(target, target)[0] < 1e-4 < near < far
    silent = torch.zeros(1, 8000, requires_grad=True)
    loss(silent, target)[0].backward()
    assert torch.isfinite(silent.grad).all()
    loss(silent, torch.zeros(1, 8000))[0].backward()
    assert torch.isfinite(silent.grad).all()


@pytest.mark.parametrize(("build", "data"), [(image_tokenizer, images), (lambda: AudioCodec(**SPEECH), sounds)])
@pytest.mark.parametrize("stop", [2, 7])
def test_interrupted_run_ends_with_the_same_bits(build, data, stop, tmp_path):
    options = {**RUN, "crop_seconds": 0.1}
    whole = fit_tokenizer(build(), data(), run_dir=tmp_path / "whole", **options)
    assert not whole.training and bool(whole.quantizer.layers[1]._codebook.initted)
    with pytest.raises(Killed):
        fit_tokenizer(build(), data(), run_dir=tmp_path / "cut", callbacks=[kill_at(stop)], **options)
    assert (tmp_path / "cut" / CHECKPOINT).exists() == (stop > 3)
    torch.manual_seed(99)
    resumed = fit_tokenizer(build(), data(), run_dir=tmp_path / "cut", **options)
    finished = fit_tokenizer(build(), data(), run_dir=tmp_path / "cut", **options)  # nothing left to do
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
        assert torch.equal(tensor, finished.state_dict()[name]), name


def test_training_leaves_the_random_state(tmp_path):
    before = torch.get_rng_state()
    fit_tokenizer(image_tokenizer(), images(), run_dir=tmp_path, **RUN)
    assert torch.equal(before, torch.get_rng_state())


def test_statistics_are_set_once(tmp_path):
    dark = images() // 4
    tokenizer = fit_tokenizer(image_tokenizer(), dark, run_dir=tmp_path / "a", **RUN)
    mean = tokenizer.mean_C11.clone()
    assert 0.1 < mean.mean() < 0.15 and tokenizer.deviation < 0.1
    fit_tokenizer(tokenizer, images(), run_dir=tmp_path / "b", **RUN)  # further training keeps its scale
    assert torch.equal(tokenizer.mean_C11, mean)


def test_resume_refuses_another_run(tmp_path):
    fit_tokenizer(image_tokenizer(), images(), run_dir=tmp_path, **RUN)
    for change in ({"lr": 0.5}, {"seed": 5}, {"max_steps": 10}):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            fit_tokenizer(image_tokenizer(), images(), run_dir=tmp_path, **{**RUN, **change})
    with pytest.raises(CheckpointError, match="data"):
        fit_tokenizer(image_tokenizer(), images(11), run_dir=tmp_path, **RUN)
    (tmp_path / CHECKPOINT).write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="readable"):
        fit_tokenizer(image_tokenizer(), images(), run_dir=tmp_path, **RUN)


def test_impossible_settings(tmp_path):
    with pytest.raises(ManifestError, match="quantizers have started"):
        fit_tokenizer(image_tokenizer(), images(), run_dir=tmp_path, **{**RUN, "max_steps": 4})
    with pytest.raises(ManifestError, match="precision"):
        resolve_precision("fp8")
    with pytest.raises(MediaError, match="divisible"):
        fit_tokenizer(image_tokenizer(), np.zeros((2, 20, 20, 3), np.uint8), run_dir=tmp_path, **RUN)


@pytest.mark.slow
def test_sigkill_during_a_run(tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys
        import numpy as np
        from lightning.pytorch.callbacks import Callback
        from anyglot_tokenizers import ImageVQ, fit_tokenizer

        class Kill(Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == int(sys.argv[2]):
                    os.kill(os.getpid(), signal.SIGKILL)

        images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8)
        tokenizer = ImageVQ(channels=(8, 8, 8), codebook_size=8, codebook_dim=8, stage_steps=2, dropout=0.5)
        fit_tokenizer(tokenizer, images, run_dir=sys.argv[1] + "/run", max_steps=9, batch_size=4, checkpoint_every=2,
                      precision="32-true", callbacks=[Kill()])
        tokenizer.save_pretrained(sys.argv[1])
    """)
    fingerprints = []
    for name, kills in (("whole", [0]), ("cut", [3, 4, 7, 0])):
        for kill in kills:
            done = subprocess.run([sys.executable, "-c", program, str(tmp_path / name), str(kill)], capture_output=True)
            assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr.decode()
        fingerprints.append(load(tmp_path / name).fingerprint)
    assert fingerprints[0] == fingerprints[1]
