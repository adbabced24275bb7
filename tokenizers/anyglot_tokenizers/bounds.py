"""A limit on what a config may build: not much more than the weight files beside it hold.

A damaged or hostile `config.json` could otherwise ask for terabytes, or for millions of layers, before anyone sees
that the weights do not fit. This file knows no tokenizers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from anyglot_tokenizers.errors import CheckpointError


@contextmanager
def bounded_by(folder: Path) -> Iterator[None]:
    """Inside, this thread cannot build many more weights than the safetensors files in `folder` hold.

    The room above that is for what is not saved: averages, windows, weights that are folded later. Raises
    CheckpointError before memory is touched, since a module registers its weights before it fills them.
    """
    from safetensors import SafetensorError, safe_open

    held, count = 0, 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(str(path), framework="pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        except (SafetensorError, OSError, ValueError):
            continue  # whoever reads the weights will say so
        held, count = held + sum(map(math.prod, shapes)), count + len(shapes)
    most, many, thread = 4 * held + 2**24, 4 * count + 2000, threading.get_ident()

    def spend(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal most, many
        if tensor is not None and threading.get_ident() == thread:
            most, many = most - tensor.numel(), many - 1
            if most < 0 or many < 0:
                raise CheckpointError(
                    f"{folder}: the weights do not fit the config, which asks for far more than the files hold"
                )

    hooks = [register_module_parameter_registration_hook(spend), register_module_buffer_registration_hook(spend)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
