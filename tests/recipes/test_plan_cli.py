"""`anyglot plan show` and `build`: trees and JSON of shards and plans, and one clear line for wrong use."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from anyglot_lm.plan import Plan, PlanError
from anyglot_lm.shards import ShardWriter
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_recipes.plan_cli import add_parser
from anyglot_tokenizers.errors import AnyglotError, ManifestError

VOCABULARY = Vocabulary.build(100, BlockSpec("image", "i" * 64, 16, pattern="raster", grid=(2, 2)))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng = tmp_path_factory.mktemp("prepared") / "shards", np.random.default_rng(0)
    controls, block = VOCABULARY.controls, VOCABULARY.block("image")
    with ShardWriter(path, VOCABULARY) as writer:
        for i in range(60):
            prompt = [controls["bos"], controls["user"], *rng.integers(0, 100, 4), controls["assistant"]]
            codes = (block.first_id + rng.integers(0, 16, 4)).tolist()
            answer = [block.start_id, *codes, block.end_id] if i % 2 else rng.integers(0, 100, 5).tolist()
            ids = np.array([*prompt, *answer, controls["eos"]])
            writer.add(ids, np.arange(len(ids)) >= len(prompt), "text->image" if i % 2 else "chat")
    return path


def call(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["plan", *map(str, words)])
    code: int = arguments.run(arguments)
    return code


def test_shards_are_shown(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", shards.parent) == 0
    tree = capsys.readouterr().out
    assert "60 documents, 810 ids, 390 of them targets" in tree
    assert "text->image: 30 documents, 420 ids (text 57.1%, image 42.9%)" in tree
    assert call("show", shards, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["shards"][0]["tasks"][1]["modalities"] == {"text": 240, "image": 180}


def test_plans_are_built_and_shown(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan"
    words = ("--weights", "chat=1", "text->image=3", "--condition_dropout", "0.2", "--max_repetition", "chat=5", "40")
    with pytest.raises(AnyglotError, match=r"--max_repetition '40': give NAME=NUMBER"):
        call("build", shards, "--out", out, "--seq_len", 64, "--num_packs", 20, *words)
    assert call("build", shards, "--out", out, "--seq_len", 64, "--num_packs", 20, *words[:-1]) == 0
    plan = Plan.load(out)
    built = capsys.readouterr()
    assert call("show", out) == 0
    assert capsys.readouterr().out == built.out and str(out) in built.err
    for part in (plan.fingerprint[:12], plan.shards[0].fingerprint[:12], plan.vocabulary.fingerprint[:12]):
        assert part in built.out
    assert "condition dropout 20.0%" in built.out and "without prompt" in built.out
    assert call("show", out, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["fingerprint"] == plan.fingerprint and content["num_packs"] == 20
    (phase,) = content["phases"]
    assert phase["sources"][1]["share"] == pytest.approx(0.75, abs=0.05)
    assert sum(content["ids_by_modality"].values()) == pytest.approx(content["ids"], abs=2)


def test_a_curriculum_from_a_file(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, common = tmp_path / "phases.json", ("build", shards, "--out", tmp_path / "plan", "--seq_len", 64)
    file.write_text(json.dumps([{"num_packs": 5}, {"num_packs": 7, "weights": {"chat": 1, "text->image": 0}}]))
    assert call(*common, "--phases", file, "--json") == 0
    assert [p["num_packs"] for p in json.loads(capsys.readouterr().out)["phases"]] == [5, 7]
    file.write_text('[{"packs": 5}]')
    with pytest.raises(ManifestError, match=r"phases.json: .*packs.*; it holds a JSON list"):
        call(*common, "--phases", file)
    with pytest.raises(PlanError, match="either num_packs or epochs"):
        call(*common)
    with pytest.raises(AnyglotError, match="show one plan, or any number of shard folders"):
        call("show", tmp_path / "plan", shards)
    with pytest.raises(ManifestError, match=r"nowhere.*cannot be read"):
        call("show", tmp_path / "nowhere")
    with pytest.raises(AnyglotError, match=r"--weights 'chat': give NAME=NUMBER"):
        call(*common, "--num_packs", 3, "--weights", "chat")
    with pytest.raises(AnyglotError, match=r"--max_repetition 'x': give a number"):
        call(*common, "--num_packs", 3, "--max_repetition", "x")
