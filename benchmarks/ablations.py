"""What each choice of the recipe `nano` is worth: short runs that differ in one setting, side by side.

    python benchmarks/ablations.py runs/nano --out ablations                # every variant, about 20 minutes each
    python benchmarks/ablations.py runs/nano --out ablations --only base,z_loss --steps 300
    anyglot eval nanoworld --compare ablations                              # every row, with paired intervals

Tokenizers and text tokenizer are those of a finished run of the recipe, linked, and so are its shards unless a variant
writes other ones. All variants but `again` see the same number of ids in the same order, as far as their tasks are the
same. What is done is not done again. Runs are short and single: differences mean nothing unless they are larger than
that of `base` and `again`, which differ in luck (one draw of it), and what helps a short run need not help a long one.

`nats` are what the true answers of the held-out scenes cost the model, per answer, as means over the answers of a kind:
steadier than scores of a short run. Where speech has other ids, only the columns of the other media can be compared.
Of `small`, `base` and `large` a power law of the parameters is fitted, too, to the mean of the four kinds; rows of ids
count as the model folder has them, which is one row for each.
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

import numpy as np

from anyglot_lm.likelihood import log_likelihoods
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.nano import EVERYTHING, test_items
from anyglot_recipes.tasks import THROUGH, sample
from anyglot_tokenizers.files import atomic_write

MEDIA = ("text", "image", "speech", "music")
SPEECH = "lm.blocks.speech"
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "again": {},
    "speech_frame_major": {f"{SPEECH}.num_quantizers": 2, f"{SPEECH}.pattern": "frame_major", "lm.seq_len": 512},
    "speech_delay": {f"{SPEECH}.num_quantizers": 2, f"{SPEECH}.pattern": "delay", "lm.seq_len": 512},
    "image_half": {"lm.modality_weights": {"image": 0.5}},
    "text_double": {"lm.modality_weights": {"text": 2.0}},
    "rows_free": {"lm.factored": False},
    "rows_codebook": {"lm.factored": False, "lm.tied": False, "lm.codebook_rows": True},
    "z_loss": {"lm.z_loss": 1e-4},
    "no_qk_norm": {"lm.qk_norm": False},
    "no_dropout": {"lm.condition_dropout": 0.0},
    "no_reading": {"shares": {"write down": 0.0, "read aloud": 0.0}},
    "no_through": {"shares": dict.fromkeys(THROUGH.values(), 0.0)},
    "small": {"lm.hidden_size": 128, "lm.num_layers": 4},
    "large": {"lm.hidden_size": 384, "lm.num_layers": 8, "lm.num_heads": 6},
}
NEW_SHARDS = ("speech_frame_major", "speech_delay")
"""Variants with another vocabulary."""
SIZES = ("small", "base", "large")
SHOWN = ("text->image", "text->speech", "image->text", "image->speech", "music->image")
KINDS = {kind: [f"{other}->{kind}" for other in MEDIA if other != kind] for kind in MEDIA}


def run(name: str, base: Path, out: Path, steps: int, num: int) -> float:
    """Train and grade one variant; minutes it took. What is there is kept, and refused if its settings were others."""
    folder = out / name
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
        **({"seed": settings["seed"] + 1} if name == "again" else {}),
        **VARIANTS[name],
        "shares": {**settings["shares"], **VARIANTS[name].get("shares", {})},
    }
    anyglot = [sys.executable, "-m", "anyglot_recipes.cli"]
    given = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
    subprocess.run([*anyglot, "train", "nano", f"--run_dir={folder}", *given], check=True)
    if (folder / "report" / "report.json").exists():
        return 0.0
    graded = ["--num", str(num), "--out", str(folder / "report"), "--model", str(folder / "model")]
    subprocess.run([*anyglot, "eval", "nanoworld", *graded], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) / 60


def measured(folder: Path, num: int) -> dict[str, Any]:
    """Parameters and nats of a trained variant, kept in its folder."""
    path, plan = folder / "nats.json", json.loads((folder / "model" / "training.json").read_text())["plan"]
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if (kept.get("plan"), kept.get("num")) != (plan, num):
        model = UnifiedModel.from_pretrained(folder / "model")
        items = test_items(model, num)
        nats = {}
        for kind, tasks in KINDS.items():
            found = log_likelihoods(model, [sample(item, task) for task in tasks for item in items], mean=False)
            nats[kind] = -float(np.mean([value for value in found if value is not None]))
        size = sum(parameter.numel() for parameter in model.model.parameters())
        kept = {"plan": plan, "num": num, "parameters": size, "nats": nats}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(kept))
    return kept


def line(name: str, out: Path, num: int) -> str:
    """A row of the table."""
    report = json.loads((out / name / "report" / "report.json").read_text())
    scores = {row["task"]: row["score"] for row in report["rows"]}
    shown = [report["mean"], *(scores[task] for task in SHOWN)]
    nats = measured(out / name, num)["nats"].values()
    return f"| {name} | " + " | ".join([*(f"{v:.3f}" for v in shown), *(f"{v:.1f}" for v in nats)]) + " |"


def fitted(out: Path, num: int) -> str:
    """nats of an answer = a x parameters^-b, by least squares of the logarithms; and how far off it is."""
    kept = [measured(out / name, num) for name in SIZES]
    sizes = np.log([found["parameters"] for found in kept])
    nats = np.log([np.mean(list(found["nats"].values())) for found in kept])
    slope, start = np.polyfit(sizes, nats, 1)
    off = np.abs(np.exp(nats - (slope * sizes + start)) - 1).max()
    means = [json.loads((out / name / "report" / "report.json").read_text())["mean"] for name in SIZES]
    points = zip(np.exp(sizes), np.exp(nats), means, strict=True)
    rows = [f"{size:,.0f} parameters: {value:.1f} nats, mean {mean:.3f}" for size, value, mean in points]
    return "; ".join(rows) + f"\nnats = {np.exp(start):.3g} x parameters^{slope:.3f}, at most {off:.1%} off"


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
    print(f"| variant | mean of 12 | {' | '.join(SHOWN)} | {' | '.join(f'nats of {kind}' for kind in KINDS)} |")
    print("|---" * (2 + len(SHOWN) + len(KINDS)) + "|")
    for name in chosen:
        print(line(name, arguments.out, arguments.num))
    if set(SIZES) <= set(chosen):
        print(fitted(arguments.out, arguments.num))
    versions = {"python": sys.version.split()[0], "threads": os.environ.get("OMP_NUM_THREADS", "all")}
    means = {name: json.loads((arguments.out / name / "report" / "report.json").read_text())["mean"] for name in chosen}
    print(json.dumps({"benchmark": "ablations", "scores": means, "versions": versions}))


if __name__ == "__main__":
    main()
