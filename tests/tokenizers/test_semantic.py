"""Teachers, and what learning from one does to the first codebook."""

import math

import numpy as np
import pytest
import torch

from anyglot_tokenizers import AudioCodec, CheckpointError, MediaError, fit_tokenizer, load
from anyglot_tokenizers.probe import label_information
from anyglot_tokenizers.quantize import spread_seeds
from anyglot_tokenizers.semantic import (
    Distillation,
    PublishedTeacher,
    SpeechTeacher,
    at_places,
    cluster,
    load_teacher,
    stretch,
    train_teacher,
)

SMALL_TEACHER = {"dim": 32, "depth": 2, "num_mels": 20, "clusters": 8}
SMALL_CODEC = {"n_fft": 640, "hop": 160, "stride": 4, "num_mels": 20, "dim": 24, "encoder_depth": 1, "decoder_depth": 1}
SMALL_CODEC |= {"codebook_dim": 8, "codebook_size": 16, "num_quantizers": 2, "stage_steps": 2, "dropout": 0.0}


def noise(samples, seed=0):
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def speech(items, seed):
    """Toy speech at 16 kHz: 80 ms sounds of four kinds, two resonances each; pitch and loudness tell nothing.

    Returns audio float32 `[items, 16000]` and kinds int64 `[items, 25]`, one per 40 ms.
    """
    rng = np.random.default_rng(seed)
    frequency = np.fft.rfftfreq(1280, 1 / 16000)
    shapes = [sum(np.exp(-(((frequency - f) / 150) ** 2)) for f in pair) for pair in PAIRS]
    sounds, kinds = [], []
    for _ in range(items):
        chosen = rng.integers(0, len(PAIRS), 13)
        pieces, loudness = [], 10 ** rng.uniform(-2, 0)
        for kind in chosen:
            pulses = np.zeros(1280)
            pulses[:: rng.integers(60, 160)] = loudness
            pieces.append(np.fft.irfft(np.fft.rfft(pulses) * (shapes[kind] + 0.01)))
        sounds.append(np.concatenate(pieces)[:16000])
        kinds.append(np.repeat(chosen, 2)[:25])
    return torch.tensor(np.array(sounds), dtype=torch.float32), torch.tensor(np.array(kinds))


PAIRS = ((300, 2300), (700, 1200), (500, 3200), (400, 900))


