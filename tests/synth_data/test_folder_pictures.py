"""Captioned folders: what is found, what is not, and whose licence it is under."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anyglot_synth.backends import BackendError
from anyglot_synth.folder import CaptionIndex, MusicFolder, PictureFolder, caption_words
from anyglot_synth.music import build_music
from anyglot_synth.nanoworld.language import describe
from anyglot_synth.nanoworld.scene import sample_scene
from anyglot_synth.pictures import build_pictures
from anyglot_synth.stages import Filtered
from anyglot_tokenizers.errors import AnyglotError, MediaError

CAPTIONS = {
    "cat.png": "a black cat asleep on a red sofa",
    "dog.png": "a brown dog that runs on the beach",
    "sea.png": "high waves on a beach in a storm",
}
COLORS = {"cat.png": (200, 0, 0), "dog.png": (0, 200, 0), "sea.png": (0, 0, 200)}


def paint(folder: Path) -> None:
    for name, color in COLORS.items():
        Image.new("RGB", (8, 6), color).save(folder / name)


def write_list(folder: Path, kind: str) -> None:
    rows = [{"file": name, "caption": caption} for name, caption in CAPTIONS.items()]
    rows[0]["licence"] = "CC-BY-4.0"
    if kind == "jsonl":
        (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        lines = [f'{row["file"]},"{row["caption"]}",{row.get("licence", "")}' for row in rows]
        (folder / "captions.csv").write_text("file,caption,licence\n" + "\n".join(lines) + "\n")
    else:
        for row in rows:
            (folder / row["file"]).with_suffix(".txt").write_text(row["caption"] + "\n")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_the_nearest_caption_is_taken(tmp_path: Path, kind: str) -> None:
    paint(tmp_path)
    write_list(tmp_path, kind)
    backend = build_pictures({"engine": "folder", "path": str(tmp_path), "licence": "CC0-1.0"})
    backend.setup()
    made = backend.make("Show me a sleeping black cat on a sofa!", {}, 0)
    assert made.array.shape == (6, 8, 3) and made.array.dtype == np.uint8
    assert made.array[0, 0].tolist() == [200, 0, 0]
    assert made.notes["file"] == "cat.png" and made.notes["caption"] == CAPTIONS["cat.png"]
    assert made.notes["licence"] == ("CC0-1.0" if kind == "txt" else "CC-BY-4.0")
    assert backend.make("waves at the beach", {}, 0).notes["licence"] == "CC0-1.0"
    with pytest.raises(Filtered) as end:
        backend.make("an elephant in a library", {}, 0)
    assert end.value.reason == "no_match"


def test_a_caption_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    paint(tmp_path)
    write_list(tmp_path, "txt")
    (tmp_path / "dog.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(BackendError, match="dog.txt: not a caption .*save it as text in UTF-8"):
        PictureFolder(tmp_path).identity()


def test_a_word_in_common_is_not_enough(tmp_path: Path) -> None:
    paint(tmp_path)
    write_list(tmp_path, "txt")
    with pytest.raises(Filtered):
        PictureFolder(tmp_path, min_cover=0.6).make("a red tractor with two farmers", {}, 0)
    lenient = PictureFolder(tmp_path, min_cover=0.1)
    assert lenient.make("a red tractor with two farmers", {}, 0).notes["file"] == "cat.png"


def test_every_caption_of_many_finds_itself() -> None:
    rng = np.random.default_rng(0)
    captions = sorted({describe(sample_scene(rng), rng) for _ in range(300)})
    index = CaptionIndex(captions)
    right = 0
    for caption in captions:
        best = index.nearest(caption, 3)
        assert best[0][2] == pytest.approx(1.0)
        # Other orders of the same words are as near.
        right += sorted(caption_words(captions[best[0][0]])) == sorted(caption_words(caption))
        assert [found[1] for found in best] == sorted((found[1] for found in best), reverse=True)
    assert right / len(captions) > 0.9


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.text(max_size=20))
def test_covers_are_shares(captions: list[str], asked: str) -> None:
    for number, score, cover in CaptionIndex(captions).nearest(asked, 5):
        assert 0 <= number < len(captions) and score > 0 and 0 < cover <= 1


def test_the_seed_chooses_among_several(tmp_path: Path) -> None:
    paint(tmp_path)
    write_list(tmp_path, "txt")
    one, some = PictureFolder(tmp_path), PictureFolder(tmp_path, choose=2, min_cover=0.3)
    found = {some.make("on the beach", {}, seed).notes["file"] for seed in range(20)}
    assert found == {"dog.png", "sea.png"}
    assert some.make("on the beach", {}, 3).notes == some.make("on the beach", {}, 3).notes
    assert not one.seeded and one.key("x", {}, 1) == one.key("x", {}, 2)
    assert some.seeded and some.key("x", {}, 1) != some.key("x", {}, 2)


def test_the_identity_is_that_of_the_contents(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paint(tmp_path / name)
        write_list(tmp_path / name, "txt")
    first, second = (PictureFolder(tmp_path / name).identity() for name in ("a", "b"))
    assert first == second
    Image.new("RGB", (8, 6)).save(tmp_path / "b" / "sea.png")
    assert PictureFolder(tmp_path / "b").identity() != first


def test_sounds_of_a_folder(tmp_path: Path) -> None:
    tone = np.stack([np.full(800, 0.5), np.zeros(800)], axis=1)
    soundfile.write(tmp_path / "tune.wav", tone, 8000, subtype="FLOAT")
    (tmp_path / "tune.txt").write_text("slow piano music")
    backend = build_music({"engine": "folder", "path": str(tmp_path)})
    made = backend.make("some slow piano", {}, 0)
    assert made.sample_rate == 8000 and made.array.shape == (800,) and made.array[5] == pytest.approx(0.25)
    (tmp_path / "tune.wav").write_bytes(b"no sound")
    with pytest.raises(BackendError, match=r"tune.wav: not a sound"):
        MusicFolder(tmp_path).make("slow piano", {}, 0)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="there is no such folder"):
        PictureFolder(tmp_path / "nowhere").setup()
    with pytest.raises(BackendError, match="no captioned files"):
        PictureFolder(tmp_path).setup()
    with pytest.raises(BackendError, match="min_cover 2"):
        PictureFolder(tmp_path, min_cover=2)
    (tmp_path / "captions.jsonl").write_text('{"file": "cat.png"}\n')
    paint(tmp_path)
    with pytest.raises(BackendError, match=r"captions.jsonl: not a list of captions \(KeyError\('caption'\)\)"):
        PictureFolder(tmp_path).setup()
    (tmp_path / "captions.jsonl").write_text('{"file": "../secret.png", "caption": "x"}\n')
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "secret.png")
    with pytest.raises(BackendError, match="is no file of the folder"):
        PictureFolder(tmp_path).setup()
    (tmp_path / "captions.jsonl").write_text('{"file": "bad.png", "caption": "a bad picture"}\n')
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(MediaError, match=r"bad\.png"):
        PictureFolder(tmp_path).make("bad picture", {}, 0)


def test_unknown_names_and_arguments() -> None:
    with pytest.raises(AnyglotError, match="there is no picture engine 'dalle'; use one of: nanoworld, diffusers"):
        build_pictures("dalle")
    with pytest.raises(AnyglotError, match=r"picture engine 'folder' has no option 'pth'; it has: path, min_cover"):
        build_pictures({"engine": "folder", "path": "x", "pth": "y"})
    with pytest.raises(AnyglotError, match="names no music engine"):
        build_music({"path": "x"})
