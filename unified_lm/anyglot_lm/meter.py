"""What a training log needs beside the loss: speed, share of the machine, padding, codes in use, signs of divergence.

`Meter` sums over a window of micro-batches: `sums` gives raw tensors that the caller adds up over ranks, `metrics`
turns them into floats. `matmul_rate` is what this device reaches in this process, so MFU here is a share of that and
not of a data sheet. `DivergenceWatch` compares each window with the running median of those before.

It knows neither Lightning nor ranks, and prints nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

IGNORE = -100


@cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matmul on `device`, the best of sizes that take a quarter of a second; once per process.

    Other work on the machine at that moment makes it too low, and the MFU too high.
    """
    place = torch.device(device)
    module = torch.get_device_module(place)
    generator = torch.Generator(place).manual_seed(0)  # the global one stays as it was
    warm = torch.ones(256, 256, device=place, dtype=dtype)
    warm @ warm  # loads the libraries
    module.synchronize()
    best, size, began = 0.0, 256, time.perf_counter()
    while size <= 8192 and time.perf_counter() - began < 0.25:
        a = torch.randn(size, size, device=place, generator=generator).to(dtype)
        for _ in range(5):
            module.synchronize()
            start = time.perf_counter()
            a @ a
            module.synchronize()
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
        size *= 2
    return best


class Meter:
    """Sums of a window of micro-batches on one rank.

    Args:
        slices: by name, the ids `(first, last + 1)` among which the codes of a slice class are counted
            (`Vocabulary.slice_names`, `slice_table`).
        num_ids: rows V of the vocabulary.
        pad_id: ids that carry nothing; None counts every id as useful.
        flops_per_id: of a training step (`cost.flops_per_id`).
        rate: FLOP/s that a rank can reach (`matmul_rate`); None leaves `mfu` out.
    """

    def __init__(
        self,
        slices: Mapping[str, tuple[int, int]],
        num_ids: int,
        *,
        pad_id: int | None,
        flops_per_id: float = 0.0,
        rate: float | None = None,
    ) -> None:
        self.slices, self.num_ids, self.pad_id = dict(slices), num_ids, pad_id
        self.flops_per_id, self.rate = flops_per_id, rate
        self.reset()

    def reset(self) -> None:
        """Start a new window now."""
        self._sums: dict[str, Tensor] = {}
        self._started = time.perf_counter()

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    @torch.no_grad()
    def update(
        self,
        ids_BT: Tensor,
        labels_N: Tensor | None = None,
        predicted_N: Tensor | None = None,
        hidden_BTD: Tensor | None = None,
    ) -> None:
        """One micro-batch; nothing here waits for the device.

        Args:
            ids_BT: input ids.
            labels_N: target ids, -100 ignored.
            predicted_N: most likely ids, at the same positions.
            hidden_BTD: output of the last layer before the final norm. Its norm grows long before the loss of a run
                that will diverge does (Chameleon, arXiv 2405.09818, section 2.3).
        """
        useful = ids_BT.numel() if self.pad_id is None else (ids_BT != self.pad_id).sum()
        counts = torch.zeros(2, dtype=torch.int64, device=ids_BT.device)
        counts[0], counts[1] = ids_BT.numel(), useful
        self._add("ids", counts)
        if labels_N is not None:
            self._add("target", self._histogram(labels_N, labels_N))
            if predicted_N is not None:
                self._add("predicted", self._histogram(predicted_N, labels_N))
        if hidden_BTD is not None:
            norms = hidden_BTD.float().norm(dim=-1)
            self._add("output", torch.stack([norms.sum(), torch.ones_like(norms).sum()]))

    def _histogram(self, ids_N: Tensor, labels_N: Tensor) -> Tensor:
        """How often each id occurs where there is a label, int64 [V]; ignored places go to a bin that is cut off.

        So do predictions of -1: logits that are no numbers predict nothing.
        """
        ids_N = torch.where((labels_N == IGNORE) | (ids_N < 0), self.num_ids, ids_N).flatten()
        counts = torch.zeros(self.num_ids + 1, dtype=torch.int64, device=ids_N.device)
        counts.scatter_add_(0, ids_N, torch.ones_like(ids_N))  # bincount would wait for the device
        return counts[: self.num_ids]

    def sums(self) -> dict[str, Tensor]:
        """Raw sums of the window so far; add those of all ranks before `metrics`.

        `ids` int64 [2] (all, useful), `target` and `predicted` int64 [V], `output` float32 [2] (norms, positions).
        """
        return dict(self._sums)

    def seconds(self) -> float:
        """Since the window began."""
        return time.perf_counter() - self._started

    def metrics(self, sums: Mapping[str, Tensor], seconds: float, ranks: int = 1) -> dict[str, float]:
        """Names of the log and their values, from the sums of all `ranks`.

        `ids_per_s` and `useful_ids_per_s` are of all ranks together; `padding` is the share of ids that carry nothing;
        `mfu` the share of the measured matmul rate; `perplexity/<slice>` exp(entropy) of the predicted ids of the
        slice (as many codes as are in even use), `target_perplexity/<slice>` the same of the data; `output_norm`.
        """
        found: dict[str, float] = {}
        if "ids" in sums:
            ids, useful = (float(n) for n in sums["ids"])
            found = {"ids_per_s": ids / seconds, "useful_ids_per_s": useful / seconds}
            found["padding"] = 1 - useful / ids if ids else 0.0
            if self.rate:
                found["mfu"] = self.flops_per_id * ids / seconds / (self.rate * ranks)
        for kind, prefix in (("predicted", "perplexity"), ("target", "target_perplexity")):
            if kind in sums:
                histogram = sums[kind].double().cpu()
                for name, (lo, hi) in self.slices.items():
                    total = float(histogram[lo:hi].sum())
                    if total:
                        share = histogram[lo:hi] / total
                        found[f"{prefix}/{name}"] = math.exp(float(torch.special.entr(share).sum()))
        if "output" in sums:
            total, count = (float(n) for n in sums["output"])
            found["output_norm"] = total / max(count, 1.0)
        return found


class DivergenceWatch:
    """Says when a number of the log leaves its usual range.

    Args:
        factor: a value above this many times the running median is unusual, as is one that is not finite.
        windows: of the running median; it needs five of them.
        quiet: windows without another warning after one.
        names: what is watched.
    """

    def __init__(
        self,
        factor: float = 3.0,
        windows: int = 20,
        quiet: int = 20,
        names: Sequence[str] = ("loss", "grad_norm", "output_norm"),
    ) -> None:
        self.factor, self.quiet = factor, quiet
        self._past: dict[str, deque[float]] = {name: deque(maxlen=windows) for name in names}
        self._silent = 0

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """One line with the values and what to do, or None. Call it once per window."""
        unusual = []
        for name, past in self._past.items():
            if name not in metrics:
                continue
            value = metrics[name]
            if not math.isfinite(value):
                unusual.append(f"{name} {value}")
                continue
            if len(past) >= 5:
                usual = statistics.median(past)
                if value > self.factor * usual > 0:
                    unusual.append(f"{name} {value:.3g} ({value / usual:.1f} times its median {usual:.3g})")
            past.append(value)
        self._silent = max(0, self._silent - 1)
        if not unusual or self._silent:
            return None
        self._silent = self.quiet + 1
        return (
            f"step {step}: {', '.join(unusual)}: the run may diverge; if it does not come down, go back to the last "
            "checkpoint with a lower lr, longer warm-up or stronger gradient clipping"
        )
