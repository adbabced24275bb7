"""One step of the optimizer for the hidden matrices of `nano` (six layers, width 256), against `torch.optim.Muon`.

Torch's orthogonalises in bfloat16 everywhere and one matrix after the other, ours all of one shape together, and in
float32 where the hardware has no products of bfloat16 (a CPU without AVX512-BF16, for one): there the ratio is large,
elsewhere it says what the batches bring. Same gradients, learning rate, decay and momentum, both by turns, median of
the rounds. That both move the weights alike, as closely as bfloat16 lets them, is checked first.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from torch import nn

from anyglot_tokenizers.optim import MuonAdamW
from anyglot_tokenizers.precision import native_bf16

SHAPES = ((256, 256),) * 4 + ((640, 256),) * 2 + ((256, 640),)
LAYERS, ROUNDS = 6, 5
HOW = {"lr": 0.02, "weight_decay": 0.05, "momentum": 0.95}


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in SHAPES * LAYERS]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def main() -> None:
    ours, theirs = matrices(), matrices()
    before = [parameter.detach().clone() for parameter in ours]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "ours": MuonAdamW(
            [{"params": ours, "muon": True, "weight_decay": HOW["weight_decay"]}], HOW["lr"], momentum=HOW["momentum"]
        ),
        "torch": torch.optim.Muon(theirs, **HOW, nesterov=True, adjust_lr_fn="match_rms_adamw"),
    }
    for optimizer in optimizers.values():
        optimizer.step()
    for start, mine, other in zip(before, ours, theirs, strict=True):
        off = (mine - other).norm() / (other - start).norm()
        assert off < 0.05, f"the two steps differ by {off:.3f} of their size"
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(ROUNDS):
        for name, optimizer in optimizers.items():
            started = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name}: {medians[name] * 1e3:.1f} ms a step ({min(values) * 1e3:.1f} to {max(values) * 1e3:.1f})")
    print(f"bfloat16 is {'native' if native_bf16('cpu') else 'emulated'} here, {torch.get_num_threads()} threads")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    ratio = medians["torch"] / medians["ours"]
    print(json.dumps({"benchmark": "muon", "ratios": {"step": round(ratio, 2)}, "versions": versions}))


if __name__ == "__main__":
    main()
