"""The device that a command was given, refused in one line where it is none or is not there."""

from __future__ import annotations

import torch

from anyglot_tokenizers.errors import UnsupportedError


def device_of(name: str) -> str:
    """`name`, such as "cpu" or "cuda:1", once a tensor could be put there. Raises UnsupportedError."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise UnsupportedError(
            f"--device {name}: {str(error).splitlines()[0]}; give cpu, or a device there is"
        ) from error
    return name
