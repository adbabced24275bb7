"""`Codes`: a batch of codes with lengths, and its self-describing file form.

File form: safetensors with `codes` (uint16 when the ids fit, else uint32), optionally `lengths` (int64) and
`extras.NAME`, and in the header metadata `format`, `version` and `spec` (JSON). This file does not know models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyglot_tokenizers.errors import AnyglotError, CodesError, MediaError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.spec import CodeSpec

FORMAT = "anyglot.codes"
VERSION = "1"
EXTRAS = "extras."


@dataclass(eq=False)
class Codes:
    """Codes of a batch.

    Attributes:
        codes: int64 `[batch, num_quantizers, *grid]`, every id in `[0, codebook_size)`; padding holds any
            legal id.
        lengths: int64 `[batch]`, valid positions on the first grid axis; None = all.
        spec: what the codes mean; None = unknown.
        extras: what decode can use beside the codes, batch first, such as the loudness of EnCodec 48 kHz. Empty for
            what a language model writes.
    """

    codes: Tensor
    lengths: Tensor | None = None
    spec: CodeSpec | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.codes, Tensor):
            raise CodesError(f"codes must be a tensor, got {type(self.codes).__name__}")
        if self.codes.ndim < 3 or self.codes.shape[1] == 0 or self.codes.dtype != torch.int64:
            raise CodesError(
                f"codes must be int64[batch, quantizers >= 1, *grid], got {self.codes.dtype}{list(self.codes.shape)}"
            )
        if self.lengths is not None:
            if self.lengths.shape != self.codes.shape[:1] or self.lengths.dtype != torch.int64:
                raise CodesError(
                    f"lengths must be int64[{self.codes.shape[0]}], got {self.lengths.dtype}{list(self.lengths.shape)}"
                )
            if (
                self.lengths.numel()
                and not 0 <= int(self.lengths.min()) <= int(self.lengths.max()) <= self.codes.shape[2]
            ):
                raise CodesError(f"lengths must lie in 0..{self.codes.shape[2]}, got {self.lengths.tolist()[:8]}")
        for name, extra in self.extras.items():
            if extra.ndim < 1 or extra.shape[0] != self.codes.shape[0]:
                raise CodesError(
                    f"extra {name!r} must come batch first, {self.codes.shape[0]} rows, got {list(extra.shape)}"
                )

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self.item(index) for index in range(len(self)))

    def item(self, index: int) -> Tensor:
        """Codes of one item, `[num_quantizers, *grid]`, cropped to its length (without extras)."""
        codes = self.codes[index]
        return codes if self.lengths is None else codes[:, : int(self.lengths[index])]

    def to(self, device: torch.device | str) -> Codes:
        """The same codes on another device."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        extras = {name: extra.to(device) for name, extra in self.extras.items()}
        return Codes(self.codes.to(device), lengths, self.spec, extras)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file form atomically. Raises CodesError for ids below 0 or beyond uint32."""
        from safetensors.numpy import save

        array = self.codes.cpu().numpy()
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if low < 0 or high >= 2**32:
            raise CodesError(
                f"{path}: ids must lie in 0..{2**32 - 1}, got {low}..{high}; codes hold no sentinel values"
            )
        tensors = {"codes": array.astype("uint16" if high < 2**16 else "uint32")}
        tensors |= {f"{EXTRAS}{name}": extra.detach().cpu().numpy() for name, extra in self.extras.items()}
        if self.lengths is not None:
            tensors["lengths"] = self.lengths.cpu().numpy()
        metadata = {"format": FORMAT, "version": VERSION}
        if self.spec is not None:
            metadata["spec"] = json.dumps(self.spec.to_dict(), sort_keys=True)
        with atomic_write(path) as temporary:
            whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # else memory's order
            temporary.write_bytes(save(whole, metadata=metadata))  # save_file makes it private to its owner

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codes:
        """Read the file form. Raises MediaError if the file is missing, truncated or something else."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise MediaError(path, "no such file", "write codes with Codes.save")
        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                names = set(file.keys())
                wanted = {name for name in names if name in ("codes", "lengths") or name.startswith(EXTRAS)}
                tensors = {name: file.get_tensor(name) for name in wanted}
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:  # the last two: odd dtypes
            raise MediaError(
                path, f"not a readable safetensors file ({error})", "write it again with Codes.save"
            ) from error
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION or "codes" not in tensors:
            raise MediaError(
                path,
                f"holds {sorted(names)} with metadata format {metadata.get('format')!r}, "
                f"version {metadata.get('version')!r}",
                f"expected format {FORMAT!r}, version {VERSION!r}, as written by Codes.save",
            )
        try:
            return cls(
                _integers("codes", tensors["codes"]),
                _integers("lengths", tensors["lengths"]) if "lengths" in tensors else None,
                CodeSpec.from_dict(json.loads(metadata["spec"])) if "spec" in metadata else None,
                {name[len(EXTRAS) :]: torch.from_numpy(tensors[name]) for name in sorted(wanted) if EXTRAS in name},
            )
        except (AnyglotError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise MediaError(path, f"inconsistent content ({error})", "write it again with Codes.save") from error


def _integers(name: str, array: np.ndarray) -> Tensor:
    """As int64. Raises CodesError for other than integers from 0 to 2**63 - 1."""
    if array.dtype.kind not in "iu" or (array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**63):
        raise CodesError(f"{name} must be whole numbers from 0 on, found {array.dtype}")
    return torch.from_numpy(array.astype("int64"))
