from __future__ import annotations

import base64
import io
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anyglot_synth.dialogue import Dialogue, DialogueError, Part, escaped
from anyglot_synth.recipe import build
from anyglot_synth.run import run
from anyglot_synth.sources import SOURCES, BadRow, SourceError
from anyglot_synth.sources.hf import _plain
from anyglot_synth.sources.placeholders import parts_of
from anyglot_synth.store import Store
from anyglot_synth.validate import validate
from anyglot_tokenizers.errors import AnyglotError


def write(path: Path, rows: Any, array: bool = False) -> str:
    text = json.dumps(rows, ensure_ascii=False) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(tmp_path: Path, kind: str, **options: Any) -> list[Dialogue | BadRow]:
    return list(SOURCES.build(kind, **options).read(Store(tmp_path / "out")))


def said(dialogue: Dialogue | BadRow) -> list[tuple[str, list[tuple[str, str]]]]:
    assert isinstance(dialogue, Dialogue), dialogue
    return [(turn.role, [(p.modality, p.text) for p in turn.parts]) for turn in dialogue.turns]


def png(color: tuple[int, int, int] = (200, 10, 10), size: int = 8, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, format=kind)
    return buffer.getvalue()


ALPACA = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"}


# --- all sources ---


def test_folders_patterns_and_lists_keep_their_order(tmp_path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json"):
        write(tmp_path / name, [{"instruction": name, "output": "x"}], array=name == "c.json")
    found = read(tmp_path, "alpaca", data=str(tmp_path))
    assert [said(d)[0][1][0][1] for d in found] == ["a.jsonl", "b.jsonl", "c.json"]
    assert {(d.licence, d.source) for d in found} == {("unknown", tmp_path.name)}
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\npretty_name: My data\n---\n# Title\n")
    found = read(tmp_path, "alpaca", data=str(tmp_path))
    assert {(d.licence, d.source) for d in found} == {("cc-by-4.0", "My data")}
    (tmp_path / "README.md").write_text("---\nlicense:\n- mit\n- cc0-1.0\n---\n")
    assert read(tmp_path, "alpaca", data=str(tmp_path / "c.json"))[0].licence == "mit AND cc0-1.0"
    (tmp_path / "README.md").write_text("---\n: [\n---\nlicense: mit\n")
    assert read(tmp_path, "alpaca", data=str(tmp_path / "c.json"))[0].licence == "unknown"
    (tmp_path / ".cache").mkdir()
    for name in (".cache/x.json", "cache-1.arrow", "dataset_info.json"):
        (tmp_path / name).write_text("nothing to read")
    assert len(read(tmp_path, "alpaca", data=str(tmp_path))) == 3
    several = [str(tmp_path / "c.json"), str(tmp_path / "*.jsonl")]
    found = read(tmp_path, "alpaca", data=several, licence="MIT", data_name="s")
    assert [said(d)[0][1][0][1] for d in found] == ["c.json", "a.jsonl", "b.jsonl"]
    assert {(d.licence, d.source) for d in found} == {("MIT", "s")}


def test_the_licence_of_a_card_is_part_of_the_fingerprint(tmp_path) -> None:
    card = "---\nlicense: {}\n---\n"
    for folder in ("data", "other"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        write(tmp_path / "set" / folder / f"{folder}.jsonl", [{"instruction": folder, "output": "x"}])

    def licences(data: str) -> list[str]:
        return [d.licence for d in read(tmp_path, "alpaca", data=str(tmp_path / data)) if isinstance(d, Dialogue)]

    (tmp_path / "README.md").write_text(card.format("of-something-else"))
    assert licences("set") == licences("set/*/*.jsonl") == ["unknown", "unknown"]
    source = SOURCES.build("alpaca", data=str(tmp_path / "set"))
    loaded = SOURCES.build("datasets", data=str(tmp_path / "set" / "data" / "data.jsonl"), rows="alpaca")
    before = source.config(), loaded.config()
    (tmp_path / "set" / "README.md").write_text(card.format("mit"))
    assert licences("set") == ["mit", "mit"]  # the folder that was given
    assert licences("set/*/*.jsonl") == licences("set/data") + licences("set/other") == ["mit", "unknown"]
    assert source.config() != before[0] and loaded.config() != before[1]
    (tmp_path / "set" / "other" / "README.md").write_text(card.format("apache-2.0"))
    assert licences("set") == ["mit", "apache-2.0"]


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(("card", "licence", "name"), [
    ("license: mit\npretty_name: My set", "mit", "My set"),
    ("license: [mit, cc0-1.0]", "mit AND cc0-1.0", "a"),
    ("license: mit\ndate: 2024-13-45", "unknown", "a"),
    ("license: mit\nopen: !!bool perhaps", "unknown", "a"),
    ("license: {a: b}\npretty_name: [1]", "unknown", "a"),
    ('license: "half \\ud800"', "half \\ud800", "a"),
    (f"{BOMB}license: *a11\npretty_name: *a11", "unknown", "a"),
])  # fmt: skip
def test_what_a_card_says(card: str, licence: str, name: str, tmp_path) -> None:
    data = write(tmp_path / "a.jsonl", [ALPACA])
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    source = SOURCES.build("alpaca", data=data)
    assert (source.licences()[tmp_path], source.data_name) == (licence, name)


def test_data_have_a_name_however_they_are_given(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    for name in ("b.jsonl", "a.jsonl", os.fsdecode(b"z\xff.jsonl")):
        write(Path(name), [{"instruction": escaped(name), "output": "Hello"}])
    for data, name in ((".", "mine"), ("*.jsonl", "a"), ("./b*", "b"), ("../mine/a.jsonl", "a"), ("..", tmp_path.name)):
        assert SOURCES.build("alpaca", data=data).data_name == name
    broken = SOURCES.build("alpaca", data="z*")
    assert broken.data_name == r"z\udcff" and broken.config()["files"][0][0] == r"z\udcff.jsonl"
    done = run(SOURCES.build("alpaca", data="."), [], tmp_path / "out", workers=1)
    assert (done.ok, done.failed) == (3, 0)


def test_a_recipe_names_its_data(tmp_path) -> None:
    data = write(tmp_path / "a.jsonl", [ALPACA])
    source = build({"source": {"source": "alpaca", "data": data, "data_name": "sums"}}).source
    assert [d.source for d in source.read(Store(tmp_path)) if isinstance(d, Dialogue)] == ["sums"]


def test_mistakes_of_the_user_are_told(tmp_path) -> None:
    data = write(tmp_path / "a.jsonl", [ALPACA])
    with pytest.raises(SourceError, match="there is no source 'alpacca'; did you mean 'alpaca'?"):
        SOURCES.build("alpacca", data=data)
    with pytest.raises(SourceError, match="source 'alpaca' has no option 'inputs'; it has: data, form"):
        SOURCES.build("alpaca", data=data, inputs="text")
    with pytest.raises(SourceError, match="source 'alpaca' needs the option 'data'"):
        SOURCES.build("alpaca")
    with pytest.raises(SourceError, match="input is 'yes'; use one of: append, text, drop"):
        SOURCES.build("alpaca", data=data, input="yes")
    with pytest.raises(AnyglotError, match="there is no form 'spoken'"):
        SOURCES.build("alpaca", data=data, form="spoken")
    with pytest.raises(AnyglotError, match="form is \\['text'\\]; use one of text, user-speech"):
        SOURCES.build("alpaca", data=data, form=["text"])
    with pytest.raises(SourceError, match="nowhere.json: there is no file to read"):
        read(tmp_path, "alpaca", data=str(tmp_path / "nowhere.json"))


def test_every_source_can_be_imported() -> None:
    assert {cls.name for cls in SOURCES.values()} == set(SOURCES)


def test_the_config_knows_the_files(tmp_path) -> None:
    data = write(tmp_path / "a.jsonl", [ALPACA])
    before = SOURCES.build("alpaca", data=data).config()
    json.dumps(before)
    write(tmp_path / "a.jsonl", [{**ALPACA, "output": "4"}])
    assert SOURCES.build("alpaca", data=data).config() != before


@pytest.mark.parametrize(("kind", "option"), [("llava", "images"), ("examples", "media")])
def test_the_config_knows_the_folder_of_media(kind: str, option: str, tmp_path) -> None:
    data = write(tmp_path / "a.jsonl", [{"image": "a.png", "text": "x"}])
    configs = [SOURCES.build(kind, data=data, **{option: at}).config() for at in ("", "one", "two", "else/two")]
    assert [config[option] for config in configs] == ["", "one", "two", "two"]


# --- alpaca ---


def test_alpaca_inputs(tmp_path) -> None:
    data = write(tmp_path / "a.json", [ALPACA, {"instruction": "Hi", "input": "", "output": "Hello"}], array=True)
    first, second = read(tmp_path, "alpaca", data=data)
    assert said(first) == [("user", [("text", "Add the numbers.\n\n1 and 2")]), ("assistant", [("text", "3")])]
    assert said(second)[0] == ("user", [("text", "Hi")])
    first, second = read(tmp_path, "alpaca", data=data, input="text", form="speech")
    assert said(first) == [
        ("user", [("speech", "Add the numbers."), ("text", "1 and 2")]),
        ("assistant", [("speech", "3")]),
    ]
    first, second = read(tmp_path, "alpaca", data=data, input="drop")
    assert first == BadRow("a.json", 1, "it has an input, and input is 'drop'") and isinstance(second, Dialogue)


def test_alpaca_bad_rows(tmp_path) -> None:
    rows = [
        {"instruction": "", "output": "x"},
        {"instruction": "x"},
        {"instruction": 3, "output": "x"},
        ["x"],
        {"instruction": "x", "output": "y" * 100_000},
        {"instruction": "😀", "output": "😀"},
        {"prompt": "x", "completion": "y", "system": "Be kind."},
        {"q": "x", "a": "y"},
    ]
    found = read(tmp_path, "alpaca", data=write(tmp_path / "a.jsonl", rows))
    errors = [d.error if isinstance(d, BadRow) else None for d in found]
    assert errors == [
        "'instruction' is empty",
        "it has no 'output'; it has: instruction",
        "'instruction' is a int, not text",
        "the row is a JSON list, not an object",
        "turn 2 has 100000 characters, 20000 are the limit",
        None,
        None,
        "it has no 'instruction'; it has: q, a",
    ]
    assert [row.row for row in found if isinstance(row, BadRow)] == [1, 2, 3, 4, 5, 8]
    assert said(found[6])[0] == ("system", [("text", "Be kind.")])
    renamed = read(tmp_path, "alpaca", data=str(tmp_path / "a.jsonl"), columns={"instruction": "q", "output": "a"})
    assert said(renamed[7])[0] == ("user", [("text", "x")])


# --- conversations ---


def test_sharegpt_and_openai(tmp_path) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    (tmp_path / "cat.png").write_bytes(png((1, 2, 3)))
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "?"},
            ]
        },
        {"system": "S", "messages": [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}]},
        {"conversation": [[{"role": "user", "message": "a"}, {"role": "assistant", "message": "b"}]]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "look"},
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "image_url", "image_url": "cat.png"},
                    ],
                },
                {"role": "assistant", "content": "red"},
            ]
        },
        {"items": [{"from": "bing", "value": "I begin"}]},
    ]
    found = read(tmp_path, "sharegpt", data=write(tmp_path / "a.jsonl", rows))
    assert said(found[0]) == [("user", [("text", "Hi")]), ("assistant", [("text", "Hello")])]
    assert [role for role, _ in said(found[1])] == ["system", "user", "assistant"]
    assert said(found[2])[1] == ("assistant", [("text", "b")])
    assert [kind for kind, _ in said(found[3])[0][1]] == ["text", "image", "image"]
    assert said(found[4]) == [("assistant", [("text", "I begin")])]


