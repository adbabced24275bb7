"""The checkpoint of a run: written through a temporary name every so many steps, and read back by a run like it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from anyglot_tokenizers.errors import CheckpointError
from anyglot_tokenizers.files import atomic_write, sweep
from anyglot_tokenizers.quantize import Quantizer
from anyglot_tokenizers.tokenizer import Tokenizer, fingerprint_of

CHECKPOINT = "last.ckpt"
LATER = ("teacher_weights",)
"""Settings that are not in the checkpoints of earlier versions, whose runs go on unchecked."""


class KeepLast(Callback):
    """Writes `last.ckpt` every so many steps and at the end, through a temporary name."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Delete what killed runs left."""
        if trainer.is_global_zero:
            sweep(self.path.parent, f".{self.path.stem}.*")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            with atomic_write(self.path) if trainer.is_global_zero else nullcontext(self.path) as path:
                trainer.save_checkpoint(path)  # on every device; the first one writes


def plain(value: Any) -> Any:
    """A setting as a checkpoint can keep and compare it."""
    if isinstance(value, nn.Module):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, np.generic):  # checkpoints that hold such a one cannot be read as weights only
        return value.item()
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def saved_step(path: Path, settings: dict[str, Any]) -> int:
    """Step of a checkpoint. Raises CheckpointError if it is unreadable or of another run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved, step = checkpoint["anyglot"], int(checkpoint["global_step"])
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        raise CheckpointError(f"{path}: not a readable checkpoint ({error}); delete it or pass resume=False") from error
    for name, value in settings.items():
        if saved.get(name, value if name in LATER else None) != value:
            raise CheckpointError(
                f"{path}: from a run with {name} {_short(saved.get(name))}, now {_short(value)}; "
                "use another run_dir, or resume=False to overwrite it"
            )
    return step


def weights_of(module: nn.Module | None) -> str | None:
    """Fingerprint of what is in a module."""
    return None if module is None else fingerprint_of(type(module).__name__, {}, module.state_dict())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def start_of(tokenizer: Tokenizer, run_dir: Path) -> str | None:
    """Fingerprint of the weights that a run begins with; None of a new tokenizer, whose configuration says all (and
    whose weights are not the same bits on every kind of machine). An object remembers it, as the run changes it.
    """
    starts: dict[Path, str | None] = tokenizer.__dict__.setdefault("_starts", {})
    steps = [int(module.steps) for module in tokenizer.modules() if isinstance(module, Quantizer)]
    return starts.setdefault(run_dir.resolve(), tokenizer.fingerprint if any(steps) or not steps else None)
