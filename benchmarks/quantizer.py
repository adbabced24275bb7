"""Nearest codes of a large codebook: our search against the eval path of vector-quantize-pytorch.

The same codebook and latents on both sides, each side in a process of its own, so that the high-water mark of its
resident memory is its own too. Codes must be equal. The library gathers the entries in the same call, a few per mille
of its time. Wants a quiet machine: our search is many short steps, whose threads wait for each other.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
import zlib
from importlib.metadata import version

import torch

ENTRIES, DIM, ROWS, RUNS, THREADS = 16384, 8, 4096, 7, 2


def peak_bytes() -> int:
    """High-water mark of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(side: str) -> dict[str, float]:
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    embed_CD = torch.randn(ENTRIES, DIM, generator=generator)
    x_1DN = torch.randn(1, DIM, ROWS, generator=generator)
    if side == "ours":
        from anyglot_tokenizers import ResidualQuantizer

        ours = ResidualQuantizer(DIM, 1, ENTRIES).eval()
        ours.layers[0]._codebook.embed.copy_(embed_CD[None])

        def run(x_1DN: torch.Tensor) -> torch.Tensor:
            return ours.encode(x_1DN)[0, 0]
    else:
        from vector_quantize_pytorch import VectorQuantize

        theirs = VectorQuantize(DIM, ENTRIES, channel_last=False).eval()
        theirs._codebook.embed.copy_(embed_CD[None])

        def run(x_1DN: torch.Tensor) -> torch.Tensor:
            return theirs(x_1DN)[1][0]

    with torch.inference_mode():
        run(x_1DN[:, :, :8])  # whatever is loaded or built on first use
        before = peak_bytes()
        codes = run(x_1DN)
        seconds = []
        for _ in range(RUNS):
            start = time.perf_counter()
            run(x_1DN)
            seconds.append(time.perf_counter() - start)
        return {
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "bytes": peak_bytes() - before,
            "codes": zlib.crc32(codes.contiguous().numpy().tobytes()),
        }


def main() -> None:
    results = {}
    for side in ("theirs", "ours"):
        done = subprocess.run([sys.executable, __file__, side], capture_output=True, text=True, check=True)
        results[side] = json.loads(done.stdout)
        found = results[side]
        print(
            f"{side:8s} {found['seconds'] * 1e3:8.1f} ms ({found['fastest'] * 1e3:.1f} to {found['slowest'] * 1e3:.1f})"
            f"  +{found['bytes'] / 2**20:7.1f} MiB  ({ROWS} rows, {ENTRIES} entries of {DIM} dims)"
        )
    ours, theirs = results["ours"], results["theirs"]
    assert ours["codes"] == theirs["codes"], "the two sides found different codes"
    ratios = {
        "speed": round(theirs["seconds"] / ours["seconds"], 2),
        "memory of ours over theirs, less is better": round(ours["bytes"] / theirs["bytes"], 3),
    }
    versions = {name: version(name) for name in ("torch", "vector-quantize-pytorch")}
    print(json.dumps({"benchmark": "quantizer", "ratios": ratios, "versions": versions}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
