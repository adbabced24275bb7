"""Stages on two gloo processes, DDP and FSDP2: one process's losses, the same bytes after a kill, one plain export."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anyglot_lm.segments import Sample, Segment
from anyglot_lm.shards import ShardWriter
from anyglot_lm.unified import UnifiedModel

PROGRAM = Path(__file__).with_name("stage_program.py")
WORDS = ["red", "green", "blue", "white", "a large red circle at the top left", "two"]
DIES_AT = {1: 11, 2: 5}  # of 4 or 2 micro-batches a step: inside the third step of four, a checkpoint after the second
STRATEGIES = {"ddp": "ddp", "fsdp2": "fsdp2"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: UnifiedModel) -> Path:
    """A start folder and shards of uneven documents in the temporary folder that all runs share."""
    root = tmp_path_factory.mktemp("ranks")
    tiny_model.save_pretrained(root / "start")
    with ShardWriter(root / "shards", tiny_model.vocabulary, text=tiny_model.text) as writer:
        for value in range(36):
            picture = torch.full((1, 4, 4), value % 4).numpy()
            word = Segment("text", WORDS[value % len(WORDS)], "assistant")
            writer.add_sample(Sample([Segment("image", picture, "user"), word]), "image->text")
            writer.add_sample(
                Sample([Segment("text", word.content, "user"), Segment("image", picture, "assistant")]), "t"
            )
    return root


def arguments(root: Path, name: str, ranks: int, strategy: str, preset: str) -> list[str]:
    given = {
        "run_dir": root / name,
        "model.start": root / "start",
        "data.shards": json.dumps([str(root / "shards")]),
        "trainer.strategy": strategy,
        "trainer.devices": ranks,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 4,
        "trainer.gradient_clip_val": 1.0,
        "model.preset": preset,
        "model.log_every": 1,
        "model.warmup_steps": 1,
        "checkpoint_every": 2,
        "data.seq_len": 64,
        "data.batch_size": 1,
        "data.packs_per_step": 4,
        "precision": "fp32",
        "export_dtype": "fp32",
    }
    return [f"--{key}={value}" for key, value in given.items()]


def start(run_ranks: Callable[..., None], root: Path, ranks: int, strategy: str) -> None:
    """For full and LoRA: a whole run, and one that is killed and started again."""
    runs: list[tuple[list[str], int]] = []
    for preset in ("full", "lora"):
        whole, cut = (arguments(root, f"{strategy}-{preset}-{n}", ranks, strategy, preset) for n in ("whole", "cut"))
        runs += [(whole, -1), (cut, DIES_AT[ranks]), (cut, -1)]
    file = root / f"{strategy}.json"
    file.write_text(json.dumps(runs))
    run_ranks(PROGRAM, file, ranks=ranks, seconds=600)


@pytest.fixture(scope="module")
def runs(world: Path, run_ranks: Callable[..., None]) -> Path:
    """All runs; the folder `STRATEGY-PRESET-whole` or `-cut` of each."""
    start(run_ranks, world, 1, "auto")
    for strategy in STRATEGIES.values():
        start(run_ranks, world, 2, strategy)
    return world


def losses(folder: Path) -> dict[int, float]:
    found = {}
    for file in sorted(folder.glob("logs/version_*/metrics.csv")):
        with file.open() as opened:
            found.update({int(float(row["step"])): float(row["loss"]) for row in csv.DictReader(opened)})
    return found


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("preset", ["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_learn_what_one_does(runs: Path, strategy: str, preset: str) -> None:
    alone, together = runs / f"auto-{preset}-whole", runs / f"{strategy}-{preset}-whole"
    assert list(losses(together)) == [1, 2, 3, 4]
    for step, loss in losses(alone).items():
        assert losses(together)[step] == pytest.approx(loss, rel=1e-5)
    one, two = exported(alone), exported(together)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("preset", ["full", "lora"])
@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_killed_and_started_again(runs: Path, strategy: str, preset: str) -> None:
    whole, cut = runs / f"{strategy}-{preset}-whole", runs / f"{strategy}-{preset}-cut"
    assert len(list(cut.glob("logs/version_*"))) == 2, "the run was killed once"
    assert losses(cut) == losses(whole)
    for name, value in exported(whole).items():
        assert torch.equal(exported(cut)[name], value), name


def test_other_ranks_go_on(runs: Path, tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    """Two ranks stop after step 2, one goes on: the losses are those of the run that never stopped."""
    given = arguments(runs, "elastic", 2, "ddp", "full")
    for ranks, dies_at in ((2, DIES_AT[2]), (1, -1)):
        mine = [*given, f"--trainer.devices={ranks}", f"--trainer.strategy={'ddp' if ranks == 2 else 'auto'}"]
        (tmp_path / "runs.json").write_text(json.dumps([(mine, dies_at)]))
        run_ranks(PROGRAM, tmp_path / "runs.json", ranks=ranks)
    whole = losses(runs / "auto-full-whole")
    assert {step: pytest.approx(loss, rel=1e-5) for step, loss in losses(runs / "elastic").items()} == whole
