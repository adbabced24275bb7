"""A resumed run sees the packs and ends with the weights of the run that never stopped, to the last bit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from anyglot_lm.plan import build_plan
from anyglot_lm.shards import ShardWriter
from anyglot_lm.vocabulary import Vocabulary

PROGRAM = Path(__file__).with_name("resume_program.py")
PACKS = 35  # one rank: 8 whole steps of 2 x 2 packs, 3 packs left out; two ranks: 4 steps of 2 x 2 x 2
CUTS = {"inside": 5, "edge": 4}
pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resume_program", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    vocabulary = Vocabulary.build(50)
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "shards", vocabulary) as writer:
        for _ in range(200):
            length = int(rng.integers(4, 12))
            ids = rng.integers(0, 50, length)
            ids[[0, 1, -1]] = [vocabulary.controls[c] for c in ("bos", "user", "eos")]
            writer.add(ids, np.arange(length) >= 2, "t")
    build_plan([folder / "shards"], seq_len=24, num_packs=PACKS, path=folder / "plan")
    return folder / "plan"


@pytest.fixture(scope="module")
def one_rank(program: ModuleType, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    runs = {}
    folder = tmp_path_factory.mktemp("runs")
    runs["0/whole"] = program.run(plan, folder, workers=0)
    for workers in (0, 2):
        for cut in CUTS:
            runs[f"{workers}/{cut}"] = program.run(plan, folder, workers=workers, ckpt=folder / f"{cut}.ckpt")
    runs["folder"] = folder
    return runs


@pytest.fixture(scope="module")
def two_ranks(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks") / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(PROGRAM), str(plan), str(out)], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return [{**json.loads(Path(f"{out}.{rank}").read_text()), "folder": out.parent} for rank in (0, 1)]


def _check(whole: dict[str, Any], resumed: dict[str, Any], cut: str) -> None:
    # A cut inside an accumulation loses its gradients, so the packs of that step are read again.
    done = CUTS[cut] - CUTS[cut] % 2
    assert whole["seen"][:done] + resumed["seen"] == whole["seen"]
    assert resumed["loss"] == whole["loss"]
    assert resumed["weight"] == whole["weight"]
    assert (resumed["steps"], resumed["samples"]) == (whole["steps"], whole["samples"])


def test_whole_run_is_the_plan(one_rank: dict[str, Any]) -> None:
    whole = one_rank["0/whole"]
    assert [p for batch in whole["seen"] for p in batch] == list(range(32))
    assert (whole["steps"], whole["samples"]) == (8, 32)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", CUTS)
def test_one_rank(one_rank: dict[str, Any], workers: int, cut: str) -> None:
    _check(one_rank["0/whole"], one_rank[f"{workers}/{cut}"], cut)


def test_checkpoint_holds_one_integer(one_rank: dict[str, Any], plan: Path) -> None:
    for name in CUTS:
        checkpoint = torch.load(one_rank["folder"] / f"{name}.ckpt", weights_only=True)
        state = checkpoint["TokenDataModule"]
        assert state["samples"] == 8 and set(state) == {"samples", "plan"}


@pytest.mark.parametrize(("accumulate", "batch_size"), [(1, 4), (4, 1), (3, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("cut", CUTS)
def test_other_batches_after_the_resume(
    program: ModuleType, one_rank: dict[str, Any], plan: Path, cut: str, accumulate: int, batch_size: int
) -> None:
    folder = one_rank["folder"]
    run = program.run(
        plan, folder, workers=0, ckpt=folder / f"{cut}.ckpt", accumulate=accumulate, batch_size=batch_size
    )
    seen = [p for batch in run["seen"] for p in batch]
    steps = (PACKS - 8) // (accumulate * batch_size)
    assert seen == list(range(8, 8 + steps * accumulate * batch_size))
    assert run["steps"] == 2 + steps and run["samples"] == seen[-1] + 1


def test_from_checkpoints_written_after_validation(
    program: ModuleType, one_rank: dict[str, Any], plan: Path, tmp_path: Path
) -> None:
    whole = program.run(plan, tmp_path, workers=0, validate=True)
    assert whole == one_rank["0/whole"], "validation changes nothing"
    checkpoints = {int(p.name.split("step=")[1].split("-")[0]): p for p in tmp_path.glob("*.ckpt")}
    assert sorted(checkpoints) == [2, 4, 6, 8]
    for step, path in checkpoints.items():
        resumed = program.run(plan, tmp_path / "again", workers=0, validate=True, ckpt=path) if step < 8 else whole
        done = step * 2 if step < 8 else 0
        assert whole["seen"][:done] + resumed["seen"] == whole["seen"]
        assert resumed["weight"] == whole["weight"] and resumed["steps"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", CUTS)
def test_two_ranks(two_ranks: list[dict[str, Any]], workers: int, cut: str) -> None:
    for runs in two_ranks:
        _check(runs["0/whole"], runs[f"{workers}/{cut}"], cut)
        assert runs[f"{workers}/whole"] == runs["0/whole"]
        _check(runs["fsdp2/whole"], runs[f"fsdp2/{cut}"], cut)
        assert runs["fsdp2/whole"]["seen"] == runs["0/whole"]["seen"]
    batches = zip(*(runs["0/whole"]["seen"] for runs in two_ranks), strict=True)
    assert sorted(p for pair in batches for batch in pair for p in batch) == list(range(32))


@pytest.mark.slow
def test_two_ranks_go_on_as_one(program: ModuleType, two_ranks: list[dict[str, Any]], plan: Path) -> None:
    folder = two_ranks[0]["folder"] / "0"
    run = program.run(plan, folder, workers=0, ckpt=folder / "edge.ckpt", batch_size=4, world=1)
    assert [p for batch in run["seen"] for p in batch] == list(range(16, 32))
    assert run["steps"] == two_ranks[0]["0/whole"]["steps"]
