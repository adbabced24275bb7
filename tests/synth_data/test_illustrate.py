"""`IllustrateStage` with the world's own pictures and melodies: graded by what can read them back, and kept once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anyglot_synth.backends import BackendError, Made
from anyglot_synth.dialogue import Dialogue, Part, Turn
from anyglot_synth.grammar_writer import GrammarWriter
from anyglot_synth.illustrate import IllustrateStage
from anyglot_synth.music.nanoworld import NanoworldMelodies
from anyglot_synth.nanoworld.listen import listen
from anyglot_synth.nanoworld.melody import read_midi, scene_of
from anyglot_synth.nanoworld.scene import Scene, sample_scene
from anyglot_synth.nanoworld.see import see
from anyglot_synth.pictures.nanoworld import NanoworldPictures
from anyglot_synth.stages import Item
from anyglot_synth.store import Store


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ask(*parts: Part) -> Item:
    return Item(0, Dialogue((Turn("user", parts),), "test"))


@pytest.fixture
def stage() -> IllustrateStage:
    return IllustrateStage({"engine": "nanoworld"}, "nanoworld", seed=7)


def test_media_show_what_the_dialogue_says(stage: IllustrateStage, tmp_path: Path) -> None:
    store = Store(tmp_path)
    stage.setup()
    pictures = tunes = 0
    for index, dialogue in enumerate(GrammarWriter("test", seed=1).dialogues(40)):
        item = stage(Item(index, dialogue), store)
        assert item.status == "ok", item
        assert item.dialogue.id == dialogue.id
        for entry in dialogue.meta["truth"]:
            part = item.dialogue.turns[entry["turn"]].parts[entry["part"]]
            if part.modality == "image":
                assert part.media and part.media.size == (64, 64)
                assert see(store.picture(part.media) / 255) == Scene.from_dict(entry["scene"])
                pictures += 1
            elif part.modality == "music":
                assert part.media and part.media.sample_rate == 16000
                assert listen(store.sound(part.media)[0]) == Scene.from_dict(entry["scene"])
                midi = tmp_path / part.media.origin["midi"]
                assert scene_of(read_midi(midi)) == Scene.from_dict(entry["scene"])
                assert midi == (tmp_path / part.media.file).with_suffix(".mid")
                assert part.media.origin["licence"] == "CC0-1.0"
                tunes += 1
            else:
                assert part.media is None
    assert pictures > 20 and tunes > 10


def test_the_same_again_and_after_a_kill(stage: IllustrateStage, tmp_path: Path) -> None:
    items = [Item(i, dialogue) for i, dialogue in enumerate(GrammarWriter(seed=2).dialogues(10))]
    whole = [stage(item, Store(tmp_path / "a")) for item in items]
    for item in items[:4]:
        stage(item, Store(tmp_path / "b"))
    victims = sorted(path for path in (tmp_path / "b").rglob("*.*") if path.suffix in (".png", ".flac"))[::2]
    assert victims
    for path in victims:
        path.unlink()
    again = [stage(item, Store(tmp_path / "b")) for item in items]
    assert again == whole
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_pictures_vary_with_seed_and_place(tmp_path: Path) -> None:
    text = "a large red square at the top left. a small blue circle at the bottom right"
    item = ask(Part("image", text), Part("image", text))
    both = IllustrateStage("nanoworld", seed=0)(item, Store(tmp_path)).dialogue.turns[0].parts
    other = IllustrateStage("nanoworld", seed=1)(item, Store(tmp_path)).dialogue.turns[0].parts
    assert len({part.media.sha256 for part in (*both, *other) if part.media}) > 2


def test_a_scene_in_the_style_is_taken() -> None:
    scene = sample_scene(np.random.default_rng(0))
    made = NanoworldPictures(96).make("whatever", {"scene": scene.to_dict()}, 0)
    assert made.array.shape == (96, 96, 3)
    assert see(np.asarray(Image.fromarray(made.array).resize((64, 64))) / 255) == scene
    assert listen(NanoworldMelodies().make("", {"scene": scene.to_dict()}, 3).array) == scene
    with pytest.raises(BackendError, match="not a scene"):
        NanoworldPictures().make("", {"scene": {"things": 3}}, 0)


def test_what_has_a_file_or_is_no_medium_stays(stage: IllustrateStage, tmp_path: Path) -> None:
    store = Store(tmp_path)
    media = store.put_picture("0" * 32, np.zeros((4, 4, 3), np.uint8))
    item = ask(Part("image", "", media=media), Part("speech", "hello"), Part("text", "hello"))
    assert stage(item, store) == item
    assert len(files(tmp_path)) == 1


def test_a_description_that_is_none_fails(stage: IllustrateStage, tmp_path: Path) -> None:
    item = stage(ask(Part("image", "a cat on a sofa")), Store(tmp_path))
    assert (item.status, item.stage, item.retryable) == ("failed", "illustrate", False)
    assert "'a cat on a sofa' describes no scene" in item.detail
    no_engine = IllustrateStage(pictures="nanoworld")(ask(Part("music", "slow piano")), Store(tmp_path))
    assert no_engine.status == "failed" and "no engine for it; give illustrate its music" in no_engine.detail


def test_notes_of_a_folder_survive(tmp_path: Path) -> None:
    """What a backend found out (caption, licence) is in the origin whether the file was made now or was there."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(photos / "a.png")
    (photos / "captions.jsonl").write_text('{"file": "a.png", "caption": "a dark room", "licence": "CC-BY-4.0"}\n')
    stage = IllustrateStage({"engine": "folder", "path": str(photos)})
    store = Store(tmp_path / "out")
    item = ask(Part("image", "a room that is dark"))
    first = stage(item, store)
    media = first.dialogue.turns[0].parts[0].media
    assert media and media.origin["licence"] == "CC-BY-4.0" and media.origin["caption"] == "a dark room"
    assert "seed" not in media.origin
    assert stage(item, store) == first
    away = stage(ask(Part("image", "two elephants")), store)
    assert (away.status, away.reason) == ("filtered", "no_match")
    shutil.rmtree(tmp_path / "out")
    assert stage(item, store) == first


def test_the_configuration_names_all(stage: IllustrateStage) -> None:
    config = stage.config()
    plain = NanoworldPictures()
    assert config["image"] == [plain.identity(), plain.licence] and config["music"][0]["engine"] == "nanoworld"
    assert IllustrateStage(pictures=NanoworldPictures(96)).config() != IllustrateStage("nanoworld").config()
    free = NanoworldPictures()
    free.licence = "MIT"
    assert IllustrateStage(pictures=free).config() != IllustrateStage("nanoworld").config(), "it is in every origin"


class Broken(NanoworldPictures):
    """Fails the first time, as a busy engine does."""

    calls = 0

    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        self.calls += 1
        if self.calls == 1:
            raise BackendError("busy", retryable=True)
        return super().make(text, style, seed)


def test_a_failure_may_be_tried_again(tmp_path: Path) -> None:
    stage = IllustrateStage(Broken())
    item = ask(Part("image", "a large red square at the top left"))
    failed = stage(item, Store(tmp_path))
    assert failed.status == "failed" and failed.retryable and not files(tmp_path)
    assert stage(item, Store(tmp_path)).status == "ok"
