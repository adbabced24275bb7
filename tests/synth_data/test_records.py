"""Records: the same for the same arguments, whole after a kill, and readable back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from PIL import Image

from anyglot_synth.nanoworld import melody, records, voices
from anyglot_synth.nanoworld.language import parse, question
from anyglot_synth.nanoworld.scene import sample_scene
from anyglot_tokenizers.errors import AnyglotError, ManifestError

needs_engine = pytest.mark.skipif(not voices.installed_voices(), reason="no speech engine (flite, espeak-ng) is here")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speech")


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@needs_engine
def test_world_is_a_function_of_split_seed_and_index(cache_dir):
    short = records.world("train", 4, 3, cache_dir=cache_dir)
    long = records.world("train", 8, 3, cache_dir=cache_dir)
    parallel = records.world("train", 8, 3, cache_dir=cache_dir, workers=2)
    for a, b in [*zip(short, long, strict=False), *zip(long, parallel, strict=True)]:
        assert (a.id, a.scene, a.text, a.spoken_text, a.voice) == (
            b.id,
            b.scene,
            b.text,
            b.spoken_text,
            b.voice,
        )
        for part in records.PARTS:
            assert np.array_equal(getattr(a, part), getattr(b, part))
    assert len({record.id for record in long}) == 8
    assert {r.id for r in records.world("train", 8, 4, cache_dir=cache_dir)}.isdisjoint(r.id for r in long)


@needs_engine
def test_a_record_says_the_same_in_every_modality(cache_dir):
    for record in records.world("test", 6, 1, cache_dir=cache_dir):
        assert parse(record.text) == record.scene == parse(record.spoken_text)
        assert record.scene.has_held_out and record.voice in {voice.name for voice in voices.VOICES}
        assert record.image.shape == (64, 64, 3) and record.image.dtype == np.uint8
        assert record.speech.dtype == record.music.dtype == np.float32
        assert len(record.music) % 1600 == 0 and len(record.speech) > 8000


def test_parts_without_speech_need_no_engine(monkeypatch, tmp_path):
    def fail(engine: str) -> str:
        raise voices.SpeechError("no engine")

    monkeypatch.setattr(records, "engine_version", fail)
    (record,) = records.world("train", 1, cache_dir=tmp_path, parts=("image", "music"))
    assert len(record.speech) == 0 and len(record.music) and record.image.shape == (64, 64, 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, options, problem",
    [
        (("dev", 1), {}, "use one of train, test"),
        (("train", -1), {}, "0 or more"),
        (("train", 1, -1), {}, "0 or more"),
        (("train", 1), {"parts": ("video",)}, "use some of image"),
    ],
)
def test_bad_arguments(arguments, options, problem):
    with pytest.raises(AnyglotError, match=problem):
        records.world(*arguments, **options)


@needs_engine
def test_files_hold_what_memory_holds(tmp_path, cache_dir):
    assert records.make(tmp_path, "train", 5, 2, cache_dir=cache_dir) == 5
    stored = list(records.iterate(tmp_path))
    for record, entry in zip(records.world("train", 5, 2, cache_dir=cache_dir), stored, strict=True):
        assert (entry.id, entry.scene, entry.text, entry.voice) == (
            record.id,
            record.scene,
            record.text,
            record.voice,
        )
        assert np.array_equal(np.asarray(Image.open(entry.image)), record.image)
        for path, audio in ((entry.speech, record.speech), (entry.music, record.music)):
            read, sample_rate = sf.read(path, dtype="float32")
            assert sample_rate == voices.SAMPLE_RATE and np.abs(read - audio).max() < 1e-4
        assert melody.scene_of(melody.read_midi(entry.midi)) == entry.scene
    line = json.loads((tmp_path / records.RECORDS).read_text().splitlines()[0])
    expected = {"id", "split", "scene", "text", "spoken_text", "voice", "image", "speech", "music", "midi"}
    assert expected <= line.keys()


@needs_engine
def test_make_again_adds_only_what_is_missing(tmp_path, cache_dir):
    records.make(tmp_path, "train", 3, cache_dir=cache_dir)
    before = _contents(tmp_path)
    assert records.make(tmp_path, "train", 3, cache_dir=cache_dir) == 0
    next(records.iterate(tmp_path)).speech.unlink()
    assert records.make(tmp_path, "train", 3, cache_dir=cache_dir) == 1
    assert _contents(tmp_path) == before
    assert records.make(tmp_path, "test", 2, cache_dir=cache_dir) == 2
    assert [entry.split for entry in records.iterate(tmp_path)] == ["train"] * 3 + ["test"] * 2
    assert len(list(records.iterate(tmp_path, "test"))) == 2


@needs_engine
def test_killed_and_run_again_gives_the_same_files(tmp_path, cache_dir):
    records.make(tmp_path / "whole", "train", 24, 7, cache_dir=cache_dir)
    broken = tmp_path / "broken"
    lines = broken / records.RECORDS
    # A brake on every record, so that the kill lands between and within records.
    code = (
        "import sys, time; from anyglot_synth.nanoworld import records\n"
        "records.make(sys.argv[1], 'train', 24, 7, cache_dir=sys.argv[2],"
        " progress=lambda *_: time.sleep(.03))"
    )
    for reached in (2, 9):
        process = subprocess.Popen([sys.executable, "-c", code, str(broken), str(cache_dir)])
        while process.poll() is None and (not lines.is_file() or lines.read_bytes().count(b"\n") < reached):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with open(lines, "ab") as file:
            file.write(b'{"id": "cut off')  # as if the kill had come within a write
        assert reached <= len(list(records.iterate(broken))) < 24
    records.make(broken, "train", 24, 7, cache_dir=cache_dir)
    assert _contents(broken) == _contents(tmp_path / "whole")


def test_what_a_kill_left_is_removed(tmp_path):
    folder = tmp_path / "media" / "2c"
    folder.mkdir(parents=True)
    for name in (".2cab.0123456789ab.tmp.png", ".2cab.speech.0123456789ab.tmp.wav", ".draft.tmp.odt"):
        (folder / name).touch()
    assert records.make(tmp_path, "train", 0, cache_dir=tmp_path / "cache") == 0
    assert [path.name for path in folder.iterdir()] == [".draft.tmp.odt"]


@needs_engine
@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent_and_write_the_same(tmp_path, cache_dir):
    records.make(tmp_path / "one", "test", 20, cache_dir=cache_dir)
    two = tmp_path / "two"
    code = (
        "import sys, time; from anyglot_synth.nanoworld import records\n"
        "if __name__ == '__main__':\n"
        "    records.make(sys.argv[1], 'test', 20, 0, 2, cache_dir=sys.argv[2],"
        " progress=lambda *_: time.sleep(9))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script), str(two), str(cache_dir)])
    while process.poll() is None and not (two / records.RECORDS).is_file():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = children.read_text().split() if children.is_file() else []
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.0)

    def lives(pid: str) -> bool:  # a zombie waiting for its adopter does not count
        status = Path(f"/proc/{pid}/stat")
        return status.is_file() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    assert not any(map(lives, pids))
    records.make(two, "test", 20, 0, 2, cache_dir=cache_dir)
    assert _contents(two) == _contents(tmp_path / "one")


def test_damaged_or_missing_file(tmp_path):
    with pytest.raises(ManifestError, match="make records first"):
        next(records.iterate(tmp_path))
    (tmp_path / records.RECORDS).write_text('{"id": 1}\n')
    with pytest.raises(ManifestError, match="line 1 is no record"):
        next(records.iterate(tmp_path))
    with pytest.raises(ManifestError, match="line 1 is no record"):
        records.make(tmp_path, "train", 1, cache_dir=tmp_path)


def test_one_writer_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with records._sole_writer(tmp_path), pytest.raises(AnyglotError, match="another process"):
        records.make(tmp_path, "train", 1, cache_dir=tmp_path)


def test_spoken_sentences_cover_what_is_said():
    known = set(records.spoken_sentences())
    assert len(known) == 1133
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng, "test")
        assert known.issuperset(question(scene, rng))
    for outline in records._outlines("test", 50, 0):
        assert known.issuperset(voices.clauses(outline.spoken_text))
