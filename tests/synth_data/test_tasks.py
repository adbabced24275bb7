from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from anyglot_synth.dialogue import Dialogue, Part
from anyglot_synth.nanoworld.language import answer, apply_edit, parse
from anyglot_synth.nanoworld.scene import Scene
from anyglot_synth.sources import SOURCES, BadRow, SourceError
from anyglot_synth.speakable import Spoken, speakable
from anyglot_synth.store import Store
from anyglot_synth.tasks import TASKS, Asking, Example, TaskError, build, edges_of, word_times
from anyglot_synth.templates import HELD_OUT, TEMPLATES, instruction
from anyglot_tokenizers.errors import AnyglotError

CAT = Example("a cat", Part("image", "a cat"), Part("speech", "a cat"), Part("music", "a cat"), source="t")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path: Path, kind: str, **options: Any) -> list[Dialogue | BadRow]:
    return list(SOURCES.build(kind, **options).read(Store(tmp_path / "out")))


def said(dialogue: Dialogue | BadRow) -> list[list[tuple[str, str]]]:
    assert isinstance(dialogue, Dialogue), dialogue
    return [[(p.modality, p.text) for p in turn.parts] for turn in dialogue.turns]


# --- templates ---


def test_every_direction_has_enough_and_holds_some_out() -> None:
    assert TEMPLATES.keys() == HELD_OUT.keys()
    for direction, pool in TEMPLATES.items():
        held = HELD_OUT[direction]
        assert len(set(pool)) == len(pool) >= 12 and len(held) >= 2, direction
        assert not set(pool) & set(held)
        slots = {template.count("{text}") for template in (*pool, *held)}
        assert slots == ({1} if direction.startswith("text->") or direction == "clone" else {0}), direction


def test_every_template_without_a_text_can_be_spoken() -> None:
    for pool in (*TEMPLATES.values(), *HELD_OUT.values()):
        for template in pool:
            assert isinstance(speakable(template.replace("{text}", "a red house")), Spoken)


def test_instructions_are_drawn_by_name() -> None:
    drawn = [instruction("image->text", "", 0, i) for i in range(300)]
    assert set(drawn) == set(TEMPLATES["image->text"])
    assert drawn == [instruction("image->text", "", 0, i) for i in range(300)]
    assert drawn != [instruction("image->text", "", 1, i) for i in range(300)]
    held = {instruction("text->image", "a cat", 0, i, held_out=True) for i in range(50)}
    assert held == {template.replace("{text}", "a cat") for template in HELD_OUT["text->image"]}
    with pytest.raises(AnyglotError, match="there are no templates 'text->smell'"):
        instruction("text->smell", "", 0)


# --- tasks ---


@pytest.mark.parametrize("source", ["text", "speech", "image", "music"])
@pytest.mark.parametrize("target", ["text", "speech", "image", "music"])
def test_the_twelve_pairs(tmp_path, source, target) -> None:
    if source == target:
        assert f"{source}-to-{target}" not in TASKS
        return
    dialogue = build(f"{source}-to-{target}", CAT, Asking(), Store(tmp_path))
    dialogue.check()
    asked, given = dialogue.turns
    assert (asked.role, given.role) == ("user", "assistant")
    assert given.parts == (Part(target, "a cat"),)
    if source == "text":
        assert len(asked.parts) == 1 and "a cat" in asked.parts[0].text
    else:
        assert asked.parts[0].modality == "text" and asked.parts[1:] == (Part(source, "a cat"),)


def test_what_is_missing_is_named(tmp_path) -> None:
    bare = Example("a cat", source="t")
    with pytest.raises(TaskError, match="the example has no 'image'"):
        build("caption", bare, Asking(), Store(tmp_path))
    with pytest.raises(TaskError, match="there is no task 'sing'; use one of: text-to-speech"):
        build("sing", bare, Asking(), Store(tmp_path))
    with pytest.raises(TaskError, match="the image of the example has no file yet"):
        build("image-to-edges", CAT, Asking(), Store(tmp_path))


def test_spoken_instructions_are_a_share(tmp_path) -> None:
    store = Store(tmp_path)
    cats = [Example(f"cat {i}", Part("image", f"cat {i}")) for i in range(300)]
    asked = [build("caption", cat, Asking(spoken=0.3), store).turns[0].parts[0] for cat in cats]
    kinds = Counter(part.modality for part in asked)
    assert 60 < kinds["speech"] < 120
    tts = build("tts", CAT, Asking(spoken=1.0), Store(tmp_path))
    assert tts.turns[0].parts[0].modality == "text"  # it holds the text to read


