"""The whole nano chain, short: it runs from nothing, a run killed at random moments ends with the same loss, and it
can be trained on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

KILLS = 5


def start(run_dir: Path, cache: Path, *more: str) -> subprocess.Popen[str]:
    code = "import sys; from anyglot_recipes.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "ANYGLOT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", "nano_short", "--run_dir", str(run_dir), *more],
        stdout=subprocess.PIPE,
        stderr=(run_dir.parent / f"{run_dir.name}.log").open("a"),
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str], log: Path) -> float:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, log.read_text()[-3000:]
    loss: float = json.loads(out.strip().splitlines()[-1])["loss"]
    return loss


@pytest.mark.slow
def test_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    finish(start(tmp_path / "first", cache), tmp_path / "first.log")  # speaks every clip once
    begun = time.monotonic()
    whole = finish(start(tmp_path / "whole", cache), tmp_path / "whole.log")
    duration = time.monotonic() - begun
    begun = time.monotonic()
    assert finish(start(tmp_path / "whole", cache), tmp_path / "whole.log") == whole
    startup = time.monotonic() - begun
    moments = random.Random(int(os.environ.get("ANYGLOT_KILL_SEED", "0")))
    killed_runs = 0
    for _ in range(KILLS):
        process = start(tmp_path / "killed", cache)
        try:
            process.wait(timeout=startup * 0.8 + moments.uniform(0, 0.5) * (duration - startup))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed_runs += 1
    assert killed_runs >= 2, "most runs ended before they were killed: this test has shown nothing"
    killed = finish(start(tmp_path / "killed", cache), tmp_path / "killed.log")
    assert repr(killed) == repr(whole)
    folders = ["model", "tokenizers/image", "tokenizers/speech", "tokenizers/music"]
    for name in [*(f"{folder}/model.safetensors" for folder in folders), "plan/plan.json"]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    given = [
        "--start",
        str(tmp_path / "whole"),
        "--seed",
        "1",
        "--eval.n",
        "0",
        "--lm.max_steps",
        "1",
        "--lm.lr",
        "1e-12",
        "--world.lookups",
        "8",
    ]
    finish(start(tmp_path / "more", cache, *given), tmp_path / "more.log")
    for folder in folders[1:]:
        name = f"{folder}/model.safetensors"
        assert (tmp_path / "more" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    before, after = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "more"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    alone = [given[0], str(tmp_path / "whole" / "model"), *given[2:]]
    finish(start(tmp_path / "alone", cache, *alone), tmp_path / "alone.log")  # a model's folder, and nothing else
    again = load_file(tmp_path / "alone" / "model" / "model.safetensors")
    assert before.keys() == again.keys() and all(torch.equal(before[name], again[name]) for name in before)
    anew = ["--tokenizers", str(tmp_path / "whole" / "model"), *given[2:8]]
    finish(start(tmp_path / "anew", cache, *anew), tmp_path / "anew.log")
    for folder in folders[1:]:
        name = f"{folder}/model.safetensors"
        assert (tmp_path / "anew" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    fresh = load_file(tmp_path / "anew" / "model" / "model.safetensors")
    norms = [name for name in fresh if name.endswith("norm.weight")]
    assert fresh.keys() == before.keys() and not torch.equal(fresh[norms[0]], before[norms[0]])
    other = start(tmp_path / "wider", cache, *given[:6], "--lm.hidden_size", "128")
    assert other.wait(timeout=600) == 2
    assert "trained another model (lm.hidden_size: 64 there, 128 here)" in (tmp_path / "wider.log").read_text()
    other = start(tmp_path / "factored", cache, *alone, "--lm.factored", "true")
    assert other.wait(timeout=600) == 2
    assert "one that is trained on keeps its own: leave them out" in (tmp_path / "factored.log").read_text()
    other = start(tmp_path / "longer", cache, *alone, "--lm.blocks.speech.max_frames", "200")
    assert other.wait(timeout=600) == 2
    assert "writes media otherwise than lm.blocks say" in (tmp_path / "longer.log").read_text()
    assert not (tmp_path / "longer" / "shards").exists()  # it is said before the work
    (tmp_path / "whole" / "training" / "lm" / "last.ckpt").unlink()
    other = start(tmp_path / "without", cache, *given)
    assert other.wait(timeout=600) == 2
    assert "has no training/lm/last.ckpt; give the whole run folder" in (tmp_path / "without.log").read_text()
    empty = start(tmp_path / "other", cache, "--start", str(tmp_path))
    assert empty.wait(timeout=600) == 2
    assert f"start: {tmp_path} holds no run of nano that is done" in (tmp_path / "other.log").read_text()
