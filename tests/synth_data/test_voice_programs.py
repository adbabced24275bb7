"""Speech engines that are programs: what they say repeats itself, styles are heard, and no engine can do harm."""

from __future__ import annotations

import pickle
import shutil
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from anyglot_synth import scratch
from anyglot_synth.backends import BackendError, silent
from anyglot_synth.voices import BACKENDS, backend, programs
from anyglot_synth.voices.base import SpeechBackend, most_seconds
from anyglot_synth.voices.piper import PiperVoice

TEXT = "A large red circle is at the top left."
needs_flite = pytest.mark.skipif(not programs.has_flite(), reason="flite is not here")
needs_espeak = pytest.mark.skipif(not programs.has_espeak_library(), reason="espeakng-loader is not here")
ENGINES = [pytest.param("flite", marks=needs_flite), pytest.param("espeak-ng", marks=needs_espeak)]


def pitch_hz(audio: np.ndarray, rate: int) -> float:
    """Median pitch of the voiced frames, by autocorrelation between 60 and 400 Hz."""
    found = []
    size, low, high = rate // 20, rate // 400, rate // 60
    for start in range(0, len(audio) - 2 * size, size // 2):
        frame = audio[start : start + 2 * size] - audio[start : start + 2 * size].mean()
        match = np.correlate(frame, frame, "full")[len(frame) - 1 :]
        lag = low + int(match[low:high].argmax())
        if match[lag] > 0.5 * match[0] > 1e-3:
            found.append(rate / lag)
    return float(np.median(found))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_voice_repeats_itself_and_differs_from_the_others(engine: str) -> None:
    voices = backend(engine)
    assert voices.modality == "speech" and not voices.seeded and voices.deterministic
    sounds = []
    for known in voices.styles():
        style = {"voice": known["voice"]}
        first, again = voices.make(TEXT, style, 1), voices.make(f"  {TEXT}\n", style, 2)
        assert np.array_equal(first.array, again.array)
        assert first.array.dtype == np.float32 and 1 < len(first.array) / (first.sample_rate or 1) < 6
        assert known["language"].lower().startswith("en") and known["gender"] in ("male", "female")
        sounds.append(first.array.tobytes())
    assert len(sounds) >= 3 and len(set(sounds)) == len(sounds)


@pytest.mark.parametrize("engine", ENGINES)
def test_rate_and_pitch_are_heard_each_alone(engine: str) -> None:
    voices = backend(engine)
    voice = voices.styles()[0]["voice"]

    def say(**style: float) -> tuple[float, float]:
        made = voices.make(TEXT, {"voice": voice, **style}, 0)
        assert made.sample_rate
        return len(made.array) / made.sample_rate, pitch_hz(made.array, made.sample_rate)

    seconds, hz = say()
    fast, fast_hz = say(rate=1.25)
    assert fast == pytest.approx(seconds / 1.25, rel=0.08) and fast_hz == pytest.approx(hz, rel=0.08)
    for semitones in (-3, 3):
        moved, moved_hz = say(pitch=semitones)
        assert moved == pytest.approx(seconds, rel=0.06)
        assert moved_hz == pytest.approx(hz * 2 ** (semitones / 12), rel=0.06)


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_requests_say_what_to_do(engine: str) -> None:
    voices = backend(engine)
    good = voices.styles()[0]["voice"]
    for text, style, problem in [
        (TEXT, {"voice": "nobody"}, "has no voice 'nobody'"),
        (TEXT, {"voice": "-o"}, "give voice"),
        (TEXT, {}, "give voice"),
        (TEXT, {"voice": good, "volume": 3}, "give voice, and if wanted rate and pitch"),
        (TEXT, {"voice": good, "rate": 9}, "from 0.5 to 2"),
        (TEXT, {"voice": good, "pitch": "high"}, "from -12 to 12"),
        ("...", {"voice": good}, "at least one word"),
        ("nul \0 byte", {"voice": good}, "at least one word"),
        ("half a \ud800 pair", {"voice": good}, "no valid Unicode"),
    ]:
        with pytest.raises(BackendError, match=problem) as caught:
            voices.make(text, style, 0)
        assert "\n" not in str(caught.value) and not caught.value.retryable
    with pytest.raises(BackendError, match="has no voice"):
        backend(engine, voices=["nobody"]).styles()


@pytest.mark.parametrize("engine", ENGINES)
def test_key_depends_on_everything_but_the_seed(engine: str) -> None:
    voices = pickle.loads(pickle.dumps(backend(engine)))
    one, two = (known["voice"] for known in voices.styles()[:2])
    keys = [voices.key(*asked) for asked in [(TEXT, {"voice": one}, 0), (TEXT, {"voice": two}, 0)]]
    keys += [voices.key(TEXT, {"voice": one, "rate": 1.1}, 0), voices.key(TEXT + "!", {"voice": one}, 0)]
    assert len(set(keys)) == 4 and keys[0] == voices.key(TEXT, {"voice": one}, 7)


@needs_espeak
def test_espeak_speaks_many_languages() -> None:
    assert [v["language"] for v in backend("espeak-ng", language="de").styles()] == ["de"] * 6
    known = {v["voice"]: v for v in backend("espeak-ng").known_voices()}
    assert len(known) > 500 and known["fr-fr+f4"]["gender"] == "female"
    german, english = (
        backend("espeak-ng").make("Guten Morgen, wie geht es dir?", {"voice": v}, 0).array for v in ("de", "en-us")
    )
    assert not np.array_equal(german, english)
    with pytest.raises(BackendError, match="no variant 'zz'"):
        backend("espeak-ng", voices=["de+zz"]).styles()


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="the program espeak-ng is not here")
def test_espeak_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyglot_synth.voices import espeak

    for module in (programs, espeak):
        monkeypatch.setattr(module, "has_espeak_library", lambda: False)
    espeak._listed.cache_clear()
    try:
        voices = backend("espeak-ng", voices=["en-us+f2"])
        assert voices.identity()["as"] == "program" and not voices.deterministic
        assert voices.styles()[0]["gender"] == "female"
        assert len(voices.make(TEXT, {"voice": "en-us+f2"}, 0).array) > 20_000
    finally:
        espeak._listed.cache_clear()


