"""Preference tuning: DPO on pairs of answers, as a stage like the others.

A shard folder of pairs holds documents in twos: the preferred answer, then the other, to the same prompt; a pack holds
whole pairs (`together` of the plan). The reference is the start of the run: its trained weights are kept and put in
place for one more forward pass, so there is no second model in memory. The loss is `anyglot_lm.preference`'s, pairs are
made by whoever has them (`nano_dpo.py` makes some).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyglot_lm.data import PackedDataset
from anyglot_lm.loss import SpanNLL
from anyglot_lm.packed import PackedLM, PackedOutput
from anyglot_lm.plan import Plan
from anyglot_lm.preference import dpo_loss, sequence_logps
from anyglot_lm.shards import ShardReader
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.stage import Stage
from anyglot_recipes.stage_data import StageData, shards_at
from anyglot_tokenizers.errors import ManifestError

MEANS = ("loss", "margin", "accuracy")


class DPOStage(Stage):
    """The model's side of preference tuning.

    It logs means over pairs, `val/` for held-out ones: `preference/loss`; `preference/margin`, by how many nats the
    preferred answer gained more than the other since the start, times beta; and `preference/accuracy`, the share of
    pairs whose margin is positive. `loss` is nats per id of both answers, as in every stage.

    Args:
        beta: how far answers may leave the reference; larger stays closer.
        label_smoothing: share of pairs assumed to be the wrong way round.
        sft_weight: factor of the loss per id of the preferred answers, which keeps them likely.
        kwargs: those of `Stage`; factors of its loss do not apply.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 0.0, **kwargs: Any) -> None:
        for name in ("modality_weights", "learned_weights", "z_loss", "keep_text", "history_noise"):
            if kwargs.get(name):
                raise ManifestError(f"model.{name} does not apply to dpo, whose loss is of whole answers; leave it out")
        super().__init__(**kwargs)
        self.beta, self.label_smoothing, self.sft_weight = beta, label_smoothing, sft_weight
        self._reference: list[Tensor] = []
        self._pairs: list[Tensor] = []

    def configure_model(self) -> None:
        """Build the model, and keep what of it trains: the reference. A checkpoint is read after this."""
        super().configure_model()
        if not self._reference:
            self._reference = [p.detach().clone() for p in self._trained()]

    def _trained(self) -> list[torch.nn.Parameter]:
        if self._sharded:  # after a forward pass without gradients, the gathered weights of the root are still there
            self.lm.reshard()  # type: ignore[operator]
        return [p for p in self.lm.parameters() if p.requires_grad]

    @torch.no_grad()
    def _as_reference(self, batch: dict[str, Tensor]) -> PackedOutput:
        """The forward pass with the weights of the start, without dropout."""
        trained, training = self._trained(), self.lm.training
        now = [p.detach().clone() for p in trained]
        self._reference = [start.to(p.device) for p, start in zip(trained, self._reference, strict=True)]
        for p, start in zip(trained, self._reference, strict=True):
            p.copy_(start)
        self.lm.eval()
        try:
            out: PackedOutput = self.lm(batch["input_ids"], batch["position_ids"], batch["labels"])
        finally:
            self.lm.train(training)
            self._trained()  # weights that FSDP2 gathered, and copies that autocast made, are of the start: drop them
            torch.clear_autocast_cache()
            for p, value in zip(trained, now, strict=True):
                p.copy_(value)
        return out

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        total, sums, out = self._pair_loss(batch)
        assert self.targets_per_pack is not None
        if self._window is not None:
            self._window.add(batch, out)
        self._pairs.append(sums)
        return total / (self.targets_per_pack * len(batch["input_ids"]))

    def _pair_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, PackedOutput]:
        """(summed loss, sums of `MEANS` and the number of pairs [4], the policy's output) of a batch."""
        reference = self._as_reference(batch)
        out: PackedOutput = self.lm(batch["input_ids"], batch["position_ids"], batch["labels"])
        pad_id = self.vocabulary.pad_id
        policy_P2, reference_P2 = (pair_logps(nll, batch, pad_id) for nll in (out.nll, reference.nll))
        pairs = dpo_loss(
            *policy_P2.unbind(1),
            *reference_P2.unbind(1),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            chosen_nll_P=-pair_logps(out.nll, batch, pad_id, mean=True)[:, 0] if self.sft_weight else None,
            nll_weight=self.sft_weight,
        )
        count = torch.ones_like(pairs.margin)
        sums = torch.stack([v.sum() for v in (pairs.loss.detach(), pairs.margin, pairs.accuracy, count)])
        reached = out.total * 0.0  # a batch without a pair still reaches every parameter
        return pairs.loss.sum().float() + reached, sums, out

    def _extra_metrics(self, prefix: str = "") -> dict[str, float]:
        *sums, count = self._sum_ranks(torch.stack(self._pairs).sum(0)).tolist()
        self._pairs = []
        return {f"{prefix}preference/{name}": value / max(count, 1) for name, value in zip(MEANS, sums, strict=True)}

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._training_pairs, self._pairs = self._pairs, []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _, sums, out = self._pair_loss(batch)
        assert self._validation is not None
        self._validation.add(batch, out)
        self._pairs.append(sums)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._pairs = self._training_pairs