def test_conversations_that_are_none(tmp_path) -> None:
    turn = {"from": "human", "value": "Hi"}
    rows = [
        {"conversations": [turn]},
        {"conversations": [turn, {"from": "tool", "value": "x"}]},
        {"conversations": [turn, {"from": "gpt", "value": " "}]},
        {"conversations": [turn, {"value": "x"}]},
        {"conversations": "Hi"},
        {"conversations": ["Hi"]},
        {"text": "Hi"},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}]},
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]},
        {"conversations": []},
    ]
    found = read(tmp_path, "sharegpt", data=write(tmp_path / "a.jsonl", rows))
    assert [row.error for row in found if isinstance(row, BadRow)] == [
        "the assistant says nothing in it",
        "turn 2 is of an unknown role 'tool'",
        "turn 2 is empty",
        "turn 2 is of an unknown role None",
        "'conversations' is a str, not a list of turns",
        "turn 1 is a str, not an object with a role and a text",
        "it has no 'conversations' or 'messages'; it has: text",
        "turn 1 has a part of an unknown type 'video'",
        "turn 1 has a picture at 'http://a/b.png'; fetch it and give its path",
        "turn 1 is empty",
        "the assistant says nothing in it",
    ]


def test_llava(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    for name, kind in (("a.jpg", "JPEG"), ("b.png", "PNG"), ("c.bmp", "BMP")):
        (tmp_path / "images" / name).write_bytes(png((50, 60, 70), kind=kind))
    (tmp_path / "images" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "secret.png").write_bytes(png())

    def row(image: Any, asked: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "A square."}]
        return {"conversations": turns, **({} if image is None else {"image": image})}

    rows = [
        row("a.jpg", "<image>\nWhat is it?"),
        row(["b.png", "c.bmp"], "<image> and <image>: the same?"),
        row("b.png", "What is it?"),
        row(None, "Hello"),
        row("b.png", "<image><image>"),
        row(None, "<image>\nWhat?"),
        row("bad.png", "<image>"),
        row("none.png", "<image>"),
        row("../secret.png", "<image>"),
    ]
    data, folder = write(tmp_path / "llava.json", rows, array=True), str(tmp_path / "images")
    found = read(tmp_path, "llava", data=data, images=folder, form="user-speech")
    assert said(found[0])[0] == ("user", [("image", ""), ("speech", "What is it?")])
    assert [kind for kind, _ in said(found[1])[0][1]] == ["image", "speech", "image", "speech"]
    assert said(found[2])[0] == ("user", [("image", ""), ("speech", "What is it?")])
    assert [d.task for d in found[:4] if isinstance(d, Dialogue)] == ["vqa", "vqa", "vqa", "spoken-chat"]
    errors = [d.error for d in found if isinstance(d, BadRow)]
    assert errors[:2] == ["it has 2 <image> but 1 pictures", "it has 1 <image> but 0 pictures"]
    assert "bad.png" in errors[2] and "none.png: it cannot be read" in errors[3]
    assert "it is outside of 'images'" in errors[4]
    store = Store(tmp_path / "out")
    media = found[0].turns[0].parts[0].media
    assert store.path(media).read_bytes() == (tmp_path / "images" / "a.jpg").read_bytes()
    assert media.size == (8, 8) and media.origin == {"name": "a.jpg", "given": True, "licence": "unknown"}
    assert store.path(found[1].turns[0].parts[2].media).suffix == ".png"
    assert found == read(tmp_path, "llava", data=data, images=folder, form="user-speech")


