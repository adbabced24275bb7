"""Preference tuning: DPO on pairs of answers, as a stage like the others.

A shard folder of pairs holds documents in twos: the preferred answer, then the other, to the same prompt; a pack holds
whole pairs. The reference is the start of the run: its trained weights are kept and put in place for one more forward
pass, so there is no second model in memory. The loss is `anyglot_lm.preference`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyglot_lm.packed import PackedOutput
from anyglot_lm.plan import Plan
from anyglot_lm.preference import dpo_loss, sequence_logps
from anyglot_recipes.stage import Stage
from anyglot_recipes.stage_data import StageData


class DPOStage(Stage):
    """The model's side of preference tuning.

    Args:
        beta: how far answers may leave the reference; larger stays closer.
        label_smoothing: share of pairs assumed to be the wrong way round.
        sft_weight: factor of the loss per id of the preferred answers, which keeps them likely.
        kwargs: those of `Stage`.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 0.0, **kwargs: Any) -> None:
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
        return [p for p in self.lm.parameters() if p.requires_grad]

    @torch.no_grad()
    def _as_reference(self, batch: dict[str, Tensor]) -> PackedOutput:
        """The forward pass with the weights of the start."""
        trained = self._trained()
        now = [p.detach().clone() for p in trained]
        for p, start in zip(trained, self._reference, strict=True):
            p.copy_(start.to(p.device))
        self.lm.eval()
        try:
            out: PackedOutput = self.lm(batch["input_ids"], batch["position_ids"], batch["labels"])
        finally:
            self.lm.train()
            for p, value in zip(trained, now, strict=True):
                p.copy_(value)
        return out

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        total, count, metrics, out = self._pair_loss(batch)
        assert self.targets_per_pack is not None
        if self._window is not None:
            self._window.add(batch, out)
        self._pairs.append(torch.cat([metrics, count[None]]))
        return total / (self.targets_per_pack * len(batch["input_ids"]))

    def _pair_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, PackedOutput]:
        """(summed loss, pairs, sums of margin and accuracy [2], the policy's output) of a batch."""
        reference = self._as_reference(batch)
        out: PackedOutput = self.lm(batch["input_ids"], batch["position_ids"], batch["labels"])
        starts_BT = (batch["position_ids"] == 0).long()
        segment_N = starts_BT.flatten().cumsum(0) - 1
        documents = int(segment_N[-1]) + 1
        valid_S = torch.zeros(documents, dtype=torch.bool, device=segment_N.device)
        valid_S[segment_N[out.nll.slice_class >= 0]] = True  # padding is a document without labels
        policy_P2, reference_P2, mean_P2 = (
            sequence_logps(nll, segment_N, documents, mean=mean)[valid_S].view(-1, 2)
            for nll, mean in ((out.nll, False), (reference.nll, False), (out.nll, True))
        )
        pairs = dpo_loss(
            policy_P2[:, 0],
            policy_P2[:, 1],
            reference_P2[:, 0],
            reference_P2[:, 1],
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            chosen_nll_P=-mean_P2[:, 0] if self.sft_weight else None,
            nll_weight=self.sft_weight,
        )
        reached = out.total * 0.0  # a batch without a pair still reaches every parameter
        sums = torch.stack([pairs.margin.sum(), pairs.accuracy.sum()])
        count = torch.tensor(len(pairs.loss), dtype=sums.dtype, device=sums.device)
        return pairs.loss.sum().float() + reached, count, sums, out

    def _extra_metrics(self, prefix: str = "") -> dict[str, float]:
        sums = self._sum_ranks(torch.stack(self._pairs).sum(0))
        self._pairs = []
        margin, accuracy, count = sums.tolist()
        return {f"{prefix}preference/margin": margin / count, f"{prefix}preference/accuracy": accuracy / count}

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._training_pairs, self._pairs = self._pairs, []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _, count, metrics, out = self._pair_loss(batch)
        assert self._validation is not None
        self._validation.add(batch, out)
        self._pairs.append(torch.cat([metrics, count[None]]))

    def on_validation_epoch_end(self) -> None:
        """Logs the margin and the accuracy of held-out pairs beside the usual."""
        super().on_validation_epoch_end()
        self._pairs = self._training_pairs


class DPOData(StageData):
    """Shards of pairs; arguments as for `StageData`, a document being a pair."""

    together = 2

    @property
    def targets_per_pack(self) -> float:
        """Mean number of pairs in a pack: the constant that normalises the loss."""
        plan: Plan = self.plan
        return len(plan.docs) / 2 / len(plan)
