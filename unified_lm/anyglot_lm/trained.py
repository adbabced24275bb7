"""The model's part of a checkpoint that a training of ours left, without what only the training needs.

Sharded checkpoints are not read, nor those of anybody else.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyglot_tokenizers.errors import CheckpointError

MODEL = "lm.model."
"""What the names of the model's parameters begin with."""


def trained_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's parameters in a checkpoint, by their names in the model, and what our modules noted beside them.

    Raises:
        CheckpointError: it cannot be read, is none of a training, or is sharded over ranks.
    """
    if Path(path).is_dir():
        raise CheckpointError(
            f"{path}: no adapter, and in shards of each rank; start from the model folder of that run"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = checkpoint["state_dict"].items()
        return {k.removeprefix(MODEL): v for k, v in state if k.startswith(MODEL)}, checkpoint.get("anyglot", {})
    except (OSError, EOFError, KeyError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        said = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: no checkpoint of a training ({said}); give the last.ckpt of one") from error
