"""Batches as a function of the step, and runs: killed and resumed, with an adversary, averaged, on two devices."""

import json
import os
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
    SeriesVQ,
    StepBatches,
    TwoToneVQ,
    UnsupportedError,
    load,
    train,
)
from anyglot_tokenizers.batches import Augment, held_out_batches
from anyglot_tokenizers.keep import KeepLast
from anyglot_tokenizers.meaning import HeardVQ
from anyglot_tokenizers.precision import resolve_precision
from anyglot_tokenizers.snac import Snac
from anyglot_tokenizers.train import CHECKPOINT, LitTokenizer, fit_tokenizer, twin_of, validate

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


def learnt(codec):
    """With codebooks that have started, of what its random encoder makes of sounds."""
    batches = StepBatches(sounds(), batch_size=4, crop=1600)
    codec.train()
    with torch.no_grad(), torch.random.fork_rng():
        for step in range(6):
            torch.manual_seed(step)
            codec(batches[step]["media"], batches[step]["lengths"])
    return codec


class Killed(Exception):
    pass


class Left(SystemExit):
    pass


ADVERSARY = {"balance": "balancer", "feature_weight": 1.0}
GAME = {"adversary_start": 4, "ema_decay": 0.9}
IMAGE_GAME = {**GAME, "adversary": {**ADVERSARY, "discriminator": {"width": 4, "depth": 1}}}
SOUND_GAME = {
    **GAME,
    "adversary": {**ADVERSARY, "discriminator": {"periods": [2], "period_width": 2, "windows": [64], "width": 2}},
    "loss": {"windows": [256], "mels": [20]},
}


