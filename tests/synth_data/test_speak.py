"""SpeakStage: every spoken part gets its sound, once, the same bytes wherever and whenever it is made."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anyglot_synth.augment import AugmentStage
from anyglot_synth.dialogue import Dialogue, MediaFile, Part, Turn
from anyglot_synth.loudness import PEAK, loudness
from anyglot_synth.recipe import STAGES
from anyglot_synth.speak import SpeakStage
from anyglot_synth.stages import FAILED, FILTERED, OK, Item
from anyglot_synth.store import Store
from anyglot_synth.voices import SpeechError, backend, programs
from anyglot_synth.voices.flite import FliteVoice
from anyglot_tokenizers.errors import ManifestError

pytestmark = pytest.mark.skipif(
    not (programs.has_flite() and programs.has_espeak_library()), reason="flite or espeakng-loader is not here"
)
FLITE = {"engine": "flite", "voices": ["slt", "rms", "awb"]}
ESPEAK = {"engine": "espeak-ng", "voices": ["en-us", "en-us+f2"]}

CAST = {"assistant": "en-us", "pitch": [-3, 3]}


def dialogue(*texts: str, language: str = "en") -> Dialogue:
    roles = ("user", "assistant")
    turns = (Turn(roles[i % 2], (Part("speech", text),)) for i, text in enumerate(texts))
    return Dialogue(tuple(turns), "test", language=language)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


TALK = dialogue("What is the capital of France?", "It is Paris.", "And of Italy?", "It is Rome.")


def test_every_spoken_part_has_its_sound(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), SpeakStage([FLITE, ESPEAK], sample_rate=24_000)
    stage.setup()
    mixed = Dialogue(
        (*TALK.turns, Turn("user", (Part("text", "bye"), Part("speech", "In 3.5 s!", spoken_text="in three seconds")))),
        "test",
    )
    item = stage(Item(0, mixed), store)
    assert item.status == OK and item.dialogue.id == mixed.id and len(item.facts["speech_seconds"]) == 5
    styles = []
    for turn in item.dialogue.turns:
        part = turn.parts[-1]
        media = part.media
        assert media is not None and media.seconds and 0.3 < media.seconds < 4
        assert part.spoken_text == ("in three seconds" if part.text.startswith("In 3") else part.text)
        sound, rate = store.sound(media)
        assert rate == media.sample_rate == 24_000 and len(sound) == media.num_samples
        assert np.abs(sound).max() <= PEAK + 1e-3
        assert loudness(sound, rate) == pytest.approx(-23, abs=0.1) or np.abs(sound).max() > PEAK - 1e-3
        assert media.origin["backend"]["version"] and media.origin["seed"] == 0 and media.origin["licence"]
        styles.append((turn.role, str(media.origin["style"])))
    assert len(set(styles)) == 2  # one of the user, one of the assistant, in all their turns
    assert item.dialogue.turns[-1].parts[0] == Part("text", "bye")
    again = stage(item, store)  # what has its sound keeps it
    assert again.dialogue == item.dialogue


def test_the_same_bytes_in_another_folder_and_process(tmp_path: Path) -> None:
    long = dialogue("Tell me of ships.", "Ships sail, they carry things; they sink. " * 26)
    for name in ("one", "two"):
        stage = pickle.loads(pickle.dumps(SpeakStage([FLITE, ESPEAK], CAST, seed=4)))
        stage.setup()
        for number, talk in enumerate([TALK, long, dialogue("Hello there.", "Hello to you.")]):
            assert stage(Item(number, talk), Store(tmp_path / name)).status == OK
    (tmp_path / "talk.json").write_text(json.dumps(TALK.to_dict()))
    code = (
        "import json, sys; sys.path[:0] = sys.argv[3:]\n"
        "from anyglot_synth.speak import SpeakStage; from anyglot_synth.stages import Item\n"
        "from anyglot_synth.store import Store; from anyglot_synth.dialogue import Dialogue\n"
        f"stage = SpeakStage([{FLITE!r}, {ESPEAK!r}], {CAST!r}, seed=4)\n"
        "talk = Dialogue.from_dict(json.load(open(sys.argv[2])))\n"
        "assert stage(Item(0, talk), Store(sys.argv[1])).status == 'ok'"
    )
    arguments = [str(tmp_path / "three"), str(tmp_path / "talk.json"), *sys.path]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=60)
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and len(one) == 8 and three.items() <= one.items() and len(three) == 4


def test_what_is_there_is_not_made_again_and_equal_sounds_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, stage = Store(tmp_path), SpeakStage(FLITE, {"rate": [1, 1], "pitch": [0, 0], "users": ["rms"]})
    first = stage(Item(0, TALK), store)
    calls = []
    make = FliteVoice.make
    monkeypatch.setattr(FliteVoice, "make", lambda self, text, *more: calls.append(text) or make(self, text, *more))
    assert stage(Item(0, TALK), store) == first and calls == []
    other = stage(Item(1, dialogue("And of Italy?", "I do not know.")), store)
    assert other.status == OK and calls == ["I do not know."]
    assert other.dialogue.turns[0].parts[0].media == first.dialogue.turns[2].parts[0].media
    louder = SpeakStage(FLITE, {"rate": [1, 1], "pitch": [0, 0], "users": ["rms"]}, loudness_lufs=-16)
    assert louder(Item(1, dialogue("And of Italy?")), store).status == OK and calls[1:] == ["And of Italy?"]


def test_endings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    stage = SpeakStage(FLITE, max_characters=200, max_seconds=4)
    for talk, reason, detail in [
        (dialogue("a " * 101), "too_long", "201 characters to speak, 200 are the limit"),
        (dialogue("one two three four five " * 5), "too_long", "s of speech, 4 s are the limit"),
        (dialogue("***"), "no_words", "nothing to say"),
        (dialogue("bonjour", language="fr"), "language", "no voice of the user speaks 'fr'"),
    ]:
        ended = stage(Item(0, talk), store)
        assert (ended.status, ended.reason, ended.stage) == (FILTERED, reason, "speak") and detail in ended.detail
    assert not list(tmp_path.rglob("*.flac"))
    for retryable in (True, False):
        error = SpeechError("it broke", retryable=retryable)
        monkeypatch.setattr(FliteVoice, "make", lambda *_, error=error: (_ for _ in ()).throw(error))
        ended = stage(Item(0, TALK), store)
        assert (ended.status, ended.detail, ended.retryable) == (FAILED, "it broke", retryable)


def test_settings() -> None:
    for settings, problem in [
        ({"engines": {"engine": "none"}}, "no speech engine 'none'"),
        ({"engines": [{"voices": ["slt"]}]}, "names no speech engine"),
        ({"engines": FLITE, "cast": {"voice": "slt"}}, "cast cannot be set up"),
        ({"engines": FLITE, "sample_rate": 10}, "one of these is impossible"),
    ]:
        with pytest.raises((ManifestError, SpeechError), match=problem):
            SpeakStage(**settings)
    with pytest.raises(ManifestError, match="unknown voice 'bob'"):
        SpeakStage(FLITE, {"assistant": "bob"}).setup()
    with pytest.raises(SpeechError, match="no voice 'bob'"):
        SpeakStage(backend("flite", voices=["bob"])).setup()
    settings_N = [
        STAGES.build("speak", engines=given).config() for given in ("flite", ["flite"], [{"engine": "flite"}])
    ]
    assert settings_N[0] == settings_N[1] == settings_N[2]
    with pytest.raises(ManifestError, match="engines is 3; give"):
        STAGES.build("speak", engines=3)
    one, two = (SpeakStage(FLITE, seed=seed).config() for seed in (0, 1))
    assert one != two and one["engines"][0][0]["engine"] == "flite"
    assert SpeakStage({**FLITE, "licence": "MIT"}).config() != SpeakStage(FLITE).config(), "it is in every origin"


def test_augmentation_spoils_users_only_and_names_the_clean_file(tmp_path: Path) -> None:
    spoken = SpeakStage(FLITE)(Item(0, TALK), Store(tmp_path / "a"))
    steps = {"noise": {"snr_db": [5, 5], "kinds": ["babble"]}, "codec": {"kinds": ["mulaw"]}}
    item = AugmentStage(**steps, seed=1)(spoken, Store(tmp_path / "a"))
    assert item.status == OK and item.dialogue.id == TALK.id
    for before, after in zip(spoken.dialogue.turns, item.dialogue.turns, strict=True):
        clean, media = before.parts[0].media, after.parts[0].media
        assert isinstance(clean, MediaFile) and isinstance(media, MediaFile)
        if after.role == "assistant":
            assert media == clean
            continue
        assert media.file != clean.file and media.origin["clean"] == clean.file
        assert media.origin["augment"] == item.facts["augment"] and media.origin["style"] == clean.origin["style"]
        assert media.num_samples == clean.num_samples and (tmp_path / "a" / clean.file).is_file()
    assert AugmentStage(**steps, seed=1)(spoken, Store(tmp_path / "a")) == item
    store = Store(tmp_path / "b")
    again = AugmentStage(**steps, seed=1)(SpeakStage(FLITE)(Item(0, TALK), store), store)
    assert again == item and contents(tmp_path / "a") == contents(tmp_path / "b")
    assert AugmentStage(**steps, seed=2)(spoken, store).dialogue != item.dialogue
    assert AugmentStage(gain={"p": 0})(spoken, store) == spoken
