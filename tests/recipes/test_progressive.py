"""The progressive recipe, whole and small: music comes to a model that lacked it, and both runs are graded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyglot_lm.plan import Plan
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import id_map
from anyglot_recipes.chain import BlockConfig, LMConfig
from anyglot_recipes.nano import ASSISTANT_VOICE, WorldConfig
from anyglot_recipes.progressive import NEW, OLD, ProgressiveConfig, progressive
from anyglot_recipes.shipped import NANO
from anyglot_recipes.tasks import PAIRS
from anyglot_recipes.train import find_recipe, parse_recipe
from anyglot_synth.nanoworld.voices import installed_voices
from anyglot_tokenizers.errors import ManifestError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
needs_voices = pytest.mark.skipif(
    ASSISTANT_VOICE not in {v.name for v in installed_voices()}, reason="the speech engine flite is not here"
)


def small(run_dir: Path) -> ProgressiveConfig:
    """The shipped recipe with a model, data and steps that take seconds."""
    _, config = parse_recipe(find_recipe("progressive"), [])
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "batch_size": 2}
    steps: dict[str, Any] = {"max_steps": 4, "log_every": 1, "checkpoint_every": 2, "compile": False}
    stage = {"trainer.max_steps": 4, "model.log_every": 1, "checkpoint_every": 2, "model.warmup_steps": 1}
    return replace(
        config,
        run_dir=str(run_dir),
        world=WorldConfig(num_chunks=1, chunk=8, workers=1),
        lm=replace(config.lm, precision="32-true", **sizes, **steps),
        stage={**config.stage, **stage, "precision": "fp32", "trainer.accelerator": "cpu"},
        n=2,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProgressiveConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("progressive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYGLOT_CACHE", str(folder / "cache"))
        config = small(folder / "run")
        return config, progressive(config)


def shares(plan: Plan) -> dict[str, float]:
    """Share of the plan's ids by task."""
    return {source.name: source.weight for source in plan.phases[0].sources}


def test_old_and_new_directions_are_the_twelve_pairs() -> None:
    assert len(OLD) == len(NEW) == 6
    assert set(OLD) | set(NEW) == set(PAIRS)
    assert not any("music" in task for task in OLD)


@needs_voices
def test_report(done: tuple[ProgressiveConfig, dict[str, Any]]) -> None:
    config, report = done
    assert json.loads((Path(config.run_dir) / "report.json").read_text()) == report
    assert {name: [row["task"] for row in rows] for name, rows in report["rows"].items()} == {
        "before": list(OLD),
        "with_replay": [*OLD, *NEW],
        "without_replay": [*OLD, *NEW],
    }
    for part, tasks in (("old", OLD), ("new", NEW)):
        for name, mean in report[part].items():
            scores = [row["score"] for row in report["rows"][name] if row["task"] in tasks]
            assert mean == pytest.approx(np.mean(scores), abs=1e-4)
    assert set(report["new"]) == set(report["lost"]) == {"with_replay", "without_replay"}
    for name, points in report["lost"].items():
        assert points == pytest.approx(100 * (report["old"]["before"] - report["old"][name]), abs=0.01)
    ceilings = {row["task"]: row["ceiling"] for row in report["rows"]["with_replay"]}
    assert ceilings["image->text"] == 1
    assert ceilings["text->music"] > 0.8, "music is decoded by its own tokenizer"


@needs_voices
def test_the_added_modality_is_new_and_the_rest_starts_as_it_was(done: Any) -> None:
    run = Path(done[0].run_dir)
    before, start = (UnifiedModel.from_pretrained(run / name) for name in ("model", "start"))
    assert before.vocabulary.modalities == ("image", "speech")
    assert start.vocabulary.modalities == ("image", "speech", "music")
    places = torch.from_numpy(id_map(before.vocabulary, start.vocabulary))
    known = places >= 0
    rows, moved = (m.model.get_input_embeddings().weight for m in (before, start))
    assert torch.equal(moved[places[known]], rows[: len(places)][known])
    layer = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before.model.state_dict()[layer], start.model.state_dict()[layer])
    for name in ("with_replay", "without_replay"):
        after = UnifiedModel.from_pretrained(run / name / "model")
        assert after.vocabulary.fingerprint == start.vocabulary.fingerprint
        assert not torch.equal(after.model.state_dict()[layer], start.model.state_dict()[layer])


@needs_voices
def test_the_two_runs_differ_in_replay_only(done: Any) -> None:
    run = Path(done[0].run_dir)
    with_replay, without = (Plan.load(run / name / "plan") for name in ("with_replay", "without_replay"))
    assert len(with_replay) == len(without) == 4 * 2
    assert set(shares(without)) == set(NEW)
    found = shares(with_replay)
    assert set(found) == {*NEW, *OLD}
    assert sum(found[task] for task in OLD) == pytest.approx(0.4)
    settings = [(run / name / "config.yaml").read_text().splitlines() for name in ("with_replay", "without_replay")]
    changed = {line.split(":")[0].strip() for line in set(settings[0]) ^ set(settings[1]) if ":" in line}
    assert changed == {"run_dir", "replay", "replay_share"}


@needs_voices
def test_a_finished_run_is_not_trained_again(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, report = done
    monkeypatch.setenv("ANYGLOT_CACHE", str(Path(config.run_dir).parent / "cache"))
    written = {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob("*.safetensors")}
    assert len([path for path in written if path.name == "model.safetensors" and path.parent.name == "model"]) == 3
    assert progressive(config) == report
    assert {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob("*.safetensors")} == written


@pytest.mark.parametrize("wrong", [{"replay_share": 0.0}, {"replay_share": 1.0}, {"n": 0}])
def test_settings_that_cannot_work_are_refused_before_anything_is_made(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"replay_share .* n "):
        progressive(ProgressiveConfig(run_dir=str(tmp_path / "run"), **wrong))
    assert not (tmp_path / "run").exists()


def test_blocks_of_no_modality_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    lm = LMConfig(blocks={"sound": BlockConfig()})
    with pytest.raises(ManifestError, match=r"lm\.blocks: no modality sound; there are image, speech, music"):
        progressive(ProgressiveConfig(run_dir=str(tmp_path / "run"), lm=lm))
    assert not (tmp_path / "run").exists()


def test_a_source_without_music_is_refused(tmp_path: Path) -> None:
    for name in ("text.model", "tokenizers/image", "tokenizers/speech"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(NANO / name)
    with pytest.raises(ManifestError, match="no tokenizer for music"):
        progressive(ProgressiveConfig(run_dir=str(tmp_path / "run"), source=str(tmp_path), lm=LMConfig()))
