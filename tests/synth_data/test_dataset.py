"""Finished datasets: read back, checked to the last byte, counted, described."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml
from PIL import Image

from anyglot_synth.card import _hub_licence, card, write_card
from anyglot_synth.dataset import ERRORS, REJECTS, SAMPLES, DatasetError, is_dataset, media_of, read_items, voice_of
from anyglot_synth.dialogue import Dialogue
from anyglot_synth.licences import check_licences, is_open
from anyglot_synth.report import Histogram, make_report, write_report
from anyglot_synth.sources import SOURCES
from anyglot_synth.store import Store
from anyglot_synth.validate import validate


@pytest.fixture
def mine(dialogues: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(dialogues, tmp_path / "mine"))


def change(folder: Path, name: str, number: int, edit: Callable[[Any], None]) -> None:
    """Edits the JSON of one line."""
    lines = (folder / name).read_text().splitlines()
    found = json.loads(lines[number])
    edit(found)
    lines[number] = json.dumps(found)
    (folder / name).write_text("".join(line + "\n" for line in lines))


def test_items_come_back_with_their_endings(dialogues: Path) -> None:
    assert is_dataset(dialogues) and not is_dataset(dialogues / "objects")
    samples, (reject,), (error,) = (list(read_items(dialogues, name)) for name in (SAMPLES, REJECTS, ERRORS))
    assert [item.index for item in samples] == [0, 2, 4] and {item.status for item in samples} == {"ok"}
    assert (reject.status, reject.stage, reject.reason, reject.facts["wer"]) == ("filtered", "recognise", "wer", [1.0])
    assert (error.status, error.retryable, error.dialogue.turns[0].parts[0].media) == ("failed", True, None)
    spoken = [medium for medium in media_of(samples[0].dialogue) if medium.part.modality == "speech"]
    assert [(m.turn_number, m.turn.role) for m in spoken] == [(1, "user"), (2, "assistant"), (3, "user")]
    assert voice_of(spoken[0].file) == voice_of(spoken[2].file) != voice_of(spoken[1].file)


def test_a_dataset_without_rejects_has_none(mine: Path) -> None:
    (mine / REJECTS).unlink()
    assert list(read_items(mine, REJECTS)) == [] and validate(mine).is_whole
    (mine / SAMPLES).unlink()
    for read in (lambda: list(read_items(mine)), lambda: validate(mine)):
        with pytest.raises(DatasetError, match="no such file"):
            read()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 1: is cut off"),
        (b"{\n", "is no item"),
        (b"[]\n", "is no item"),
        (b'{"index": -1}\n', "its index is -1"),
        (b'{"index": NaN, "turns": []}\n', "NaN is no JSON"),
        (b'{"index": true, "turns": []}\n', "its index is True"),
        (b'{"index": 0, "turns": [], "source": "x"}\n', "it has no turns"),
        (b'{"index": 0, "source": "\\ud800", "turns": [{"role": "user", "parts": []}]}\n', "surrogates"),
    ],
)
def test_a_line_that_is_no_item_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / SAMPLES).write_bytes(line)
    with pytest.raises(DatasetError, match=message) as caught:
        list(read_items(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / SAMPLES}, line 1")


def test_a_whole_dataset_is_whole(dialogues: Path) -> None:
    report = validate(dialogues)
    assert report.is_whole and report.exit_code == 0 and not report.num_extra, list(report.lines())
    assert dict(report.counts) == {"ok": 3, "filtered": 1, "failed": 1}
    files = [path for path in (dialogues / "objects").rglob("*") if path.suffix in (".flac", ".png")]
    assert report.files == len(files) == 8 and report.bytes == sum(path.stat().st_size for path in files)
    assert json.loads(json.dumps(report.to_dict()))["whole"] is True


def flac(folder: Path) -> Path:
    return sorted((folder / "objects").rglob("*.flac"))[0]


def repeat(folder: Path) -> None:
    with (folder / SAMPLES).open("a") as file:
        file.write((folder / SAMPLES).read_text().splitlines(keepends=True)[0])


def cut(folder: Path) -> None:
    content = (folder / REJECTS).read_bytes()
    (folder / REJECTS).write_bytes(content[:-30])


def renote(folder: Path) -> None:
    """Another sound, and a record that has its hash but not its length."""
    audio, rate = soundfile.read(flac(folder))
    soundfile.write(flac(folder), audio[:-100], rate)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "job": lambda folder: (folder / "job.json").write_text("{"),
    "line": cut,
    "id": lambda folder: change(folder, SAMPLES, 1, lambda d: d.update(id="0" * 32)),
    "order": repeat,
    "twice": lambda folder: change(folder, REJECTS, 0, lambda d: d.update(index=4)),
    "name": lambda folder: change(
        folder, SAMPLES, 1, lambda d: d["turns"][0]["parts"][0]["media"].update(file="../secret.png")
    ),
    "missing": lambda folder: flac(folder).unlink(),
    "hash": renote,
    "header": renote,
    "report": lambda folder: (folder / "report.json").write_text('{"counts": {"ok": 4}}'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_every_kind_is_found(kind: str, mine: Path) -> None:
    DAMAGE[kind](mine)
    report = validate(mine)
    assert report.num_problems[kind] >= 1 and report.exit_code == 2
    assert any(kind in line for line in report.lines())


def test_a_photo_that_its_exif_turns_is_whole(tmp_path: Path) -> None:
    rows = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (12, 8)).save(tmp_path / f"{orientation}.jpg", exif=exif)
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A photo."}]
        rows.append(json.dumps({"image": f"{orientation}.jpg", "conversations": turns}))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = SOURCES.build("llava", data=str(tmp_path / "a.jsonl")).read(Store(tmp_path / "out"))
    lines = [json.dumps({"index": i, **one.to_dict()}) for i, one in enumerate(found) if isinstance(one, Dialogue)]
    (tmp_path / "out" / SAMPLES).write_text("".join(f"{line}\n" for line in lines))
    report = validate(tmp_path / "out")
    assert report.files == 8 and report.num_problems == {"job": 1}, list(report.lines())
    for number in range(8):
        change(tmp_path / "out", SAMPLES, number, lambda d: d["turns"][0]["parts"][0]["media"]["size"].reverse())
    # Of pictures that are turned the size as it is stored passes, too: not every picture's EXIF is read.
    assert validate(tmp_path / "out").num_problems == {"job": 1, "header": 4}


def test_text_that_was_changed_has_another_id(mine: Path) -> None:
    def shout(found: Any) -> None:
        found["turns"][4]["parts"][0]["text"] = "YOU ARE WELCOME."

    change(mine, SAMPLES, 0, shout)
    (problem,) = validate(mine).problems
    assert problem.kind == "id" and problem.where == f"{SAMPLES}, line 1"


def test_files_that_nobody_names_are_listed_and_no_fault(mine: Path) -> None:
    (mine / "objects" / "ab").mkdir(exist_ok=True)
    (mine / "objects" / "ab" / ".left.tmp.flac").write_bytes(b"half")
    clean = "objects/ab/clean.flac"
    shutil.copy(flac(mine), mine / clean)
    report = validate(mine)
    assert report.is_whole and report.extra == ["objects/ab/.left.tmp.flac", clean]
    change(mine, SAMPLES, 0, lambda d: d["turns"][1]["parts"][0]["media"]["origin"].update(clean=clean))
    assert validate(mine).extra == ["objects/ab/.left.tmp.flac"], "an origin may name the file before a stage"
    (mine / clean).unlink()
    (problem,) = validate(mine).problems
    assert (problem.kind, problem.where) == ("missing", f"{SAMPLES}, line 1") and problem.detail.startswith(clean)
    for taken in ({"given": True}, {"given": False, "name": "objects/cd/of-another-dataset.flac"}):
        change(mine, SAMPLES, 0, lambda d, taken=taken: d["turns"][1]["parts"][0]["media"]["origin"].update(taken))
        assert "missing" not in validate(mine).num_problems, "what was taken over keeps the origin that it had"


def test_only_the_first_problems_are_kept(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyglot_synth.validate.MAX_PROBLEMS", 2)
    shutil.rmtree(mine / "objects")
    report = validate(mine)
    assert report.num_problems["missing"] == 8 and len(report.problems) == 2
    assert "and 6 more problems" in list(report.lines())


# Counting


def test_the_report_counts_what_is_there(mine: Path) -> None:
    report = write_report(mine)
    assert report == json.loads((mine / "report.json").read_text())
    assert report["counts"] == {"ok": 3, "filtered": 1, "failed": 1} and report["retryable"] == 1
    assert report["ended"] == {"filtered": {"recognise": {"wer": 1}}, "failed": {"speak": {"backend": 1}}}
    assert report["tasks"] == {"caption": 1, "spoken-chat": 1, "text->music": 1}
    speech, music, image = (report["media"][modality] for modality in ("speech", "music", "image"))
    assert speech["files"] == 4 and speech["roles"] == {"assistant": 2, "user": 2}
    assert sum(voice["files"] for voice in speech["voices"].values()) == 4 and len(speech["voices"]) == 2
    samples = [medium for item in read_items(mine) for medium in media_of(item.dialogue)]
    seconds = sum(medium.file.seconds or 0 for medium in samples if medium.part.modality == "speech")
    assert speech["hours"] == pytest.approx(seconds / 3600, abs=1e-6) and music["files"] == 1
    assert (image["longer_side"]["n"], image["longer_side"]["mean"]) == (2, 64) and image["engines"][0][
        "engine"
    ] == "nanoworld-picture 1"
    wer = report["facts"]["wer"]
    assert (wer["n"], wer["min"], wer["max"]) == (7, 0, 1) and sum(wer["counts"]) == 7
    assert report["facts"]["judge.loudness"]["mean"] == -21.5
    assert report["turns"]["mean"] == pytest.approx((5 + 2 + 2) / 3, abs=1e-6)
    assert validate(mine).is_whole and write_report(mine) == report


def test_a_number_too_big_to_be_counted_is_left_out(mine: Path) -> None:
    change(mine, "samples.jsonl", 0, lambda line: line["facts"].update(wer=[0.25, 10**400, True]))
    assert write_report(mine)["facts"]["wer"]["max"] == 1


def test_histograms_hold_every_value() -> None:
    histogram = Histogram([0, 1, 10])
    for value in (-5, 0, 0.99, 1, 9, 10, 1e9):
        histogram.add(value)
    found = histogram.to_dict()
    assert found["counts"] == [3, 2, 2] and found["n"] == 7 and (found["min"], found["max"]) == (-5, 1e9)
    assert Histogram([0]).to_dict() == {"n": 0}


# Licences


@pytest.mark.parametrize(
    ("licence", "open_"),
    [
        ("CC-BY-4.0", True),
        ("cc0-1.0", True),
        ("MIT AND CC-BY-SA-4.0", True),
        ("CC-BY-NC-4.0", False),
        ("MIT AND CC-BY-NC-4.0", False),
        ("CC-BY-NC-4.0 OR MIT", True),
        ("unknown", False),
        ("", False),
        ("CC-BY-ND-4.0", False),
        ("BSD-3-Clause", True),
    ],
)
def test_open_licences(licence: str, open_: bool) -> None:
    assert is_open(licence) is open_
    assert is_open(licence, ["any"]) and is_open(licence, [licence])


def test_closed_licences_are_refused_by_name(mine: Path) -> None:
    assert check_licences(mine) == {"CC-BY-4.0": 3, "CC0-1.0": 7}
    change(mine, SAMPLES, 1, lambda d: d.update(licence="CC-BY-NC-4.0"))
    with pytest.raises(DatasetError, match=r"'CC-BY-NC-4.0' \(1 times\).*allow_licences=\['CC-BY-NC-4.0'\]"):
        check_licences(mine)
    check_licences(mine, ["CC-BY-NC-4.0"])


# The card


def test_licences_as_the_hub_spells_them() -> None:
    names = ("CC-BY-4.0", "CC-BY-NC-SA-4.0", "ODbL-1.0", "Apache-2.0", "MIT-CMU", "A OR B", "unknown")
    spelled = ["cc-by-4.0", "cc-by-nc-sa-4.0", "odbl", "apache-2.0", "other", "other", "unknown"]
    assert [_hub_licence(name) for name in names] == spelled


def test_the_card_says_how_it_was_made(mine: Path) -> None:
    report = make_report(mine)
    text = write_card(mine).read_text()
    assert text == card(mine, report) and "sesame" not in text
    _, header, body = text.split("---\n", 2)
    head = yaml.safe_load(header)
    assert head["license"] == ["cc-by-4.0", "cc0-1.0"] and head["language"] == ["en"]
    assert head["size_categories"] == ["n<1K"] and head["configs"][0]["data_files"] == "samples.jsonl"
    assert {"any-to-any", "text-to-speech", "text-to-image"} <= set(head["task_categories"])
    for heading in ("How it was made", "Sources and licences", "Engines and voices", "What was left out", "Limits"):
        assert f"\n## {heading}\n" in body
    assert "| filtered | recognise | wer | 1 |" in body and "nanoworld-voice 1" in body
    assert "<i>" not in body and "a\\|b \\`c\\` \\<i\\>" in body, "names of others do not format"
    recipe = json.loads(body.split("```json\n")[1].split("\n```")[0])
    assert recipe["stages"] == ["speak", "recognise"] and recipe["source"]["api_key"] == "(left out)"
    assert "Not free to pass on" not in body


def test_recordings_of_the_data_are_not_called_synthetic(mine: Path) -> None:
    said = "Speech is synthetic (2 voices)"
    assert said in write_card(mine).read_text()

    def given(found: Any) -> None:
        for turn in found["turns"]:
            for part in turn["parts"]:
                if part["modality"] == "speech":
                    part["media"]["origin"] = {"given": True, "speaker": f"person {part['text']}"}

    change(mine, SAMPLES, 0, given)
    assert "Speech is synthetic (1 voices)" in write_card(mine).read_text()
    change(mine, SAMPLES, 2, given)
    assert "Speech is synthetic" not in write_card(mine).read_text()


def test_the_card_warns_of_closed_licences(mine: Path) -> None:
    change(mine, SAMPLES, 1, lambda d: d.update(licence="unknown"))
    text = write_card(mine).read_text()
    assert "**Not free to pass on as it is:** `unknown`" in text
    assert "unknown" in yaml.safe_load(text.split("---\n")[1])["license"]
