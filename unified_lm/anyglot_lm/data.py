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

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from anyglot_lm.packing import numbers_of
from anyglot_lm.patterns import Int64
from anyglot_lm.plan import PROMPT, Plan, PlanError
from anyglot_tokenizers.errors import CheckpointError, FingerprintError

IGNORED = -100


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
        self._empty_prompt = plan.empty_prompt

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        """Several rows at once: a `DataLoader` asks for its batches this way."""
        names = ("input_ids", "labels", "position_ids")
        return Rows({n: torch.from_numpy(v) for n, v in zip(names, self._gather(indices), strict=True)})

    def _gather(self, indices: Sequence[int]) -> tuple[Int64, Int64, Int64]:
        """Ids, labels and positions of packs: int64 `[B, T]` each.

        Where everything goes is found for all at once. Per document only its ids are copied, and per stretch of
        targets these ids once more to the labels.
        """
        plan, size = self.plan, len(indices) * self.plan.seq_len
        if min(indices) < 0 or max(indices) >= len(plan):
            raise IndexError(f"packs {list(indices)} of {len(plan)}")
        docs, offsets = np.asarray(plan.docs), np.asarray(plan.pack_offsets)  # slicing a np.memmap is slow
        packs = [docs[offsets[i] : offsets[i + 1]] for i in indices]
        docs_N = np.concatenate(packs)
        dropped_N, docs_N = docs_N < 0, numbers_of(docs_N)
        shard_N = np.searchsorted(plan.starts, docs_N, side="right") - 1
        start_N, stop_N, run_docs, run_edges = np.empty_like(docs_N), np.empty_like(docs_N), [], []
        for shard in np.unique(shard_N).tolist():
            mine, reader = np.flatnonzero(shard_N == shard), plan.shards[shard]
            local = docs_N[mine] - plan.starts[shard]
            start_N[mine], stop_N[mine] = reader.offsets[local], reader.offsets[local + 1]
            of_doc, edges = reader.runs_of(local)
            run_docs.append(mine[of_doc])
            run_edges.append(edges)
        doc_R, edges_R2 = np.concatenate(run_docs), np.concatenate(run_edges)
        skipped_N = np.zeros_like(docs_N)  # ids of a document that are left out, less those of the empty prompt
        if dropped_N.any():
            cut_N = np.full_like(docs_N, np.iinfo(np.int64).max)
            np.minimum.at(cut_N, doc_R, edges_R2[:, 0])
            skipped_N[dropped_N] = cut_N[dropped_N] - PROMPT
        length_N = stop_N - start_N - skipped_N
        first_B = np.cumsum([0, *map(len, packs)])
        at_N = np.cumsum(length_N) - length_N
        used_B = np.add.reduceat(length_N, first_B[:-1])
        row_B = np.arange(0, size, plan.seq_len)
        at_N += np.repeat(row_B - at_N[first_B[:-1]], np.diff(first_B))

        input_ids, labels = np.empty(size, dtype=np.int64), np.full(size, IGNORED, dtype=np.int64)
        for low, high in zip((row_B + used_B).tolist(), (row_B + plan.seq_len).tolist(), strict=True):
            input_ids[low:high] = self.pad_id
        # What stands in place of a prompt is written over the end of that prompt, after the copy.
        start_N += skipped_N
        sources = [shard.ids for shard in plan.shards]
        copy = (shard_N, at_N, at_N + length_N, start_N, stop_N)
        for shard, at, end, start, stop in zip(*(array.tolist() for array in copy), strict=True):
            input_ids[at:end] = sources[shard][start:stop]
        for at in at_N[dropped_N].tolist():
            input_ids[at : at + PROMPT] = self._empty_prompt
        edges_R2 += (at_N - skipped_N)[doc_R, None]
        low_R = np.maximum(edges_R2[:, 0], at_N[doc_R] + 1)  # the first id of a document is never a target
        for low, high in zip(low_R.tolist(), edges_R2[:, 1].tolist(), strict=True):
            labels[low - 1 : high - 1] = input_ids[low:high]

        starts = np.sort(np.concatenate([at_N, (row_B + used_B)[used_B < plan.seq_len], [size]]))
        position_ids = np.arange(size)
        position_ids -= np.repeat(starts[:-1], starts[1:] - starts[:-1])
        shape = (len(indices), plan.seq_len)
        return input_ids.reshape(shape), labels.reshape(shape), position_ids.reshape(shape)


