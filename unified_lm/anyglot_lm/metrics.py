"""The window between two log lines: raw sums of what `PackedLM` gave, turned into the names of the log.

It puts the loss per slice class (with its accuracy and uniform baseline) beside what `meter.py` measures: speed, MFU,
padding, use of the codebooks, norms, signs of divergence. Sums of all ranks are added before anything is divided, so
uneven counts cannot bias a mean. It draws nothing and writes no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from anyglot_lm.cost import flops_per_id
from anyglot_lm.loss import IGNORE, class_sums
from anyglot_lm.meter import Meter, matmul_rate
from anyglot_lm.packed import PackedOutput, class_names
from anyglot_lm.vocabulary import Vocabulary


class Window:
    """Sums since the last log line on one rank.

    Args:
        vocabulary: its slices and their names.
        model: what trains, for the FLOPs of an id.
        device: of the sums.
        dtype: of the arithmetic, whose matmul rate is the MFU's 1; None leaves the MFU out.
        sliced: whether a label is multiplied with its slice of the head only.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        model: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype | None = None,
        sliced: bool = True,
    ) -> None:
        lo, hi, _ = vocabulary.slice_table()
        self.names = class_names(vocabulary)
        self.slices = {name: (int(lo[c]), int(hi[c])) for c, name in enumerate(self.names)}
        self.model, self.sliced = model, sliced
        rate = matmul_rate(str(device), dtype) if dtype is not None else None
        self.meter = Meter(self.slices, vocabulary.size, pad_id=vocabulary.pad_id, rate=rate)
        self.reset()

    def reset(self) -> None:
        """Start a new window now."""
        self.meter.reset()
        self._losses: Tensor | None = None
        self._positions: Tensor | None = None
        self._kept: Tensor | None = None
        self._gradients: list[Tensor] = []

    def __bool__(self) -> bool:
        return self._losses is not None

    def add(self, batch: dict[str, Tensor], out: PackedOutput) -> None:
        """One micro-batch; nothing here waits for the device."""
        nll = out.nll
        classes = len(self.names)
        counted = torch.ones_like(nll.nll)
        parts = [class_sums(v, nll.slice_class, classes) for v in (nll.nll.detach(), counted, nll.correct.float())]
        sums = torch.stack(parts)
        self._losses = sums if self._losses is None else self._losses + sums
        position = batch["position_ids"]
        positions = torch.stack([position.sum(), torch.full_like(position[0, 0], position.numel())])
        self._positions = positions if self._positions is None else self._positions + positions
        if out.kept is not None:
            self._kept = out.kept if self._kept is None else self._kept + out.kept
        learnt_N = batch["labels"].flatten().masked_fill(nll.slice_class < 0, IGNORE)
        self.meter.update(batch["input_ids"], learnt_N, nll.predicted, out.hidden)

    def add_gradient_norm(self, norm: Tensor) -> None:
        """The global norm of one optimizer step, the same on every rank."""
        self._gradients.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def close(self, sum_ranks: Callable[[Tensor], Tensor], ranks: int = 1) -> dict[str, float]:
        """The window's metrics, from the sums of all ranks; a new window begins."""
        assert self._losses is not None
        seconds = self.meter.seconds()
        nll, count, correct = sum_ranks(self._losses)
        metrics: dict[str, float] = {"loss": (nll.sum() / count.sum().clamp_min(1)).item()}
        for c, name in enumerate(self.names):
            if count[c]:
                lo, hi = self.slices[name]
                metrics[f"loss/{name}"] = (nll[c] / count[c]).item()
                metrics[f"accuracy/{name}"] = (correct[c] / count[c]).item()
                metrics[f"uniform/{name}"] = math.log(hi - lo if self.sliced else self.meter.num_ids)
        if self._kept is not None:
            kl, ids = sum_ranks(self._kept).tolist()
            if ids:
                metrics["kept/text"] = kl / ids
        if self.meter.rate is not None:
            assert self._positions is not None
            position, ids = sum_ranks(self._positions).tolist()
            widths = [hi - lo if self.sliced else self.meter.num_ids for lo, hi in self.slices.values()]
            head_rows = sum(w * n for w, n in zip(widths, count.tolist(), strict=True)) / ids
            # Documents of lengths n: the mean position is half of sum(n²) / sum(n).
            self.meter.flops_per_id = flops_per_id(self.model, 2 * position / ids + 1, head_rows=head_rows)
        sums = {name: sum_ranks(value) for name, value in self.meter.sums().items()}
        metrics.update(self.meter.metrics(sums, seconds, ranks))
        if self._gradients:
            metrics["grad_norm"] = torch.stack(self._gradients).mean().item()
        self.reset()
        return metrics
