"""Plans and loading: how full packs are, how long a plan takes, how fast rows come, and what memory that costs.

The corpus is a mix of pictures (1,024 codes and a caption), music (1,500 codes), speech (1 to 20 s at 50 codes a
second) and text, of 1,000,000 documents, and a tenth of it. The peers are Hugging Face `datasets` (memory-mapped Arrow,
numpy format, a pack's documents asked for in one call) for loading, and TRL's `pack_dataset` (best-fit decreasing) for
packing. The rows that both loaders make are compared before they are timed.

    python benchmarks/packing.py [--documents 1000000]

Peak memory is private memory (RssAnon) of a fresh process that opens the plan and loads; mapped files are page cache,
which the system takes back when it needs it, so they are reported but not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from anyglot_lm.data import IGNORED, PackedDataset, collate
from anyglot_lm.plan import Plan, build_plan
from anyglot_lm.shards import ShardWriter
from anyglot_lm.vocabulary import BlockSpec, Vocabulary

SEQ_LEN, BATCH, RUNS, PACKS = 4096, 16, 5, 4000
VOCABULARY = Vocabulary.build(
    32000,
    BlockSpec("image", "a", 8192, grid=(32, 32), pattern="raster"),
    BlockSpec("speech", "b", 1024, max_frames=1000),
    BlockSpec("music", "c", 2048, max_frames=1500),
)


def write_corpus(path: Path, documents: int) -> None:
    """Documents `bos user <prompt> assistant <answer> eos` of random ids; the answer is text or media."""
    rng = np.random.default_rng(0)
    kinds = rng.choice(4, documents, p=[0.4, 0.2, 0.3, 0.1])
    text = np.clip(rng.lognormal(4.6, 0.9, documents), 4, 3900).astype(int)
    codes = np.where(kinds == 1, 1024, np.where(kinds == 2, rng.integers(50, 1000, documents), 1500))
    prompts = rng.integers(8, 48, documents)
    sizes = [32000, *(block.codebook_size for block in VOCABULARY.blocks)]
    noise = [rng.integers(0, size, 1 << 20) for size in sizes]
    bos, user, assistant, eos = (VOCABULARY.controls[c] for c in ("bos", "user", "assistant", "eos"))
    with ShardWriter(path, VOCABULARY) as writer:
        for i, kind in enumerate(kinds.tolist()):
            block = VOCABULARY.blocks[kind - 1] if kind else None
            answer = int(codes[i]) + 2 if block else int(text[i])
            prompt = int(prompts[i])
            at = i * 257 % ((1 << 20) - 8192)
            ids = noise[0][at : at + prompt + answer + 4].copy()
            if block is not None:
                ids[prompt + 3 : -1] = block.first_id + noise[kind][at : at + answer]
                ids[prompt + 3], ids[-2] = block.start_id, block.end_id
            ids[0], ids[1], ids[prompt + 2], ids[-1] = bos, user, assistant, eos
            writer.add(ids, np.arange(len(ids)) > prompt + 2, block.modality if block else "text")


def anonymous_mib() -> float:
    """Private memory of this process now, MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def load(plan: Plan, packs: int, on_batch: Callable[[], None] | None = None) -> int:
    """Reads `packs` packs, as a run does; returns their ids."""
    order = np.random.default_rng(1).permutation(len(plan))[:packs].tolist()
    loader: DataLoader[Any] = DataLoader(PackedDataset(plan), BATCH, sampler=order, collate_fn=collate)
    ids = 0
    for batch in loader:
        ids += batch["input_ids"].numel()
        if on_batch is not None:
            on_batch()
    return ids


def memory_of(plan_path: Path) -> dict[str, float]:
    """Peak private memory of a fresh process that loads from a plan, MiB."""
    done = subprocess.run([sys.executable, __file__, "--memory", str(plan_path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def report_memory(plan_path: Path) -> None:
    before = anonymous_mib()
    peaks = [before]
    plan = Plan.load(plan_path)
    load(plan, PACKS, lambda: peaks.append(anonymous_mib()))
    hwm = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({"peak": max(peaks), "of the loader": max(peaks) - before, "with mapped files": hwm}))


def arrow_of(plan: Plan, folder: Path) -> Any:
    """The same documents as a memory-mapped Arrow dataset: ids, and where the targets start."""
    import datasets
    import pyarrow

    reader = plan.shards[0]
    ids = pyarrow.LargeListArray.from_arrays(pyarrow.array(reader.offsets), pyarrow.array(reader.ids))
    table = pyarrow.table({"ids": ids, "target": pyarrow.array(reader.runs[:, 0].astype(np.int64))})
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder)).with_format("numpy")