def pair_logps(nll: SpanNLL, batch: dict[str, Tensor], pad_id: int, *, mean: bool = False) -> Tensor:
    """log p of both answers of every pair in a batch of packs, the preferred one first.

    Args:
        nll: what a model gives for the batch, `[B x T]`.
        batch: `input_ids`, `position_ids` int64 `[B, T]`; its documents are pairs, rows may end in padding.
        pad_id: the vocabulary's.
        mean: per target id.

    Returns:
        float64 `[P, 2]`.
    """
    starts_BT = batch["position_ids"] == 0
    segment_N = starts_BT.flatten().long().cumsum(0) - 1
    real_S = batch["input_ids"][starts_BT] != pad_id  # padding counts its positions as a document does
    return sequence_logps(nll, segment_N, len(real_S), mean=mean)[real_S].view(-1, 2)


@torch.no_grad()
def score_pairs(model_dir: str | Path, shards: str | Path, batch_size: int = 8) -> Tensor:
    """log p of the answers of every pair in a shard folder under the model of a folder: float64 `[P, 2]`, in order."""
    model, reader = UnifiedModel.from_pretrained(model_dir), ShardReader(shards)
    lm = PackedLM(model.model.float(), model.vocabulary).eval()
    documents = len(reader)
    seq_len = int(reader.lengths.reshape(-1, 2).sum(1).max())
    rows = PackedDataset(Plan((reader,), seq_len, np.arange(0, documents + 1, 2), np.arange(documents), ()))
    found = []
    for start in range(0, len(rows), batch_size):
        batch = rows.__getitems__(range(start, min(start + batch_size, len(rows)))).batch
        out: PackedOutput = lm(batch["input_ids"], batch["position_ids"], batch["labels"])
        found.append(pair_logps(out.nll, batch, model.vocabulary.pad_id))
    return torch.cat(found)


class DPOData(StageData):
    """Shards of pairs; arguments as for `StageData`, without condition dropout."""

    together = 2

    def prepare_data(self) -> None:
        """As `StageData`, once the folders are seen to hold pairs.

        Raises:
            ManifestError: documents in twos whose prompts differ.
        """
        for path in (*self.shards, *(self.val_shards or [])):
            _check_pairs(shards_at(path))
        super().prepare_data()

    @property
    def targets_per_pack(self) -> float:
        """Mean number of pairs in a pack: the constant that normalises the loss."""
        plan: Plan = self.plan
        return len(plan.docs) / 2 / len(plan)


def _check_pairs(path: Path, most: int = 1000) -> None:
    """Compare the prompts of the first `most` pairs of a shard folder."""
    reader = ShardReader(path)
    for first in range(0, min(len(reader) - 1, 2 * most), 2):
        preferred, other = (ids[: int(np.argmax(loss))] for ids, loss in map(reader.doc, (first, first + 1)))
        if not np.array_equal(preferred, other):
            raise ManifestError(
                f"{path}: documents {first} and {first + 1} have different prompts; dpo needs documents in twos, the "
                "preferred answer and another to the same prompt"
            )