def kill_at(step, how=Killed):
    from lightning.pytorch.callbacks import Callback

    class Kill(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == step:
                raise how

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


def test_devices_share_out_the_same_batch():
    for media, crop in ((images(), 12), (images(), None), (sounds(), 640)):
        augment = Augment(zoom=(0.5, 1.0), flip=0.5, swap=0.5, gain_db=6.0) if crop else Augment()
        whole, part = (StepBatches(media, batch_size=4, crop=crop, augment=augment) for _ in range(2))
        for name in whole[3]:
            rows = torch.empty_like(whole[3][name])
            for rank in range(2):
                part.share(rank, 2)
                rows[rank::2] = part[3][name]
            assert torch.equal(rows, whole[3][name])
    with pytest.raises(ManifestError, match="3 devices"):
        whole.share(0, 3)


def test_changes_keep_what_they_should():
    pictures = images(8)
    plain = StepBatches(pictures, batch_size=8)[0]["media"]
    mirrored = StepBatches(pictures, batch_size=8, augment=Augment(flip=1.0))[0]["media"]
    assert torch.equal(mirrored.flip(3), plain)
    swapped = StepBatches(pictures, batch_size=8, augment=Augment(swap=1.0))[0]["media"]
    assert torch.allclose(swapped.sum(1), plain.sum(1)) and not torch.equal(swapped, plain)
    zoomed = StepBatches(pictures, batch_size=8, crop=8, augment=Augment(zoom=(0.5, 0.5)))[0]["media"]
    assert zoomed.shape == (8, 3, 8, 8) and zoomed.std() > 0.2  # cut out at its own size, not averaged
    loud = StepBatches([np.full(640, 0.9, np.float32)], batch_size=16, crop=640, augment=Augment(gain_db=6.0))[0][
        "media"
    ]
    levels = loud[:, 0, 0]
    assert levels.max() <= 1 and levels.min() < 0.6 and len(levels.unique()) > 5
    for wrong in ({"zoom": (0.0, 1.0)}, {"zoom": (1.0, 0.5)}, {"flip": 2.0}, {"gain_db": -1.0}):
        with pytest.raises(ManifestError):
            Augment(**wrong)
    assert StepBatches(pictures, batch_size=8, augment=Augment(flip=1.0)).fingerprint != (
        StepBatches(pictures, batch_size=8).fingerprint
    )


def test_stereo_sounds():
    rng = np.random.default_rng(0)
    pair = [rng.standard_normal((2, count)).astype(np.float32) * 0.1 for count in (500, 900)]
    batch = StepBatches(pair, batch_size=4, crop=640)[0]
    assert batch["media"].shape == (4, 2, 640) and (batch["media"][batch["lengths"] == 500][:, :, 500:] == 0).all()
    with pytest.raises(MediaError, match="channels"):
        StepBatches([pair[0], pair[1][0]], batch_size=1, crop=10)


def test_held_out_batches_are_in_order_and_whole():
    batches = StepBatches(images(7), batch_size=3, seed=5, crop=16)
    media = torch.cat([batch["media"] for batch in held_out_batches(batches, 5)])
    assert torch.equal((media * 255).round().byte(), torch.from_numpy(images(7)[[0, 1, 2, 4, 5]]).permute(0, 3, 1, 2))
    wide = np.zeros((1, 16, 32, 3), np.uint8)
    wide[:, :, 8:24] = 200
    (batch,) = held_out_batches(StepBatches(wide, batch_size=3, crop=16), 9)
    assert (batch["media"] * 255 == 200).all()
    lengths = torch.cat([b["lengths"] for b in held_out_batches(StepBatches(sounds(), batch_size=2, crop=2400), 9)])
    assert lengths.tolist() == [500, 2400, 2400]


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


@pytest.mark.parametrize(
    ("build", "data", "more"),
    [
        (image_tokenizer, images, {}),
        (lambda: AudioCodec(**SPEECH), sounds, {}),
        (image_tokenizer, images, {**IMAGE_GAME, "held_out": images(5), "augment": Augment(flip=0.5)}),
        (lambda: AudioCodec(**SPEECH), sounds, {**SOUND_GAME, "augment": Augment(gain_db=6.0)}),
        (lambda: learnt(AudioCodec(**SPEECH)), sounds, {**SOUND_GAME, "from_codes": 1}),
    ],
)
@pytest.mark.parametrize("stop", [2, 7])
def test_interrupted_run_ends_with_the_same_bits(build, data, more, stop, tmp_path):
    options = {**RUN, "crop_seconds": 0.1, **more}
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


@pytest.mark.parametrize("how", [KeyboardInterrupt, Left])
def test_an_interrupt_comes_out_as_what_it_is(how, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(how):
        fit_tokenizer(image_tokenizer(), images(), run_dir=tmp_path, callbacks=[kill_at(1, how)], **RUN)
    assert signal.getsignal(signal.SIGINT) is before


def test_two_runs_in_one_folder_do_not_write_the_same_file(tmp_path):
    left = tmp_path / ".last.0123456789ab.tmp.ckpt"
    left.write_bytes(b"of a killed run")
    os.utime(left, (0, 0))
    names = []

    class Trainer:
        global_step = max_steps = 4
        is_global_zero = True

        def save_checkpoint(self, path):
            names.append(path)
            path.write_bytes(b"x")

    for _ in range(2):
        keep = KeepLast(tmp_path / CHECKPOINT, 2)
        keep.on_train_start(Trainer())
        keep.on_train_batch_end(Trainer())
    assert names[0] != names[1] and [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


class Recorder:
    """What every step logs."""

    def __init__(self):
        from lightning.pytorch.callbacks import Callback

        recorder = self
        self.parts, self.judges, self.steps = [], [], []

        class Record(Callback):
            def on_train_batch_end(self, trainer, module, *_):
                recorder.parts.append(set(module.parts))
                recorder.steps.append(trainer.global_step)
                if module.adversary is not None:
                    recorder.judges.append(next(module.adversary.parameters()).detach().clone())

        self.callback = Record()


def test_the_adversary_enters_at_its_step(tmp_path):
    recorder = Recorder()
    fit_tokenizer(image_tokenizer(), images(), run_dir=tmp_path, callbacks=[recorder.callback], **RUN, **IMAGE_GAME)
    assert recorder.steps == list(range(1, 10))  # two optimizers, one count
    game = {"adversarial", "features", "discriminator"}
    assert [game <= parts for parts in recorder.parts] == [False] * 4 + [True] * 5
    still = [torch.equal(a, b) for a, b in zip(recorder.judges, recorder.judges[1:], strict=False)]
    assert still == [True] * 3 + [False] * 5
    assert LitTokenizer(image_tokenizer(), max_steps=1).adversary is None


def test_averaged_weights_are_what_is_returned(tmp_path):
    plain = fit_tokenizer(image_tokenizer(), images(), run_dir=tmp_path / "plain", **RUN)
    averaged = fit_tokenizer(image_tokenizer(), images(), run_dir=tmp_path / "mean", ema_decay=0.9, **RUN)
    state = torch.load(tmp_path / "mean" / CHECKPOINT, weights_only=True)["state_dict"]
    for name, tensor in averaged.state_dict().items():
        assert torch.equal(state[f"averaged.{name}"], tensor)
        assert torch.equal(state[f"tokenizer.{name}"], plain.state_dict()[name])  # averaging does not steer training
    weight = "encoder.1.weight"
    assert not torch.equal(plain.state_dict()[weight], averaged.state_dict()[weight])
    with pytest.raises(ManifestError, match="ema_decay"):
        LitTokenizer(image_tokenizer(), max_steps=1, ema_decay=1.0)


@pytest.mark.parametrize(
    ("build", "data", "files"),
    [
        (image_tokenizer, images, ["images.png"]),
        (lambda: AudioCodec(**SPEECH), sounds, ["0.png", "0_original.wav", "0_reconstructed.wav"]),
    ],
)
def test_validation_on_held_out_media(build, data, files, tmp_path):
    held_out = data()[:2]
    options = {**RUN, "crop_seconds": 0.1, "validate_every": 4}
    trained = fit_tokenizer(build(), data()[2:], run_dir=tmp_path, held_out=held_out, **options)
    figures = json.loads((tmp_path / "validation.json").read_text())
    assert figures["last"]["step"] == 9 and figures["best"]["loss"] <= figures["last"]["loss"]
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"0000004", "0000008", "0000009"}
    assert set(files) <= {path.name for path in (tmp_path / "samples" / "0000009").iterdir()}
    loss = LitTokenizer(trained, max_steps=1).loss
    crop = None if data is images else 1600
    again, shown = validate(trained, loss, held_out_batches(StepBatches(held_out, batch_size=4, crop=crop), 99))
    assert {name: figures["last"][name] for name in again} == pytest.approx(again)
    target, output = shown[0]
    codes = trained.encode(target[None])
    assert torch.allclose(trained.decode(codes)[0, ..., : output.shape[-1]], output, atol=1e-5)
    met = torch.cat([trained.encode(original[None]).codes[:, 0].flatten() for original, _ in shown])
    assert again["usage/0"] == pytest.approx(len(met.unique()) / 8)
    assert load(tmp_path / "best").spec.codebook_sizes == trained.spec.codebook_sizes


def test_the_best_is_judged_on_the_same_items(tmp_path, monkeypatch):
    seen = []
    measure = train.validate

    def spy(tokenizer, loss, batches, num_quantizers):
        batches = list(batches)
        seen.append(sum(len(batch["media"]) for batch in batches))
        metrics, shown = measure(tokenizer, loss, batches, num_quantizers)
        return {**metrics, "loss": 9.0 - len(seen) if seen[-1] == 2 else 0.0}, shown

    monkeypatch.setattr(train, "validate", spy)
    options = {**RUN, "validate_every": 4, "validate_items": 2}
    fit_tokenizer(image_tokenizer(), images(), run_dir=tmp_path, held_out=images()[:5], **options)
    figures = json.loads((tmp_path / "validation.json").read_text())
    assert seen == [2, 2, 2, 5]
    assert figures["best"]["loss"] == 6.0 and figures["last"]["loss"] == 0.0 and figures["last"]["step"] == 9


@pytest.mark.parametrize("kind", ["fsq", "lfq", "simvq"])
def test_every_kind_of_quantizer_trains(kind, tmp_path):
    tokenizer = ImageVQ(channels=(8, 8, 8), codebook_size=16, codebook_dim=8, quantizer=kind)
    before = {name: p.detach().clone() for name, p in tokenizer.named_parameters()}
    trained = fit_tokenizer(tokenizer, images(), run_dir=tmp_path, **RUN)
    assert any(not torch.equal(before[name], p) for name, p in trained.named_parameters() if "quantizer" in name)
    trained.save_pretrained(tmp_path / "saved")
    media = StepBatches(images(), batch_size=2)[0]["media"]
    assert torch.equal(load(tmp_path / "saved").encode(media).codes, trained.encode(media).codes)


def test_what_the_tokenizer_asks_for_is_added(tmp_path):
    class Greedy(ImageVQ):
        def forward(self, media, lengths=None):
            output = super().forward(media, lengths)
            output.extra_losses = {"size": self.linear_in.bias.square().sum() * 100}
            return output

    options = {"channels": (8, 8, 8), "codebook_size": 8, "codebook_dim": 8, "stage_steps": 2}
    recorder = Recorder()
    pulled = fit_tokenizer(Greedy(**options), images(), run_dir=tmp_path / "a", callbacks=[recorder.callback], **RUN)
    plain = fit_tokenizer(ImageVQ(**options), images(), run_dir=tmp_path / "b", **RUN)
    assert "size" in recorder.parts[0] and pulled.linear_in.bias.norm() < plain.linear_in.bias.norm()


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
@pytest.mark.parametrize("game", [False, True])
def test_two_devices_train_as_one(game, tmp_path):
    """Same global batches, so the same training, but for the order of sums; every rank ends with the same bits."""
    program = textwrap.dedent("""
        import json, os, sys
        import numpy as np
        import torch
        from anyglot_tokenizers import ImageVQ, fit_tokenizer
        from anyglot_tokenizers.train import LitTokenizer

        torch.set_num_threads(1)
        folder, devices, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
        images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8)
        kind = "rvq" if options else "fsq"  # restarts are drawn from rows in another order
        tokenizer = ImageVQ(channels=(8, 8, 8), codebook_size=8, codebook_dim=8, stage_steps=2, dropout=0.0,
                            num_quantizers=1, quantizer=kind)
        fit_tokenizer(tokenizer, images, run_dir=folder, max_steps=6, batch_size=4, precision="32-true", muon=False,
                      accelerator="cpu", devices=devices, held_out=images[:3], validate_every=3, **options)
        tokenizer.save_pretrained(f"{folder}/rank{os.environ.get('LOCAL_RANK', 0)}")
    """)
    script = tmp_path / "run.py"
    script.write_text(program)
    options = IMAGE_GAME if game else {}
    for devices in (1, 2):
        command = [sys.executable, str(script), str(tmp_path / str(devices)), str(devices), json.dumps(options)]
        done = subprocess.run(command, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    one, first, second = (load(tmp_path / name) for name in ("1/rank0", "2/rank0", "2/rank1"))
    assert first.fingerprint == second.fingerprint
    if not game:
        for name, tensor in one.state_dict().items():
            assert torch.allclose(tensor, first.state_dict()[name], atol=2e-4), name


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


DECODERS = {
    "image": (image_tokenizer, images, {}),
    "digits": (
        lambda: TwoToneVQ(downsample_factor=8, patch=4, channels=(8, 8), num_patterns=16, num_tones=8, stage_steps=2),
        images,
        {},
    ),
    "speech": (lambda: AudioCodec(**SPEECH), sounds, {"crop": 1024}),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_alone_is_trained_from_codes(kind, tmp_path):
    build, data, more = DECODERS[kind]
    start = fit_tokenizer(build(), data(), run_dir=tmp_path / "all", **{**RUN, "max_steps": 30}, **more)
    tokenizer = twin_of(start).requires_grad_(True)
    batch = StepBatches(data(), batch_size=4, seed=3, crop=more.get("crop"))[0]
    media, lengths = batch["media"], batch.get("lengths")
    before = start.encode(media, lengths)
    how = {**RUN, "max_steps": 40, "lr": 3e-3, "held_out": data(), "validate_every": 20}
    fit_tokenizer(tokenizer, data(), run_dir=tmp_path / "decoder", from_codes=1, **how, **more)
    assert torch.equal(tokenizer.encode(media, lengths).codes, before.codes)  # of all quantizers
    changed = {
        name.split(".")[0]
        for name, old in start.state_dict().items()
        if not torch.equal(tokenizer.state_dict()[name], old)
    }
    decoders = {"unfold", "decoder", "head", "linear_out", "pattern_out", "tones_out"}
    assert "decoder" in changed and changed <= decoders
    loss = train.loss_for(start, {})
    batches = [batch]
    old, new = (validate(t, loss, batches, 1)[0] for t in (start, tokenizer))
    assert new["loss"] < old["loss"] and "usage/0" in new and "usage/1" not in new
    shown = json.loads((tmp_path / "decoder" / "validation.json").read_text())["last"]
    assert shown["step"] == 40 and "usage/1" not in shown


def test_the_gradient_of_a_decoder_is_that_of_decoding(tmp_path):
    tokenizer = fit_tokenizer(AudioCodec(**SPEECH), sounds(), run_dir=tmp_path, crop=1024, **RUN)
    module = LitTokenizer(tokenizer, max_steps=1, from_codes=1)
    batch = StepBatches(sounds(), batch_size=4, crop=1024)[0]
    output = module._decoded(batch["media"], batch["lengths"])
    codes = tokenizer.encode(batch["media"], batch["lengths"], num_quantizers=1)
    assert torch.equal(output.media.clamp(-1, 1), tokenizer.decode(codes))
    assert int(output.stats["counts"].sum()) == int(codes.lengths.sum()) and output.stats["counts"].shape == (1, 8)
    tokenizer.zero_grad()
    output.media.square().sum().backward()
    reached = {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.grad is not None}
    assert reached == {"unfold", "decoder", "head"}


def test_a_decoder_needs_codes_to_learn_from(tmp_path):
    with pytest.raises(ManifestError, match=r"from_codes 3 must lie in 1\.\.2"):
        LitTokenizer(AudioCodec(**SPEECH), max_steps=1, from_codes=3)
    with pytest.raises(ManifestError, match="from_codes 0"):
        LitTokenizer(AudioCodec(**SPEECH), max_steps=1, from_codes=0)
    with pytest.raises(ManifestError, match="from_codes is for a trained tokenizer"):
        fit_tokenizer(AudioCodec(**SPEECH), sounds(), run_dir=tmp_path, from_codes=1, crop=1024, **RUN)
    start = fit_tokenizer(AudioCodec(**SPEECH), sounds(), run_dir=tmp_path / "one", crop=1024, **RUN)
    fit_tokenizer(start, sounds(), run_dir=tmp_path / "decoder", from_codes=1, crop=1024, **RUN)
    start.save_pretrained(tmp_path / "another")
    with pytest.raises(CheckpointError, match="start"):
        fit_tokenizer(
            load(tmp_path / "another"), sounds(), run_dir=tmp_path / "decoder", from_codes=1, crop=1024, **RUN
        )
    with pytest.raises(UnsupportedError, match="makes no media of latents"):
        SeriesVQ(channels=1).from_latents(torch.zeros(1, 8, 4), torch.ones(1, 4, dtype=torch.bool))
    untaught = AudioCodec(**SPEECH, quantizer="fsq")
    print_before = untaught.fingerprint
    with pytest.raises(ManifestError, match="train it without from_codes first"):
        fit_tokenizer(untaught, sounds(), run_dir=tmp_path / "never", from_codes=1, crop=1024, **RUN)
    series = SeriesVQ(channels=1, stage_steps=0)
    for module in series.modules():
        if hasattr(module, "steps"):
            module.steps += 1
    with pytest.raises(UnsupportedError, match="SeriesVQ gives no latents"):
        fit_tokenizer(
            series, sounds(), run_dir=tmp_path / "never", from_codes=1, crop=1024, loss=torch.nn.MSELoss(), **RUN
        )
    assert untaught.fingerprint == print_before and not (tmp_path / "never").exists()


def test_what_cannot_be_trained_is_refused_before_data_are_read(tmp_path):
    snac = {"sampling_rate": 24000, "encoder_dim": 8, "encoder_rates": [2, 3], "decoder_dim": 16, "noise": True}
    snac |= {"decoder_rates": [3, 2], "attn_window_size": None, "codebook_size": 32, "codebook_dim": 4}
    published = Snac(model={**snac, "vq_strides": [4, 2, 1], "depthwise": True}, license="mit")
    for tokenizer in (image_tokenizer().requires_grad_(False), published, HeardVQ(dim=8, depth=1, channels=4)):
        with pytest.raises(UnsupportedError, match="cannot be trained here"):
            fit_tokenizer(tokenizer, None, run_dir=tmp_path / "never", **RUN)
    assert not (tmp_path / "never").exists()


def test_images_stay_as_they_are_without_a_crop():
    wide = np.random.default_rng(0).integers(0, 256, (8, 16, 32, 3), np.uint8)
    plain = StepBatches(wide, batch_size=8)[0]["media"]
    mirrored = StepBatches(wide, batch_size=8, augment=Augment(flip=1.0))[0]["media"]
    assert plain.shape == (8, 3, 16, 32) and torch.equal(mirrored.flip(3), plain)
    squares = StepBatches(wide, batch_size=8, augment=Augment(zoom=(0.5, 1.0)))[0]["media"]
    assert squares.shape == (8, 3, 16, 16)

    class Two:
        fingerprint, is_image, channels = "two", True, 3

        def __len__(self):
            return 2

        def __getitem__(self, item):
            return torch.zeros(16, 16 + 8 * item, 3, dtype=torch.uint8)

    with pytest.raises(MediaError, match="16x16 and 16x24 pixels"):
        StepBatches(Two(), batch_size=2)[0]
    assert StepBatches(Two(), batch_size=2, crop=8)[0]["media"].shape == (2, 3, 8, 8)


def test_a_run_is_of_the_tokenizer_it_began_with(tmp_path):
    how = {"run_dir": tmp_path / "run", "max_steps": 5, "batch_size": 2, "lr": np.float64(1e-3)}
    first, again = image_tokenizer(), image_tokenizer()
    fit_tokenizer(first, images(), **how)
    assert "start" in (saved := torch.load(how["run_dir"] / CHECKPOINT, weights_only=True)["anyglot"])
    assert saved["start"] is None
    for same in (again, first):  # reads the checkpoint, although the rate was a number of numpy's
        assert fit_tokenizer(same, images(), **how).fingerprint == first.fingerprint
    first.save_pretrained(tmp_path / "first")
    other = load(tmp_path / "first")
    with pytest.raises(CheckpointError, match="from a run with start None"):
        fit_tokenizer(other, images(), **how)
    fit_tokenizer(other, images(), **how | {"run_dir": tmp_path / "other"})
    assert fit_tokenizer(load(tmp_path / "first"), images(), **how | {"run_dir": tmp_path / "other"}).fingerprint == (
        other.fingerprint
    )
