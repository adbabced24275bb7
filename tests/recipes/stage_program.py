"""Runs stages one after the other, some of them to a sudden end: what `test_stage_ranks.py` starts on one or two ranks.

    torchrun --nproc-per-node 2 stage_program.py RUNS.json

RUNS.json is a list of [arguments of `run_stage`, micro-batch in which it dies or -1].
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from anyglot_recipes.stage import Stage
from anyglot_recipes.stage_cli import run_stage


class Killed(Exception):
    """Stands for the end of a process."""


def main() -> None:
    """All runs of the file."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    real = Stage.training_step
    for arguments, dies_at in json.loads(Path(sys.argv[1]).read_text()):

        def step(self: Stage, batch: dict[str, Tensor], batch_idx: int, dies_at: int = dies_at) -> Tensor:
            if batch_idx == dies_at:
                raise Killed
            return real(self, batch, batch_idx)

        Stage.training_step = step  # type: ignore[method-assign]
        try:
            run_stage("stage", arguments)
        except Killed:
            continue


if __name__ == "__main__":
    main()
    os._exit(0)  # gloo threads that a model still holds may abort the interpreter's own end (pytorch issue 190489)