def arrow_row(dataset: Any, docs: list[int], pad: int) -> tuple[Any, Any, Any]:
    """A row as `PackedDataset` makes it, from Arrow."""
    got = dataset[docs]
    ids, labels = np.full(SEQ_LEN, pad), np.full(SEQ_LEN, IGNORED)
    positions, at = np.zeros(SEQ_LEN, dtype=np.int64), 0
    for doc, target in zip(got["ids"], got["target"], strict=True):
        stop = at + len(doc)
        ids[at:stop] = doc
        labels[at + target - 1 : stop - 1] = doc[target:]
        positions[at:stop] = np.arange(len(doc))
        at = stop
    positions[at:] = np.arange(SEQ_LEN - at)
    return ids, labels, positions


def median_of(run: Callable[[], float]) -> tuple[float, str]:
    """Median of several runs after a first one, and their range."""
    values = [run() for _ in range(RUNS + 1)][1:]
    return statistics.median(values), f"{min(values):,.1f} to {max(values):,.1f}"


def speed_of(run: Callable[[], int]) -> float:
    start = time.perf_counter()
    ids = run()
    return ids / (time.perf_counter() - start) / 1e6


def trl_packing(dataset: Any) -> tuple[float, float]:
    """Seconds and utilisation of TRL's packing of the same documents."""
    from trl import pack_dataset

    plain = dataset.with_format(None).select_columns(["ids"]).rename_column("ids", "input_ids")
    start = time.perf_counter()
    packed = pack_dataset(plain, SEQ_LEN, "bfd", map_kwargs={"load_from_cache_file": False})
    seconds = time.perf_counter() - start
    ids = sum(map(len, plain.with_format("arrow")[:]["input_ids"]))
    return seconds, ids / (len(packed) * SEQ_LEN)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--memory", type=Path)
    arguments = parser.parse_args()
    if arguments.memory is not None:
        report_memory(arguments.memory)
        return
    import datasets
    import trl

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory, utilisation, seconds = {}, {}, {}
        for size in (arguments.documents // 10, arguments.documents):
            start = time.perf_counter()
            write_corpus(folder / f"shards{size}", size)
            print(f"wrote {size:,} documents in {time.perf_counter() - start:.1f} s")
            start = time.perf_counter()
            plan = build_plan([folder / f"shards{size}"], seq_len=SEQ_LEN, epochs=1, path=folder / f"plan{size}")
            seconds[size], utilisation[size] = time.perf_counter() - start, plan.utilisation
            print(f"plan of {size:,} documents: {seconds[size]:.2f} s, {len(plan):,} packs {plan.utilisation:.3%} full")
            memory[size] = memory_of(folder / f"plan{size}")
            print("loader, MiB: " + ", ".join(f"{k} {v:.1f}" for k, v in memory[size].items()))
        small, large = sorted(memory)
        plan = Plan.load(folder / f"plan{small}")
        speed, spread = median_of(lambda: speed_of(lambda: load(plan, PACKS)))
        print(f"loader, one process: {speed:.1f} M tokens/s ({spread})")

        dataset = arrow_of(plan, folder / "arrow")
        rows, pad = PackedDataset(plan), VOCABULARY.pad_id
        for i in range(20):
            for ours, theirs in zip(rows[i].values(), arrow_row(dataset, plan.pack(i), pad), strict=True):
                assert np.array_equal(ours.numpy(), theirs)

        def arrow() -> int:
            few = np.random.default_rng(1).permutation(len(plan))[: PACKS // 20].tolist()
            return sum(len(arrow_row(dataset, plan.pack(i), pad)[0]) for i in few)

        theirs, spread = median_of(lambda: speed_of(arrow))
        print(f"datasets {datasets.__version__}, Arrow: {theirs:.1f} M tokens/s ({spread})")
        trl_seconds, trl_full = trl_packing(dataset)
        print(f"trl {trl.__version__}, pack_dataset of {small:,} documents: {trl_seconds:.2f} s, {trl_full:.3%} full")
    print(
        json.dumps(
            {
                "benchmark": "packing",
                "ratios": {
                    "loader speed against datasets": round(speed / theirs, 1),
                    "loader speed against 50 M tokens/s": round(speed / 50, 2),
                    "plan speed against 1,000,000 documents in 10 s": round(large / 1e5 / seconds[large], 2),
                    "packing speed against trl": round(trl_seconds / seconds[small], 2),
                    "share of padding, trl over ours": round((1 - trl_full) / (1 - utilisation[small]), 1),
                    "peak memory, 10 x the corpus over 1 x (1 = does not grow)": round(
                        memory[large]["peak"] / memory[small]["peak"], 3
                    ),
                },
                "utilisation": utilisation[large],
                "plan_seconds": seconds[large],
                "loader_tokens_per_second": speed * 1e6,
                "versions": {"torch": torch.__version__, "datasets": datasets.__version__, "trl": trl.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
