"""LitUnified: the LightningModule that trains a unified LM on packed batches, and `fit_lm`, which runs it to a folder.

The loss is the grammar's cross-entropy (`loss.py`) normalised by a constant, the plan's mean number of target ids in a
pack, so gradients do not depend on how packs fall into micro-batches, accumulation steps or ranks. Logs per modality:
loss, accuracy and the uniform baseline ln(slice size). It does not build data, vocabularies or evaluations.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import PreTrainedModel

from anyglot_lm.loss import SliceTable, span_cross_entropy
from anyglot_lm.model import hidden_states
from anyglot_lm.optim import MuonAdamW
from anyglot_lm.vocabulary import Vocabulary


class LitUnified(L.LightningModule):
    """Next-id training of a causal LM under the span grammar.

    Args:
        model: Hugging Face causal LM whose rows are those of `vocabulary`.
        vocabulary: gives the legal slices and the names of the logs.
        max_steps: optimizer steps of the whole run (the schedule ends there).
        targets_per_pack: mean number of target ids in a pack; the constant that normalises the loss.
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        weight_decay: of hidden matrices.
        muon: Muon for hidden matrices (True) or AdamW everywhere.
        modality_weights: factor of the loss per modality ("text" included), default 1.
        z_loss: factor of logsumexp².
        sliced: compete inside the grammar's slice, or over the whole vocabulary.
        compile: run the decoder through torch.compile.
        log_every: steps between log lines.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        *,
        max_steps: int,
        targets_per_pack: float,
        lr: float = 2e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.05,
        muon: bool = True,
        modality_weights: dict[str, float] | None = None,
        z_loss: float = 0.0,
        sliced: bool = True,
        compile: bool = False,
        log_every: int = 50,
    ) -> None:
        super().__init__()
        self.model = model
        self.model.config.use_cache = False
        self.max_steps, self.targets_per_pack = max_steps, targets_per_pack
        self.lr, self.warmup_steps, self.weight_decay, self.muon = lr, warmup_steps, weight_decay, muon
        self.z_loss, self.sliced, self.log_every = z_loss, sliced, log_every
        lo, hi, class_of_id = vocabulary.slice_table()
        self.register_buffer("_class_of_id", torch.as_tensor(class_of_id, dtype=torch.long), persistent=False)
        self._lo, self._hi = [int(i) for i in lo], [int(i) for i in hi]
        self.class_names = vocabulary.slice_names()
        weights = modality_weights or {}
        factors = [weights.get(name.partition("/")[0], 1.0) for name in self.class_names]
        self.register_buffer("_class_weights", torch.tensor(factors), persistent=False)
        # Not a registered submodule: checkpoints hold the plain model's names.
        decoder = model.base_model
        self.__dict__["_decoder"] = torch.compile(decoder) if compile else decoder
        self._window: list[Tensor] = []
        self._started = time.perf_counter()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        hidden_BTD = hidden_states(self.__dict__["_decoder"], batch["input_ids"], batch["position_ids"])
        head = self.model.get_output_embeddings()
        sums = span_cross_entropy(
            hidden_BTD.flatten(0, 1),
            head.weight,
            batch["labels"].flatten(),
            SliceTable(self._lo, self._hi, self._class_of_id),
            class_weights=self._class_weights,
            sliced=self.sliced,
            z_loss=self.z_loss,
        )
        self._window.append(torch.stack([sums.nll, sums.count, sums.correct]))
        return sums.total / (self.targets_per_pack * len(batch["input_ids"]))

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        if self.global_step % self.log_every and self.global_step != self.max_steps:
            return
        if not self._window:  # an accumulation step that follows a log
            return
        nll, count, correct = torch.stack(self._window).sum(0)
        elapsed, batches = time.perf_counter() - self._started, len(self._window)
        self._window, self._started = [], time.perf_counter()
        metrics: dict[str, float] = {"loss": (nll.sum() / count.sum().clamp_min(1)).item()}
        for c, name in enumerate(self.class_names):
            if count[c]:
                metrics[f"loss/{name}"] = (nll[c] / count[c]).item()
                metrics[f"accuracy/{name}"] = (correct[c] / count[c]).item()
                metrics[f"uniform/{name}"] = math.log(self._hi[c] - self._lo[c])
        metrics["ids_per_s"] = batches * batch["input_ids"].numel() * self.trainer.world_size / elapsed
        self.log_dict(metrics)
        if self.trainer.is_global_zero:
            parts = " ".join(f"{k[5:]} {v:.3f}" for k, v in metrics.items() if k.startswith("loss/"))
            message = f"step {self.global_step}/{self.max_steps} loss {metrics['loss']:.6f} | {parts}"
            print(f"{message} | {metrics['ids_per_s']:.0f} ids/s", file=sys.stderr, flush=True)

    def configure_optimizers(self) -> Any:
        optimizer = MuonAdamW(self.model, self.lr, weight_decay=self.weight_decay, muon=self.muon)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self, step: int) -> float:
        """Linear warm-up, constant, then linear to 2 % over the last 60 % of the run."""
        cooldown = 0.6 * self.max_steps
        return min((step + 1) / max(self.warmup_steps, 1), 1.0, max(0.02, (self.max_steps - step) / cooldown))


def fit_lm(
    module: LitUnified,
    data: L.LightningDataModule,
    *,
    run_dir: str | Path,
    precision: str = "bf16-mixed",
    accumulate: int = 1,
    clip: float = 1.0,
    checkpoint_every: int = 200,
    strategy: str = "auto",
    devices: int | str = 1,
    accelerator: str = "auto",
) -> float:
    """Train `module` on `data` for `module.max_steps` steps; continue from `run_dir/last.ckpt` when it is there.

    Returns:
        The last logged mean training loss (nats per target id).
    """
    from anyglot_lm.checkpoint import AtomicCheckpoint

    run_dir = Path(run_dir)
    checkpoint = AtomicCheckpoint(run_dir / "last.ckpt", every=checkpoint_every)
    trainer = L.Trainer(
        max_steps=module.max_steps,
        max_epochs=1,
        precision=precision,  # type: ignore[arg-type]
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        strategy=strategy,
        devices=devices,
        accelerator=accelerator,
        logger=CSVLogger(run_dir, name="logs", version=""),
        callbacks=[checkpoint],
        log_every_n_steps=module.log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    resume = checkpoint.path if checkpoint.path.exists() else None
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return float(trainer.callback_metrics["loss"])
