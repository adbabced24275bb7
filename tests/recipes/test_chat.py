"""`anyglot chat`: words and files in, text and files out; what is saved comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chat_session import Session
from anyglot_tokenizers.media import read_audio, read_image, write_audio, write_image


class Terminal:
    def __init__(self, model: UnifiedModel, out: Path, **options: object) -> None:
        self.said = ""
        self.session = Session(model, out, write=self.add, **options)  # type: ignore[arg-type]

    def add(self, text: str) -> None:
        self.said += text

    def type(self, *lines: str) -> str:
        self.said = ""
        self.session.run(lines)
        return self.said


@pytest.fixture
def terminal(tiny_model: UnifiedModel, tmp_path: Path) -> Terminal:
    write_image(tmp_path / "a cat.png", torch.rand(3, 64, 64))
    write_audio(tmp_path / "hum.wav", torch.rand(1, 16000) - 0.5, 16000)
    return Terminal(tiny_model, tmp_path / "out", to="text,image,speech")


def test_files_among_words(terminal: Terminal, tmp_path: Path) -> None:
    segments = terminal.session.read(f"what's '{tmp_path}/a cat.png' and")
    assert [s.content for s in segments if s.modality == "text"] == ["what's", "and"] and len(segments) == 3
    escaped = str(tmp_path / "a cat.png").replace(" ", "\\ ")
    assert [s.modality for s in terminal.session.read(f'say "hi" {escaped}')] == ["text", "image"]
    assert terminal.session.read('say "hi" to ~3 of them')[0].content == 'say "hi" to ~3 of them'
    segments = terminal.session.read(f"what is '{tmp_path}/a cat.png' and {tmp_path}/hum.wav music:{tmp_path}/hum.wav")
    assert [s.modality for s in segments] == ["text", "image", "text", "speech", "music"]
    assert segments[0].content == "what is" and segments[2].content == "and"
    assert [s.modality for s in terminal.session.read("no such file.png here")] == ["text"]


def test_what_is_said_stays_as_it_is(terminal: Terminal, tmp_path: Path) -> None:
    said = "is the circle 'small',  and isn't it red? 'tis so, don't you say"
    assert [s.content for s in terminal.session.read(said)] == [said]
    shown = terminal.session.read(f"{said} '{tmp_path}/a cat.png'  {said}")
    assert [s.content for s in shown if s.modality == "text"] == [said, said] and shown[1].modality == "image"
    asked = terminal.session.read(f"what is '{tmp_path}/a cat.png'?")
    assert [s.modality for s in asked] == ["text", "image", "text"] and asked[2].content == "?"
    assert terminal.session.read(f"look {'a' * 300}.png")[0].modality == "text"  # longer than a name of a file can be


def test_an_absolute_path_is_no_command(terminal: Terminal, tmp_path: Path) -> None:
    assert "no command" not in terminal.type(f"{tmp_path}/hum.wav what is this?")
    assert [s.modality for s in terminal.session.chat.segments[:2]] == ["speech", "text"]


def test_an_answer_is_printed_and_written(terminal: Terminal, tmp_path: Path) -> None:
    said = terminal.type("a red circle", "/to image", "two")
    out = tmp_path / "out"
    assert f"[image: {out}/001-2-image.png]" in said and f"[speech: {out}/001-3-speech.wav]" in said
    assert read_image(out / "001-2-image.png").shape == (3, 64, 64)
    rate = terminal.session.model.tokenizers["speech"].spec.sample_rate
    assert read_audio(out / "001-3-speech.wav", sample_rate=rate).shape[1] > 0
    assert f"[image: {out}/002-1-image.png]" in said
    lines = [json.loads(line) for line in (out / "transcript.jsonl").read_text().splitlines()]
    assert [line["user"] for line in lines] == ["a red circle", "two"]
    assert [part["modality"] for part in lines[0]["assistant"]] == ["text", "image", "speech"]
    assert lines[0]["assistant"][0]["text"] in said


@pytest.mark.parametrize("positions", [4096, 8192])
def test_models_of_more_positions_than_a_conversation_answer(
    tiny_model: UnifiedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    """SmolLM2 has 8,192, an engine of a conversation 4,096."""
    monkeypatch.setattr(tiny_model.model.config, "max_position_embeddings", positions)
    terminal = Terminal(tiny_model, tmp_path / "long", to="any")
    said = terminal.type("a red circle")
    assert terminal.session.chat.engine.capacity == 4096 and len(terminal.session.chat.segments) > 1, said


def test_a_saved_conversation_goes_on(terminal: Terminal, tiny_model: UnifiedModel, tmp_path: Path) -> None:
    terminal.type(f"a '{tmp_path}/a cat.png'", f"/save {tmp_path}/talk.json")
    terminal.type("two")
    again = Terminal(tiny_model, tmp_path / "other", to="text,image,speech", seed=1)
    assert "5 segments" in again.type(f"/load {tmp_path}/talk.json")
    again.type("two")
    assert again.session.chat.segments == terminal.session.chat.segments
    assert terminal.type("/new", f"/save {tmp_path}/empty.json") and terminal.session.chat.segments == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sing", "/sing is no command; /help lists them"),
        ("/to video", "no modality 'video'; there are text, image, speech, music, or any"),
        ("/temperature warm", "'warm' is no number"),
        ("/temperature -1", "Sampling.temperature is -1.0"),
        ("/save", "give a file"),
        ("/save /", "cannot be written"),
        ("/save no such folder/talk.json", "cannot be written"),
        ("/save ~nobody-here/x", "~nobody-here/x"),
        ("music:~nobody-here/x.wav", "~nobody-here"),
        ("/load nowhere.json", "nowhere.json: cannot be read"),
        ("music:nowhere.wav", "nowhere.wav"),
        ("word " * 2000, "this turn has"),
    ],
)
def test_mistakes_are_one_line_and_the_conversation_goes_on(terminal: Terminal, line: str, message: str) -> None:
    said = terminal.type(line, "/to text", "two")
    first = next(x for x in said.splitlines() if x.startswith("!"))
    assert message in first and len(terminal.session.chat.segments) == 2


def test_conversations_of_others_are_refused(terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    terminal.type("two", f"/save {path}")
    good = json.loads(path.read_text())
    for change, message in (
        ({"vocabulary": "x"}, "another vocabulary"),
        ({"version": 9}, "no conversation that this version"),
        ({"segments": [{"role": "user", "modality": "image", "content": [[[99] * 4] * 4]}]}, "outside the codebook"),
        (
            {"segments": [{"role": "assistant", "modality": "image", "content": [[[99] * 4] * 4]}]},
            "outside the codebook",
        ),
        ({"segments": [{"role": "king", "modality": "text", "content": "x"}]}, "king"),
        ({"segments": 3}, "no conversation that /save wrote"),
        ({"segments": [{"role": "user", "modality": ["text"], "content": [[1]]}]}, "no conversation that /save wrote"),
    ):
        path.write_text(json.dumps({**good, **change}))
        assert message in terminal.type(f"/load {path}")
    for broken in ("{", "[" * 200_000):
        path.write_text(broken)
        assert "no conversation that /save wrote" in terminal.type(f"/load {path}")
    assert len(terminal.session.chat.segments) > 0, "what was there stays"


def test_the_command_reads_a_pipe(tmp_path: Path) -> None:
    """The real program with the shipped model."""
    lines = "/to image\na large red circle at the top left\n/to text\nwhat now\n/quit\n"
    command = [sys.executable, "-m", "anyglot_recipes.cli", "chat", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "001-1-image.png").exists() and done.stdout.count("[image: ") == 1
