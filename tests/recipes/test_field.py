"""The field data: nobody and nothing held out is in training, and augmentation keeps what the tokenizers expect."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import BlockConfig, LMConfig, TokenizerConfig, encode_audio, encode_images
from anyglot_recipes.field import (
    IMAGE_SIZE,
    SAMPLE_RATE,
    WORDS,
    FieldConfig,
    FieldData,
    FieldDataConfig,
    Picture,
    field_trial,
    read_field_data,
    vary_picture,
    vary_speech,
)
from anyglot_recipes.field_eval import as_heard, as_seen
from anyglot_recipes.field_graders import interval
from anyglot_recipes.field_meaning import (
    Heard,
    at_speeds,
    between,
    caption_words,
    microphone,
    spoken,
    to_tensor,
    train_heard,
    vary_images,
    vary_power,
)
from anyglot_recipes.field_phones import PART, STEP, align, read_phones, write_phones
from anyglot_recipes.field_voices import Voices
from anyglot_synth.backends import BackendError
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.meaning import HeardVQ, SeenVQ
from anyglot_tokenizers.media import write_audio
from anyglot_tokenizers.tokenizer import seeded


@pytest.fixture(scope="module")
def data(shared_data: Path) -> FieldData:
    return read_field_data(FieldDataConfig(root=str(shared_data / "real")))


def test_the_held_out_speaker_is_only_in_test(data: FieldData) -> None:
    assert {c.speaker for c in data.test_clips} == {"jackson"}
    assert "jackson" not in {c.speaker for c in data.clips} and len({c.speaker for c in data.clips}) >= 3
    for clips in (data.clips, data.test_clips):
        assert {c.digit for c in clips} == set(range(10))


def test_no_picture_is_in_both_splits(data: FieldData) -> None:
    train, test = ({(p.kind, p.name) for p in pictures} for pictures in (data.pictures, data.test_pictures))
    assert not train & test
    pixels = [{p.pixels.tobytes() for p in pictures} for pictures in (data.pictures, data.test_pictures)]
    assert not pixels[0] & pixels[1]
    for kind in ("sign", "emoji"):
        held = sum(k == kind for k, _ in test)
        assert 0.05 < held / (held + sum(k == kind for k, _ in train)) < 0.15
    for pictures in (data.pictures, data.test_pictures):
        assert {p.word for p in pictures if p.kind == "sign"} == set(WORDS)


def test_media_are_what_the_tokenizers_take(data: FieldData) -> None:
    for picture in (*data.pictures[:5], *data.test_pictures[-5:]):
        assert picture.pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and picture.pixels.dtype == np.uint8
        assert picture.word == picture.word.lower() != ""
    for audio in (*(c.audio for c in data.test_clips[:20]), *data.unlabelled[:3]):
        assert audio.dtype == np.float32 and audio.ndim == 1 and np.abs(audio).max() <= 0.951
    assert data.unlabelled


def test_vary_speech_keeps_kind_and_range(data: FieldData) -> None:
    rng, again = np.random.default_rng(0), np.random.default_rng(0)
    for clip in data.clips[:20]:
        varied = vary_speech(clip.audio, rng)
        assert varied.dtype == np.float32 and varied.ndim == 1 and np.isfinite(varied).all()
        assert np.abs(varied).max() <= 1
        assert 0.75 * len(clip.audio) < len(varied) < 1.3 * len(clip.audio) + 0.2 * SAMPLE_RATE
        assert np.array_equal(varied, vary_speech(clip.audio, again))


@pytest.mark.parametrize("kind", ["sign", "emoji"])
def test_vary_picture_keeps_kind_and_range(kind: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    before = pixels.copy()
    varied = [vary_picture(Picture(kind, "one", pixels, "a.png"), rng) for _ in range(10)]
    assert np.array_equal(pixels, before)
    assert all(v.shape == pixels.shape and v.dtype == np.uint8 for v in varied)
    assert len({v.tobytes() for v in varied}) > 5
    if kind == "emoji":  # moved, never recolored or mirrored
        colors = {tuple(c) for c in pixels.reshape(-1, 3)}
        assert all({tuple(c) for c in v.reshape(-1, 3)} <= colors for v in varied)


def test_an_unknown_speaker_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "spoken_digits").mkdir()
    for name in ("3_theo_0", "4_lucas_1"):
        write_audio(tmp_path / "spoken_digits" / f"{name}.wav", torch.full((1, 800), 0.1), SAMPLE_RATE)
    with pytest.raises(ManifestError, match="no clips of held_out_speaker 'nobody'; speakers found: lucas, theo"):
        read_field_data(FieldDataConfig(root=str(tmp_path), held_out_speaker="nobody"))


def test_missing_data_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="speakers found: none .*--data.root"):
        read_field_data(FieldDataConfig(root=str(tmp_path / "missing")))


def test_the_model_answers_in_a_voice_it_may_hear(shared_data: Path) -> None:
    with pytest.raises(ManifestError, match="reply_speaker 'jackson' must be one of the training speakers"):
        read_field_data(FieldDataConfig(root=str(shared_data / "real"), reply_speaker="jackson"))


@pytest.mark.parametrize("steps", [0, 30])
def test_codes_of_a_trained_reader_say_the_digit(data: FieldData, tmp_path: Path, steps: int) -> None:
    """Two digits of one speaker, a few steps: codes of takes that were never heard tell the digits apart.

    With phones of a teacher that is so as well.
    """
    phones = None
    if steps:
        pytest.importorskip("pocketsphinx")
        write_phones(data.unlabelled[1:2], tmp_path)
        phones = read_phones(tmp_path, data.unlabelled[1:2])
    heard = HeardVQ(dim=64, depth=2, channels=16, codebook_size=64, stage_steps=50)
    few = [c for c in data.clips if c.digit in (6, 7) and c.speaker == "george" and c.take < 30]
    train, test = ([c for c in few if (c.take < 20) == known] for known in (True, False))
    digits = spoken(train, Voices([], []))
    head = train_heard(heard, digits, steps=150, seed=0, batch_size=16, phones=phones, phone_steps=steps)
    right = []
    for clip, code in zip(test, encode_audio(heard, [c.audio for c in test]), strict=True):
        q_BDN = heard.quantizer.decode(torch.from_numpy(code)[None])
        right.append(int(head(q_BDN, torch.ones(1, code.shape[1], dtype=torch.bool)).argmax()) == clip.digit)
    assert len(right) == 20 and np.mean(right) > 0.85  # chance: a half


def test_varied_power_and_pictures_keep_their_kind(data: FieldData) -> None:
    heard, rng = HeardVQ(), np.random.default_rng(0)
    tone = 0.3 * np.sin(np.arange(9 * STEP) * 0.5).astype(np.float32)
    sounds = [np.concatenate([np.zeros(30 * STEP, np.float32), tone, np.zeros(14 * STEP, np.float32)])]
    sounds += [data.clips[1].audio]
    phones = [np.repeat([0, 1, 0], [30, 9, 14]), None]
    said = at_speeds(heard, sounds, 3, phones, [c.digit for c in data.clips[:2]])
    assert len(said) == 6 and [h.digit for h in said[:2]] == [c.digit for c in data.clips[:2]]
    for i, each in enumerate(said):
        power, varied = each.power, vary_power(each, rng)
        assert varied.power.shape[1] == power.shape[1] and varied.digit == each.digit
        assert bool((varied.power >= 0).all()) and bool(varied.power.isfinite().all())
        assert 0.7 * len(power) < len(varied.power) < 1.4 * len(power) + 24
        assert (each.phone is None) == (varied.phone is None) == bool(i % 2)
        if varied.phone is not None:
            assert len(varied.phone) == len(varied.power)
            for it in (each, varied):  # the tone is where its label is
                assert it.phone is not None
                loud_t = np.flatnonzero(it.power.sum(1).numpy() > 0.3 * float(it.power.sum(1).max()))
                where_t = np.flatnonzero(it.phone == 1)
                assert abs(loud_t[0] - where_t[0]) <= 2 and abs(loud_t[-1] - where_t[-1]) <= 2
    x_BCHW = to_tensor(data.pictures[:4])
    with seeded(0):
        moved = vary_images(x_BCHW, torch.tensor([True, True, False, False]))
    assert moved.shape == x_BCHW.shape and 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert float((moved - x_BCHW).abs().mean()) > 0.01


def _said(bands: dict[int, int], phones: list[tuple[int, int]], level: float) -> Heard:
    """Each phone sounds in its own mel band; silence (0) in none."""
    label_t = np.repeat([p for p, _ in phones], [n for _, n in phones])
    power_tM = torch.full((len(label_t), 40), 1e-6)
    for t, phone in enumerate(label_t):
        if phone:
            power_tM[t, bands[int(phone)]] = level
    return Heard(power_tM, label_t, 3)


def test_a_voice_between_two_says_the_word_when_the_first_says_it() -> None:
    first = _said({1: 5, 2: 20}, [(0, 6), (1, 10), (2, 8)], 1.0)
    other = _said({1: 7, 2: 24}, [(0, 2), (1, 5), (2, 20), (0, 9)], 100.0)
    made = between(first, other, 0.5)
    assert made.digit == 3 and made.phone is first.phone and len(made.power) == len(first.power)
    for phone, ours, theirs in ((1, 5, 7), (2, 20, 24)):
        where_t = first.phone == phone
        loud_tM = made.power[torch.from_numpy(where_t)]
        assert set(loud_tM.topk(2, dim=1).indices.flatten().tolist()) == {ours, theirs}
        assert torch.allclose(loud_tM[:, ours].log(), loud_tM[:, theirs].log(), atol=1.0)  # half of each, at one level
    assert float(made.power[:6].max()) < 0.1 * float(made.power[6:].amax(1).min())  # silence stays silent
    alone = between(first, other, 1.0).power
    assert torch.allclose(alone, first.power / first.power.mean() + 1e-4, rtol=1e-3)
    cut = _said({1: 7, 2: 24}, [(1, 5), (2, 20)], 100.0)  # no silence: none of its phones is heard in that of the first
    around = between(_said({1: 5, 2: 20}, [(0, 6), (1, 10), (2, 8), (0, 9)], 1.0), cut, 0.5).power
    assert float(torch.cat([around[:6], around[-9:]]).max()) < 0.1 * float(around[6:-9].amax(1).min())
    longer = _said({1: 7, 2: 24}, [(1, 5), (2, 20), (1, 3)], 100.0)
    assert between(first, longer, 0.5) is first  # other phones: no frame of one belongs to one of the other
    unknown = between(Heard(first.power, None, 3), other, 0.0).power  # stretched evenly: 24 frames of 36
    assert int(unknown[5].argmax()) == 24 and int(unknown[4].argmax()) == 7


def test_microphones_are_smooth_and_differ() -> None:
    rng = np.random.default_rng(0)
    gain_nM = torch.stack([microphone(40, rng) for _ in range(200)]).log()
    assert 0.5 < float(gain_nM.std(0).mean()) < 1.5 and abs(float(gain_nM.mean())) < 0.2
    assert torch.equal(microphone(40, np.random.default_rng(1)), microphone(40, np.random.default_rng(1)))
    steps_nM = gain_nM.diff(dim=1)
    assert float(steps_nM.std()) < 0.25 * float(gain_nM.std())


@pytest.mark.skipif(not importlib.util.find_spec("pocketsphinx"), reason="pocketsphinx is not installed")
def test_phones_of_a_reader_are_where_they_are_said(data: FieldData, tmp_path: Path) -> None:
    clip, silence = data.unlabelled[1], np.zeros(1600, np.float32)  # "Chapter ninety-nine ..."
    clips = [silence] * PART + [clip]  # two processes, in order
    write_phones(clips, tmp_path)
    phones = read_phones(tmp_path, clips)
    with pytest.raises(ManifestError, match="phones of 11 clips, but there are 1; remove the folder"):
        read_phones(tmp_path, [clip])
    said, label_t = phones.clips[-1]
    assert said is clip and len(label_t) == -(-len(clip) // STEP)
    spelt = [phones.names[p] for i, p in enumerate(label_t) if i == 0 or p != label_t[i - 1]]
    assert spelt[:11] == ["SIL", *["CH", "AE", "P", "T", "ER", "N", "AY", "N", "T", "IY"]]
    loud_t = np.array([np.abs(clip[t * STEP : (t + 1) * STEP]).mean() for t in range(len(label_t))])
    silent_t = label_t == phones.names.index("SIL")
    assert loud_t[silent_t].mean() < 0.3 * loud_t[~silent_t].mean()


def test_without_clips_there_are_no_phones(tmp_path: Path) -> None:
    write_phones([], tmp_path)
    assert read_phones(tmp_path, []).clips == []


def test_without_the_judge_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(BackendError, match="pip install pocketsphinx"):
        field_trial(FieldConfig(run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_table_is_markdown(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"table results must end in \.md"):
        field_trial(FieldConfig(run_dir=str(tmp_path / "run"), table="results"))
    assert not (tmp_path / "run").exists()


def test_phone_steps_are_of_what_hears(tmp_path: Path) -> None:
    for name, steps in (("heard", -1), ("seen", 1)):
        config = FieldConfig(run_dir=str(tmp_path / "run"))
        getattr(config, name).phone_steps = steps
        with pytest.raises(ManifestError, match=r"heard\.phone_steps must be 0 or more; seen has none"):
            field_trial(config)


def test_settings_that_only_later_stages_read_are_refused_first(tmp_path: Path) -> None:
    lm, image = LMConfig(blocks={"video": BlockConfig()}), TokenizerConfig(precision="fp8")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"lm": lm}, "lm.blocks: no modality video; there are heard, seen, image, speech, music"),
        ({"lm": LMConfig(blocks={"heard": BlockConfig(num_quantizers=3)})}, "heard: num_quantizers=3, but .* has 1"),
        ({"image": image}, "fp8"),
        ({"music": TokenizerConfig(model={"strides": 5})}, r"music\..*strides"),
    )
    for given, message in cases:
        with pytest.raises(ManifestError, match=message):
            field_trial(FieldConfig(run_dir=str(tmp_path / "run"), **given))
    assert not (tmp_path / "run").exists()


def test_the_model_reads_what_it_makes_as_it_reads_what_is_given(data: FieldData) -> None:
    tokenizers = {"heard": HeardVQ(dim=64, depth=2, channels=16).eval(), "seen": SeenVQ().eval()}
    model = cast(UnifiedModel, SimpleNamespace(tokenizers=tokenizers))
    pictures, clips = data.pictures[:3], data.clips[:3]
    wanted = encode_images(tokenizers["seen"], np.stack([p.pixels for p in pictures]))
    for segment, codes in zip(as_seen(model, list(to_tensor(pictures))), wanted, strict=True):
        assert (segment.modality, segment.role) == ("seen", "user") and np.array_equal(segment.content, codes)
    wanted = encode_audio(tokenizers["heard"], [c.audio for c in clips])
    made = [torch.from_numpy(c.audio)[None] for c in clips]  # `[1, samples]`, as tokenizers decode
    for segment, codes in zip(as_heard(model, made), wanted, strict=True):
        assert (segment.modality, segment.role) == ("heard", "user") and np.array_equal(segment.content, codes)


def test_words_of_captions_are_those_that_recur() -> None:
    assert caption_words(["red heart", "red red car", "a red sun", "heart"], least=2) == ["heart", "red"]


def test_an_interval_holds_the_mean_and_narrows() -> None:
    low, high = interval([1.0] * 80 + [0.0] * 20)
    assert 0.70 < low < 0.8 < high < 0.90
    wide = interval([1.0] * 8 + [0.0] * 2)
    assert wide[1] - wide[0] > 2 * (high - low)
    assert interval([1.0] * 10) == (1.0, 1.0)


def test_a_path_takes_every_phone_in_order_and_silence_only_where_it_is() -> None:
    rng = np.random.default_rng(0)
    for wanted in ([0, 0, 1, 1, 2, 0], [1, 2, 2], [0, 1, 2, 2, 2], [1, 1, 2, 0]):
        log_NP = rng.normal(0, 0.1, (len(wanted), 3))
        log_NP[np.arange(len(wanted)), wanted] += 5
        total, path = align(log_NP, [0, 1, 2, 0])
        assert path == wanted and total == pytest.approx(log_NP[np.arange(len(wanted)), wanted].sum())
    total, path = align(rng.normal(size=(6, 3)), [0, 1, 2, 0])
    moves = [b for a, b in itertools.pairwise([-1, *path]) if a != b]
    assert moves in ([0, 1, 2, 0], [1, 2, 0], [0, 1, 2], [1, 2])
    assert len(align(np.zeros((1, 3)), [0, 1, 2, 0])[1]) == 1
