"""The `anyglot` command: wrong use is code 2 and one line that names the way out; right use writes what it says."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.cli import main, shipped_or_given
from anyglot_recipes.expand import add_modalities
from anyglot_recipes.shipped import NANO
from anyglot_tokenizers.codes import Codes
from anyglot_tokenizers.image import ImageVQ
from anyglot_tokenizers.media import read_audio, read_image, write_audio, write_image
from anyglot_tokenizers.query import QueryImageVQ

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "demo",
    "train",
    "eval",
    "synth",
    "prepare",
    "dataset",
    "generate",
    "tokenizer",
    "plan",
    "average",
    "expand",
    "replay",
    "chat",
    "export",
    "serve",
)


@pytest.fixture(scope="module")
def folder(tiny_model: UnifiedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must end with code 2."""
    assert main([str(a) for a in arguments]) == 2
    streams = capsys.readouterr()
    (line,) = streams.err.splitlines()
    assert line.startswith("anyglot: ") and not streams.out
    return line


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "train"])
def test_help_of_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and f"anyglot {command}" in capsys.readouterr().out


def test_starting_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'lightning'}"
    code = f"import sys, anyglot_recipes.cli; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--text", "hello", "--to", "image"],
        ["eval", "nanoworld", "--num", "2"],
        ["demo", "--num", "2", "--out", "page"],
    ],
    ids=lambda a: a[0],
)
def test_missing_model_folder(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *arguments, "--model", tmp_path / "none")
    assert f"{tmp_path / 'none'}" in line and "give the folder of a unified model" in line


def test_shipped_models_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_or_given("nano") == str(NANO)
    assert [shipped_or_given(name) for name in ("other", "../nano", ".", "")] == ["other", "../nano", ".", ""]
    (tmp_path / "nano").mkdir()
    assert shipped_or_given("nano") == "nano"


