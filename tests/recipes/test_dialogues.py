"""Dialogues as training data: every turn in its place, media as the model's own codes, and a stage that learns them."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyglot_lm.segments import Sample, Segment
from anyglot_lm.shards import ShardReader
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.cli import main
from anyglot_recipes.importers.dialogues import is_dialogues, to_sample
from anyglot_recipes.train import CONFIGS
from anyglot_synth.dataset import media_of, read_items
from anyglot_synth.dialogue import Dialogue, MediaFile, Part, Turn
from anyglot_tokenizers.media import read_audio, read_image

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
FILE = MediaFile("objects/00/00.flac", "0" * 64)
CODES = {f"{i}-{j}.speech": np.full((1, 2), 10 * i + j) for i in range(4) for j in range(3)}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: UnifiedModel) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture
def prepare(model_dir: Path, tmp_path: Path, capsys: Any) -> Callable[..., dict[str, Any]]:
    """`anyglot prepare` of sources into `out`; what it prints as JSON."""

    def call(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
        words = ["prepare", *map(str, arguments), "--model", str(model_dir), "--out", str(tmp_path / "out"), "--json"]
        assert main(words) == code
        printed = capsys.readouterr()
        found: dict[str, Any] = json.loads(printed.out) if not code else {"error": printed.err}
        return found

    return call


def documents(out: Path, model: UnifiedModel) -> list[tuple[str, Sample, int]]:
    """(task, sample, number of targets) of every document of the shards."""
    reader = ShardReader(out / "shards")
    found = []
    for number, task in enumerate(reader.tasks):
        ids, loss = reader.doc(number)
        sample = model.template.parse(ids, model.vocabulary, model.text, loss)
        found.append((reader.task_names[task], sample, int(np.sum(loss))))
    return found


def shape(sample: Sample) -> list[tuple[str, str]]:
    return [(segment.role, segment.modality) for segment in sample.segments]


def spoken(text: str) -> Part:
    return Part("speech", text, text.lower(), FILE)


CHAT = Dialogue(
    (
        Turn("system", (Part("text", "Be kind."),)),
        Turn("user", (spoken("Who are you?"), Part("text", "Say it."), Part("text", "Quickly."))),
        Turn("assistant", (spoken("A model."),)),
    ),
    "tests",
)


@pytest.mark.parametrize(
    ("chain", "answer"), [("none", []), ("answer", ["A model."]), ("full", ["Who are you?\nA model."])]
)
def test_a_chain_writes_before_it_speaks(chain: str, answer: list[str]) -> None:
    sample = to_sample(CHAT, CODES, chain)
    expected = [
        Segment("text", "Be kind.", "user"),
        Segment("speech", CODES["1-0.speech"], "user"),
        Segment("text", "Say it.\nQuickly.", "user"),
        *(Segment("text", text, "assistant") for text in answer),
        Segment("speech", CODES["2-0.speech"], "assistant"),
    ]
    assert list(sample.segments) == expected


def test_texts_stay_apart_where_the_template_tells_them_apart() -> None:
    found = to_sample(CHAT, CODES, "full", apart=True).segments
    assert [s.content for s in found if s.modality == "text"] == [
        "Be kind.", "Say it.", "Quickly.", "Who are you?", "A model."
    ]  # fmt: skip


@pytest.mark.parametrize(("asked", "repeated"), [("Read this: Hello.", 0), ("Read this: Hello.s", 1), ("Greet me", 1)])
def test_what_is_written_already_is_not_written_again(asked: str, repeated: int) -> None:
    reading = Dialogue((Turn("user", (Part("text", asked),)), Turn("assistant", (spoken("Hello."),))), "tests")
    segments = to_sample(reading, CODES, "answer").segments
    assert sum(segment.role == "assistant" and segment.modality == "text" for segment in segments) == repeated


@pytest.mark.parametrize(
    ("asked", "answer", "transcript"),
    [
        (["Who?", "Say it."], [Part("text", "Who? Say it."), Part("text", "Me."), spoken("Me.")], []),  # form `chain`
        (["Hello there."], [Part("text", "Hello there.")], []),  # speech recognition
        (["Write it down.", "Hello there."], [Part("text", "Hello there.")], ["Write it down."]),
        (["Red"], [Part("text", "Red is a color."), spoken("Red is a color.")], ["Red"]),
    ],
)
def test_a_transcript_is_not_written_twice(asked: list[str], answer: list[Part], transcript: list[str]) -> None:
    dialogue = Dialogue((Turn("user", tuple(map(spoken, asked))), Turn("assistant", tuple(answer))), "tests")
    segments = to_sample(dialogue, CODES, "full", apart=True).segments
    texts = [segment.content for segment in segments if segment.role == "assistant" and segment.modality == "text"]
    assert texts == transcript + [part.text for part in answer if part.modality == "text"]


def test_every_dialogue_becomes_its_own_codes(
    dialogues: Path, prepare: Callable[..., dict[str, Any]], tmp_path: Path, tiny_model: UnifiedModel
) -> None:
    report = prepare(dialogues)
    assert (report["good"], report["bad"], report["samples"], report["samples_left_out"]) == (3, 0, 3, 0)
    found = documents(tmp_path / "out", tiny_model)
    assert [task for task, _, _ in found] == ["spoken-chat", "caption", "text->music"]
    assert shape(found[0][1]) == [
        ("user", "text"), ("user", "speech"), ("assistant", "speech"), ("user", "speech"), ("assistant", "text"),
    ]  # fmt: skip
    for item, (_, sample, _) in zip(read_items(dialogues), found, strict=True):
        codes = [segment for segment in sample.segments if segment.modality != "text"]
        for medium, segment in zip(media_of(item.dialogue), codes, strict=True):
            assert (medium.part.modality, medium.turn.role) == (segment.modality, segment.role)
            tokenizer = tiny_model.tokenizers[segment.modality]
            path = dialogues / medium.file.file
            media = read_image(path, size=64) if segment.modality == "image" else read_audio(path, sample_rate=16_000)
            with torch.no_grad():
                expected = tokenizer.encode(media[None]).item(0).numpy()[:1]
            assert np.array_equal(segment.content, expected)
        texts = [segment.content for segment in sample.segments if isinstance(segment.content, str)]
        written = [p.text for turn in item.dialogue.turns for p in turn.parts if p.modality == "text"]
        assert "\n".join(texts) == "\n".join(written)
        assert all(segment.loss == (segment.role == "assistant") for segment in sample.segments)


def test_bad_dialogues_are_named_and_the_rest_goes_on(
    dialogues: Path, prepare: Callable[..., dict[str, Any]], tmp_path: Path, tiny_model: UnifiedModel
) -> None:
    mine = shutil.copytree(dialogues, tmp_path / "mine")
    lines = [json.loads(line) for line in (mine / "samples.jsonl").read_text().splitlines()]
    broken = json.loads((mine / "errors.jsonl").read_text())
    silent = lines[0] | {"turns": lines[0]["turns"][:2]}
    escaping = json.loads(json.dumps(lines[1]))
    escaping["turns"][0]["parts"][0]["media"]["file"] = "../outside.png"
    entries = [lines[0], broken, silent, escaping, lines[1]]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (mine / "samples.jsonl").write_text(text + "{\n")
    (mine / lines[1]["turns"][0]["parts"][0]["media"]["file"]).write_bytes(b"no picture")
    report = prepare(mine)
    assert (report["good"], report["bad"], report["samples"], report["samples_left_out"]) == (2, 4, 1, 1)
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [error["row"] for error in errors] == [2, 4, 5, 6]
    for error, words in zip(errors, ("without a file", "leads out", "png", "is not JSON"), strict=True):
        assert words in error["error"]
    (left_out,) = (json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines())
    assert left_out["row"] == 3 and "nothing to learn" in left_out["error"]
    assert [task for task, _, _ in documents(tmp_path / "out", tiny_model)] == ["spoken-chat"]
    assert "errors.jsonl" in prepare(mine, "--strict", code=2)["error"]


def test_a_second_call_encodes_nothing_again(
    dialogues: Path, prepare: Callable[..., dict[str, Any]], tmp_path: Path, tiny_model: UnifiedModel
) -> None:
    prepare(dialogues)
    plain = documents(tmp_path / "out", tiny_model)
    report = prepare(dialogues, "--chain", "full")
    assert report["reused_shards"] == report["shards"] == 1
    chained = documents(tmp_path / "out", tiny_model)
    assert [targets for _, _, targets in chained] > [targets for _, _, targets in plain]
    twice = prepare(dialogues, dialogues / "samples.jsonl")
    assert twice["samples"] == 6 and [s for _, s, _ in documents(tmp_path / "out", tiny_model)] == [
        sample for _, sample, _ in plain * 2
    ]


def test_sources_of_other_kinds_are_told_apart(
    dialogues: Path, prepare: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert is_dialogues(dialogues) and is_dialogues(dialogues / "samples.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "image": "a.png"}\n')
    assert not is_dialogues(tmp_path) and not is_dialogues(tmp_path / "rows.jsonl")
    assert "holds dialogues" in prepare(dialogues, tmp_path / "rows.jsonl", code=2)["error"]
    assert "leave out --column" in prepare(dialogues, "--interleave", "2", code=2)["error"]
    assert "--chain is for dialogues" in prepare(tmp_path / "rows.jsonl", "--chain", "full", code=2)["error"]


def test_a_dataset_that_is_not_finished_is_no_folder_of_rows(
    dialogues: Path, prepare: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(dialogues, unfinished)
    (unfinished / "samples.jsonl").rename(unfinished / "journal.jsonl")
    assert "unfinished: a dataset that is not finished" in prepare(unfinished, code=2)["error"]
    assert not (tmp_path / "out").exists()


def test_from_dialogues_to_a_model_that_answers(
    dialogues: Path, prepare: Callable[..., dict[str, Any]], tmp_path: Path, model_dir: Path, capsys: Any
) -> None:
    """`anyglot prepare`, then `anyglot train instruct`: the loss falls, the model answers speech with speech."""
    prepare(dialogues, "--chain", "answer")
    words = ["train", str(CONFIGS / "instruct.yaml"), f"--run_dir={tmp_path / 'run'}", f"--model.start={model_dir}"]
    words += [f'--data.shards=["{tmp_path / "out"}"]', "--data.replay=null", "--data.replay_share=0"]
    words += ["--data.max_repetition=300", "--data.seq_len=512", "--data.batch_size=1", "--data.packs_per_step=1"]
    words += ["--trainer.max_steps=60", "--trainer.accelerator=cpu", "--model.preset=full", "--model.lr=0.01"]
    words += ["--model.rows_lr=0.02", "--model.log_every=1", "--model.warmup_steps=1", "--precision=fp32"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    with (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").open() as file:
        heard = [float(row["loss/speech"]) for row in csv.DictReader(file) if row["loss/speech"]]
    assert heard[-1] < 0.5 * heard[0], heard
    model = UnifiedModel.from_pretrained(report["model"])
    question = next(media_of(next(read_items(dialogues)).dialogue))
    asked = read_audio(dialogues / question.file.file, sample_rate=16_000)
    output = model.generate("speech", text="Answer briefly.", speech=asked)
    assert output.modality == "speech" and output.media is not None