@pytest.mark.parametrize("images", [{}, {"images": "."}])
def test_a_relative_folder_is_not_left_either(tmp_path, monkeypatch, images) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    Path("a.png").write_bytes(png())
    Path("../secret.png").write_bytes(png())
    os.mkfifo("pipe.png")
    names = ["a.png", "../secret.png", "x/../../secret.png", str(tmp_path / "secret.png"), "pipe.png"]
    names += ["a\0.png", "half\ud800.png", "n" * 300]
    given: list[Any] = [*names, {"path": "a\0.png"}, {"path": "half\ud800.png"}, {"path": "../secret.png"}]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A square."}]
    Path("rows.json").write_text(json.dumps([{"conversations": turns, "image": one} for one in given]))
    good, *bad = read(tmp_path, "llava", data="rows.json", **images)
    assert isinstance(good, Dialogue) and all(isinstance(found, BadRow) for found in bad)
    errors = [found.error.partition(": ")[2] for found in bad if isinstance(found, BadRow)]
    assert all("it is outside of 'data'" in errors[at] for at in (0, 1, 2, 9))
    assert "not a file" in errors[3] and all("it cannot be read (" in errors[at] for at in (4, 5, 6, 7, 8))


# --- our own ---


def test_dialogues_with_placeholders(tmp_path) -> None:
    def turns(text: str) -> dict[str, Any]:
        return {"turns": [{"role": "user", "text": text}, {"role": "assistant", "content": "ok"}]}

    rows = [
        turns("Draw [image: a [big] cat ] and [Music : slow, sad] [1]."),
        turns("[speech: hello there]"),
        turns("[image: ]"),
        turns("[image]"),
        turns("[image: a cat"),
        turns("[MUSIC:]"),
        turns(" "),
        {**turns("hi"), "task": "greet", "licence": "MIT", "language": "en-GB", "meta": {"topic": "x"}},
    ]
    found = read(tmp_path, "dialogues", data=write(tmp_path / "a.jsonl", rows), licence="CC0-1.0")
    assert said(found[0])[0][1] == [
        ("text", "Draw"),
        ("image", "a [big] cat"),
        ("text", "and"),
        ("music", "slow, sad"),
        ("text", "[1]."),
    ]
    assert said(found[1])[0][1] == [("speech", "hello there")]
    assert [row.error for row in found if isinstance(row, BadRow)] == [
        "a placeholder without a description: '[image: ]'",
        "a placeholder without a description: '[image]'",
        "the placeholder '[image: a cat' has no closing bracket",
        "a placeholder without a description: '[MUSIC:]'",
        "turn 1 (user) is empty",
    ]
    last = found[-1]
    assert (last.task, last.licence, last.language, last.meta) == ("greet", "MIT", "en-GB", {"topic": "x"})
    assert found[0].licence == "CC0-1.0"


