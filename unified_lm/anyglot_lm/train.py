"""LitUnified: the LightningModule that trains a unified LM on packed batches, and `fit_lm`, which runs it to a folder.

The loss is the grammar's cross-entropy (`loss.py`) normalised by a constant, the plan's mean number of target ids in a
pack, so gradients do not depend on how packs fall into micro-batches, accumulation steps or ranks. What is logged is
`metrics.py`'s business, what trains `tuning.py`'s. It does not build data, vocabularies or evaluations.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from transformers import PreTrainedModel

from anyglot_lm.history import HistoryNoise
from anyglot_lm.meter import DivergenceWatch
from anyglot_lm.metrics import Window
from anyglot_lm.packed import PackedLM, class_names
from anyglot_lm.vocabulary import Vocabulary
from anyglot_lm.weighting import SpanWeights
from anyglot_tokenizers.errors import AnyglotError, CheckpointError, FingerprintError, ManifestError
from anyglot_tokenizers.optim import SMALLEST, MuonAdamW, is_hidden_matrix


class LitUnified(L.LightningModule):
    """Next-id training of a causal LM under the span grammar.

    Args:
        model: Hugging Face causal LM whose rows are those of `vocabulary`, with what should train chosen
            (`tuning.choose_trained`); or a function that makes it, called once the strategy is set up.
        vocabulary: gives the legal slices and the names of the logs.
        max_steps: optimizer steps of the whole run (the schedule ends there); default the trainer's.
        targets_per_pack: mean number of target ids in a pack, the constant that normalises the loss; default the data
            module's.
        lr: peak learning rate.
        rows_lr: peak learning rate of the rows of ids (embedding and head), default `lr`.
        warmup_steps: linear warm-up.
        cooldown: share of the run, at its end, in which the rate falls linearly to 2 %.
        weight_decay: of hidden matrices.
        muon: Muon for hidden matrices (True) or AdamW everywhere.
        modality_weights: relative factor of the loss per modality ("text" included) or codebook ("speech/1"), default
            1; all are scaled to a mean of 1 over modalities and codebooks.
        learned_weights: learn a factor per modality and codebook (uncertainty weighting).
        z_loss: factor of logsumexp².
        keep_text: what plain text costs in training instead of its nll, see `PackedLM`; logged as `kept/text`.
        history_noise: share of the codes of answers, by modality, that half of the documents read back as others
            (`history.py`); the logged loss is with them, validation without.
        sliced: compete inside the grammar's slice, or over the whole vocabulary.
        compile: run the decoder through torch.compile.
        param_dtype: of the arithmetic under FSDP2, where weights are gathered in it.
        log_every: steps between log lines.
        seed: of dropout and `history_noise`, default torch's at the start; a resumed run goes on with its own.
    """

    lm: PackedLM

    def __init__(
        self,
        model: PreTrainedModel | Callable[[], PreTrainedModel],
        vocabulary: Vocabulary,
        *,
        max_steps: int | None = None,
        targets_per_pack: float | None = None,
        lr: float = 2e-3,
        rows_lr: float | None = None,
        warmup_steps: int = 100,
        cooldown: float = 0.6,
        weight_decay: float = 0.05,
        muon: bool = True,
        modality_weights: Mapping[str, float] | None = None,
        learned_weights: bool = False,
        z_loss: float = 0.0,
        keep_text: float = 0.0,
        history_noise: Mapping[str, float] | None = None,
        sliced: bool = True,
        compile: bool = False,
        param_dtype: torch.dtype = torch.float32,
        log_every: int = 50,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # frozen weights are not in checkpoints; `on_load_checkpoint` checks the rest
        self.vocabulary, self.class_names = vocabulary, class_names(vocabulary)
        self.max_steps, self.targets_per_pack = max_steps, targets_per_pack
        self._targets_given = targets_per_pack is not None
        self.lr, self.rows_lr, self.warmup_steps, self.cooldown = lr, rows_lr, warmup_steps, cooldown
        self.weight_decay, self.muon, self.param_dtype, self.log_every = weight_decay, muon, param_dtype, log_every
        weights = SpanWeights(self.class_names, modality_weights, learned=learned_weights)
        self.history_noise = HistoryNoise(vocabulary, history_noise or {})
        how: dict[str, Any] = {"sliced": sliced, "z_loss": z_loss, "keep_text": keep_text, "compile": compile}
        self._make = lambda built: PackedLM(built, vocabulary, weights, **how)
        self._build: Callable[[], PreTrainedModel] | None = None
        if isinstance(model, PreTrainedModel):
            self.lm = self._make(model)
        else:
            self._build = model
        self._sharded = False
        self._seed = seed
        self.last_loss = math.nan
        self.last: dict[str, float] = {}
        self._window: Window | None = None
        self._validation: Window | None = None
        self._closed = 0  # the step of the last log
        self._lr = math.nan
        self._metrics: dict[str, float] = {}

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model in training."""
        return self.lm.model

    def configure_model(self) -> None:
        """Build the model where it was not given, and shard it under FSDP2."""
        if self._build is not None:
            self.lm, self._build = self._make(self._build()), None
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._sharded:
            if self.lm.weights.log_variance is not None:
                raise ManifestError(
                    "learned_weights are read between steps, FSDP2 shards them; leave learned_weights out"
                )
            assert self.device_mesh is not None
            self.lm.shard(self.device_mesh["data_parallel"], self.param_dtype)
            self._sharded = True

    def setup(self, stage: str) -> None:
        """Take the length of the run and the normalising constant from the trainer where they were not given."""
        if self.max_steps is None:
            self.max_steps = self.trainer.max_steps
        if self.max_steps < 1:
            raise ManifestError(
                f"max_steps={self.max_steps}; the schedule needs the run's length, give trainer.max_steps"
            )
        if self.targets_per_pack is None:
            self.targets_per_pack = float(self.trainer.datamodule.targets_per_pack)  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        dtype = torch.bfloat16 if "bf16" in str(self.trainer.precision) else self.param_dtype
        self._window = Window(self.vocabulary, self.model, self.device, dtype, self.lm.sliced)
        self._watch = DivergenceWatch()
        self._closed = self.global_step
        self._keep_settings()
        self._drops = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.modules())
        if self._seed is None:
            self._seed = torch.initial_seed()

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Where there is dropout, its masks are those of the step: a resumed run has the same, ranks have others."""
        if self._drops and batch_idx % self.trainer.accumulate_grad_batches == 0:
            assert self._seed is not None
            torch.manual_seed((self._seed + self.global_step * self.trainer.world_size + self.global_rank) % 2**63)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        input_ids = batch["input_ids"]
        if self.history_noise:
            assert self._seed is not None
            input_ids = self.history_noise(batch, self._seed + self.global_step)
        out = self.lm(input_ids, batch["position_ids"], batch["labels"])
        assert self.targets_per_pack is not None
        if self._window is not None:  # None outside of a trainer
            self._window.add(batch, out)
        total: Tensor = out.total
        return total / (self.targets_per_pack * len(batch["input_ids"]))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm (no clipping without a value), and keep the norm for the log."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
        self._lr = optimizer.param_groups[0]["lr"]  # of this step; the log comes after the schedule moved on
        assert self._window is not None
        self._window.add_gradient_norm(norm)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._close_window()
        if not self._metrics:
            return
        metrics, self._metrics = self._metrics, {}
        self.log_dict({**metrics, "step": float(self.global_step)})  # Lightning would count one less
        if self.global_step % self.log_every:  # the run's end: Lightning writes multiples alone
            for logger in self.loggers:
                logger.log_metrics(metrics, self.global_step)
        if self.trainer.is_global_zero:
            parts = " ".join(f"{k[5:]} {v:.3f}" for k, v in metrics.items() if k.startswith("loss/"))
            message = f"step {self.global_step}/{self.max_steps} loss {metrics['loss']:.6f} | {parts}"
            print(f"{message} | {metrics['ids_per_s']:.0f} ids/s", file=sys.stderr, flush=True)

    def _close_window(self) -> None:
        """At a step that is to be logged: sums since the last log become `_metrics`, once."""
        # The trainer's own end is that of a round, where there are rounds.
        due = self.global_step % self.log_every == 0 or self.global_step in (self.max_steps, self.trainer.max_steps)
        if not due or self.global_step == self._closed or self._window is None or not self._window:
            return
        metrics = self._window.close(self._sum_ranks, self.trainer.world_size)
        warning = self._watch.check(self.global_step, metrics)
        if warning and self.trainer.is_global_zero:
            print(warning, file=sys.stderr, flush=True)
        metrics["lr"] = self._lr
        metrics.update(self._extra_metrics())
        if not math.isfinite(metrics["loss"]):
            raise AnyglotError(f"step {self.global_step}: loss is {metrics['loss']}; start again with a lower lr")
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # it skips such steps
        if not scaled and not math.isfinite(metrics.get("grad_norm", 0.0)):
            raise AnyglotError(
                f"step {self.global_step}: a gradient's norm was {metrics['grad_norm']} since the last log line, which "
                "spoiled the weights; start again with a lower lr"
            )
        self._metrics, self.last, self.last_loss = metrics, metrics, metrics["loss"]
        self._closed = self.global_step

    def _extra_metrics(self, prefix: str = "") -> dict[str, float]:
        """More of the log, for training (no prefix) or validation ("val/"): learned weights of the loss."""
        if self.lm.weights.log_variance is None or prefix:
            return {}
        weights = self.lm.weights.weights()[0].tolist()
        return {f"weight/{name}": weight for name, weight in zip(self.class_names, weights, strict=True)}

    def _sum_ranks(self, sums: Tensor) -> Tensor:
        return sums if self.trainer.world_size == 1 else torch.as_tensor(self.all_gather(sums)).sum(0)

    def on_validation_start(self) -> None:
        self._validation = Window(self.vocabulary, self.model, self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert self._validation is not None
        self._validation.add(batch, self.lm(batch["input_ids"], batch["position_ids"], batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, `val/<name>` and the text perplexity of the validation set."""
        assert self._validation is not None
        found = self._validation.close(self._sum_ranks, self.trainer.world_size)
        metrics = {"val/loss": found["loss"]}
        metrics.update({f"val/{k[5:]}": v for k, v in found.items() if k.startswith("loss/")})
        metrics.update(self._extra_metrics("val/"))
        if "val/text" in metrics:
            metrics["val/text_perplexity"] = math.exp(min(metrics["val/text"], 50.0))
        self.log_dict({**metrics, "step": float(self.global_step)})
        if self.trainer.is_global_zero:
            parts = " ".join(f"{k[4:]} {v:.3f}" for k, v in metrics.items())
            print(f"step {self.global_step}/{self.max_steps} validation {parts}", file=sys.stderr, flush=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resume is checked against, and leaves frozen weights out: they come from the start folder."""
        self._close_window()  # callbacks save before this module's own hook at the end of a step
        last = {name: value for name, value in self.last.items() if name.startswith(("loss/", "uniform/"))}
        checkpoint["anyglot"] = {
            "vocabulary": self.vocabulary.fingerprint,
            "last_loss": self.last_loss,
            "last": last,  # an adaptive mixture needs it where a run stopped at the end of a round
            "targets_per_pack": self.targets_per_pack,  # of the plan as it was: a longer one has another mean
            "seed": self._seed,
            "muon": self.muon,
        }
        if not self._sharded:
            trained = self._trained_names()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def _trained_names(self) -> set[str]:
        return {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get("anyglot", {})
        made_for = own.get("vocabulary", self.vocabulary.fingerprint)
        if made_for != self.vocabulary.fingerprint:
            raise FingerprintError(
                f"the checkpoint was trained with the vocabulary {made_for[:12]}, this run has "
                f"{self.vocabulary.fingerprint[:12]}; use another run_dir, or give the old vocabulary back"
            )
        if own.get("muon", self.muon) != self.muon:
            raise CheckpointError(
                f"the checkpoint was trained with muon: {str(not self.muon).lower()}, whose state is of no use to "
                "the other optimizer; give that back, or use another run_dir"
            )
        self._seed = own.get("seed", self._seed)
        if not self._targets_given:
            self.targets_per_pack = own.get("targets_per_pack", self.targets_per_pack)
        self.last_loss, self.last = own.get("last_loss", math.nan), own.get("last", {})
        if "state_dict" not in checkpoint:  # a sharded checkpoint; the strategy compares the names
            return
        saved = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        own_state = self.state_dict()
        needed = {name: tuple(own_state[name].shape) for name in self._trained_names()}
        for name in sorted(saved.keys() | needed.keys()):
            if saved.get(name) != needed.get(name):
                raise CheckpointError(
                    f"the checkpoint is of another model: {name} has shape {saved.get(name)}, this model needs "
                    f"{needed.get(name)}; use another run_dir, or give the old settings back"
                )

    def configure_optimizers(self) -> Any:
        groups = self._groups()
        optimizer: torch.optim.Optimizer
        if self.muon:
            if self._sharded:
                raise ManifestError("muon needs whole matrices, FSDP2 shards them; give muon: false")
            optimizer = MuonAdamW(groups, self.lr)
        else:
            optimizer = torch.optim.AdamW(groups, self.lr, betas=(0.9, 0.95), fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        """Hidden matrices (decayed, under Muon where asked), rows of ids, and the rest: each with its rate."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        of_ids = {id(p) for end in ends if end is not None for p in end.parameters()}
        rows = [p for _, p in trained if id(p) in of_ids]
        matrices = [p for name, p in trained if id(p) not in of_ids and is_hidden_matrix(name, p)]
        known = {id(p) for p in (*rows, *matrices)}
        others = [p for _, p in trained if id(p) not in known]
        marks = {"muon": True} if self.muon else {}
        plain = {"muon": False} if self.muon else {}
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": self.weight_decay, "lr": self.lr, **marks},
            {"params": rows, "weight_decay": 0.0, "lr": self.lr if self.rows_lr is None else self.rows_lr, **plain},
            {"params": others, "weight_decay": 0.0, "lr": self.lr, **plain},
        ]
        if self.muon and not matrices:
            raise ManifestError(
                f"muon: none of what trains is a hidden matrix of {SMALLEST} rows and columns or more (LoRA of a lower "
                "rank is none); give muon: false"
            )
        return [group for group in groups if group["params"]]

    def _schedule(self, step: int) -> float:
        """Linear warm-up, constant, then linear to 2 %."""
        assert self.max_steps is not None
        left = (self.max_steps - step) / max(self.cooldown * self.max_steps, 1e-9)
        return min((step + 1) / max(self.warmup_steps, 1), 1.0, max(0.02, left))

    def _keep_settings(self) -> None:
        """A resumed optimizer has the rates and decay of its checkpoint: this run's settings count, not those."""
        for optimizer, config in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            scheduler: Any = config.scheduler
            scheduler.base_lrs = [group["lr"] for group in self._groups()]
            rates = [rate * self._schedule(scheduler.last_epoch) for rate in scheduler.base_lrs]
            for group, rate, fresh in zip(optimizer.param_groups, rates, self._groups(), strict=True):
                group.update(lr=rate, initial_lr=fresh["lr"], weight_decay=fresh["weight_decay"])
            scheduler._last_lr = rates


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

    Every start logs to its own `run_dir/logs/version_*/metrics.csv`; `run_dir/curves.png` draws all of them.

    Returns:
        The last logged mean training loss (nats per target id).

    Raises:
        AnyglotError: `checkpoint_every` is no multiple of `module.log_every`; the loss or a gradient is no number; or
            `data` ended before the last step.
        FingerprintError: the checkpoint is of another vocabulary or plan.
        CheckpointError: the checkpoint is damaged, or of another model.
        KeyboardInterrupt: the user stopped it.
    """
    from anyglot_lm.checkpoint import AtomicCheckpoint

    check_checkpoint_every(checkpoint_every, module.log_every)
    run_dir = Path(run_dir)
    checkpoint = AtomicCheckpoint(run_dir / "last.ckpt", every=checkpoint_every)
    trainer = L.Trainer(
        max_steps=module.max_steps or -1,
        max_epochs=1,
        precision=precision,  # type: ignore[arg-type]
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        strategy=strategy,
        devices=devices,
        accelerator=accelerator,
        logger=CSVLogger(run_dir, name="logs"),
        callbacks=[checkpoint],
        log_every_n_steps=module.log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    checkpoint.fit(trainer, module, data)
    if trainer.is_global_zero:
        draw_run(run_dir)
    if module.max_steps is not None and trainer.global_step < module.max_steps:
        raise AnyglotError(
            f"the data ended after {trainer.global_step} of {module.max_steps} steps, before the rate had fallen; make "
            "a longer plan, or lower max_steps"
        )
    return module.last_loss


def check_checkpoint_every(checkpoint_every: int, log_every: int) -> None:
    """Raises AnyglotError unless a checkpoint always falls on a log line."""
    if checkpoint_every < 1 or log_every < 1 or checkpoint_every % log_every:
        raise AnyglotError(
            f"checkpoint_every {checkpoint_every} is no multiple of log_every {log_every}, so a resumed run "
            f"would log other losses; use for example checkpoint_every {log_every}"
        )


def draw_run(run_dir: Path) -> None:
    """Draw `run_dir/curves.png` from every start's metrics; where that cannot be, say so, and no more."""
    from anyglot_lm.curves import draw_curves

    files = sorted((run_dir / "logs").glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
    try:
        if files:
            draw_curves(files, run_dir / "curves.png")
    except (AnyglotError, ImportError, OSError) as error:
        print(f"curves.png is not drawn: {error}", file=sys.stderr, flush=True)
