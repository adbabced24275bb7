"""From a plan to batches: rows of packed documents, in one global order, resumable to the batch.

A batch is `{input_ids, labels, position_ids}`, int64 `[B, T]` each, and nothing else: `labels` are shifted
already (`labels[t]` is the id to predict *after* `input_ids[t]`, or -100), `position_ids` restart at every
document, which is what makes attention block-diagonal in transformers. There is no attention mask on
purpose: one would switch that off.

There is no state per worker and none per rank. The order is the plan's, batch `k` of all ranks is
`plan[k * G : (k + 1) * G]` with `G = batch_size * ranks`, and the state of the data is one integer: how many
packs went into optimizer steps. So a run resumes exactly with any number of workers, and goes on seamlessly
with another number of ranks, another batch size or another accumulation. This file trains nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from anyglot_lm.plan import Plan, PlanError
from anyglot_tokenizers.errors import CheckpointError, FingerprintError

IGNORED = -100
_log = logging.getLogger(__name__)


class PackedDataset(Dataset[dict[str, Tensor]]):
    """The rows of a plan: `dataset[i]` is pack `i`, int64 `[seq_len]` for each name.

    documents      a a a a b b b pad pad
    input_ids      1 5 6 2 1 7 2  0   0
    labels         . 6 2 . 7 2 .  .   .     (. = -100; here the first label of `a` is no target)
    position_ids   0 1 2 3 0 1 2  0   1
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.pad_id = plan.vocabulary.pad_id

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self.plan.seq_len
        input_ids = np.full(length, self.pad_id, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        position_ids = np.arange(length, dtype=np.int64)
        at = 0
        for number in self.plan.pack(index):
            ids, loss = self.plan.doc(number)
            stop = at + len(ids)
            input_ids[at:stop] = ids
            labels[at : stop - 1] = np.where(loss[1:], ids[1:], IGNORED)
            position_ids[at:] -= position_ids[at]
            at = stop
        if at < length:
            position_ids[at:] -= position_ids[at]
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
        }


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of `PackedDataset` -> one batch, int64 `[B, T]` each."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class PlanSampler(DistributedSampler[int]):
    """The packs of one rank from a cursor on: `plan[k * G : (k + 1) * G][rank::world]` for batch `k`.

    Its length is that of the whole run, although it yields only what is left: after a resume Lightning counts
    batches from the start of the run. It is a `DistributedSampler` so that Lightning knows that the packs are
    shared out over the ranks already.

    Args:
        start: packs of the plan that are done.
        num_batches: batches left, per rank.
        batch_size: packs per rank and batch.
        rank, world: which of how many ranks.
        done_batches: batches that Lightning counts as done; 0 in a fresh run.
    """

    def __init__(
        self,
        start: int,
        num_batches: int,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        done_batches: int = 0,
    ) -> None:
        if start < 0 or num_batches < 0 or batch_size < 1 or not 0 <= rank < world or done_batches < 0:
            raise ValueError(
                f"PlanSampler({start=}, {num_batches=}, {batch_size=}, {rank=}, {world=}, {done_batches=})"
            )
        super().__init__(range(num_batches), num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.start = start
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.done_batches = done_batches

    def __iter__(self) -> Iterator[int]:
        if self.epoch:
            raise PlanError(
                f"the plan is used up after {self.num_batches + self.done_batches} batches, but the run goes "
                "on; build a plan with more packs, or lower max_steps (a plan is the whole run: "
                "Trainer(max_epochs=1))"
            )
        group = self.batch_size * self.num_replicas
        for batch in range(self.num_batches):
            first = self.start + batch * group + self.rank
            yield from range(first, self.start + (batch + 1) * group, self.num_replicas)

    def __len__(self) -> int:
        return (self.done_batches + self.num_batches) * self.batch_size


class _PlanLoader(DataLoader[dict[str, Tensor]]):
    """Tells Lightning that this loader resumes by itself; the state is the data module's integer."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state  # the sampler was made for the restored cursor


class TokenDataModule(LightningDataModule):
    """The data of a run, for `Trainer.fit(model, datamodule=...)`.

    The plan is one virtual epoch: use `Trainer(max_epochs=1)`, or `max_steps` no larger than the plan. A
    last group of packs too small for a whole optimizer step is left out. The state in a checkpoint is
    `{"samples": int, "plan": str}`: the packs that went into finished optimizer steps, and the plan's
    fingerprint. A checkpoint written in the middle of an accumulation has lost the gradients of that step,
    so its packs are read again.

    Args:
        plan: a plan or its folder.
        batch_size: packs per rank and (micro) batch.
        num_workers: processes that read; the order does not depend on it.
        val_plan: plan of the validation set, read from its start each time.
    """

    def __init__(
        self,
        plan: Plan | str | Path,
        batch_size: int = 1,
        num_workers: int = 0,
        val_plan: Plan | str | Path | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise PlanError(
                f"batch_size={batch_size}, num_workers={num_workers}; use at least 1 and at least 0"
            )
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        self.val_plan = val_plan if isinstance(val_plan, Plan) or val_plan is None else Plan.load(val_plan)
        if self.val_plan is not None:
            self.plan.vocabulary.check_same(
                self.val_plan.vocabulary, "the training plan", "the validation plan"
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._start = 0
        self._restored = False
        self._reading = False
        self._done_batches = 0
        self._group = batch_size

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The batches that are left, from the cursor on."""
        trainer = self._trainer()
        accumulate = trainer.accumulate_grad_batches
        rank, world = _rank_and_world(trainer)
        self._group = self.batch_size * world
        self._done_batches = self._align(trainer, accumulate)
        steps_left = (len(self.plan) - self._start) // (self._group * accumulate)
        self._check_length(trainer, steps_left, accumulate)
        self._reading = True
        unused = len(self.plan) - self._start - steps_left * self._group * accumulate
        if unused:
            _log.info("the last %d packs of the plan are too few for an optimizer step and left out", unused)
        sampler = PlanSampler(
            self._start,
            steps_left * accumulate,
            self.batch_size,
            rank=rank,
            world=world,
            done_batches=self._done_batches,
        )
        return self._loader(self.plan, sampler)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[DataLoader[dict[str, Tensor]]]:
        """The validation plan, shared out over the ranks; packs too few for a batch of all are left out."""
        if self.val_plan is None:
            return []
        rank, world = _rank_and_world(self._trainer())
        num_batches = len(self.val_plan) // (self.batch_size * world)
        if not num_batches:
            raise PlanError(
                f"the validation plan has {len(self.val_plan)} packs, fewer than one batch of "
                f"{self.batch_size} on {world} ranks; build a longer one or lower batch_size"
            )
        sampler = PlanSampler(0, num_batches, self.batch_size, rank=rank, world=world)
        return self._loader(self.val_plan, sampler)

    @property
    def samples(self) -> int:
        """The cursor: packs of the plan, on all ranks, that went into finished optimizer steps."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or not self._reading:
            return self._start
        # Not `completed`, which lags by one in on_train_batch_end, where checkpoints are written.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        processed = progress.processed
        since = max(0, processed - self._done_batches)
        return self._start + (since - since % trainer.accumulate_grad_batches) * self._group

    def state_dict(self) -> dict[str, Any]:
        """The cursor and the plan it counts in: the same on every rank."""
        return {"samples": self.samples, "plan": self.plan.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the cursor. Raises `FingerprintError` if the checkpoint is of another plan."""
        if state_dict["plan"] != self.plan.fingerprint:
            raise FingerprintError(
                f"the checkpoint is of plan {state_dict['plan'][:12]}, this run has "
                f"{self.plan.fingerprint[:12]}; resume with the same shards, weights, seq_len, num_packs and "
                "seed, or start a new run from the weights alone"
            )
        self._start = int(state_dict["samples"])
        self._restored = True
        self._reading = False

    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise PlanError("a TokenDataModule needs a Trainer; without one use PackedDataset and collate")
        return self.trainer

    def _align(self, trainer: Trainer, accumulate: int) -> int:
        """Batches that Lightning counts as done, moved back to the last optimizer step.

        Lightning restores its batch counter as it was. After a stop inside an accumulation that would make
        the first step of the resumed run a short one.
        """
        loop = trainer.fit_loop.epoch_loop
        if not loop.restarting:
            return 0
        progress: Any = loop.batch_progress
        processed = progress.current.processed
        if processed and not self._restored:
            raise CheckpointError(
                "the checkpoint has no cursor of TokenDataModule, so its run cannot go on exactly; load its "
                "weights only, or resume with the data module it was written with"
            )
        extra = processed % accumulate
        if extra:
            for tracker in (progress.total, progress.current):
                edge = tracker.processed - extra
                tracker.ready = tracker.started = tracker.completed = edge
                tracker.processed = edge
            progress.is_last_batch = False
        return processed - extra

    def _check_length(self, trainer: Trainer, steps_left: int, accumulate: int) -> None:
        step = trainer.global_step
        available = step + steps_left
        if not available:
            raise PlanError(
                f"the plan has {len(self.plan)} packs, fewer than one optimizer step of {self._group} packs "
                f"x {accumulate}; build a longer one or lower batch_size"
            )
        if trainer.max_epochs == 1:
            return
        if trainer.max_steps < 0:
            raise PlanError("a plan is the whole run: use Trainer(max_epochs=1), or set max_steps")
        if trainer.max_steps > available:
            raise PlanError(
                f"max_steps={trainer.max_steps}, but the plan ends after step {available}; build it with "
                f"num_packs={trainer.max_steps * self._group * accumulate} or lower max_steps"
            )

    def _loader(self, plan: Plan, sampler: PlanSampler) -> _PlanLoader:
        return _PlanLoader(
            PackedDataset(plan),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )


def _rank_and_world(trainer: Trainer) -> tuple[int, int]:
    """Data-parallel rank and size: with tensor parallelism fewer than there are processes."""
    shares = trainer.distributed_sampler_kwargs or {}
    return int(shares.get("rank", 0)), int(shares.get("num_replicas", 1))
