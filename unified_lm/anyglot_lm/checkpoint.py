"""One training checkpoint that is never half-written.

`AtomicCheckpoint` keeps `last.ckpt` of a run: written to a temporary name, then renamed, every few optimizer steps and
at the end. It holds model, optimizer, schedule, loops and the data cursor; nothing in it needs unpickling of classes,
so it loads with `weights_only=True`. Under FSDP2 it is a folder to which every rank writes its shard.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch

from anyglot_tokenizers.errors import CheckpointError
from anyglot_tokenizers.quiet import interruptible


class AtomicCheckpoint(L.Callback):
    """Save `path` every `every` optimizer steps and when training ends."""

    def __init__(self, path: str | Path, every: int) -> None:
        self.path, self.every = Path(path), every
        self._saved = -1

    def found(self) -> Path | None:
        """The checkpoint to go on from, if there is one (the one before, if a kill fell between two renames)."""
        return next((p for p in (self.path, self.path.with_suffix(".before")) if p.exists()), None)

    def fit(self, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
        """`trainer.fit`, from the checkpoint where there is one.

        Raises:
            CheckpointError: the checkpoint, where it is a file, is damaged.
            KeyboardInterrupt: it was interrupted, which Lightning would make an exit with code 1.
        """
        if (found := self.found()) is not None and found.is_file():
            _check_readable(found)
        with interruptible():
            trainer.fit(module, datamodule=data, ckpt_path=found, weights_only=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step != self._saved:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._saved:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._saved = trainer.global_step
        temporary, before = self.path.with_suffix(".tmp"), self.path.with_suffix(".before")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero and temporary.is_dir():  # what a kill left
            shutil.rmtree(temporary)
        trainer.strategy.barrier()
        trainer.save_checkpoint(temporary)
        if not trainer.is_global_zero:
            return
        if temporary.is_dir() and self.path.exists():  # a folder cannot be renamed over another
            shutil.rmtree(before, ignore_errors=True)
            os.replace(self.path, before)
        os.replace(temporary, self.path)
        shutil.rmtree(before, ignore_errors=True)


def _check_readable(path: Path) -> None:
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except OSError:  # of the disk, not of what is on it
        raise
    except Exception as error:  # torch raises many kinds for damaged files
        said = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: no readable checkpoint ({said}); delete it to begin this training anew"
        ) from error
