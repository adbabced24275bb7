"""Calibration and the asr filter on voices that speak here: what is kept, what is found, what is told."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anyglot_synth.calibration import (
    Calibration,
    Clip,
    Pace,
    clips_of,
    length_features,
    main,
    speech_seconds,
)
from anyglot_synth.dialogue import Dialogue, Part, Turn, address
from anyglot_synth.filters import make_filter
from anyglot_synth.filters.asr import AsrFilter
from anyglot_synth.nanoworld.language import describe
from anyglot_synth.nanoworld.scene import sample_scene
from anyglot_synth.nanoworld.voices import SAMPLE_RATE, SpeechCache
from anyglot_synth.recognise import NanoworldRecogniser
from anyglot_synth.scoring import Errors
from anyglot_synth.stages import FAILED, FILTERED, OK, Item
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import AnyglotError

pytestmark = pytest.mark.skipif(not shutil.which("flite"), reason="flite is not here")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SpeechCache:
    return SpeechCache(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def clips(cache: SpeechCache) -> list[Clip]:
    """Twelve descriptions of one to three things by each of two voices."""
    rng = np.random.default_rng(0)
    texts = [describe(sample_scene(rng, "train"), rng, style="spoken") for _ in range(24)]
    voices = ["flite/rms", "flite/slt"] * 12
    return [
        Clip(cache.say(text, voice[6:]), SAMPLE_RATE, text, voice) for text, voice in zip(texts, voices, strict=True)
    ]


@pytest.fixture(scope="module")
def calibration(clips: list[Clip]) -> Calibration:
    return Calibration.measure(NanoworldRecogniser(), clips)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data")


def put(store: Store, *clips: Clip) -> Item:
    parts = [
        Part(
            "speech",
            clip.words,
            clip.words,
            store.put_sound(
                address(clip.audio.tobytes().hex()),
                clip.audio,
                clip.sample_rate,
                {"backend": {"engine": "flite", "version": "2"}, "style": {"voice": clip.voice[6:]}},
            ),
        )
        for clip in clips
    ]
    return Item(0, Dialogue(tuple(Turn("user", (part,)) for part in parts), "test"))


def cut(clip: Clip, share: float) -> Clip:
    return Clip(clip.audio[: int(len(clip.audio) * share)], clip.sample_rate, clip.words, clip.voice)


def test_the_recognisers_own_error_is_over_all_words(clips: list[Clip]) -> None:
    def errors(clips: list[Clip]) -> Errors:
        return Calibration.measure(NanoworldRecogniser(), clips).voices["all"].errors

    good = [replace(clip, voice="all") for clip in clips[:10]]
    found = errors(good)
    assert found.total == sum(len(clip.words.replace(",", "").split()) for clip in good) and found.rate < 0.05
    assert errors([replace(clip, words=f"yes {clip.words}") for clip in good]).edits == found.edits + 10


def test_calibration_is_kept_whole(calibration: Calibration, clips: list[Clip], tmp_path: Path) -> None:
    assert set(calibration.voices) == {"flite/rms", "flite/slt"}
    for name, voice in calibration.voices.items():
        assert voice.num_clips == 12 and voice.errors.rate < 0.05 and 0.01 < voice.pace.sigma < 0.2
        for clip in (clip for clip in clips if clip.voice == name):
            assert abs(voice.pace.deviation(clip.words, speech_seconds(clip.audio, SAMPLE_RATE))) < 3.5
            assert voice.pace.deviation(clip.words, speech_seconds(cut(clip, 0.5).audio, SAMPLE_RATE)) < -3
    calibration.save(tmp_path / "voices.json")
    assert Calibration.load(tmp_path / "voices.json") == calibration
    with pytest.raises(AnyglotError, match="has 3 clips; 8 are needed"):
        Calibration.measure(NanoworldRecogniser(), [clip for clip in clips if clip.voice == "flite/rms"][:3])
    with pytest.raises(AnyglotError, match="no clips of a known voice"):
        Calibration.measure(NanoworldRecogniser(), [])
    for key, value in (("sigma", math.nan), ("weights", [1.0, 2.0]), ("weights", [math.inf] * 4)):
        damaged = calibration.to_dict()
        damaged["voices"]["flite/rms"]["pace"][key] = value
        with pytest.raises(AnyglotError, match=r"not a calibration .*'flite/rms'"):
            Calibration.from_dict(damaged)
    damaged = calibration.to_dict()
    damaged["voices"]["flite/rms"]["words"] = math.inf
    with pytest.raises(AnyglotError, match="not a calibration"):
        Calibration.from_dict(damaged)
    with pytest.raises(AnyglotError, match="none/voices.json: cannot be written"):
        calibration.save(tmp_path / "none" / "voices.json")
    (tmp_path / "bad.json").write_text('{"format": 2, "recogniser": {}, "voices": {"a": {}}}', encoding="utf-8")
    for name in ("bad.json", "none.json"):
        with pytest.raises(AnyglotError, match=name):
            Calibration.load(tmp_path / name)


def test_pace_finds_its_own_line() -> None:
    texts = [f"{'word ' * n}{'so, ' * (n % 4)}on {'ai' * (n % 3)}" for n in range(2, 30)]
    weights = np.array([0.4, 0.05, 0.03, 0.2])
    seconds = [float(weights @ length_features(text)) for text in texts]
    pace = Pace.fit(texts, seconds)
    assert pace.weights == pytest.approx(weights, abs=1e-3) and pace.sigma < 1e-3
    assert pace.deviation(texts[0], seconds[0] * 1.5) == pytest.approx(np.log(1.5) / 0.02, rel=0.01)  # least sigma
    noisy = [s * f for s, f in zip(seconds, np.exp(np.random.default_rng(0).normal(0, 0.1, 28)), strict=True)]
    assert 0.06 < Pace.fit(texts, noisy).sigma < 0.14


def test_the_filter_keeps_the_good_and_ends_the_bad(
    calibration: Calibration, clips: list[Clip], store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "voices.json"
    calibration.save(path)
    settings = {"recogniser": "nanoworld", "calibration": str(path), "max_error": 0.2, "max_sigmas": 3.5}
    stage = make_filter({"filter": "asr", **settings})
    good = stage(put(store, *clips[:6]), store)
    assert good.status == OK and set(good.facts) == {"speech_pace", "sigmas", "wer", "missed_end"}
    assert [len(values) for values in good.facts.values()] == [6, 6, 6, 6]
    assert max(good.facts["wer"]) <= 0.2
    by_length = sorted((clip for clip in clips if clip.voice == "flite/slt"), key=lambda clip: len(clip.audio))
    a, b = by_length[5:7]
    swapped = Clip(b.audio, b.sample_rate, a.words, a.voice)
    found = stage(put(store, clips[0], swapped), store)
    assert (found.status, found.stage, found.reason) == (FILTERED, "asr", "wer")
    assert found.detail.startswith("turn 2 (user): wer 0.") and "heard" in found.detail and len(found.facts["wer"]) == 2
    short = stage(put(store, cut(clips[0], 0.5)), store)
    assert (short.status, short.reason) == (FILTERED, "pace") and "wer" not in short.facts  # it was not listened to
    lax = make_filter({"filter": "asr", **settings, "max_sigmas": 100, "max_error": 0.6})
    end = lax(put(store, cut(by_length[-1], 0.75)), store)
    assert (end.status, end.reason) == (FILTERED, "missed_end") and end.facts["missed_end"][0] > 1


def test_letters_are_measured_against_letters_and_texts_in_their_language(clips: list[Clip], tmp_path: Path) -> None:
    rms = [clip for clip in clips if clip.voice == "flite/rms"]
    one = [replace(clip, words=clip.words.replace(" ", ""), language="de") for clip in rms]  # as scripts without spaces
    found = Calibration.measure(NanoworldRecogniser(), one).voices["flite/rms"]
    assert found.errors.rate >= 1 and found.letters.rate < 0.4
    path = tmp_path / "voices.json"
    Calibration(NanoworldRecogniser().identity(), {"flite/rms": found}).save(path)
    stage = AsrFilter("nanoworld", 0.1, str(path), metric="cer")
    assert stage.limits(found).errors == 0.1 + found.letters.rate
    digits = [f"{'wort ' * n}{10**n}" for n in range(1, 12)]
    seconds = [0.2 + 0.1 * length_features(text, "de")[1] for text in digits]
    german = Pace.fit(digits, seconds, ["de"] * len(digits))
    assert all(abs(german.deviation(text, s, "de")) < 0.1 for text, s in zip(digits, seconds, strict=True))


def test_a_voice_that_was_not_measured_is_judged_by_absolute_limits(
    calibration: Calibration, clips: list[Clip], store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "voices.json"
    Calibration(calibration.recogniser, {"flite/slt": calibration.voices["flite/slt"]}).save(path)
    stage = make_filter({"filter": "asr", "recogniser": "nanoworld", "calibration": str(path), "max_error": 0.2})
    rms, slt = clips[:2]
    good = stage(put(store, rms, slt), store)
    assert good.status == OK and good.facts["uncalibrated"] == [1] and len(good.facts["sigmas"]) == 1
    wrong = Clip(rms.audio, rms.sample_rate, slt.words, rms.voice)
    found = stage(put(store, wrong), store)
    assert (found.status, found.reason) == (FILTERED, "wer") and found.facts["uncalibrated"] == [1]


def test_without_a_calibration_the_limits_are_absolute(clips: list[Clip], store: Store) -> None:
    stage = make_filter({"filter": "asr", "recogniser": "nanoworld", "max_error": 0.2})
    assert stage(put(store, clips[0]), store).status == OK
    padded = Clip(np.pad(clips[0].audio, SAMPLE_RATE), SAMPLE_RATE, clips[0].words, clips[0].voice)
    facts = stage(make_filter("duration")(put(store, padded), store), store).facts
    assert facts["speech_pace"][0] > 1.3 * facts["pace"][0]  # of two filters and two meanings, both are kept
    fast = Clip(clips[0].audio[::4].copy(), SAMPLE_RATE, clips[0].words, clips[0].voice)
    assert stage(put(store, fast), store).reason == "pace"
    silent = Clip(np.zeros(3 * SAMPLE_RATE, np.float32), SAMPLE_RATE, "no", "flite/rms")
    assert stage(put(store, silent), store).facts["wer"] == [1.0]
    wordless = stage(put(store, Clip(clips[0].audio, SAMPLE_RATE, "", clips[0].voice), clips[0]), store)
    assert wordless.status == OK and len(wordless.facts["wer"]) == 1  # nothing to compare with is no error
    letters = make_filter({"filter": "asr", "recogniser": "nanoworld", "metric": "cer"})
    assert set(letters(put(store, clips[0]), store).facts) == {"speech_pace", "cer"}
    nowhere = Item(0, Dialogue((Turn("user", (Part("speech", "hello"),)),), "test"))
    assert stage(nowhere, store).status == FAILED


def test_what_changes_results_is_in_the_fingerprint(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "voices.json"
    calibration.save(path)
    stage = AsrFilter("nanoworld", calibration=str(path))
    config = json.loads(json.dumps(stage.config()))
    assert config["recogniser"] == NanoworldRecogniser().identity()
    assert config["calibration"] == json.loads(path.read_text(encoding="utf-8"))
    with pytest.raises(AnyglotError, match=r"filter asr: .*was measured by .*nanoworld.*, not by .*openai"):
        AsrFilter({"engine": "openai", "base_url": "http://localhost/v1", "model": "m"}, calibration=str(path))
    for bad in ({"metric": "ter"}, {"max_error": -1}, {"min_pace": 9, "max_pace": 8}, {"max_sigmas": 0}):
        with pytest.raises(AnyglotError, match="filter asr: "):
            make_filter({"filter": "asr", "recogniser": "nanoworld", **bad})


def test_the_command_measures_a_dataset(
    clips: list[Clip], calibration: Calibration, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [put(store, *clips[i : i + 4]) for i in range(0, len(clips), 4)]
    read = Turn("user", (Part("text", "a line\u2028and another\u0085one"),))
    items = [replace(item, dialogue=replace(item.dialogue, turns=(read, *item.dialogue.turns))) for item in items]
    lines = [
        json.dumps({"index": i, **item.dialogue.to_dict(), "facts": {}}, ensure_ascii=False)
        for i, item in enumerate(items)
    ]
    (store.folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = tmp_path / "voices.json"
    assert main([str(store.folder), "--out", str(out), "--recogniser", "nanoworld"]) == 0
    assert "flite/slt" in capsys.readouterr().out
    measured = Calibration.load(out)
    assert measured.voices["flite/rms"].errors == calibration.voices["flite/rms"].errors != Errors(0, 0)
    assert len(list(clips_of(store.folder, most=5))) == 10
    assert main([str(tmp_path / "none"), "--out", str(out), "--recogniser", "nanoworld"]) == 2
    assert "give the folder of a finished dataset" in capsys.readouterr().err
    for bad in (tmp_path, tmp_path / "none" / "voices.json"):  # told before anything is measured
        assert main([str(tmp_path / "none"), "--out", str(bad), "--recogniser", "nanoworld"]) == 2
        assert f"{bad}: cannot be written" in capsys.readouterr().err
