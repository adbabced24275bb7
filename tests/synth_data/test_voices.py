"""Voices: clips are reproducible, equally loud, cached atomically, and every failure says what to do."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from anyglot_synth.nanoworld import voices
from anyglot_synth.nanoworld.scene import Scene, Thing
from anyglot_synth.nanoworld.voices import ESPEAK_VOICES, FLITE_VOICES, SAMPLE_RATE, SpeechCache, SpeechError

MORE = voices.MORE_ESPEAK_VOICES if voices.has_espeak() else ()
needs_engine = pytest.mark.skipif(not voices.installed_voices(), reason="no speech engine (flite, espeak-ng) is here")
TEXT = "large red circle, top left"


@pytest.fixture
def only_engine(monkeypatch: pytest.MonkeyPatch):
    """Makes the machine look as if it had only the named programs on its PATH."""
    which = shutil.which
    voices.engine_version.cache_clear()

    def keep(*programs: str) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: which(name) if name in programs else None)

    yield keep
    voices.engine_version.cache_clear()


def _check_clip(clip: np.ndarray) -> None:
    assert clip.dtype == np.float32 and 0.8 < len(clip) / SAMPLE_RATE < 3.5
    assert abs(float(np.sqrt((clip**2).mean())) - voices.RMS) < 1e-3 and np.abs(clip).max() <= voices.PEAK
    margin = int(voices.MARGIN_S * SAMPLE_RATE)
    loudest = np.abs(clip).max()
    assert np.abs(clip[: margin // 2]).max() < 0.1 * loudest > np.abs(clip[-margin // 2 :]).max()


@needs_engine
@pytest.mark.parametrize("voice", (*voices.installed_voices(), *MORE), ids=lambda voice: voice.name)
def test_every_voice_speaks_and_repeats_itself(voice):
    clip = voices.speak(TEXT, voice)
    _check_clip(clip)
    if not shutil.which("espeak-ng") or voice.engine == "flite":  # the program seeds its noise with the time
        time.sleep(1.1)
        assert np.array_equal(clip, voices.speak(TEXT, voice.name))


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="the program espeak-ng is not here")
def test_espeak_program(only_engine):
    only_engine("espeak-ng")
    assert voices.engine_version("espeak-ng").startswith("espeak-ng-1")
    _check_clip(voices.speak(TEXT, ESPEAK_VOICES[1]))


@pytest.mark.skipif(not importlib.util.find_spec("espeakng_loader"), reason="espeakng-loader is not installed")
def test_espeak_library(only_engine):
    only_engine()
    assert voices.engine_version("espeak-ng").startswith("espeak-ng-1")
    clips = [voices.speak(TEXT, voice) for voice in ESPEAK_VOICES[:2]]
    for clip in clips:
        _check_clip(clip)
    assert len(clips[0]) != len(clips[1]) or not np.array_equal(*clips)
    with pytest.raises(SpeechError, match="no voice"):
        voices.speak(TEXT, voices.Voice("xx-none", "espeak-ng", ESPEAK_VOICES[0].params))


def test_no_engine_says_what_to_install(only_engine, monkeypatch):
    only_engine()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert voices.installed_voices() == ()
    for voice in (FLITE_VOICES[0], ESPEAK_VOICES[0]):
        with pytest.raises(SpeechError, match="apt-get install flite.*espeakng-loader"):
            voices.speak(TEXT, voice)


@pytest.mark.parametrize(
    "text, voice, problem",
    [
        ("", "slt", "at least one word"),
        ("...", "slt", "at least one word"),
        ("nul \0 byte", "slt", "at least one word"),
        ("word " * 500, "slt", "limit is 1000"),
        (TEXT, "nobody", "choose one of: kal16"),
    ],
)
def test_bad_input(text, voice, problem):
    with pytest.raises(SpeechError, match=problem) as caught:
        voices.speak(text, voice)
    assert "\n" not in str(caught.value)


@needs_engine
@pytest.mark.parametrize("text", ["-t words", "$(touch hacked) `id`", "'; exit 3; #", "<b>big</b> & red", "naïve café"])
def test_text_is_never_taken_for_a_command(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(voices.speak(text, voices.VOICES[0])) > 2000
    assert not list(tmp_path.iterdir())


@needs_engine
def test_cache_gives_the_same_clip_without_an_engine(tmp_path, monkeypatch):
    voice = voices.VOICES[0]
    fresh = voices.speak(TEXT, voice, cache_dir=tmp_path)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".flac"]
    with monkeypatch.context() as patch:
        patch.setattr(voices, "_synthesise", lambda text, voice: pytest.fail("spoken again"))
        assert np.array_equal(fresh, voices.speak(f"  {TEXT}\n", voice, cache_dir=tmp_path))
    path = SpeechCache(tmp_path).path(TEXT, voice)
    assert path is not None
    path.write_bytes(path.read_bytes()[:9])  # damaged: spoken again and put right
    assert np.array_equal(fresh, voices.speak(TEXT, voice, cache_dir=tmp_path))
    assert path.stat().st_size > 9


@needs_engine
def test_key_depends_on_everything_that_is_heard(monkeypatch):
    voice = voices.VOICES[0]
    other = voices.Voice(voice.name, voice.engine, (*voice.params, ("more", "1")))
    keys = [
        voices.clip_key(TEXT, voice),
        voices.clip_key(TEXT, other),
        voices.clip_key(TEXT, voices.VOICES[1]),
    ]
    keys.append(voices.clip_key(TEXT + "!", voice))
    monkeypatch.setattr(voices, "engine_version", lambda engine: "another version")
    keys.append(voices.clip_key(TEXT, voice))
    assert len(set(keys)) == 5


@needs_engine
def test_prefetch_makes_each_clip_once(tmp_path):
    texts = ["red", "green", "red", "top left"]
    seen = []
    assert voices.prefetch(texts, voices.VOICES[:2], tmp_path, 2, lambda done, total: seen.append((done, total))) == 6
    assert seen[-1] == (6, 6) and len(list(tmp_path.rglob("*.flac"))) == 6
    assert voices.prefetch(texts, voices.VOICES[:2], tmp_path) == 0
    with pytest.raises(SpeechError):
        voices.prefetch(["blue", ""], voices.VOICES[:1], tmp_path)


@needs_engine
def test_what_is_prefetched_is_what_is_said(tmp_path):
    said = [("red. top left", voices.VOICES[0]), ("green", voices.VOICES[1].name), ("red", voices.VOICES[0])]
    cache = SpeechCache(tmp_path)
    assert cache.prefetch_said(said) == 3
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    audios = [SpeechCache(tmp_path).say(*what) for what in said]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")} == files and len(files) == 3
    assert all(np.array_equal(audio, SpeechCache().say(*what)) for audio, what in zip(audios, said, strict=True))


@needs_engine
def test_speak_scene_joins_clauses_with_a_pause(tmp_path):
    scene = Scene((Thing("circle", "red", "large", "top", "left"), Thing("cross", "blue", "small", "bottom", "right")))
    cache = SpeechCache(tmp_path)
    voice = voices.VOICES[-1]
    audio, text = voices.speak_scene(scene, voice, None, cache)
    assert voices.clauses(text) == ["large red circle, top left", "small blue cross, bottom right"]
    first, second = (cache.clip(clause, voice) for clause in voices.clauses(text))
    pause = int(voices.PAUSE_S * SAMPLE_RATE)
    assert np.array_equal(audio, np.concatenate([first, np.zeros(pause, np.float32), second]))
    varied, _ = voices.speak_scene(scene, voice, np.random.default_rng(5), cache)
    again, _ = voices.speak_scene(scene, voice, np.random.default_rng(5), tmp_path)
    assert np.array_equal(varied, again) and np.abs(varied).max() <= voices.PEAK


def test_clauses():
    assert voices.clauses("a, b. c? d! e; f") == ["a, b", "c?", "d!", "e", "f"]
    assert voices.clauses(" . ") == []


def test_import_needs_neither_torch_nor_an_engine():
    code = "import sys, anyglot_synth.nanoworld.voices; sys.exit('torch' in sys.modules)"
    environment = {"PATH": str(Path(sys.executable).parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
