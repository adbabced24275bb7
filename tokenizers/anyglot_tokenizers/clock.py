"""Time and peak memory of encoding and decoding. Knows specs, no tokenizers.

Memory is what torch holds on a GPU, and the resident set of this process elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyglot_tokenizers.spec import CodeSpec


class Clock:
    """Time of computing and peak memory, per kind of work: `with clock("encode"): ...`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.peak_mib: dict[str, float] = {}
        self.codes = self.positions = self.units = self.items = 0

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        before = reset_peak(self.device)
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[kind] += time.perf_counter() - started
        growth = (peak_bytes(self.device) - before) / 2**20
        self.peak_mib[kind] = max(self.peak_mib.get(kind, 0.0), growth)

    def count(self, codes: Tensor, medium: Tensor) -> None:
        """Note an item's codes `[K, *grid]` and samples or pixels."""
        self.items += 1
        self.codes += codes.numel()
        self.positions += codes[0].numel()
        self.units += medium[0].numel()

    def row(self, spec: CodeSpec) -> dict[str, Any]:
        """Items one at a time: seconds, codes per second, real-time factor (audio; below 1 is faster), memory."""
        found: dict[str, Any] = {"items": self.items}
        for kind, seconds in self.seconds.items():
            found[f"{kind}_seconds"] = seconds
            found[f"{kind}_tokens_per_second"] = self.codes / seconds
            if spec.sample_rate is not None:
                found[f"{kind}_real_time_factor"] = seconds * spec.sample_rate / self.units
            found[f"{kind}_peak_mib"] = self.peak_mib[kind]
        return found


def reset_peak(device: torch.device) -> int:
    """Start to watch memory; returns the bytes in use. On a GPU what torch holds, else this process's resident set."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM back to VmRSS
        return _status("VmRSS")
    except OSError:
        return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most bytes in use since `reset_peak` (without Linux's /proc: since the process started)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))