def test_what_was_made_stays_made_when_it_is_read_again(tmp_path) -> None:
    from anyglot_synth.dialogue import Turn

    store = Store(tmp_path / "first")
    spoken = store.put_sound("ab" * 16, np.full(800, 0.1, np.float32), 8000, {"backend": {"engine": "x"}})
    parts = (Part("speech", "Hi", "Hi.", spoken),)
    made = Dialogue((Turn("user", parts), Turn("assistant", (Part("text", "Hello"),))), "s", "MIT")
    data = write(tmp_path / "first" / "samples.jsonl", [made.to_dict()])
    (again,) = read(tmp_path, "dialogues", data=data)
    assert isinstance(again, Dialogue) and again.id == made.id
    part = again.turns[0].parts[0]
    assert part.spoken_text == "Hi." and part.media is not None and part.media.origin["licence"] == "MIT"
    assert part.media.sha256 == spoken.sha256


def test_a_dataset_can_be_read_again_with_its_files(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [
        {"conversations": [{"from": "human", "value": "<image> q"}, {"from": "gpt", "value": "a"}], "image": "a.png"}
    ]
    (first,) = read(tmp_path, "llava", data=write(tmp_path / "a.jsonl", rows), data_name="s")
    data = write(tmp_path / "out" / "samples.jsonl", [{"index": 0, **first.to_dict(), "facts": {}}])
    (again,) = SOURCES.build("dialogues", data=data).read(Store(tmp_path / "second"))
    assert again.id == first.id and again.turns[0].parts[0].media.sha256 == first.turns[0].parts[0].media.sha256
    assert (tmp_path / "second" / again.turns[0].parts[0].media.file).is_file()


@given(st.lists(st.sampled_from([*"[]: a\n", "[image:", "[Music", "speech", "]", "é"]), max_size=30).map("".join))
def test_any_text_is_parts_or_a_bad_dialogue(text: str) -> None:
    try:
        parts = parts_of(text)
    except DialogueError as error:
        assert "placeholder" in str(error)
        return
    kept = "".join(part.text for part in parts)
    assert all(part.text.strip() for part in parts) and len(kept) <= len(text)
    if "[" not in text:
        assert parts == ((Part("text", text.strip()),) if text.strip() else ())


def test_what_no_file_could_hold_costs_one_row(tmp_path) -> None:
    turns = [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Hello"}]

    def nested(depth: int) -> Any:
        return [nested(depth - 1)] if depth else 0

    rows = [
        {"turns": turns, "meta": {"deep": nested(63)}},
        {"turns": [*turns, {"role": "assistant", "text": "half \ud83d"}]},
        {"turns": turns, "meta": {"topic": ["\udc80"]}},
        {"turns": turns, "meta": {"score": float("nan")}},
        {"\ud800": "no turns"},
        {"turns": turns, "meta": {"deep": nested(64)}},
        {"turns": turns, "source": nested(700)},
        {"turns": [*turns, {"role": "assistant", "text": "whole \U0001f600"}]},
    ]
    source = SOURCES.build("dialogues", data=write(tmp_path / "a.jsonl", rows))
    done = run(source, [], tmp_path / "out", workers=1)
    assert (done.ok, done.filtered, done.failed) == (2, 0, 6)
    *details, deeper = [
        json.loads(line)["detail"] for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    ]
    assert [detail.split(" (Out of range")[0] for detail in details] == [
        "a.jsonl, row 2: it holds '\\ud83d', half of a character (a lone surrogate)",
        "a.jsonl, row 3: it holds '\\udc80', half of a character (a lone surrogate)",
        "a.jsonl, row 4: it holds what JSON cannot hold",
        "a.jsonl, row 5: it has no 'conversations' or 'messages'; it has: \\ud800",
        "a.jsonl, row 6: it holds lists or mappings that are nested more than 64 deep",
    ]
    assert deeper.startswith("a.jsonl, row 7: ")
    assert validate(tmp_path / "out").exit_code == 0


# --- forms ---


def test_forms(tmp_path) -> None:
    data = write(tmp_path / "a.jsonl", [{"instruction": "Hi", "output": "Hello"}])
    (user,) = read(tmp_path, "alpaca", data=data, form="user-speech")
    (both,) = read(tmp_path, "alpaca", data=data, form="speech")
    (chain,) = read(tmp_path, "alpaca", data=data, form="chain")
    assert said(user) == [("user", [("speech", "Hi")]), ("assistant", [("text", "Hello")])]
    assert said(both) == [("user", [("speech", "Hi")]), ("assistant", [("speech", "Hello")])]
    assert said(chain)[1] == ("assistant", [("text", "Hi"), ("text", "Hello"), ("speech", "Hello")])
    assert {d.task for d in (user, both, chain)} == {"spoken-chat"} and chain.meta == {"form": "chain"}


def test_a_mixture_of_forms_is_drawn_by_seed_and_row(tmp_path) -> None:
    data = write(tmp_path / "a.jsonl", [{"instruction": f"q{i}", "output": "a"} for i in range(400)])
    options = {"data": data, "form": {"text": 1, "chain": 3, "speech": 0}}
    found = read(tmp_path, "alpaca", **options)
    counts = Counter(d.meta.get("form", "text") for d in found)
    assert counts.keys() == {"text", "chain"} and 250 < counts["chain"] < 350
    assert found == read(tmp_path, "alpaca", **options) != read(tmp_path, "alpaca", **options, seed=1)
    with pytest.raises(AnyglotError, match="the weights of the forms add up to 0"):
        SOURCES.build("alpaca", data=data, form={"text": 0})


# --- datasets ---


def test_datasets(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"instruction": f"q{i}", "input": "", "output": "a"} for i in range(5)]
    data = write(tmp_path / "a.jsonl", rows)
    streamed = read(tmp_path, "datasets", data=data, rows="alpaca", options={"licence": "MIT"})
    assert [said(d)[0][1] for d in streamed] == [[("text", f"q{i}")] for i in range(5)]
    assert streamed[0].licence == "MIT"
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(str(tmp_path / "saved"))
    saved = read(tmp_path, "datasets", data=str(tmp_path / "saved"), rows="alpaca")
    assert [said(d) for d in saved] == [said(d) for d in streamed]
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red"}]
    pictures = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (9, 7))], "conversations": [turns]},
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            }
        ),
    )
    pictures.to_parquet(str(tmp_path / "pictures.parquet"))
    for kind, options in (("llava", {}), ("datasets", {"rows": "llava"})):
        (found,) = read(tmp_path, kind, data=str(tmp_path / "pictures.parquet"), **options)
        assert isinstance(found, Dialogue) and found.turns[0].parts[0].media.size == (9, 7)
    with pytest.raises(SourceError, match="cannot load split 'test'"):
        read(tmp_path, "datasets", data=data, rows="alpaca", split="test")
    with pytest.raises(SourceError, match="rows is 'nanoworld-tasks'"):
        SOURCES.build("datasets", data=data, rows="nanoworld-tasks")


