"""A limit on what a config may build: not much more than the weights beside it hold.

A damaged or hostile `config.json` could otherwise ask for terabytes, or for millions of layers, before anyone sees
that the weights do not fit. This file knows no tokenizers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from anyglot_tokenizers.errors import CheckpointError


@contextmanager
def bounded_by(tensors: Mapping[str, Tensor], folder: Path) -> Iterator[None]:
    """Inside, this thread cannot build modules with many more weights than `tensors`, those of `folder`.

    Counts parameters and buffers as modules register them. Build under `torch.device("meta")` as well, which
    allocates nothing: other modules may fill their weights first. The room above is for what is not saved: averages,
    windows, tables of implicit codebooks. Raises CheckpointError.
    """
    room = 4 * sum(tensor.numel() for tensor in tensors.values()) + 2**25
    places, thread = 4 * len(tensors) + 2000, threading.get_ident()

    def spend(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal room, places
        if tensor is not None and threading.get_ident() == thread:
            room, places = room - tensor.numel(), places - 1
            if room < 0 or places < 0:
                raise CheckpointError(
                    f"{folder}: the weights do not fit the config, which asks for far more than they hold"
                )

    hooks = [register_module_parameter_registration_hook(spend), register_module_buffer_registration_hook(spend)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
