"""Chains and few-shot prompts: untrained models answer them wholly, layouts are those of training, both recipes run."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from anyglot_lm.chat import Chat
from anyglot_lm.engine import GenerationError, Sampling, generate
from anyglot_lm.grammar import CHAIN, Request, RequestError
from anyglot_lm.processor import AnyglotProcessor
from anyglot_lm.segments import Sample, Segment, Template
from anyglot_lm.serve.answers import ChoiceStream, choice
from anyglot_lm.serve.batcher import Work
from anyglot_lm.shards import ShardReader
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.chain import Run
from anyglot_recipes.cli import main
from anyglot_recipes.nano import ASSISTANT_VOICE, pictures
from anyglot_recipes.nano_chat import NanoChatConfig, nano_chat
from anyglot_recipes.nano_shots import NanoShotsConfig, nano_shots
from anyglot_recipes.shipped import NANO
from anyglot_recipes.shots import HELD_OUT, NAMES, RULES, document, say
from anyglot_recipes.train import find_recipe, parse_recipe
from anyglot_synth.nanoworld.voices import installed_voices
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.media import write_image

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
needs_voices = pytest.mark.skipif(
    ASSISTANT_VOICE not in {v.name for v in installed_voices()}, reason="the speech engine flite is not here"
)
ASKED = [Segment("speech", np.arange(6)[None] % 16, "user")]


@pytest.fixture(scope="module")
def chained(tiny_model: UnifiedModel) -> UnifiedModel:
    """The untrained model, with the template that tells texts apart."""
    tiny = tiny_model
    return UnifiedModel(tiny.model, tiny.vocabulary, Template(version=2), tiny.text, tiny.tokenizers)


def test_untrained_chains_are_whole(chained: UnifiedModel) -> None:
    hot = dict.fromkeys(("text", "speech"), Sampling(2.0))
    for max_ids in (8, 9, 30, 200):  # 6 are the fewest
        request = Request(order=CHAIN, max_ids=max_ids, max_length={"text": 9})
        for answer in chained.respond([Sample(ASKED)] * 16, request, hot, seed=max_ids):
            assert tuple(output.modality for output in answer) == CHAIN
            assert answer[2].media is not None and answer[2].media.shape[1] % 1280 == 0
    streamed = list(chained.stream(Sample(ASKED), request, hot, seed=3))
    assert [e.output.modality for e in streamed if e.output is not None] == list(CHAIN)
    whole = chained.respond([Sample(ASKED)], request, hot, seed=3)[0]
    assert [e.output.text for e in streamed if e.output is not None][:2] == [output.text for output in whole[:2]]


def test_a_conversation_keeps_transcript_and_answer_apart(chained: UnifiedModel) -> None:
    chat = Chat(chained)
    request = Request(order=CHAIN, max_ids=40, max_length={"text": 6})
    for _ in range(2):
        list(chat.say(ASKED, request, dict.fromkeys(("text", "speech"), Sampling(2.0)), seed=1))
    assert [segment.modality for segment in chat.segments] == ["speech", *CHAIN] * 2
    ids = chained.template.render(Sample(chat.segments), chained.vocabulary, chained.text)[0]
    assert ids.tolist().count(chained.vocabulary.controls["assistant"]) == 4
    processor = AnyglotProcessor(chained.vocabulary, chained.template, chained.text, chained.tokenizers)
    for row in (ids.tolist(), ids[ids.tolist().index(chained.vocabulary.controls["assistant"]) + 1 :].tolist()):
        assert tuple(output.modality for output in processor.parse(row, decode=False)[0]) == CHAIN


def test_an_older_model_refuses_a_chain(tiny_model: UnifiedModel, tmp_path: Path, capsys: Any) -> None:
    request = Request(order=CHAIN, max_ids=40)
    with pytest.raises(RequestError, match="version 1 of this model writes as one"):
        tiny_model.respond([Sample(ASKED)], request)
    with pytest.raises(RequestError, match="version 1"):
        next(Chat(tiny_model).say(ASKED, request))
    tiny_model.save_pretrained(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--text", "a", "--to", "chain"]) == 2
    assert "version 1" in capsys.readouterr().err


def test_a_server_answers_in_a_chain(
    chained: UnifiedModel, serving: Callable[..., AbstractContextManager[Any]]
) -> None:
    asked = {
        "messages": [{"role": "user", "content": "a"}],
        "order": ["text", "text", "audio"],
        "max_tokens": 40,
        "seed": 1,
    }
    with serving(chained) as server:
        url = f"{server.url}/v1/chat/completions"
        message = httpx.post(url, json={**asked, "temperature": 2}).json()["choices"][0]["message"]
        lines = httpx.post(url, json={**asked, "temperature": 2, "stream": True}).text.splitlines()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert message["order"] == list(CHAIN) and base64.b64decode(message["audio"]["data"])[:4] == b"RIFF"
    assert message["audio"]["transcript"] == message["content"] != message["reasoning_content"]
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message[name]


@pytest.mark.parametrize("between", [(), ("text", "speech")])
def test_streamed_thoughts_are_joined_as_whole_ones(chained: UnifiedModel, between: tuple[str, ...]) -> None:
    order = ("text", *between, "text", "text")
    request = Request(order=order, max_ids=100, max_length={"text": 8}, min_text=2)
    prompt = chained.prompt(Sample(ASKED))
    (ids,) = generate(chained.model, chained.vocabulary, [prompt], request, {"text": Sampling(1.0)}, seed=2)
    message = choice(chained, Work(prompt, request, {}, [0]), 0, ids, "wav")["message"]
    deltas = ChoiceStream(chained, "wav", order).read(ids)
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message[name]
    assert message["reasoning_content"].count("\n") >= 1


def test_examples_of_generate_are_turns(chained: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    seen: list[Sample] = []
    respond = UnifiedModel.respond

    def spy(self: UnifiedModel, samples: Any, *rest: Any, **options: Any) -> Any:
        seen.extend(samples)
        return respond(self, samples, *rest, **options)

    monkeypatch.setattr(UnifiedModel, "respond", spy)
    shown = [({"image": codes}, {"text": "red"}), ([("text", "a"), ("text", "b")], [("image", codes)])]
    chained.generate("text", examples=shown, image=codes, max_ids=8)
    picture, texts = codes.numpy(), [Segment("text", "a", "user"), Segment("text", "b", "user")]
    assert seen[0].segments == (
        Segment("image", picture, "user"),
        Segment("text", "red", "assistant"),
        *texts,
        Segment("image", picture, "assistant"),
        Segment("image", picture, "user"),
    )


def test_too_many_examples_are_one_clear_error(tiny_model: UnifiedModel) -> None:
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    shown = [({"image": codes}, {"text": "red"})]
    each = 18 + 2 + len(tiny_model.text.encode("red"))
    most = (1024 - 2 - 20 - 1) // each
    tiny_model.generate("text", examples=shown * most, image=codes)
    with pytest.raises(GenerationError, match=rf"{each * 100} of them 100 examples.* 1024 positions; give fewer"):
        tiny_model.generate("text", examples=shown * 100, image=codes)


def test_the_command_reads_examples(tiny_model: UnifiedModel, tmp_path: Path, capsys: Any) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    write_image(tmp_path / "a.png", torch.rand(3, 64, 64))
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"in": {"image": "a.png"}, "out": {"text": "red"}}\n\n')
    words = ["generate", "--model", str(tmp_path / "model"), "--image", str(tmp_path / "a.png"), "--to", "text"]
    words += ["--out", str(tmp_path / "out"), "--examples", str(examples)]
    assert main(words) == 0
    examples.write_text('{"in": {"image": "a.png"}}\n')
    assert main(words) == 2
    assert "examples.jsonl, line 1: no example (KeyError('out'))" in capsys.readouterr().err


def test_prepared_rows_make_few_shot_documents(
    tiny_model: UnifiedModel, prepare_photos: list[str], tmp_path: Path
) -> None:
    """`anyglot prepare --shots 2`."""
    assert main([*prepare_photos, "--shots", "2"]) == 0
    reader = ShardReader(tmp_path / "out" / "shards")
    tasks = [reader.task_names[t] for t in reader.tasks]
    assert tasks.count("few-shot:image->text") == tasks.count("few-shot:text->image") == 1 and len(tasks) == 12
    sample = reader.sample(tasks.index("few-shot:image->text"), tiny_model.text)
    assert [(s.modality, s.role, s.loss) for s in sample.segments] == [
        ("image", "user", False),
        ("text", "assistant", True),
    ] * 3


STEPS: dict[str, Any] = {"max_steps": 2, "batch_size": 1, "log_every": 1, "checkpoint_every": 1, "compile": False}


@needs_voices
def test_nano_chat_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped YAML, two steps: all forms are trained from one start, on the same questions, and graded."""
    monkeypatch.setenv("ANYGLOT_CACHE", str(tmp_path / "cache"))
    _, config = parse_recipe(find_recipe("nano_chat"), [])
    assert isinstance(config, NanoChatConfig) and config.forms == ["direct", "chain"]
    config = replace(
        config, run_dir=str(tmp_path / "run"), forms=["direct", "chain", "both"], scenes=4, questions=2, n=3,
        lm=replace(config.lm, **STEPS, precision="32-true"),
    )  # fmt: skip
    report = nano_chat(config)
    assert [(row["model"], row["form"]) for row in report["rows"]] == [
        ("before", "direct"), ("direct", "direct"),
        ("chain", "direct"), ("chain", "chain"), ("both", "direct"), ("both", "chain"),
    ]  # fmt: skip
    assert all(row["n"] == 3 and 0 <= row["chance"] < row["ceiling"] <= 1 for row in report["rows"])
    assert all(("heard" in row) == (row["form"] == "chain") for row in report["rows"])
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    readers = [ShardReader(tmp_path / "run" / "shards" / name) for name in ("direct", "chain")]
    text = UnifiedModel.from_pretrained(report["models"]["chain"]).text
    for i in range(8):
        direct, chain = (reader.sample(i, text).segments for reader in readers)
        assert [s.modality for s in chain] == ["image", "speech", *CHAIN] and (*chain[:2], chain[-1]) == direct
    versions = [Template.load(Path(folder) / "template.json").version for folder in report["models"].values()]
    assert versions == [2, 2, 2, 2]
    assert nano_chat(config) == report