def test_only_columns_of_media_may_name_files_anywhere(tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    from anyglot_synth.sources import media

    monkeypatch.setattr(media, "MAX_BYTES", 1000)
    folder = tmp_path / "images"  # of the kind `imagefolder`: its rows name files by their whole paths
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "big.png").write_bytes(png() + bytes(1000))
    write(folder / "metadata.jsonl", [{"file_name": name, "text": name} for name in ("a.png", "big.png")])
    good, big = read(tmp_path, "datasets", data=str(folder), rows="examples")
    assert isinstance(good, Dialogue) and good.turns[0].parts[1].media.size == (8, 8)
    assert isinstance(big, BadRow) and "big.png: it has " in big.error and "1000 are the limit" in big.error
    rows = {"image": [{"bytes": None, "path": str(folder / "a.png")}], "text": ["secret"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "plain"))
    (outside,) = read(tmp_path, "datasets", data=str(tmp_path / "plain"), rows="examples")
    assert isinstance(outside, BadRow) and "it is outside of 'plain'" in outside.error
    for path in ("n" * 300, "a\0.png", None):
        assert _plain({"bytes": None, "path": path}) == {"bytes": None, "path": path}


# --- media ---


def test_sounds_are_kept_or_become_flac(tmp_path) -> None:
    from anyglot_synth.sources.media import take_sound

    store = Store(tmp_path / "out")
    tone = (0.3 * np.sin(np.arange(8000) / 5)).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", tone, 8000, subtype="PCM_16")
    soundfile.write(tmp_path / "b.wav", np.stack([tone, 0 * tone], axis=1), 8000)
    (tmp_path / "c.wav").write_bytes(b"RIFFnothing")
    kept = take_sound(store, "a.flac", tmp_path)
    assert store.path(kept).read_bytes() == (tmp_path / "a.flac").read_bytes() and kept.seconds == 1.0
    mixed, rate = store.sound(take_sound(store, "b.wav", tmp_path))
    assert rate == 8000 and np.abs(mixed - tone / 2).max() < 1e-3
    with pytest.raises(AnyglotError, match="c.wav: no sound that can be read"):
        take_sound(store, "c.wav", tmp_path)


def test_a_sound_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch) -> None:
    from anyglot_synth.sources import media

    soundfile.write(tmp_path / "long.flac", np.zeros((2_000_000, 2), np.int16), 8000)
    assert (tmp_path / "long.flac").stat().st_size < 50_000
    monkeypatch.setattr(media, "MAX_SAMPLES", 3_999_999)
    tracemalloc.start()
    with pytest.raises(AnyglotError, match="long.flac: it has 2 x 2000000 samples, 3999999 are the limit"):
        media.take_sound(Store(tmp_path / "out"), "long.flac", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_equal_words_of_different_files_are_different_dialogues() -> None:
    from anyglot_synth.dialogue import MediaFile, Turn

    def dialogue(sha: str, given: bool) -> Dialogue:
        media = MediaFile("objects/x.flac", sha, {"given": True} if given else {})
        return Dialogue((Turn("user", (Part("speech", "hello", media=media),)),), "s")

    assert dialogue("a", True).id != dialogue("b", True).id
    assert dialogue("a", False).id == dialogue("b", False).id
