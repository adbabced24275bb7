"""The grammar's cross-entropy against the usual one (full logits, `F.cross_entropy`), forward and backward.

Same hidden states, labels and float32 on both sides, back to back in one process. The values differ by design (the
grammar's loss competes inside the legal slice), so what is checked first is that our unsliced loss is the usual one.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from anyglot_lm.loss import SliceTable, span_cross_entropy
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

POSITIONS, WIDTH, RUNS = 2048, 512, 5


def timed(run: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> float:
    seconds = []
    for _ in range(RUNS + 1):
        for parameter in parameters:
            parameter.grad = None
        start = time.perf_counter()
        run().backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    vocabulary = Vocabulary.build(
        32000,
        BlockSpec("image", "a", 8192, grid=(32, 32), pattern="raster"),
        BlockSpec("speech", "b", 1024, 4, max_frames=500),
    )
    lo, hi, class_of_id = vocabulary.slice_table()
    table = SliceTable(lo.tolist(), hi.tolist(), torch.tensor(class_of_id))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary.size, WIDTH, generator=generator)).requires_grad_()
    image, speech = vocabulary.block("image"), vocabulary.block("speech")
    labels = torch.cat(
        [
            torch.randint(0, 32000, (POSITIONS // 8,), generator=generator),
            torch.randint(image.first_id, image.stop_id, (POSITIONS // 2,), generator=generator),
            torch.randint(speech.first_id, speech.stop_id, (POSITIONS * 3 // 8,), generator=generator),
        ]
    )

    def usual() -> torch.Tensor:
        return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    def ours(sliced: bool) -> torch.Tensor:
        return span_cross_entropy(hidden, weight, labels, table, sliced=sliced).total

    torch.testing.assert_close(ours(False), usual(), rtol=1e-5, atol=1e-2)
    seconds = {
        "usual": timed(usual, [hidden, weight]),
        "ours, whole vocabulary": timed(lambda: ours(False), [hidden, weight]),
        "ours, sliced": timed(lambda: ours(True), [hidden, weight]),
    }
    for name, value in seconds.items():
        print(f"{name:24s} {value * 1e3:8.1f} ms  ({POSITIONS} positions, {vocabulary.size} ids)")
    ratio = seconds["usual"] / seconds["ours, sliced"]
    print(
        json.dumps(
            {"benchmark": "sliced_loss", "ratios": {"speed": round(ratio, 2)}, "versions": {"torch": torch.__version__}}
        )
    )


if __name__ == "__main__":
    main()