def test_edges_are_where_the_picture_changes() -> None:
    pixels = np.zeros((8, 10, 3), np.uint8)
    pixels[:, 5:, 1] = 200
    edges = edges_of(pixels)
    assert edges.shape == pixels.shape and edges.dtype == np.uint8
    assert (edges[:, 4:6] == 255).all() and (edges[:, :4] == 0).all() and (edges[:, 6:] == 0).all()
    assert (edges_of(np.full((4, 4, 3), 77, np.uint8)) == 0).all()
    sobel = pytest.importorskip("scipy.ndimage").sobel
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 1), dtype=np.uint8).repeat(3, axis=2)
    down, across = (sobel(noise[..., 0].astype(float), axis=axis, mode="nearest") for axis in (0, 1))
    expected = np.hypot(down, across)
    assert np.abs(edges_of(noise)[..., 0] - 255 * expected / expected.max()).max() <= 0.51


# --- media with words ---


@pytest.fixture
def media(tmp_path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, seconds in (("ann1", 4.0), ("ann2", 1.0), ("bob1", 1.0), ("bob2", 3.5), ("bob3", 2.0)):
        soundfile.write(folder / f"{name}.flac", 0.1 * rng.standard_normal(int(8000 * seconds)), 8000)
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        picture = Image.new("RGB", (16, 12))
        picture.paste(color, (4, 4, 10, 10))
        picture.save(folder / f"{name}.png")
    return folder


def test_transcription_and_reading(tmp_path, media) -> None:
    rows = [{"speech": "ann1.flac", "text": "hello there"}, {"audio": "none.flac", "text": "x"}, {"text": "only words"}]
    data = write(media / "a.jsonl", rows)
    first, second, third, fourth = read(tmp_path, "examples", data=data, tasks=["asr", "tts"], each=True)
    assert said(first)[1] == [("text", "hello there")] and first.task == "asr"
    assert said(second)[1] == [("speech", "hello there")] and second.turns[1].parts[0].media.seconds == 4.0
    assert isinstance(third, BadRow) and third.row == 2 and "none.flac: it cannot be read" in third.error
    assert fourth == BadRow("a.jsonl", 3, "task asr: the example has no 'speech'")


def test_a_voice_is_cloned_from_another_recording_of_the_speaker(tmp_path, media) -> None:
    rows = [
        {"speech": f"{name}.flac", "text": f"text of {name}", "speaker": name[:3]}
        for name in ("ann1", "bob1", "ann2", "bob2", "bob3")
    ]
    found = read(tmp_path, "examples", data=write(media / "a.jsonl", rows), tasks="voice-clone")
    assert [row.row for row in found if isinstance(row, BadRow)] == [1, 2, 4]  # nothing long enough was heard before
    store = Store(tmp_path / "out")
    for dialogue, name, prompt in ((found[2], "ann2", "ann1"), (found[4], "bob3", "bob2")):
        words, voice = dialogue.turns[0].parts
        dialogue.check()
        assert f"text of {name}" in words.text and (voice.text, voice.spoken_text) == ("", None)
        piece, rate = store.sound(voice.media)
        whole, _ = soundfile.read(media / f"{prompt}.flac")
        assert len(piece) == 24_000 and rate == 8000
        assert np.abs(piece[:23_000] - whole[:23_000]).max() < 1e-4 and abs(piece[-1]) < 1e-4
        assert dialogue.turns[1].parts[0].text == f"text of {name}"


def test_edges_of_a_picture(tmp_path, media) -> None:
    data = write(media / "a.jsonl", [{"image": "red.png", "text": "a red square"}])
    there, back = read(
        tmp_path, "examples", data=data, tasks=["image-to-edges", "edges-to-image"], each=True, licence="CC0-1.0"
    )
    edges = there.turns[1].parts[0].media
    assert edges == back.turns[0].parts[1].media and edges.origin["backend"] == "sobel"
    assert edges.origin["licence"] == "CC0-1.0"
    assert Store(tmp_path / "out").picture(edges)[6, 3:5].min() > 200


def test_words_have_times_that_are_given_or_stated_to_be_a_guess(tmp_path, media) -> None:
    rows = [
        {"speech": "ann1.flac", "text": "aa bb", "words": [["aa", 0.5], [1.25, "bb"]]},
        {"speech": "ann1.flac", "text": "a bbb"},
        {"speech": "ann1.flac", "text": "x", "words": [["aa"]]},
        {"speech": "ann1.flac", "text": "aa bb cc", "frames": [[2.0, "blue.png"], [0, "red.png"]]},
    ]
    data = write(media / "a.jsonl", rows)
    given, guessed, bad, _ = read(tmp_path, "examples", data=data, tasks="timed-transcript")
    assert said(given)[1] == [("text", "0.50 aa 1.25 bb")] and given.meta["times"] == "given"
    assert said(guessed)[1] == [("text", "0.00 a 1.33 bbb")] and guessed.meta["times"] == "equal-division"
    assert bad == BadRow("a.jsonl", 3, "'words' holds ['aa']; pairs of a string and a second are needed")
    frames = read(tmp_path, "examples", data=data, tasks="timed-frames")[-1]
    assert [kind for kind, _ in said(frames)[0]] == ["text", "speech", "text", "image", "text", "image"]
    assert said(frames)[1] == [("text", "0.00 s: aa bb\n2.00 s: cc")]
    assert frames.turns[0].parts[3].media.origin["name"] == "red.png"


def test_times_grow_within_the_recording(tmp_path, media) -> None:
    from anyglot_synth.sources.media import take_sound

    sound = take_sound(Store(tmp_path / "out"), "ann1.flac", media)
    times = word_times(Example("one two three four", speech=Part("speech", "x", media=sound)))
    starts = [start for _, start in times]
    assert starts == sorted(starts) and starts[0] == 0 and starts[-1] < 4.0 and len(set(starts)) == 4


def test_tasks_are_drawn_by_weight(tmp_path, media) -> None:
    rows = [
        {"image": {"text": f"cat {i}"}, "text": f"cat {i}", "question": "what?", "answer": "cat"} for i in range(200)
    ]
    options = {"data": write(media / "a.jsonl", rows), "tasks": {"caption": 3, "spoken-vqa-spoken": 1}}
    found = read(tmp_path, "examples", **options)
    counts = Counter(dialogue.task for dialogue in found)
    assert counts.keys() == {"caption", "spoken-vqa-spoken"} and 120 < counts["caption"] < 180
    assert found == read(tmp_path, "examples", **options)
    with pytest.raises(SourceError, match="there is no task 'singing'"):
        SOURCES.build("examples", **{**options, "tasks": {"singing": 1}})
    with pytest.raises(SourceError, match="spoken_instructions is 2"):
        SOURCES.build("examples", **options, spoken_instructions=2)


def test_speech_in_tables(tmp_path, media) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "audio": [{"bytes": (media / f"{name}.flac").read_bytes(), "path": None} for name in ("ann1", "ann2")],
        "sentence": ["one", "two"],
        "speaker_id": [7, 7],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    table.to_parquet(str(tmp_path / "a.parquet"))
    columns = {"speech": "audio", "text": "sentence", "speaker": "speaker_id"}
    options = {"tasks": ["voice-clone"], "columns": columns}
    direct = read(tmp_path, "examples", data=str(tmp_path / "a.parquet"), **options)
    loaded = read(tmp_path, "datasets", data=str(tmp_path / "a.parquet"), rows="examples", options=options)
    for first, second in (direct, loaded):
        assert isinstance(first, BadRow) and "has no 'prompt'" in first.error
        assert said(second)[1] == [("speech", "two")] and second.turns[0].parts[1].media.seconds == 3.0
        assert second.turns[1].parts[0].media.origin["speaker"] == "7"
    assert direct[1].id == loaded[1].id


# --- nanoworld ---


def test_nanoworld_tasks_are_true(tmp_path) -> None:
    names = [
        "image-editing",
        "story",
        "vqa",
        "spoken-vqa",
        "spoken-vqa-spoken",
        "image-to-music",
        "music-to-image",
        "asr",
    ]
    found = read(tmp_path, "nanoworld-tasks", tasks=names, num=200, seed=3)
    assert {dialogue.task for dialogue in found} == set(names) and len({d.id for d in found}) > 190
    for dialogue in found:
        dialogue.check()
        scene = Scene.from_dict(dialogue.meta["scene"])
        assert not scene.has_held_out
        user, assistant = dialogue.turns
        if dialogue.task == "image-editing":
            picture, change = user.parts
            assert parse(picture.text) == scene
            assert (
                apply_edit(scene, change.text)
                == parse(assistant.parts[0].text)
                == Scene.from_dict(dialogue.meta["edited"])
            )
        elif "vqa" in dialogue.task:
            assert answer(scene, user.parts[1].text) == assistant.parts[0].text
        elif dialogue.task == "story":
            assert [part.modality for part in assistant.parts] == ["text", "image"] * 3
            scenes = [parse(part.text) for part in assistant.parts[1::2]]
            for before, change, after in zip(scenes, assistant.parts[2::2], scenes[1:], strict=False):
                assert apply_edit(before, change.text) == after
        else:
            assert parse(user.parts[-1].text) == parse(assistant.parts[0].text) == scene
    assert found == read(tmp_path, "nanoworld-tasks", tasks=names, num=200, seed=3)
    endless = SOURCES.build("nanoworld-tasks", tasks=names, seed=3).read(Store(tmp_path))
    assert found[:50] == list(islice(endless, 50))


def test_nanoworld_tests_hold_out_things_and_templates(tmp_path) -> None:
    found = read(tmp_path, "nanoworld-tasks", tasks="image-to-music", num=30, split="test")
    for dialogue in found:
        assert Scene.from_dict(dialogue.meta["scene"]).has_held_out and dialogue.meta["templates"] == "held-out"
        assert dialogue.turns[0].parts[0].text in HELD_OUT["image->music"]
    with pytest.raises(SourceError, match="task 'image-to-edges' needs files"):
        SOURCES.build("nanoworld-tasks", tasks="image-to-edges")
