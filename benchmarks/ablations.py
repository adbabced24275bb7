"""What each choice of the recipe `nano` is worth: short runs that differ in one setting, side by side.

    python benchmarks/ablations.py runs/nano --out ablations                # every variant, about 20 minutes each
    python benchmarks/ablations.py runs/nano --out ablations --only base,z_loss --steps 300
    anyglot eval nanoworld --compare ablations                              # every row, with paired intervals

Tokenizers and text tokenizer are those of a finished run of the recipe, linked, and so are its shards unless a variant
writes other ones. All variants see the same number of ids in the same order, as far as their tasks are the same. What
is done is not done again. Runs are short and single: small differences mean nothing, and what helps a short run need
not help a long one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from anyglot_recipes.nano import EVERYTHING
from anyglot_recipes.tasks import THROUGH

SPEECH = "lm.blocks.speech"
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "speech_frame_major": {f"{SPEECH}.num_quantizers": 2, f"{SPEECH}.pattern": "frame_major", "lm.seq_len": 512},
    "speech_delay": {f"{SPEECH}.num_quantizers": 2, f"{SPEECH}.pattern": "delay", "lm.seq_len": 512},
    "image_half": {"lm.modality_weights": {"image": 0.5}},
    "text_double": {"lm.modality_weights": {"text": 2.0}},
    "rows_free": {"lm.factored": False},
    "rows_codebook": {"lm.factored": False, "lm.tied": False, "lm.codebook_rows": True},
    "z_loss": {"lm.z_loss": 1e-4},
    "qk_norm": {"lm.qk_norm": True},
    "no_dropout": {"lm.condition_dropout": 0.0},
    "no_reading": {"shares": {"write down": 0.0, "read aloud": 0.0}},
    "no_through": {"shares": dict.fromkeys(THROUGH.values(), 0.0)},
    "small": {"lm.hidden_size": 128, "lm.num_layers": 4},
    "large": {"lm.hidden_size": 384, "lm.num_layers": 8, "lm.num_heads": 6},
}
NEW_SHARDS = ("speech_frame_major", "speech_delay")
"""Variants with another vocabulary."""
SHOWN = ("text->image", "text->speech", "image->text", "image->speech", "music->image")


def run(name: str, base: Path, out: Path, steps: int, num: int) -> float:
    """Train and grade one variant; minutes it took, 0.0 where its report is there already."""
    folder = out / name
    if (folder / "report" / "report.json").exists():
        return 0.0
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("tokenizers", "text", "shards"):
        if not (folder / part).exists() and not (part == "shards" and name in NEW_SHARDS):
            (folder / part).symlink_to((base / part).resolve())
    settings = json.loads((base / "settings.json").read_text())
    unknown = settings["shares"].keys() - set(EVERYTHING)
    if unknown:
        raise SystemExit(f"{base} was made by another anyglot, with {', '.join(sorted(unknown))}; train nano anew")
    chunks = len(list((base / "shards").glob("[0-9]*[0-9]")))
    options: dict[str, Any] = {
        **{part: settings[part] for part in ("seed", "world", "image", "speech", "music")},
        "world.num_chunks": 4 if name in NEW_SHARDS else chunks,
        "lm.max_steps": steps,
        "eval.n": 0,
        **VARIANTS[name],
        "shares": {**settings["shares"], **VARIANTS[name].get("shares", {})},
    }
    anyglot = [sys.executable, "-m", "anyglot_recipes.cli"]
    given = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
    subprocess.run([*anyglot, "train", "nano", f"--run_dir={folder}", *given], check=True)
    graded = ["--num", str(num), "--out", str(folder / "report"), "--model", str(folder / "model")]
    subprocess.run([*anyglot, "eval", "nanoworld", *graded], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) / 60


def line(name: str, out: Path) -> str:
    """A row of the table."""
    report = json.loads((out / name / "report" / "report.json").read_text())
    trained = json.loads((out / name / "model" / "training.json").read_text())
    scores = {row["task"]: row["score"] for row in report["rows"]}
    shown = [report["mean"], *(scores[task] for task in SHOWN)]
    return f"| {name} | " + " | ".join(f"{value:.3f}" for value in shown) + f" | {trained['loss']:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?", help="a run of the recipe nano; without, nothing is measured")
    parser.add_argument("--out", type=Path, default=Path("ablations"))
    parser.add_argument("--only", help=f"names joined by commas, of {', '.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--num", type=int, default=100, help="held-out scenes per direction")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(VARIANTS)
    if unknown := sorted(set(chosen) - set(VARIANTS)):
        parser.error(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    if arguments.base is None:
        print("ablations: nothing measured; give a finished run: python benchmarks/ablations.py runs/nano")
        return
    if not (arguments.base / "settings.json").exists():
        parser.error(f"{arguments.base}: no run of the recipe nano; make one: anyglot train nano")
    for name in chosen:
        minutes = run(name, arguments.base, arguments.out, arguments.steps, arguments.num)
        print(f"{name}: {minutes:.1f} minutes", file=sys.stderr, flush=True)
    print(f"| variant | mean of 12 | {' | '.join(SHOWN)} | loss |")
    print("|---" * (3 + len(SHOWN)) + "|")
    for name in chosen:
        print(line(name, arguments.out))
    versions = {"python": sys.version.split()[0], "threads": os.environ.get("OMP_NUM_THREADS", "all")}
    means = {name: json.loads((arguments.out / name / "report" / "report.json").read_text())["mean"] for name in chosen}
    print(json.dumps({"benchmark": "ablations", "scores": means, "versions": versions}))


if __name__ == "__main__":
    main()