def test_a_run_keeps_to_the_length_of_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        pass

    def once(*_: Any) -> None:
        raise Begun

    monkeypatch.setattr(Run, "once", once)
    _, config = parse_recipe(find_recipe("nano_chat"), [f"--run_dir={tmp_path}"])
    data = {name: getattr(config, name) for name in ("seed", "model", "scenes", "questions")}
    Run(tmp_path, data)  # as earlier versions began one
    with pytest.raises(Begun):
        nano_chat(config)
    with pytest.raises(ManifestError, match="lm.seq_len: nothing then, 200 now"):
        nano_chat(replace(config, lm=replace(config.lm, seq_len=200)))


def test_rules_and_what_they_say() -> None:
    assert len(RULES) == 13 and not set(RULES) & set(HELD_OUT)
    assert all(rule[::-1] in RULES for rule in HELD_OUT), "both attributes are known together"
    assert {name for rule in RULES for name in rule} == set(NAMES)
    model = UnifiedModel.from_pretrained(NANO)
    shown = pictures("test", 5, 0, model.tokenizers["image"])
    sample = document(shown, ("place", "color"))
    thing = shown[-1][0]
    assert sample.segments[-1].content == f"{thing.row} {thing.column} {thing.color}" == say(thing, ("place", "color"))
    longest = [model.template.render(document(shown, rule), model.vocabulary, model.text)[0] for rule in RULES]
    assert max(map(len, longest)) <= 384, "as long as what the shipped model was trained on"


def test_nano_shots_runs(tmp_path: Path) -> None:
    """The shipped YAML, two steps."""
    _, config = parse_recipe(find_recipe("nano_shots"), [])
    assert isinstance(config, NanoShotsConfig)
    lm = replace(config.lm, **STEPS, precision="32-true")
    config = replace(config, run_dir=str(tmp_path / "run"), pictures=12, documents=6, shots=[0, 2], lm=lm, n=16)
    report = nano_shots(config)
    assert [(r["model"], r["rules"], r["shots"]) for r in report["rows"]] == [
        (model, rules, shots) for model in ("before", "after") for rules in ("seen", "held_out") for shots in (0, 2)
    ]
    assert all(row["score"] <= row["form"] and row["n"] == 16 for row in report["rows"])
    assert report["guess"] == pytest.approx(1 / 13, abs=1e-4)
    assert Template.load(Path(report["model"]) / "template.json").version == 2
    with pytest.raises(ManifestError, match="shots"):
        nano_shots(replace(config, shots=[12]))
