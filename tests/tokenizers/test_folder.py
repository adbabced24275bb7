"""Folders of media: what is found, left out, held out, cached; and the pictures of the run folder."""

import json
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyglot_tokenizers import ManifestError, StepBatches, read_audio, read_image, write_audio, write_image
from anyglot_tokenizers.folder import ERRORS, Item, Split, audio_folder, image_folder
from anyglot_tokenizers.plots import image_grid, spectrogram, write_reconstructions


def picture(seed, height=20, width=20):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def sound(seed, samples=900, channels=1):
    return torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for index in range(12):
        write_image(folder / "deep" / f"{index}.png", picture(index))
    write_image(folder / "deep" / "er" / "again.PNG".lower(), picture(3))
    write_image(folder / ".hidden" / "no.png", picture(50))
    write_image(folder / "wide.png", picture(51, 30, 90))
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_pictures_are_found_fitted_and_split(pictures, tmp_path):
    split = Split(share=0.4)
    train, held_out = image_folder([pictures], tmp_path / "cache", split, side=16)
    names = {item.name for item in train.items} | {item.name for item in held_out.items}
    assert names == {f"deep/{index}.png" for index in range(12)} | {"deep/er/again.png", "wide.png"}
    sides = {item.name: (train if item in train.items else held_out) for item in (*train.items, *held_out.items)}
    assert sides["deep/3.png"] is sides["deep/er/again.png"]  # the same picture
    shapes = {item.name: item.shape for item in (*train.items, *held_out.items)}
    assert shapes["deep/0.png"] == (16, 16, 3) and shapes["wide.png"] == (16, 32, 3)  # at most twice as long
    batch = StepBatches(train, batch_size=4, crop=16)[0]
    assert batch["media"].shape == (4, 3, 16, 16)
    sent = pickle.dumps(train)
    assert len(sent) < 5000 and torch.equal(pickle.loads(sent)[1], train[1])


def test_pictures_small_enough_are_kept_as_they_are(pictures, tmp_path):
    train, held_out = image_folder([pictures], tmp_path / "cache", Split(held_out=("deep/er/*",)), side=64)
    assert [item.name for item in held_out.items] == ["deep/er/again.png"]
    assert "deep/3.png" not in {item.name for item in train.items}  # its twin is held out
    for index, item in enumerate(train.items[:3]):
        pixels = (read_image(pictures / item.name) * 255).round().byte().permute(1, 2, 0)
        assert torch.equal(train[index], pixels)