class Rows(Sequence[dict[str, Tensor]]):
    """Rows of one batch, as views of `batch`, int64 `[B, T]` each, so that `collate` need not copy them."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return {name: values[index] for name, values in self.batch.items()}


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of `PackedDataset` -> one batch, int64 `[B, T]` each."""
    if isinstance(rows, Rows):
        return rows.batch
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
        packs: Any = range(num_batches)
        super().__init__(packs, num_replicas=world, rank=rank, shuffle=False)
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
        for batch in range(self.num_batches):
            first = self.start + batch * self.group
            yield from range(first + self.rank, first + self.group, self.num_replicas)

    @property
    def group(self) -> int:
        """Packs per batch, of all ranks together."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        return (self.done_batches + self.num_batches) * self.batch_size


class _PlanLoader(DataLoader[dict[str, Tensor]]):
    """A loader that starts, workers included, when its first batch is asked for, and not before.

    Lightning makes its iterators early, at times before the checkpoint is restored. The empty state tells
    Lightning that the loader resumes by itself.
    """

    def __init__(self, *args: Any, on_start: Callable[[], None], **kwargs: Any) -> None:
        self._on_start = on_start
        super().__init__(*args, **kwargs)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        self._on_start()
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state  # the sampler follows the data module's cursor


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
            raise PlanError(f"batch_size={batch_size}, num_workers={num_workers}; use at least 1 and at least 0")
        self.use(plan, val_plan)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._start = 0
        self._done_batches = 0
        self._reading = False
        self._sampler: PlanSampler | None = None
        if val_plan is None:  # Lightning takes this as: there is no validation
            self.val_dataloader = None  # type: ignore[method-assign,assignment]

    def use(self, plan: Plan | str | Path, val_plan: Plan | str | Path | None = None) -> None:
        """Take these plans (or their folders) from now on; before `setup`."""
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        self.val_plan = val_plan if isinstance(val_plan, Plan) or val_plan is None else Plan.load(val_plan)
        if self.val_plan is not None:
            self.plan.vocabulary.check_same(self.val_plan.vocabulary, "the training plan", "the validation plan")

    def setup(self, stage: str) -> None:
        """Forgets the cursor of an earlier run; `Trainer` calls it before it restores a checkpoint."""
        if stage == "fit":
            self._start = self._done_batches = 0
            self._reading = False
            self._sampler = None

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The batches that are left, from the cursor on."""
        self._sampler = self._make_sampler(self._trainer())
        return self._loader(self.plan, self._sampler, self._begin)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The validation plan, shared out over the ranks; packs too few for a batch of all are left out."""
        assert self.val_plan is not None
        rank, world = _rank_and_world(self._trainer())
        num_batches = len(self.val_plan) // (self.batch_size * world)
        if not num_batches:
            raise PlanError(
                f"the validation plan has {len(self.val_plan)} packs, fewer than one batch of "
                f"{self.batch_size} on {world} ranks; build a longer one or lower batch_size"
            )
        sampler = PlanSampler(0, num_batches, self.batch_size, rank=rank, world=world)
        return self._loader(self.val_plan, sampler, lambda: None)

    @property
    def targets_per_pack(self) -> float:
        """Mean number of prediction targets in 256 packs, evenly spaced over the plan: the constant that normalises a
        loss.
        """
        dataset = PackedDataset(self.plan)
        chosen = sorted({i * len(dataset) // 256 for i in range(256)})
        counts = [int((dataset[i]["labels"] != IGNORED).sum()) for i in chosen]
        return sum(counts) / len(counts)

    @property
    def samples(self) -> int:
        """The cursor: packs of the plan, on all ranks, that went into finished optimizer steps."""
        trainer = self.trainer
        if trainer is None or self._sampler is None or not self._reading:
            return self._start
        # Not `completed`, which lags by one in on_train_batch_end, where checkpoints are written.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        since = progress.processed - self._sampler.done_batches
        since -= since % trainer.accumulate_grad_batches
        return self._start + since * self._sampler.group

    def state_dict(self) -> dict[str, Any]:
        """The cursor and the plan it counts in: the same on every rank."""
        return {"samples": self.samples, "plan": self.plan.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the cursor. Raises `FingerprintError` if the checkpoint is of a plan that this one does not extend."""
        if state_dict["plan"] not in self.plan.prefixes:
            raise FingerprintError(
                f"the checkpoint is of plan {state_dict['plan'][:12]}, this run has "
                f"{self.plan.fingerprint[:12]}; resume with the same shards, weights, seq_len, num_packs and "
                "seed, or start a new run in another folder"
            )
        self._start = int(state_dict["samples"])
        self._reading = False
        if self.trainer is None:
            return
        packs_per_step = self.batch_size * _rank_and_world(self.trainer)[1] * self.trainer.accumulate_grad_batches
        self._done_batches = _align(self.trainer, more=len(self.plan) - self._start >= packs_per_step)
        if self._sampler is not None:  # the loader was made before the checkpoint was read
            length = len(self._sampler)
            self._sampler.__dict__.update(self._make_sampler(self.trainer).__dict__)
            if len(self._sampler) != length:
                raise PlanError(
                    "with this strategy, a run that reads trainer.estimated_stepping_batches cannot go on with "
                    "other batches; give the schedule explicit steps, or keep batch_size, ranks and accumulation"
                )

    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise PlanError("a TokenDataModule needs a Trainer; without one use PackedDataset and collate")
        return self.trainer

    def _make_sampler(self, trainer: Trainer) -> PlanSampler:
        accumulate = trainer.accumulate_grad_batches
        rank, world = _rank_and_world(trainer)
        group = self.batch_size * world
        steps_left = (len(self.plan) - self._start) // (group * accumulate)
        self._check_length(trainer, steps_left, group * accumulate)
        return PlanSampler(
            self._start,
            steps_left * accumulate,
            self.batch_size,
            rank=rank,
            world=world,
            done_batches=self._done_batches,
        )

    def _begin(self) -> None:
        """Called when the first batch is asked for: by now Lightning must count from where the cursor is."""
        progress: Any = self._trainer().fit_loop.epoch_loop.batch_progress.current
        if progress.ready != self._done_batches:
            raise CheckpointError(
                f"the trainer starts at batch {progress.ready}, the data at {self._done_batches}; resume from "
                "a checkpoint of a run with TokenDataModule, or load the weights only"
            )
        self._reading = True

    def _check_length(self, trainer: Trainer, steps_left: int, packs_per_step: int) -> None:
        if not self._start and not steps_left:
            raise PlanError(
                f"the plan has {len(self.plan)} packs, fewer than one optimizer step of {packs_per_step}; "
                "build a longer one or lower batch_size"
            )
        if trainer.max_epochs == 1:
            return
        if trainer.max_steps < 0:
            raise PlanError("a plan is the whole run: use Trainer(max_epochs=1), or set max_steps")
        available = self._start // packs_per_step + steps_left
        if trainer.max_steps > available and not self._start:
            raise PlanError(
                f"max_steps={trainer.max_steps}, but the plan ends after step {available}; build it with "
                f"num_packs={trainer.max_steps * packs_per_step} or lower max_steps"
            )

    def _loader(self, plan: Plan, sampler: PlanSampler, on_start: Callable[[], None]) -> _PlanLoader:
        return _PlanLoader(
            PackedDataset(plan),
            on_start=on_start,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )


