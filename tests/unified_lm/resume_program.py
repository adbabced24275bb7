"""Trains a tiny model on a plan, in one go or resumed from a checkpoint that another run wrote.

    python resume_program.py JOBS.json                            one rank
    torchrun --nproc-per-node 2 resume_program.py JOBS.json       two ranks

JOBS.json maps names to the arguments of `run`. What came of them goes to JOBS.json.r for rank r: per run the packs and
the loss of every batch, in order, and the sum of all weights at the end, as exact text. `test_resume.py` compares.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from anyglot_lm.data import PackedDataset, TokenDataModule
from anyglot_lm.plan import Plan

CUTS = {"inside": 5, "edge": 4}  # batches done, with 2 batches per optimizer step
ACCUMULATE = 2
BATCH_SIZE = 2


class Tiny(LightningModule):
    """An embedding and a head; notes which packs it saw."""

    def __init__(self, packs: dict[tuple[int, ...], int], vocabulary_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary_size, 8)
        self.head = nn.Linear(8, vocabulary_size)
        self.packs = packs
        self.seen: list[list[int]] = []
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            for module in (self.embed, self.head, self):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append([self.packs[tuple(row)] for row in batch["input_ids"].tolist()])
        logits_BTV = self.head(self.embed(batch["input_ids"]) + 0.01 * batch["position_ids"][..., None])
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch["labels"].flatten())
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits_BTV = self.head(self.embed(batch["input_ids"]))
        self.log("val", nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch["labels"].flatten()))

    def configure_optimizers(self) -> Any:
        # Touching this property makes Lightning set the loaders up early, which has lost data states before.
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / (steps + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SaveAt(Callback):
    """Writes a checkpoint after the given numbers of batches, in the hook where ModelCheckpoint does."""

    def __init__(self, folder: Path, cuts: Mapping[str, int] = CUTS) -> None:
        self.folder = folder
        self.cuts = cuts

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, batches in self.cuts.items():
            if batch_idx + 1 == batches:
                trainer.save_checkpoint(self.folder / f"{name}.ckpt")


def run(
    plan_path: Path | str,
    folder: Path | str,
    *,
    workers: int = 0,
    ckpt: Path | str | None = None,
    accumulate: int = ACCUMULATE,
    batch_size: int = BATCH_SIZE,
    world: int | None = None,
    validate: bool = False,
    sharded: bool = False,
    cuts: Mapping[str, int] = CUTS,
) -> dict[str, Any]:
    """One `Trainer.fit`; returns what the model saw and became."""
    plan, folder = Plan.load(plan_path), Path(folder)
    dataset = PackedDataset(plan)
    packs = {tuple(dataset[i]["input_ids"].tolist()): i for i in range(len(plan))}
    model = Tiny(packs, plan.vocabulary.size)
    world = world or int(os.environ.get("WORLD_SIZE", "1"))
    callbacks: list[Callback] = [SaveAt(folder, cuts)] if ckpt is None else []
    if validate:
        callbacks = [ModelCheckpoint(folder, "{step}-{val:.3f}", monitor="val", save_top_k=-1)]
    strategy: Any = "ddp" if world > 1 else "auto"
    if sharded:
        strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=validate,
        check_val_every_n_epoch=None,
        val_check_interval=2 * accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = TokenDataModule(plan, batch_size=batch_size, num_workers=workers, val_plan=plan if validate else None)
    trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    if ckpt is None and cuts is not CUTS:
        trainer.save_checkpoint(folder / "after.ckpt")
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    weight = sum(p.detach().double().sum() for p in weights)
    return {
        "seen": model.seen,
        "losses": [loss.hex() for loss in model.losses],
        "weight": float(weight).hex(),
        "steps": trainer.global_step,
        "samples": data.state_dict()["samples"],
        "rank": trainer.global_rank,
    }


def main() -> None:
    """All runs of the file of jobs, one after the other."""
    path = Path(sys.argv[1])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    runs = {name: run(**job) for name, job in json.loads(path.read_text()).items()}
    rank = next(iter(runs.values()))["rank"]
    Path(f"{path}.{rank}").write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
    os._exit(0)  # gloo threads that a model still holds may abort the interpreter's own end (pytorch issue 190489)
