"""Gradients of the weighted span loss on two ranks, each with its own uneven micro-batches.

    torchrun --nproc-per-node 2 loss_program.py OUT.safetensors

Rank 0 writes the gradients under DDP ("ddp.NAME") and FSDP2 ("fsdp.NAME"). `test_weighting.py` compares them with a
float64 reference of everything at once, and uses `Model` and `micro_batches` for the same in one process.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from anyglot_lm.loss import IGNORE, SliceTable, span_nll
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_lm.weighting import SpanWeights, weighted_sum

VOCABULARY = Vocabulary.build(
    20, BlockSpec("image", "i", 16, grid=(2, 2)), BlockSpec("speech", "s", 8, num_quantizers=2, max_frames=5)
)
NAMES = ["text", "image", "speech/0", "speech/1"]
WIDTH, OLD = 8, 22
Z_LOSS, CONSTANT = 1e-3, 11.0
COUNTS = ((40, 3, 0), (0, 7, 25))  # targets of each micro-batch, per rank


def table() -> SliceTable:
    lo, hi, class_of_id = VOCABULARY.slice_table()
    return SliceTable(lo.tolist(), hi.tolist(), torch.tensor(class_of_id))


class Model(nn.Module):
    """A layer, frozen old and trained new output rows, learned weights; gives the loss divided by a constant."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(self.layer.weight, generator=generator)
        rows = torch.randn(VOCABULARY.size, WIDTH, generator=generator)
        self.old, self.new = nn.Parameter(rows[:OLD].clone(), requires_grad=False), nn.Parameter(rows[OLD:].clone())
        self.weights = SpanWeights(NAMES, {"speech": 0.5, "speech/1": 0.25}, shares=[4, 3, 2, 1], learned=True)
        assert self.weights.log_variance is not None
        self.weights.log_variance.data = torch.tensor([0.5, -0.5, 1.0, 0.0])

    def forward(self, inputs_ND: Tensor, labels_N: Tensor) -> Tensor:
        nll = span_nll(self.layer(inputs_ND), (self.old, self.new), labels_N, table(), chunk=4 * 7 * 7)
        return weighted_sum(nll, self.weights, Z_LOSS) / CONSTANT


def micro_batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels, the same number of positions each, with as many targets as `COUNTS` says."""
    generator = torch.Generator().manual_seed(1 + rank)
    out = []
    for count in COUNTS[rank]:
        labels = torch.randint(0, VOCABULARY.blocks[-1].stop_id, (50,), generator=generator)
        labels[count:] = IGNORE
        out.append((torch.randn(50, WIDTH, generator=generator), labels))
    return out


def main() -> None:
    dist.init_process_group("gloo")
    batches = micro_batches(dist.get_rank())
    found: dict[str, Tensor] = {}
    ddp = DistributedDataParallel(Model())
    for at, batch in enumerate(batches):
        ddp.require_backward_grad_sync = at == len(batches) - 1
        ddp(*batch).backward()
    found |= {f"ddp.{name}": p.grad for name, p in ddp.module.named_parameters() if p.grad is not None}
    sharded = Model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    for at, batch in enumerate(batches):
        sharded.set_requires_gradient_sync(at == len(batches) - 1)  # type: ignore[operator]
        sharded(*batch).backward()
    for name, parameter in sharded.named_parameters():
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            found[f"fsdp.{name}"] = parameter.grad.full_tensor()
    if dist.get_rank() == 0:
        save_file(found, sys.argv[1])
    dist.barrier()


if __name__ == "__main__":
    main()
    os._exit(0)  # gloo threads that a model still holds may abort the interpreter's own end (pytorch issue 190489)
