"""Reading and writing media: values, limits, and one clear error for each kind of bad file."""

import struct
import zlib

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from anyglot_tokenizers import MediaError, atomic_write, read_audio, read_image, write_audio, write_image
from anyglot_tokenizers.media import MediaBytes


def test_image_round_trip(tmp_path):
    image = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0)) / 255
    write_image(tmp_path / "a.png", image)
    assert torch.equal(read_image(tmp_path / "a.png"), image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert read_image(tmp_path / "a.png", size=4).shape == (3, 4, 4)


def test_image_size_crops_the_centre(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", size=10).min() > 0.99


def test_alpha_goes_on_white_and_exif_turns(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 1).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "b.jpg").shape == (3, 8, 4)
    Image.fromarray(np.full((2, 2), 65535, np.uint16)).save(tmp_path / "c.png")
    assert (read_image(tmp_path / "c.png") == 1).all()


def _bomb(path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def test_bad_images(tmp_path):
    path = tmp_path / "a.png"
    cases = []
    with pytest.raises(MediaError, match="no such file"):
        read_image(path)
    with pytest.raises(MediaError, match="folder"):
        read_image(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(MediaError, match="empty"):
        read_image(path)
    path.write_text("not a picture")
    with pytest.raises(MediaError, match="known format"):
        read_image(path)
    _bomb(path)
    with pytest.raises(MediaError, match="64000000 pixels"):
        read_image(path)
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    for suffix in ("png", "jpg", "webp", "bmp"):
        whole = tmp_path / f"w.{suffix}"
        Image.fromarray(noise).save(whole)
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(MediaError) as caught:
            read_image(cut)
        cases.append(str(caught.value))
    assert all("\n" not in line and "cut." in line for line in cases)
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(MediaError, match="NaN"):
        read_image(tmp_path / "nan.tiff")
    Image.new("RGB", (20, 20)).save(path)
    with pytest.raises(MediaError, match="more than 100 pixels"):
        read_image(path, max_pixels=100)


def test_audio_round_trip(tmp_path):
    audio = torch.sin(torch.arange(1600) * 0.1)[None] * 0.5
    for name in ("a.wav", "a.flac"):
        write_audio(tmp_path / name, audio, 16000)
        assert torch.allclose(read_audio(tmp_path / name, sample_rate=16000), audio, atol=1e-4)
    write_audio(tmp_path / "a.mp3", audio.repeat(1, 10), 16000)
    lossy = read_audio(tmp_path / "a.mp3", sample_rate=16000)
    assert lossy.shape == (1, 16000) and (lossy - audio.repeat(1, 10))[:, 2000:-2000].abs().mean() < 0.05
    assert read_audio(tmp_path / "a.wav", sample_rate=8000).shape == (1, 800)
    assert read_audio(tmp_path / "a.wav", sample_rate=16000, channels=2).shape == (2, 1600)
    soundfile.write(tmp_path / "s.wav", np.array([[0.5, -0.5]] * 10), 16000)
    assert read_audio(tmp_path / "s.wav", sample_rate=16000).abs().max() == 0
    assert read_audio(tmp_path / "s.wav", sample_rate=16000, channels=2).shape == (2, 10)


def test_bad_audio(tmp_path):
    path = tmp_path / "a.wav"
    with pytest.raises(MediaError, match="no such file"):
        read_audio(path, sample_rate=16000)
    path.write_bytes(b"")
    with pytest.raises(MediaError, match="empty"):
        read_audio(path, sample_rate=16000)
    path.write_text("not a sound")
    with pytest.raises(MediaError, match="not a readable"):
        read_audio(path, sample_rate=16000)
    soundfile.write(path, np.zeros(0, np.float32), 16000)
    with pytest.raises(MediaError, match="no samples"):
        read_audio(path, sample_rate=16000)
    soundfile.write(path, np.array([0.0, np.nan, np.inf], np.float32), 16000, subtype="FLOAT")
    with pytest.raises(MediaError, match="NaN"):
        read_audio(path, sample_rate=16000)
    soundfile.write(path, np.zeros((9, 3), np.float32), 16000)
    with pytest.raises(MediaError, match="3 channels"):
        read_audio(path, sample_rate=16000, channels=2)
    soundfile.write(path, np.zeros(32000, np.float32), 16000)
    with pytest.raises(MediaError, match="longer than 1 s"):
        read_audio(path, sample_rate=16000, max_seconds=1.0)
    noise = np.random.default_rng(0).uniform(-1, 1, 9000)
    for suffix in ("wav", "flac", "aiff", "au", "w64", "rf64", "caf", "ogg", "opus"):
        whole = tmp_path / f"w.{suffix}"
        kind = {"rf64": {"format": "RF64"}, "opus": {"format": "OGG", "subtype": "OPUS"}}.get(suffix, {})
        soundfile.write(whole, noise, 16000, **kind)
        assert read_audio(whole, sample_rate=16000).shape == (1, 9000)
        assert read_audio(MediaBytes("whole", whole.read_bytes()), sample_rate=16000).shape == (1, 9000)
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        for source in (cut, MediaBytes("cut", cut.read_bytes())):
            with pytest.raises(MediaError, match="cut"):
                read_audio(source, sample_rate=16000)


def test_an_ogg_file_without_its_last_page_is_truncated(tmp_path):
    whole, cut = tmp_path / "whole.ogg", tmp_path / "cut.ogg"
    soundfile.write(whole, np.random.default_rng(0).uniform(-1, 1, 90_000), 16000)
    content = whole.read_bytes()
    cut.write_bytes(content[: content.rfind(b"OggS")])
    assert read_audio(whole, sample_rate=16000).shape == (1, 90_000)
    with pytest.raises(MediaError, match="truncated"):
        read_audio(cut, sample_rate=16000)


def test_streamed_headers_state_no_size(tmp_path):
    for name, at, stated in (("a.wav", 4, b"\xff" * 4), ("a.wav", 4, bytes(4)), ("a.au", 8, b"\xff" * 4)):
        soundfile.write(tmp_path / name, np.zeros(640), 16000)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:at] + stated + content[at + 4 :])
        assert read_audio(tmp_path / name, sample_rate=16000).shape == (1, 640)


def test_an_absurd_sample_rate_takes_no_memory(tmp_path):
    """A header of 2**30 Hz, in a format that libsndfile cannot seek in: no room for ten minutes of that is made."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(640), 8000, subtype="GSM610")
    content = bytearray(path.read_bytes())
    content[24:28] = (2**30).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(MediaError, match="none at 16000 Hz"):
        read_audio(path, sample_rate=16000)


def test_write_refuses_and_leaves_nothing(tmp_path):
    for image in (
        torch.zeros(1, 2, 2),
        torch.zeros(3, 0, 2),
        torch.zeros(3, 2, 2, dtype=torch.uint8),
        torch.full((3, 2, 2), torch.nan),
    ):
        with pytest.raises(MediaError):
            write_image(tmp_path / "a.png", image)
    for audio in (torch.zeros(4), torch.zeros(1, 0), torch.full((1, 4), torch.inf)):
        with pytest.raises(MediaError):
            write_audio(tmp_path / "a.wav", audio, 16000)
    with pytest.raises(MediaError, match="suffix"):
        write_image(tmp_path / "a", torch.zeros(3, 2, 2))
    with pytest.raises(MediaError, match=r"\.exe"):
        write_audio(tmp_path / "a.exe", torch.zeros(1, 2), 16000)
    with pytest.raises(MediaError, match=r"a\.mp3.*cannot write MP3 of 3 channels at 16000 Hz"):
        write_audio(tmp_path / "a.mp3", torch.zeros(3, 2000), 16000)
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("one")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["one"]


def test_a_missing_folder_is_named(tmp_path):
    writes = {"a.png": lambda path: write_image(path, torch.zeros(3, 2, 2))}
    writes |= {name: lambda path: write_audio(path, torch.zeros(1, 2000), 16000) for name in ("a.wav", "a.mp3")}
    writes["a.txt"] = lambda path: atomic_write(path).__enter__()
    for name, write in writes.items():
        with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere") as caught:
            write(tmp_path / "nowhere" / name)
        assert caught.value.filename == str(tmp_path / "nowhere" / name)