def test_unknown_media_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, suffix in (("image", "png"), ("speech", "wav")):
        missing = tmp_path / f"none.{suffix}"
        tokenizer = folder / "tokenizers" / name
        assert str(missing) in refused(
            capsys, "tokenizer", "encode", tokenizer, missing, tmp_path / "codes.safetensors"
        )
        assert str(missing) in refused(capsys, "generate", "--model", folder, f"--{name}", missing, "--to", "text")
    missing = tmp_path / "none.safetensors"
    assert str(missing) in refused(capsys, "tokenizer", "decode", folder / "tokenizers" / "image", missing, "a.png")
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_no_media(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    assert str(bad) in refused(capsys, "generate", "--model", folder, "--image", bad, "--to", "text")


def test_media_without_text_give_no_samples(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but codes is no error, but whoever trains on them next learns here what is missing."""
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / "a.png", torch.zeros(3, 32, 32))
    out = tmp_path / "codes"
    assert main(["prepare", str(tmp_path / "photos"), "--model", str(folder), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "no training samples" in shown and "the names of sub-folders" in shown and not (out / "shards").exists()


def test_nothing_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "generate", "--model", folder, "--to", "text")
    assert "nothing was given; use at least one of --text, --image, --speech, --music" in line


def test_unknown_target(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    line = refused(capsys, "generate", "--model", folder, "--text", "a", "--to", "video", "--out", out)
    assert "video" in line and "image" in line


def test_missing_file_arguments(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tokenizer", "encode", str(folder / "tokenizers" / "image")])
    assert stopped.value.code == 2
    assert "required: input, output" in capsys.readouterr().err


def test_tokenizer_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed["shipped"]) == {"image", "speech", "music"}
    assert main(["tokenizer", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(listed["shipped"]) + len(listed["published"]) + 1
    assert all(entry["hub_id"] in line for entry, line in zip(listed["published"], lines[4:], strict=False))
    assert main(["tokenizer", "list", "--markdown"]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "tokenizers.md").read_text(), "print the table again"


def test_output_that_cannot_be_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    line = refused(capsys, "generate", "--model", folder, "--text", "a", "--to", "image", "--out", tmp_path / "file")
    assert str(tmp_path / "file") in line


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["eval", "nanoworld", "--num", "0"], ["demo", "--typo"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_generate_writes_every_answer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: UnifiedModel
) -> None:
    write_image(tmp_path / "in.png", torch.rand(3, 80, 100))
    given = ["--text", "a large red circle", "--image", str(tmp_path / "in.png")]
    to = ["--to", "text, image,music", "--out", str(tmp_path / "out")]
    assert main(["generate", "--model", str(folder), *given, *to]) == 0
    streams = capsys.readouterr()
    written = (tmp_path / "out" / "0-text.txt").read_text()
    assert written == streams.out and written.strip() not in ("", "None")
    assert read_image(tmp_path / "out" / "1-image.png").shape == (3, 64, 64)
    assert read_audio(tmp_path / "out" / "2-music.wav", sample_rate=16000).shape[1] > 0
    assert len(streams.err.splitlines()) == 3
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main(["generate", "--model", str(folder), *given, *to]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first


def test_generate_keeps_the_order_of_what_is_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "in.png", torch.rand(3, 64, 64))
    text, image = ["--text", "a red circle"], ["--image", str(tmp_path / "in.png")]
    met: list[list[str]] = []
    respond = UnifiedModel.respond

    def spy(model: UnifiedModel, samples: Any, *rest: Any, **options: Any) -> Any:
        met.append([segment.modality for segment in samples[0].segments])
        return respond(model, samples, *rest, **options)

    monkeypatch.setattr(UnifiedModel, "respond", spy)
    to = ["--to", "text", "--out", str(tmp_path / "out")]
    for given in ([*text, *image], [*image, *text]):
        assert main(["generate", "--model", str(folder), *given, *to]) == 0
    assert met == [["text", "image"], ["image", "text"]]
    capsys.readouterr()
    line = refused(capsys, "generate", "--model", folder, *image, *text, *image, "--to", "text")
    assert "--image: give one of each" in line


def test_pictures_of_another_name_are_written(tiny_model: UnifiedModel, tmp_path: Path) -> None:
    depth = ImageVQ(channels=(8, 8, 16), codebook_size=8, codebook_dim=8).eval()
    torch.manual_seed(0)
    tiny_model.save_pretrained(tmp_path / "before")
    model = add_modalities(
        UnifiedModel.from_pretrained(tmp_path / "before"), {"depth": depth}, {"depth": {"grid": [2, 2]}}
    )
    model.save_pretrained(tmp_path / "after")
    asked = ["generate", "--model", str(tmp_path / "after"), "--text", "red", "--to", "depth"]
    assert main([*asked, "--out", str(tmp_path / "out")]) == 0
    assert read_image(tmp_path / "out" / "0-depth.png").shape[0] == 3


def test_examples_that_are_no_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "examples.jsonl").write_bytes(b"\xff\xfe")
    asked = ["generate", "--model", str(folder), "--text", "red", "--to", "image"]
    assert main([*asked, "--examples", str(tmp_path / "examples.jsonl")]) == 2
    assert "byte 0 is no UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "again"), [("eval", False), ("train", True)])
def test_only_what_goes_on_says_so(
    command: str, again: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    assert main([command]) == 130
    assert ("run the same command again" in capsys.readouterr().err) == again


def test_tokenizer_of_pictures_of_one_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"image_size": (16, 32), "patch": 8, "width": 32, "heads": 2, "num_queries": 6, "codebook_size": 32}
    tokenizer, codes = tmp_path / "query", tmp_path / "codes.safetensors"
    QueryImageVQ(**small, encoder_depth=1, decoder_depth=1).save_pretrained(tokenizer)
    write_image(tmp_path / "in.png", torch.rand(3, 40, 50))
    assert main(["tokenizer", "encode", str(tokenizer), str(tmp_path / "in.png"), str(codes)]) == 0
    decode = ["tokenizer", "decode", str(tokenizer), str(codes), str(tmp_path / "out.png")]
    assert main(decode) == 0 and read_image(tmp_path / "out.png").shape == (3, 16, 32)
    assert main([*decode, "--num-quantizers", "99"]) == 2 and "1..1" in capsys.readouterr().err
    twice = Codes.load(codes).codes.repeat(2, 1, 1)
    Codes(twice).save(codes)
    assert main(decode) == 2 and "2 items" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["image", "speech"])
def test_tokenizer_round_trip(folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = str(folder / "tokenizers" / name)
    medium = tmp_path / ("in.png" if name == "image" else "in.wav")
    if name == "image":
        write_image(medium, torch.rand(3, 70, 40))
    else:
        write_audio(medium, torch.rand(1, 5000) * 0.1, 16000)
    codes, back = tmp_path / "codes.safetensors", tmp_path / f"back{medium.suffix}"
    assert main(["tokenizer", "info", tokenizer]) == 0
    spec = json.loads(capsys.readouterr().out)
    assert spec["modality"] == name
    assert main(["tokenizer", "encode", tokenizer, str(medium), str(codes)]) == 0
    assert Codes.load(codes).codes.shape == ((1, 2, 4, 2) if name == "image" else (1, 2, 4))
    assert main(["tokenizer", "decode", tokenizer, str(codes), str(back)]) == 0
    if name == "image":
        assert read_image(back).shape == (3, 64, 32)
    else:
        assert read_audio(back, sample_rate=16000).shape == (1, 4 * 1280)
