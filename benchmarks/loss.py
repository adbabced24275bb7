"""Our loss against the usual one (full logits, `F.cross_entropy`, backward): peak memory and time, float32.

4,096 positions of width 512 over a vocabulary of 65,536 ids: 32,755 of text and four blocks of 8,192 codes, a quarter
of the labels text, the rest spread evenly over the blocks. Every measurement is its own process, usual and ours by
turns. Memory is the growth of the process's peak resident size in its first run (VmHWM, so Linux only), above inputs
and gradient buffers, which are made and touched before: it counts logits, all temporaries and the gradients on their
way into those buffers, on both sides. Time is forward and backward, median of the later runs.

What is checked first is that ours over the whole vocabulary gives the usual value and gradients. The sliced loss
differs by design: its labels compete inside their legal slice.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from anyglot_lm.loss import SliceTable, span_nll
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

POSITIONS, WIDTH, RUNS, ROUNDS = 4096, 512, 2, 2
SIDES = ("usual", "ours, whole vocabulary", "ours, sliced")


def resident(field: str) -> float:
    """VmRSS or VmHWM in MiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(side: str) -> None:
    """One side in this process; prints its figures as JSON."""
    vocabulary = Vocabulary.build(
        32755,
        BlockSpec("image", "a", 8192, grid=(32, 32)),
        BlockSpec("depth", "b", 8192, grid=(32, 32)),
        BlockSpec("speech", "c", 8192, max_frames=500),
        BlockSpec("music", "d", 2048, num_quantizers=4, max_frames=500),
    )
    assert vocabulary.size == 65536
    lo, hi, class_of_id = vocabulary.slice_table()
    table = SliceTable(lo.tolist(), hi.tolist(), torch.tensor(class_of_id))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary.size, WIDTH, generator=generator).mul_(0.02).requires_grad_()
    quarter = POSITIONS // 4
    labels = torch.cat(
        [
            torch.randint(0, vocabulary.text_size, (quarter,), generator=generator),
            torch.randint(
                vocabulary.blocks[0].end_id, vocabulary.blocks[-1].stop_id, (3 * quarter,), generator=generator
            ),
        ]
    )[torch.randperm(POSITIONS, generator=generator)]

    def run() -> float:
        if side == "usual":
            total = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
        else:
            total = span_nll(hidden, weight, labels, table, sliced=side.endswith("sliced")).nll.sum()
        total.backward()
        return total.item()

    hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
    before, high = resident("VmRSS"), resident("VmHWM")
    assert high - before < 8, "the peak of making the inputs would hide part of the loss's"
    hidden.grad.zero_(), weight.grad.zero_()
    total = run()
    memory = resident("VmHWM") - before
    norms = [hidden.grad.norm().item(), weight.grad.norm().item()]
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"memory": memory, "seconds": seconds, "values": [total, *norms]}))


def main() -> None:
    found: dict[str, list[dict[str, list[float]]]] = {side: [] for side in SIDES}
    for _ in range(ROUNDS):
        for side in SIDES:
            child = subprocess.run([sys.executable, __file__, side], stdout=subprocess.PIPE, text=True, check=True)
            found[side].append(json.loads(child.stdout))
    for got, wanted in zip(found[SIDES[1]][0]["values"], found[SIDES[0]][0]["values"], strict=True):
        assert math.isclose(got, wanted, rel_tol=1e-5), (got, wanted)
    memory = {side: max(one["memory"] for one in found[side]) for side in SIDES}
    seconds = {side: [s for one in found[side] for s in one["seconds"]] for side in SIDES}
    time_of = {side: statistics.median(seconds[side]) for side in SIDES}
    print(f"{POSITIONS} positions, width {WIDTH}, 65536 ids, float32, {torch.get_num_threads()} threads")
    for side in SIDES:
        spread = f"{min(seconds[side]):.2f}-{max(seconds[side]):.2f}"
        print(f"{side:24s} {time_of[side]:6.2f} s ({spread})   peak +{memory[side]:7.1f} MiB")
    usual, whole, sliced = SIDES
    ratios = {
        "memory_ours_over_naive": memory[whole] / memory[usual],
        "time_ours_over_naive": time_of[whole] / time_of[usual],
        "memory_sliced_over_naive": memory[sliced] / memory[usual],
        "speed_sliced": time_of[usual] / time_of[sliced],
    }
    rounded = {name: round(ratio, 3) for name, ratio in ratios.items()}
    print(json.dumps({"benchmark": "loss", "ratios": rounded, "versions": {"torch": torch.__version__}}))


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