def test_engines_by_name() -> None:
    assert {*BACKENDS} == {"espeak-ng", "flite", "hf", "kokoro", "openai", "piper"}
    for kind in BACKENDS.values():
        assert issubclass(kind, SpeechBackend)
    for settings, problem in [
        ({"engine": "siri"}, "use one of: espeak-ng, flite"),
        ({"engine": "flite", "speed": 2}, "no option 'speed'; it has: voices, licence, timeout_s"),
        ({"engine": "flite", "voices": "slt"}, "give a list of names"),
        ({"engine": "flite", "voices": []}, "give a list of names"),
        ({"engine": "flite", "timeout_s": 0}, "above 0"),
        ({"engine": "piper"}, "needs the option"),
    ]:
        with pytest.raises(BackendError, match=problem):
            backend(**settings)


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(programs, "has_espeak_library", lambda: False)
    programs.engine_version.cache_clear()
    from anyglot_synth.voices import flite

    flite._installed.cache_clear()
    for call in (backend("flite").identity, backend("flite").styles):
        with pytest.raises(BackendError, match="apt-get install flite"):
            call()
    programs.engine_version.cache_clear()


# --- programs that misbehave: stand-ins for piper that are called as it is ---

SPEAKER = """
import sys, time, wave
text = sys.stdin.read()
out = sys.argv[sys.argv.index("--output_file") + 1]
def write(samples, rate=16000):
    with wave.open(out, "wb") as file:
        file.setnchannels(1); file.setsampwidth(2); file.setframerate(rate); file.writeframes(samples)
"""


@pytest.fixture
def stand_in(tmp_path: Path):
    """A voice of Piper whose program runs these lines of Python."""
    model = tmp_path / "voice.onnx"
    model.write_bytes(b"weights")
    Path(f"{model}.json").write_text('{"num_speakers": 1, "espeak": {"voice": "en-us"}}')

    def make(lines: str, **settings: float) -> PiperVoice:
        program = tmp_path / "program"
        program.write_text(f"#!{sys.executable}\n{SPEAKER}\n{lines}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return PiperVoice(str(model), command=[str(program)], **settings)

    return make


@pytest.mark.parametrize(
    "lines, problem, retryable",
    [
        ("time.sleep(60)", "did not finish within 0.5 s", True),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11", True),
        ("sys.exit('no such phoneme')", "status 1.: no such phoneme", False),
        ("", "wrote nothing", False),
        ("open(out, 'wb').write(b'RIFF nonsense')", "wrote what is no sound", True),
        ("write(bytes(64000))", "only silence", False),
        ("write(bytes(range(256)) * 75000)", "600 s of sound for 38 characters", False),
        ("write(b'')", "only silence", False),
    ],
)
def test_a_program_that_fails(stand_in, lines: str, problem: str, retryable: bool) -> None:
    voices = stand_in(lines, timeout_s=0.5 if "sleep" in lines else 20)
    start = time.monotonic()
    with pytest.raises(BackendError, match=problem) as caught:
        voices.make(TEXT, {"voice": "voice"}, 0)
    assert caught.value.retryable is retryable and time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_a_program_gets_the_text_and_the_style(stand_in) -> None:
    lines = "assert text == 'two words\\n'; n = float(sys.argv[sys.argv.index('--length_scale') + 1])\n"
    voices = stand_in(lines + "write(bytes(range(256)) * int(100 / n))")
    made = voices.make(" two   words ", {"voice": "voice", "rate": 2}, 0)
    assert made.sample_rate == 16000 and len(made.array) == 128 * 200
    higher = voices.make("two words", {"voice": "voice", "pitch": 12}, 0)
    assert higher.sample_rate == 32000 and len(higher.array) == 128 * 50


def test_voice_files_that_are_missing_or_no_voice(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="is not there; a voice of piper is"):
        PiperVoice(str(tmp_path / "none.onnx")).setup()
    (tmp_path / "v.onnx").write_bytes(b"")
    (tmp_path / "v.onnx.json").write_text('["corrupt"')
    with pytest.raises(BackendError, match="not the settings of a voice"):
        PiperVoice(str(tmp_path / "v.onnx")).setup()
    (tmp_path / "v.onnx.json").write_text('{"num_speakers": 2, "espeak": {"voice": "de"}}')
    voices = PiperVoice(str(tmp_path / "v.onnx"), command=["no-such-program"])
    assert [v["voice"] for v in voices.styles()] == ["0", "1"]
    with pytest.raises(BackendError, match="install it"):
        voices.setup()


def test_no_voice_is_that_slow() -> None:
    for text in ("yes", "2024", "你好，今天天气很好", TEXT, TEXT * 20):
        assert 3 < most_seconds(text) < 60 + len(text)
    assert most_seconds(TEXT, 0.5) == 2 * most_seconds(TEXT)
    assert silent(np.zeros(9, np.float32))


@needs_flite
def test_temporary_files_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_MEMORY", tmp_path)
    backend("flite").make(TEXT, {"voice": "slt"}, 0)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(scratch, "_MEMORY", tmp_path / "gone")  # then the system's folder is taken
    assert len(backend("flite").make(TEXT, {"voice": "slt"}, 0).array)