def _align(trainer: Trainer, *, more: bool) -> int:
    """Batches that the checkpoint in restoration counts as done, moved back to its last optimizer step.

    Lightning restores its batch counter as it was. After a stop inside an accumulation that would make the
    first step of the resumed run a short one, so the counter in the loaded checkpoint is set back too. If there
    is `more` in the plan than the checkpoint's run had, because it was extended, the one epoch is open again.
    """
    checkpoint = trainer._checkpoint_connector._loaded_checkpoint
    if not checkpoint or "loops" not in checkpoint:
        return 0
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    if more:
        progress["is_last_batch"] = False
        for counters in loop["epoch_progress"].values():
            counters.update(ready=1, started=1, processed=0, completed=0)
    processed = int(progress["current"]["processed"])
    extra = processed % trainer.accumulate_grad_batches
    if extra:
        for counters in (progress["total"], progress["current"]):
            edge = counters["processed"] - extra
            counters.update(dict.fromkeys(counters, edge))
    return processed - extra


def _rank_and_world(trainer: Trainer) -> tuple[int, int]:
    """Data-parallel rank and size: with tensor parallelism fewer than there are processes."""
    shares = trainer.distributed_sampler_kwargs or {}
    return int(shares.get("rank", 0)), int(shares.get("num_replicas", 1))
