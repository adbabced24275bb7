"""Judges: the shipped recogniser hears held-out scenes right, and pocketsphinx agrees."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anyglot_synth.nanoworld import judge as judging
from anyglot_synth.nanoworld import records, voices
from anyglot_synth.nanoworld.judge import SpeechJudge, SphinxJudge, word_error_rates
from anyglot_synth.nanoworld.language import question, words
from anyglot_synth.nanoworld.scene import sample_scene
from anyglot_tokenizers.errors import AnyglotError, CheckpointError, MediaError

needs_engine = pytest.mark.skipif(not voices.installed_voices(), reason="no speech engine (flite, espeak-ng) is here")
needs_sphinx = pytest.mark.skipif(not importlib.util.find_spec("pocketsphinx"), reason="pocketsphinx is not installed")


@pytest.fixture(scope="module")
def judge() -> SpeechJudge:
    return SpeechJudge.load()


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speech")


@pytest.fixture(scope="module")
def clean(cache_dir: Path) -> list[records.Record]:
    return records.world("test", 60, 11, cache_dir=cache_dir, parts=("speech",))


@needs_engine
def test_hears_held_out_scenes(judge, clean):
    jiwer = pytest.importorskip("jiwer")
    said = [" ".join(words(record.spoken_text)) for record in clean]
    assert jiwer.wer(said, judge.transcribe([record.speech for record in clean])) <= 0.03


@needs_engine
def test_hears_noisy_and_soft_speech(judge, clean):
    jiwer = pytest.importorskip("jiwer")
    rng = np.random.default_rng(0)
    noisy = [(r.speech * 0.05 + rng.normal(0, 5e-4, len(r.speech))).astype(np.float32) for r in clean[:20]]
    said = [" ".join(words(record.spoken_text)) for record in clean[:20]]
    assert jiwer.wer(said, judge.transcribe(noisy)) <= 0.05


@needs_engine
def test_hears_questions_answers_and_nonsense(judge, cache_dir):
    jiwer = pytest.importorskip("jiwer")
    cache = voices.SpeechCache(cache_dir)
    rng = np.random.default_rng(0)
    texts = [text for _ in range(12) for text in question(sample_scene(rng, "test"), rng)]
    texts += ["top blue cross small", "large left red red circle", "right green top triangle"]
    audio = [cache.say(text, voices.VOICES[i % 4]) for i, text in enumerate(texts)]
    assert jiwer.wer([" ".join(words(text)) for text in texts], judge.transcribe(audio)) <= 0.06


@needs_engine
def test_transcript_does_not_depend_on_the_batch(judge, clean):
    audio = [record.speech for record in clean[:9]]
    assert judge.transcribe(audio) == judge.transcribe(audio, batch_size=1) == judge.transcribe(audio[::-1])[::-1]


def test_scores_do_not_depend_on_padding(judge):
    audio = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (2, 16000)).astype(np.float32))
    lengths = torch.tensor([16000, 7000])
    with torch.no_grad():
        both, both_lengths = judge.model(*judge.model.features(audio, lengths))
        one, one_lengths = judge.model(*judge.model.features(audio[1:, :7000], lengths[1:]))
    count = int(one_lengths[0])
    assert int(both_lengths[1]) == count
    torch.testing.assert_close(both[1, :count], one[0, :count], atol=1e-4, rtol=1e-4)


def test_silence_and_nothing(judge):
    assert judge.transcribe([]) == []
    assert judge.transcribe([np.zeros(0, np.float32), np.zeros(5000, np.float32)]) == ["", ""]


@pytest.mark.parametrize(
    "audio, problem",
    [
        (np.zeros((2, 800), np.float32), "mono"),
        (np.full(800, np.nan, np.float32), "NaN"),
        (np.zeros(61 * 16000, np.float32), "cut it"),
    ],
)
def test_bad_audio(judge, audio, problem):
    with pytest.raises(MediaError, match=problem) as caught:
        judge.transcribe([np.zeros(1600, np.float32), audio])
    assert "number 1" in str(caught.value)


def test_shipped_files_are_small_and_current(judge):
    size = sum(path.stat().st_size for path in judging.WEIGHTS.iterdir())
    assert size < 1_500_000
    assert judge.vocabulary == judging.vocabulary()
    assert sum(parameter.numel() for parameter in judge.model.parameters()) <= 600_000


def test_unusable_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        SpeechJudge.load(tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(judging.WEIGHTS / name, tmp_path)
    assert SpeechJudge.load(tmp_path).vocabulary
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(CheckpointError, match="no usable judge"):
        SpeechJudge.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no usable judge"):
        SpeechJudge.load(tmp_path)


@needs_engine
@pytest.mark.slow
def test_training_is_reproducible(tmp_path, cache_dir, monkeypatch):
    monkeypatch.setattr(judging, "spoken_sentences", lambda: ["red", "top left", "what is at the top left?"])
    monkeypatch.setattr(judging, "installed_voices", lambda: voices.VOICES[:1])
    known = SpeechJudge.load().vocabulary
    monkeypatch.setattr(judging, "vocabulary", lambda: known)
    state = torch.random.get_rng_state()
    for name in ("a", "b"):
        judging.train_judge(tmp_path / name, cache_dir, 3, batch_size=2, log=lambda line: None)
    assert torch.equal(state, torch.random.get_rng_state())
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


@needs_sphinx
@pytest.mark.skipif(not shutil.which("flite"), reason="flite is not here; pocketsphinx cannot judge espeak-ng")
def test_sphinx_is_a_second_opinion(judge, clean):
    chosen = [record for record in clean if len(record.scene) < 3][:6]
    heard = SphinxJudge().transcribe([record.speech for record in chosen])
    said = [" ".join(words(record.spoken_text)) for record in chosen]
    assert sum(a == b for a, b in zip(said, heard, strict=True)) >= 5


@needs_sphinx
def test_sphinx_silence_and_bad_audio():
    sphinx = SphinxJudge()
    assert sphinx.transcribe([np.zeros(8000, np.float32)]) == [""]
    with pytest.raises(MediaError, match="NaN"):
        sphinx.transcribe([np.full(800, np.nan, np.float32)])


def test_sphinx_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(AnyglotError, match="pip install pocketsphinx"):
        SphinxJudge()


@needs_engine
def test_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "word_error_rates", lambda transcribe, cache_dir: {"slt": 0.012, "all": 0.012})
    assert judging.main(["test"]) == 0
    assert "slt      word error rate 1.20 %" in capsys.readouterr().out
    assert judging.main(["test", "--out", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err


@needs_engine
def test_word_error_rates_are_zero_for_a_perfect_judge(cache_dir):
    pytest.importorskip("jiwer")
    said = [" ".join(words(r.spoken_text)) for r in records.generate("test", 3, parts=())]
    voice = voices.VOICES[0]
    assert word_error_rates(lambda audio: said, 3, cache_dir=cache_dir, voices=[voice]) == {
        voice.name: 0,
        "all": 0,
    }
