"""A resumed run sees the packs and ends with the weights of the run that never stopped, to the last bit."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from anyglot_lm.plan import build_plan, extend_plan
from anyglot_lm.shards import ShardWriter
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import FingerprintError

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


def _launch(
    run_ranks: Callable[..., None], folder: Path, ranks: int, jobs: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Runs jobs of the program in processes of their own; returns what every rank reports."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    run_ranks(PROGRAM, file, ranks=ranks, seconds=120, tries=2)
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(ranks)]


def _matrix(plan: Path, folder: Path, workers: tuple[int, ...] = (0, 2), **options: Any) -> dict[str, dict[str, Any]]:
    """Whole runs with numbers of workers, and from every checkpoint of each a run with 0 and one with 2."""
    common = {"plan_path": plan, **options}
    jobs: dict[str, dict[str, Any]] = {}
    for before in workers:
        place = folder / str(before)
        jobs[f"{before}"] = {**common, "folder": place, "workers": before}
        for after in (0, 2):
            for cut in CUTS:
                name, ckpt = f"{before}/{after}/{cut}", place / f"{cut}.ckpt"
                jobs[name] = {**common, "folder": folder / "resumed", "workers": after, "ckpt": ckpt}
    return jobs


@pytest.fixture(scope="module")
def one_rank_sharded(
    plan: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, _launch(run_ranks, folder, 1, _matrix(plan, folder, workers=(0,), sharded=True))


@pytest.fixture(scope="module")
def two_ranks(
    plan: Path,
    tmp_path_factory: pytest.TempPathFactory,
    one_rank: dict[str, Any],
    one_rank_sharded: tuple[Path, list[dict[str, Any]]],
    run_ranks: Callable[..., None],
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    jobs = {}
    sources = {"ddp": one_rank["folder"], "fsdp2": one_rank_sharded[0] / "0"}
    for strategy, source in sources.items():
        options = {"sharded": strategy == "fsdp2"}
        matrix = _matrix(plan, folder / strategy, **options)
        jobs |= {f"{strategy}/{name}": job for name, job in matrix.items()}
        for cut in CUTS:
            more = {"ckpt": source / f"{cut}.ckpt", "batch_size": 1, "workers": 2, **options}
            jobs[f"{strategy}/from one/{cut}"] = {"plan_path": plan, "folder": folder / "more", **more}
    return folder, _launch(run_ranks, folder, 2, jobs)


def _check(whole: dict[str, Any], resumed: dict[str, Any], cut: str) -> None:
    # A cut inside an accumulation loses its gradients, so the packs of that step are read again.
    done = CUTS[cut] - CUTS[cut] % 2
    assert whole["seen"][:done] + resumed["seen"] == whole["seen"]
    assert whole["losses"][:done] + resumed["losses"] == whole["losses"]
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


def test_checkpoints_of_a_plan_go_on_with_the_extended_one(program: ModuleType, plan: Path, tmp_path: Path) -> None:
    short = build_plan([plan.parent / "shards"], seq_len=24, num_packs=18, seed=1, path=tmp_path / "short")
    extend_plan(short, num_packs=16, path=tmp_path / "long")
    first = program.run(tmp_path / "short", tmp_path, cuts={"last": 8})
    assert (first["steps"], first["samples"]) == (4, 16), "two packs of the short plan are left"
    for name in ("last", "after"):  # written after the last batch, and after the whole fit
        second = program.run(tmp_path / "long", tmp_path / "again", ckpt=tmp_path / f"{name}.ckpt")
        assert [p for batch in first["seen"] + second["seen"] for p in batch] == list(range(32))
        assert (second["steps"], second["samples"]) == (8, 32)
    with pytest.raises(FingerprintError, match="the checkpoint is of plan"):
        program.run(plan, tmp_path / "again", ckpt=tmp_path / "last.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", CUTS)
def test_one_rank_sharded(
    one_rank: dict[str, Any], one_rank_sharded: tuple[Path, list[dict[str, Any]]], workers: int, cut: str
) -> None:
    _, (runs,) = one_rank_sharded
    _check(runs["0"], runs[f"0/{workers}/{cut}"], cut)
    assert runs["0"]["losses"] == one_rank["0/whole"]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("cut", CUTS)
def test_two_ranks(
    two_ranks: tuple[Path, list[dict[str, Any]]], strategy: str, before: int, after: int, cut: str
) -> None:
    for runs in two_ranks[1]:
        _check(runs[f"{strategy}/0"], runs[f"{strategy}/{before}/{after}/{cut}"], cut)
        assert runs[f"{strategy}/2"] == runs[f"{strategy}/0"]
        assert runs["fsdp2/0"]["seen"] == runs["ddp/0"]["seen"]
        ddp, fsdp2 = ([float.fromhex(x) for x in runs[f"{s}/0"]["losses"]] for s in ("ddp", "fsdp2"))
        assert fsdp2 == pytest.approx(ddp, rel=1e-5)
    batches = zip(*(runs[f"{strategy}/0"]["seen"] for runs in two_ranks[1]), strict=True)
    assert sorted(p for pair in batches for batch in pair for p in batch) == list(range(32))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("cut", CUTS)
def test_one_rank_goes_on_as_two(two_ranks: tuple[Path, list[dict[str, Any]]], strategy: str, cut: str) -> None:
    runs = [rank[f"{strategy}/from one/{cut}"] for rank in two_ranks[1]]
    pairs = zip(*(run["seen"] for run in runs), strict=True)
    assert [p for pair in pairs for batch in pair for p in batch] == list(range(8, 32))
    assert {(run["steps"], run["samples"]) for run in runs} == {(8, 32)}


@pytest.mark.slow
def test_two_ranks_go_on_as_one(
    program: ModuleType,
    two_ranks: tuple[Path, list[dict[str, Any]]],
    plan: Path,
    tmp_path: Path,
    run_ranks: Callable[..., None],
) -> None:
    folder, (first, _) = two_ranks
    resumed = {"plan_path": plan, "folder": tmp_path, "batch_size": 4}
    jobs = {cut: {**resumed, "ckpt": folder / "fsdp2" / "0" / f"{cut}.ckpt", "sharded": True} for cut in CUTS}
    (sharded,) = _launch(run_ranks, tmp_path, 1, jobs)
    for cut in CUTS:
        plain = program.run(plan, tmp_path, batch_size=4, world=1, ckpt=folder / "ddp" / "2" / f"{cut}.ckpt")
        for run in (plain, sharded[cut]):
            assert [p for batch in run["seen"] for p in batch] == list(range(16, 32))
            assert (run["steps"], run["samples"]) == (first["ddp/0"]["steps"], 32)
