"""Rows, labels and positions; the sampler's order; the data module's errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.data import IGNORED, PackedDataset, PlanSampler, TokenDataModule, collate
from anyglot_lm.plan import Plan, PlanError, build_plan
from anyglot_lm.shards import ShardWriter
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import CheckpointError, FingerprintError

VOCABULARY = Vocabulary.build(200)
CONTROLS = VOCABULARY.controls


def write(path: Path, lengths: list[int]) -> Path:
    with ShardWriter(path, VOCABULARY) as writer:
        for number, length in enumerate(lengths):
            ids = np.arange(length) + number
            ids[:2] = CONTROLS["bos"], CONTROLS["user"]
            ids[-1] = CONTROLS["eos"]
            loss = np.arange(length) >= 3
            writer.add(ids, loss, "t")
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("shards") / "a"
    rng = np.random.default_rng(0)
    return build_plan([write(path, rng.integers(5, 20, 60).tolist())], seq_len=32, num_packs=17)


def test_a_row_by_hand(tmp_path: Path) -> None:
    plan = build_plan([write(tmp_path / "a", [6, 5])], seq_len=13, num_packs=1, seed=1)
    row = PackedDataset(plan)[0]
    bos, user, eos, pad = (CONTROLS[c] for c in ("bos", "user", "eos", "pad"))
    a = ([bos, user, 2, 3, 4, eos], [IGNORED, IGNORED, 3, 4, eos, IGNORED])
    b = ([bos, user, 3, 4, eos], [IGNORED, IGNORED, 4, eos, IGNORED])
    first, second = (a, b) if plan.pack(0) == [0, 1] else (b, a)
    assert row["input_ids"].tolist() == first[0] + second[0] + [pad, pad]
    assert row["labels"].tolist() == first[1] + second[1] + [IGNORED, IGNORED]
    lengths = [len(first[0]), len(second[0]), 2]
    assert row["position_ids"].tolist() == [p for n in lengths for p in range(n)]
    assert set(row) == {"input_ids", "labels", "position_ids"}
    assert all(v.dtype == torch.int64 for v in row.values())


def test_labels_are_shifted_inside_documents_only(plan: Plan) -> None:
    for row in (PackedDataset(plan)[i] for i in range(len(plan))):
        ids, labels, positions = (row[k].numpy() for k in ("input_ids", "labels", "position_ids"))
        targets = np.flatnonzero(labels != IGNORED)
        assert (labels[targets] == ids[targets + 1]).all()
        assert (positions[targets + 1] == positions[targets] + 1).all(), "a label crosses a document"
        starts = np.flatnonzero(positions == 0)
        assert all(ids[s] in (CONTROLS["bos"], CONTROLS["pad"]) for s in starts)
        assert not (labels[ids == CONTROLS["pad"]] != IGNORED).any()


def test_every_target_is_there_once(plan: Plan) -> None:
    rows = [PackedDataset(plan)[i] for i in range(len(plan))]
    got = sum(int((r["labels"] != IGNORED).sum()) for r in rows)
    assert got == sum(int(plan.doc(int(d))[1][1:].sum()) for d in plan.docs)
    batch = collate(rows[:3])
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(batch, (3, 32))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(0, 7))
def test_sampler_is_the_plan_shared_out(world: int, batch: int, start: int, num: int) -> None:
    ranks = [list(PlanSampler(start, num, batch, rank=r, world=world, done_batches=2)) for r in range(world)]
    group = batch * world
    for k in range(num):
        mine = [set(r[k * batch : (k + 1) * batch]) for r in ranks]
        assert set.union(*mine) == set(range(start + k * group, start + (k + 1) * group))
        assert sum(map(len, mine)) == group
    assert len(PlanSampler(start, num, batch, rank=0, world=world, done_batches=2)) == (num + 2) * batch


def _fake_trainer(**changes: Any) -> Any:
    progress = SimpleNamespace(ready=0, started=0, processed=0, completed=0)
    loop = SimpleNamespace(restarting=False, batch_progress=SimpleNamespace(total=progress, current=progress))
    return SimpleNamespace(
        **{
            "accumulate_grad_batches": 1,
            "distributed_sampler_kwargs": None,
            "global_step": 0,
            "max_epochs": 1,
            "max_steps": -1,
            "fit_loop": SimpleNamespace(epoch_loop=loop),
            "_checkpoint_connector": SimpleNamespace(_loaded_checkpoint={}),
            **changes,
        }
    )


def _batches(plan: Plan, batch_size: int = 2, start: int = 0, **changes: Any) -> list[torch.Tensor]:
    module = TokenDataModule(plan, batch_size)
    module.trainer = _fake_trainer(**changes)
    if start:
        module.load_state_dict({"samples": start, "plan": plan.fingerprint})
    return [b["input_ids"] for b in module.train_dataloader()]


def test_batches_follow_the_plan_and_whole_steps_only(plan: Plan) -> None:
    rows = [PackedDataset(plan)[i]["input_ids"] for i in range(17)]
    assert torch.equal(torch.cat(_batches(plan)), torch.stack(rows[:16]))
    assert torch.equal(torch.cat(_batches(plan, start=4)), torch.stack(rows[4:16]))
    assert len(_batches(plan, accumulate_grad_batches=3)) == 6
    second = _batches(plan, distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})
    assert torch.equal(torch.cat(second), torch.stack(rows[1:16:2]))


def test_plans_that_are_too_short_are_refused_early(plan: Plan) -> None:
    with pytest.raises(PlanError, match="fewer than one optimizer step of 20; build"):
        _batches(plan, 4, accumulate_grad_batches=5)
    with pytest.raises(PlanError, match=r"max_steps=9, but the plan ends after step 8; build it with num_packs=18"):
        _batches(plan, max_epochs=-1, max_steps=9)
    with pytest.raises(PlanError, match=r"Trainer\(max_epochs=1\)"):
        _batches(plan, max_epochs=None)
    with pytest.raises(PlanError, match="used up after 8 batches"):
        sampler = PlanSampler(0, 8, 2)
        sampler.set_epoch(1)
        next(iter(sampler))


def test_another_plan_is_refused(plan: Plan) -> None:
    module = TokenDataModule(plan)
    assert module.state_dict() == {"samples": 0, "plan": plan.fingerprint}
    with pytest.raises(FingerprintError, match=f"plan abc, this run has {plan.fingerprint[:12]}; resume with the same"):
        module.load_state_dict({"samples": 3, "plan": "abc"})


def test_checkpoints_without_cursor_are_refused(plan: Plan) -> None:
    trainer = _fake_trainer()
    trainer.fit_loop.epoch_loop.batch_progress.current.ready = 3
    module = TokenDataModule(plan)
    module.trainer = trainer
    with pytest.raises(CheckpointError, match="starts at batch 3, the data at 0"):
        next(iter(module.train_dataloader()))


def test_validation_plan(plan: Plan, tmp_path: Path) -> None:
    assert TokenDataModule(plan).val_dataloader is None, "Lightning takes this as: no validation"
    module = TokenDataModule(plan, 4, val_plan=plan)
    module.trainer = _fake_trainer()
    loader = module.val_dataloader()
    assert len(loader) == 4 == len(list(loader)) == len(list(loader))
    module = TokenDataModule(plan, 18, val_plan=plan)
    module.trainer = _fake_trainer()
    with pytest.raises(PlanError, match="17 packs, fewer than one batch of 18"):
        module.val_dataloader()


def test_module_takes_a_folder(plan: Plan, tmp_path: Path) -> None:
    saved = plan.save(tmp_path / "plan")
    assert TokenDataModule(tmp_path / "plan").plan.fingerprint == saved.fingerprint
    assert isinstance(TokenDataModule(str(tmp_path / "plan")), pl.LightningDataModule)
    with pytest.raises(PlanError, match="batch_size=0"):
        TokenDataModule(plan, 0)