@pytest.mark.parametrize(("kind", "norm"), [("hubert", "group"), ("wavlm", "layer"), ("wav2vec2", "group")])
def test_published_teacher_is_the_model(kind, norm, tmp_path):
    """Features are the hidden states that transformers gives for the normalised audio, item by item."""
    import transformers

    names = {"hubert": "Hubert", "wavlm": "WavLM", "wav2vec2": "Wav2Vec2"}
    config = getattr(transformers, f"{names[kind]}Config")(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{names[kind]}Model")(config).eval()
    model.save_pretrained(tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=norm == "layer")
    extractor.save_pretrained(tmp_path)
    x = noise(16000)
    with torch.no_grad():
        hidden = model(**extractor(x.numpy(), sampling_rate=16000, return_tensors="pt"), output_hidden_states=True)
    for layer, expected in (("average", torch.stack(hidden.hidden_states).mean(0)), (2, hidden.hidden_states[2])):
        teacher = PublishedTeacher(tmp_path, layer)
        assert (teacher.dim, teacher.step, teacher.first) == (16, 320, 199.5)
        assert torch.allclose(teacher.features(x[None], torch.tensor([16000])), expected, atol=1e-4)
    teacher = load_teacher(tmp_path)
    padded = torch.full((2, 16000), 7.0)
    padded[0], padded[1, :9000] = x, x[:9000]
    together = teacher.features(padded, torch.tensor([16000, 9000]))
    assert torch.allclose(together[:1], teacher.features(x[None], torch.tensor([16000])), atol=1e-4)
    if norm == "layer":  # these know about padding
        alone = teacher.features(x[None, :9000], torch.tensor([9000]))
        assert torch.allclose(together[1:, : alone.shape[1] - 4], alone[:, :-4], atol=0.1)
    assert teacher.features(x[None, :100], torch.tensor([100])).shape == (1, 1, 16)
    codec = AudioCodec(**SMALL_CODEC, semantic_dim=16)
    codec.learn_from(Distillation(teacher))
    assert codec.train()(x[None, None]).extra_losses["semantic"].isfinite()


def test_no_such_teacher(tmp_path):
    with pytest.raises(CheckpointError, match="HuBERT"):
        load_teacher(tmp_path)
    SpeechTeacher(**SMALL_TEACHER).save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(CheckpointError, match="not a readable teacher"):
        load_teacher(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"dim": 32', '"dim": 33'))
    with pytest.raises(CheckpointError, match="not a readable teacher"):
        load_teacher(tmp_path)


def test_own_teacher_is_a_function_of_its_arguments(tmp_path):
    sounds = [noise(9000), noise(20000, 1), noise(4000, 2)]
    options = {**SMALL_TEACHER, "steps": 3, "batch_size": 4, "crop_seconds": 0.5}
    state = torch.get_rng_state()
    teacher = train_teacher(sounds, **options)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = train_teacher(sounds, **options), train_teacher(sounds, **options, seed=1)
    x, lengths = torch.stack([noise(8000, 3), noise(8000, 4)]), torch.tensor([8000, 3000])
    found = teacher.features(x, lengths)
    assert found.shape == (2, 25, 32) and torch.equal(found, again.features(x, lengths))
    assert not torch.allclose(found, other.features(x, lengths), atol=1e-3)
    alone = teacher.features(x[1:, :3000], lengths[1:])
    assert torch.allclose(alone[0], found[1, : alone.shape[1]], atol=1e-5)  # padding does not matter
    loud = teacher.features(x * 3, lengths)
    assert torch.allclose(loud, found, atol=0.05)  # nor does loudness
    teacher.save_pretrained(tmp_path)
    assert torch.equal(load_teacher(tmp_path).features(x, lengths), found)
    with pytest.raises(MediaError):
        train_teacher([], **options)


def test_clusters_are_found():
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    rows = (centres.repeat_interleave(50, 0) + 0.1 * noise(300).reshape(150, 2)).contiguous()
    found = cluster(rows, 3)
    assert torch.cdist(centres, found).amin(1).max() < 0.05
    assert spread_seeds(rows, 3).shape == (3, 2)


def test_stretch_moves_formants():
    """A peak at band 10 moves by at most the share asked for, at all times alike."""
    mel = torch.exp(-((torch.arange(40) - 10.0) ** 2) / 2).repeat(200, 6, 2)
    assert torch.allclose(stretch(mel, 0.0), mel)
    torch.manual_seed(0)
    moved = stretch(mel, 0.2).unflatten(2, (2, 40)).argmax(3)
    assert moved.min() == 8 and moved.max() in (12, 13) and torch.equal(moved, moved[:, :1, :1].expand_as(moved))


def test_at_places():
    ramp = torch.arange(10.0)[None, :, None]
    places = 80.0 + 160 * torch.arange(10)
    assert torch.allclose(
        at_places(ramp, places, torch.tensor([80.0, 160.0, 1500.0]), 160)[0, :, 0], torch.tensor([0.0, 0.5, 8.875])
    )
    assert torch.allclose(
        at_places(ramp, places, torch.tensor([-50.0, 9999.0]), 160)[0, :, 0], torch.tensor([0.0, 9.0])
    )
    pooled = at_places(ramp, places, torch.tensor([640.0]), 640)[0, 0, 0]
    assert math.isclose(pooled, 3.5, abs_tol=1e-5)
    assert torch.allclose(at_places(ramp, places, places, 160), ramp)


@pytest.mark.parametrize("axis", ["frame", "dim"])
def test_loss_is_least_for_the_right_answer(axis):
    """Predictions are compared where items have sound; offset and scale of the teacher's features do not count."""
    teacher = SpeechTeacher(**SMALL_TEACHER)
    codec = AudioCodec(**SMALL_CODEC, semantic_dim=32)
    distillation = Distillation(teacher, 2.0, axis)
    media, lengths = torch.stack([noise(16000), noise(16000, 1)])[:, None], torch.tensor([16000, 6000])
    target, valid = distillation.target(media, lengths, 16000, 640)
    assert target.shape == (2, 25, 32) and valid[..., 0].sum(1).tolist() == [25, 10] and not target[1, 10:].any()
    assert torch.allclose(target.sum((0, 1)) / 35, torch.zeros(32), atol=1e-4)
    assert torch.allclose(target.square().sum((0, 1)) / 35, torch.ones(32), atol=1e-2)
    best = float(distillation(target, media, lengths, codec))
    garbage = target.clone()
    garbage[1, 10:] = 100.0
    assert float(distillation(garbage, media, lengths, codec)) == pytest.approx(best, rel=1e-5)
    worst = float(distillation(-target, media, lengths, codec))
    middle = float(distillation(noise(target.numel()).view_as(target), media, lengths, codec))
    assert best < middle < worst
    assert best == pytest.approx(0.0 if axis == "frame" else -2 * math.log(1 / (1 + math.exp(-1))), abs=1e-4)
    assert worst == pytest.approx(4.0 if axis == "frame" else -2 * math.log(1 / (1 + math.exp(1))), abs=1e-4)


def test_a_run_goes_on_with_its_own_teacher_only(tmp_path):
    teachers = SpeechTeacher(**SMALL_TEACHER), SpeechTeacher(**SMALL_TEACHER)
    with torch.no_grad():
        next(teachers[1].parameters()).add_(1)

    def run(teacher):
        codec = AudioCodec(**SMALL_CODEC, semantic_dim=32)
        codec.learn_from(Distillation(teacher))
        sounds = [noise(1600).numpy()]
        return fit_tokenizer(codec, sounds, run_dir=tmp_path, max_steps=5, batch_size=1, crop_seconds=0.1).fingerprint

    first = run(teachers[0])
    with pytest.raises(CheckpointError, match="with teacher_weights"):
        run(teachers[1])
    assert run(teachers[0]) == first
    path = tmp_path / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["anyglot"]["teacher_weights"]  # as earlier versions wrote it
    torch.save(checkpoint, path)
    assert run(teachers[0]) == first


def test_teacher_stays_outside(tmp_path):
    """The codec keeps its own weights only; the loss is there in training alone, and resampled for other rates."""
    teacher = SpeechTeacher(**SMALL_TEACHER)
    codec = AudioCodec(**{**SMALL_CODEC, "sample_rate": 24000, "hop": 240, "n_fft": 960}, semantic_dim=32)
    with pytest.raises(ValueError, match="semantic_dim 32"):
        codec.learn_from(Distillation(SpeechTeacher(**{**SMALL_TEACHER, "dim": 16})))
    with pytest.raises(ValueError, match="semantic_dim 0"):
        AudioCodec(**SMALL_CODEC).learn_from(Distillation(teacher))
    names = set(codec.state_dict())
    codec.learn_from(Distillation(teacher))
    assert set(codec.state_dict()) == names and {"semantic.weight", "semantic.bias"} < names
    x = noise(24000)[None, None]
    output = codec.train()(x)
    output.extra_losses["semantic"].backward()
    assert codec.encoder.embed.weight.grad.abs().sum() > 0 and codec.head.weight.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not codec.eval()(x).extra_losses
    codec.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again.encode(x).codes, codec.encode(x).codes) and again.distillation is None
    codec.learn_from(None)
    assert not codec.train()(x).extra_losses


def test_first_codebook_learns_kinds_of_sounds():
    """Toy speech: with a teacher trained on it, unlabelled, the first codebook tells more about the kinds of sounds."""
    audio, _ = speech(48, seed=0)
    teacher = train_teacher(list(audio), steps=40, batch_size=16, crop_seconds=1.0, **SMALL_TEACHER)
    unseen, kinds = speech(24, seed=1)
    told = {}
    for weight in (0.0, 10.0):
        codec = AudioCodec(**SMALL_CODEC, semantic_dim=32).train()
        codec.learn_from(Distillation(teacher, weight))
        optimizer = torch.optim.Adam(codec.parameters(), 3e-3)
        torch.manual_seed(0)
        for step in range(60):
            x = audio[torch.arange(step * 8, step * 8 + 8) % len(audio), None]
            output = codec(x)
            magnitudes = [
                torch.stft(y[:, 0, :16000], 512, 160, window=torch.hann_window(512), return_complex=True).abs()
                for y in (output.media, x)
            ]
            loss = (magnitudes[0] - magnitudes[1]).abs().mean() + output.commit_loss + output.extra_losses["semantic"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        first = codec.eval().encode(unseen[:, None], num_quantizers=1).codes[:, 0]
        told[weight] = label_information(first.flatten(), kinds.flatten())
    assert told[10.0] > told[0.0] + 0.1, told