def test_hostile_files_are_left_out_with_a_reason(pictures, tmp_path):
    (pictures / "junk.png").write_bytes(b"junk")
    (pictures / "empty.jpg").write_bytes(b"")
    whole = (pictures / "deep" / "0.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "folder.png").mkdir()
    train, held_out = image_folder([pictures], tmp_path / "cache", Split(share=0.4), side=16)
    lines = [json.loads(line) for line in (tmp_path / "cache" / ERRORS).read_text().splitlines()]
    assert {line["file"].rsplit("/")[-1] for line in lines} == {"junk.png", "empty.jpg", "cut.png"}
    assert all(line["reason"] for line in lines)
    assert len(train) + len(held_out) == 14


def test_decoded_once(pictures, tmp_path):
    cache = tmp_path / "cache"
    first = image_folder([pictures], cache, Split(share=0.4), side=16)
    data = next(cache.glob("media-*.bin"))
    before = data.stat().st_mtime_ns
    second = image_folder([pictures], cache, Split(share=0.4), side=16)
    assert data.stat().st_mtime_ns == before
    assert [part.fingerprint for part in first] == [part.fingerprint for part in second]
    write_image(pictures / "deep" / "0.png", picture(99))
    changed = image_folder([pictures], cache, Split(share=0.4), side=16)
    assert {part.fingerprint for part in changed} != {part.fingerprint for part in first}
    (cache / "index.jsonl").write_text("junk")
    again = image_folder([pictures], cache, Split(share=0.4), side=16)
    assert [part.fingerprint for part in again] == [part.fingerprint for part in changed]


def test_what_killed_runs_left_is_removed(pictures, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    old, fresh, other = (
        cache / f"{name}.tmp.bin" for name in (".media-a.0123456789ab", ".media-b.ba9876543210", ".media-c")
    )
    for path in (old, fresh, other):
        path.write_bytes(b"x")
    for path in (old, other):
        os.utime(path, (0, 0))
    image_folder([pictures], cache, Split(share=0.4), side=16)
    assert not old.exists() and fresh.exists() and other.exists()  # the second may be of a run that goes on


def test_sounds_are_resampled_and_grouped_by_speaker(tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    for speaker in range(12):
        for take in range(2):
            write_audio(folder / f"{speaker}-{take}.wav", sound(10 * speaker + take, channels=1 + take), 8000)
    write_audio(folder / "99-long.wav", sound(1, 16001), 8000)
    split = Split(share=0.3, group=r"^(\d+)-")
    train, held_out = audio_folder([folder], tmp_path / "cache", split, sample_rate=16000, channels=2, max_seconds=2)
    left, right = ({item.name.split("-")[0] for item in part.items} for part in (train, held_out))
    assert not left & right and len(left) + len(right) == 12
    assert len((tmp_path / "cache" / ERRORS).read_text().splitlines()) == 1
    expected = read_audio(folder / train.items[0].name, sample_rate=16000, channels=2)
    assert train[0].shape == (2, 1800) and (train[0] / 32768 - expected).abs().max() <= 0.5 / 32768
    batch = StepBatches(train, batch_size=2, crop=640)[0]
    assert batch["media"].shape == (2, 2, 640) and batch["media"].abs().max() < 1


@given(st.text(max_size=20), st.text(max_size=64), st.floats(0.01, 0.99))
def test_a_split_is_a_function_of_the_content(name, content, share):
    assert Split(share=share).holds_out(name, content) == Split(share=share).holds_out("other", content)
    group = Split(share=share, group="^(.)")
    if name:
        assert group.holds_out(name, content) == group.holds_out(name[0], "other") or name[0] == "\n"


def test_share_is_kept():
    held = sum(Split(share=0.15).holds_out("", str(index)) for index in range(4000))
    assert 0.13 < held / 4000 < 0.17


def test_few_groups_are_still_split():
    for first in range(0, 60, 3):
        names = [f"{speaker}-{take}.wav" for speaker in range(first, first + 3) for take in range(2)]
        items = [Item(name, 0, (1,), name) for name in names]
        held = Split(share=0.02, group=r"^(\d+)-").held_out_of(items)
        assert {item.name.split("-")[0] for item in held} and len(held) % 2 == 0 and len(held) < len(items)


def test_nothing_to_use(pictures, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, split, message in (
        (tmp_path / "nowhere", Split(), "no such folder"),
        (empty, Split(), "holds no"),
        (pictures, Split(held_out=("nobody*",)), "0 held out"),
        (pictures, Split(held_out=("*",)), "0 are left"),
    ):
        with pytest.raises(ManifestError, match=message):
            image_folder([folder], tmp_path / "cache", split, side=16)
    for options in ({"share": 0.0}, {"share": 1.0}, {"group": "("}):
        with pytest.raises(ManifestError):
            Split(**options)


def test_spectrogram_shows_where_the_tone_is():
    rate = 8000
    tone = torch.sin(torch.arange(rate) * 2 * torch.pi * 1000 / rate)[None]
    image = spectrogram(tone, height=64)
    assert image.shape[:2] == (3, 64) and image.min() >= 0 and image.max() <= 1
    brightest = int(image.sum(0).mean(1).argmax())
    assert brightest == pytest.approx(64 * (1 - 1000 / 4000), abs=2)
    assert spectrogram(torch.zeros(2, 100)).max() < 0.1


def test_grid_and_reconstructions(tmp_path):
    rows = [torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)]
    grid = image_grid(rows, gap=2)
    assert grid.shape == (3, 20, 30) and torch.equal(grid[:, 10:18, 10:18], rows[1][1])
    write_reconstructions(tmp_path / "a", list(rows[0]), list(rows[1]), None)
    assert read_image(tmp_path / "a" / "images.png").shape == (3, 20, 30)
    write_reconstructions(tmp_path / "b", [sound(0, channels=2)], [sound(1, channels=2)], 8000)
    assert read_audio(tmp_path / "b" / "0_original.wav", sample_rate=8000, channels=2).shape == (2, 900)
    write_reconstructions(tmp_path / "c", [torch.rand(4, 10)], [torch.rand(4, 10)], None)
    assert not list((tmp_path / "c").iterdir())
