"""Useful ids per second of training: ours against the Hugging Face Trainer and TRL's packed SFT, on a CPU.

    python benchmarks/training_throughput.py [--steps 20] [--rounds 2] [--only ours hf_trainer_padded ...]

Everybody trains the nano recipe's model (random weights) on the same nanoworld documents, whose ids the shipped
tokenizers made: all 15 tasks, 44 to 295 ids each. Same AdamW (the peers keep their default, torch's fused one), rate,
clipping and bf16 autocast, and on average the same useful ids (those that are not padding) per optimizer step: 16 rows
of 384 ids in ours and in TRL, as many documents as fit these in the Trainer. Ours is `fit_lm`, as recipes call it. Each
run is a process of its own, sides by turns; the clock runs from one optimizer step to another, so data, forward,
backward, clipping and logs are in it. The best round counts, spread printed.

The Trainer pads to the longest document of a batch, of random or of grouped lengths. TRL lays the rows of a micro-batch
end to end in one long row, whose sdpa mask is quadratic in it, so it gets small micro-batches with accumulation; the
fastest counts. A Trainer with smaller micro-batches pads less: that row is shown, as are ours with the softmax over all
ids and ours compiled; they run once and enter no ratio.

Checked first: rows give the mean loss that the same documents give padded. In every process: packed documents do not
attend to each other, ours and TRL's. At the end: the loss on held-out documents, in the grammar's slices on all
sides, which has to be about the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from anyglot_lm.data import IGNORED, PackedDataset, TokenDataModule, collate
from anyglot_lm.loss import SliceTable, span_nll
from anyglot_lm.model import assert_no_leak, hidden_states, new_llama
from anyglot_lm.plan import Plan, build_plan
from anyglot_lm.shards import ShardWriter
from anyglot_lm.train import LitUnified, fit_lm

NANO = Path(__file__).resolve().parent.parent / "recipes" / "anyglot_recipes" / "weights" / "nano"
SCENES, HELD_OUT, SEQ_LEN, PACKS = 200, 8, 384, 16
LR, BETAS = 1e-3, (0.9, 0.95)
COPIES = 4  # of the documents: lengths are grouped as among many
Settings = dict[str, Any]
SIDES: dict[str, tuple[str, Settings]] = {
    "ours": ("ours", {}),
    "ours, whole vocabulary": ("ours", {"sliced": False}),
    "ours, compiled": ("ours", {"compile": True}),
    "hf_trainer_padded": ("trainer", {}),
    "hf_trainer_padded, micro-batches / 4": ("trainer", {"gradient_accumulation_steps": 4}),
    "hf_trainer_grouped": ("trainer", {"train_sampling_strategy": "group_by_length"}),
    "trl_packed, 4 x 4 rows": ("trl", {"gradient_accumulation_steps": 4}),
    "trl_packed, 8 x 2 rows": ("trl", {"gradient_accumulation_steps": 8}),
    "trl_packed, 16 x 1 row": ("trl", {"gradient_accumulation_steps": 16}),
}
RATIOS = {
    "hf_trainer_padded": ["hf_trainer_padded"],
    "hf_trainer_grouped": ["hf_trainer_grouped"],
    "trl_packed": [name for name, (kind, _) in SIDES.items() if kind == "trl"],
}


@dataclass
class Clock:
    """Times of optimizer steps, ids that went through `module` before each, and those of them that are not `pad_id`."""

    module: nn.Module
    pad_id: int
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    ids: int = 0
    useful: int = 0

    def __enter__(self) -> Clock:
        self._hooks = [
            self.module.register_forward_pre_hook(self._count, with_kwargs=True),
            register_optimizer_step_post_hook(self._step),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        ids_BT = inputs[0] if inputs else named["input_ids"]
        self.ids += ids_BT.numel()
        self.useful += int((ids_BT != self.pad_id).sum())

    def _step(self, *_: object) -> None:
        self.steps.append((time.perf_counter(), self.ids, self.useful))

    def report(self, warm_up: int) -> dict[str, float]:
        first, last = self.steps[warm_up - 1], self.steps[-1]
        seconds, ids, useful = (b - a for a, b in zip(first, last, strict=True))
        steps = len(self.steps) - warm_up
        return {"useful_ids_per_s": useful / seconds, "padding": 1 - useful / ids, "useful_per_step": useful / steps}


def write_documents(folder: Path) -> None:
    """Shards of the training documents, and of those for the last loss."""
    from anyglot_lm.unified import UnifiedModel
    from anyglot_recipes.nano import make_items
    from anyglot_recipes.tasks import COMBINED, PAIRS, sample
    from anyglot_synth.nanoworld.voices import SpeechCache, default_cache_dir

    nano = UnifiedModel.from_pretrained(NANO)
    items = make_items(
        "train", SCENES + HELD_OUT, 5, dict(nano.tokenizers), SpeechCache(default_cache_dir(), 1), workers=1
    )
    rng = np.random.default_rng(5)
    for name, part in (("train", items[:SCENES]), ("held_out", items[SCENES:])):
        with ShardWriter(folder / name, nano.vocabulary, nano.template, text=nano.text) as writer:
            for item in part:
                for task in PAIRS + COMBINED:
                    made = sample(item, task, rng)
                    writer.add(*nano.template.render(made, nano.vocabulary, nano.text), task, made)


def documents(plan: Plan, numbers: list[int] | None = None) -> list[dict[str, list[int]]]:
    """Ids and labels as the Trainer wants them: not shifted, the first id of a document is no target."""
    found = []
    for number in range(sum(map(len, plan.shards))) if numbers is None else numbers:
        ids, loss = plan.doc(number)
        labels = np.where(loss, ids, IGNORED)
        labels[0] = IGNORED
        found.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return found


@dataclass
class Padding:
    """Pads documents to the longest of the batch."""

    pad_id: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


@torch.no_grad()
def packed_loss(model: LlamaForCausalLM, plan: Plan, packs: int, *, sliced: bool) -> float:
    """Mean over the targets of the first packs, float32."""
    batch = collate(PackedDataset(plan).__getitems__(range(packs)))
    lo, hi, classes = plan.vocabulary.slice_table()
    table = SliceTable(lo.tolist(), hi.tolist(), torch.tensor(classes))
    hidden_BTD = hidden_states(model.base_model, batch["input_ids"], batch["position_ids"])
    labels_N = batch["labels"].flatten()
    nll_N = span_nll(hidden_BTD.flatten(0, 1), model.lm_head.weight, labels_N, table, sliced=sliced).nll
    return float(nll_N.sum() / (labels_N != IGNORED).sum())


@torch.no_grad()
def check_same_loss(plan: Plan) -> None:
    model = new_llama(plan.vocabulary).eval()
    rows = documents(plan, [n for pack in range(4) for n in plan.pack(pack)])
    usual = model(**Padding(plan.vocabulary.pad_id)(rows)).loss.item()
    packed = packed_loss(model, plan, 4, sliced=False)
    assert abs(packed / usual - 1) < 1e-4, (packed, usual)
    print(f"loss of {len(rows)} documents: {usual:.5f} padded, {packed:.5f} packed")


def train_ours(plan: Plan, model: LlamaForCausalLM, clock: Clock, steps: int, folder: Path, settings: Settings) -> None:
    module = LitUnified(
        model, plan.vocabulary, max_steps=steps, lr=LR, warmup_steps=1, cooldown=0.0, weight_decay=0.0, muon=False,
        **settings,
    )  # fmt: skip
    clock.module = module.lm
    assert_no_leak(model)
    with clock:
        fit_lm(module, TokenDataModule(plan, batch_size=PACKS), run_dir=folder / "run", accelerator="cpu")


def trainer_settings(folder: Path, steps: int, batch: int, settings: Settings) -> Settings:
    """What Trainer and SFTTrainer get; both have further defaults that change neither result nor speed."""
    return {
        "output_dir": str(folder / "run"),
        "max_steps": steps,
        "per_device_train_batch_size": max(1, round(batch / settings.get("gradient_accumulation_steps", 1))),
        "use_cpu": True,
        "bf16": True,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }


def train_trainer(
    plan: Plan, model: LlamaForCausalLM, clock: Clock, steps: int, folder: Path, settings: Settings
) -> None:
    rows = documents(plan)
    per_step = PACKS * SEQ_LEN * plan.utilisation / statistics.mean(len(row["input_ids"]) for row in rows)
    trainer = Trainer(
        model,
        TrainingArguments(**trainer_settings(folder, steps, round(per_step), settings)),
        data_collator=Padding(plan.vocabulary.pad_id),
        train_dataset=rows * COPIES,  # type: ignore[arg-type]  # a list is a map-style data set
    )
    with clock:
        trainer.train()


def train_trl(plan: Plan, model: LlamaForCausalLM, clock: Clock, steps: int, folder: Path, settings: Settings) -> None:
    import datasets
    import tokenizers
    from trl import SFTConfig, SFTTrainer

    pad_id = plan.vocabulary.pad_id
    words = tokenizers.models.WordLevel({str(i): i for i in range(plan.vocabulary.size)}, str(pad_id))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token=str(pad_id), eos_token=str(model.config.eos_token_id)
    )
    trainer = SFTTrainer(
        model,
        SFTConfig(
            **trainer_settings(folder, steps, PACKS, settings), max_length=SEQ_LEN, packing=True, packing_strategy="bfd"
        ),
        train_dataset=datasets.Dataset.from_list(documents(plan) * COPIES),
        processing_class=tokenizer,
    )
    packs = [trainer.train_dataset[i] for i in range(4)]
    batch = {k: v for k, v in trainer.data_collator(packs).items() if k != "labels"}
    with torch.no_grad():
        hidden_BTD = model.base_model(**batch, use_cache=False).last_hidden_state
    check_no_leak(model, hidden_BTD[0], [row["input_ids"] for row in packs], [row["seq_lengths"] for row in packs])
    with clock:
        trainer.train()


@torch.no_grad()
def check_no_leak(model: LlamaForCausalLM, hidden_ND: Tensor, packs: list[list[int]], lengths: list[list[int]]) -> None:
    """Final states of packed documents, row after row, against those of the same documents alone, float32."""
    parts = [ids for pack, sizes in zip(packs, lengths, strict=True) for ids in torch.tensor(pack).split(sizes)]
    alone_ND = torch.cat([model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in parts])
    worst = ((hidden_ND - alone_ND).abs().max() / alone_ND.square().mean().sqrt()).item()
    assert worst < 1e-3, f"packed documents attend to each other: {worst:.2g}"


def one_run(side: str, folder: Path, warm_up: int, steps: int) -> None:
    """A side in this process; prints its figures as JSON."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    kind, settings = SIDES[side]
    plan, held_out = Plan.load(folder / "plan"), Plan.load(folder / "held_out_plan")
    model = new_llama(plan.vocabulary)
    clock = Clock(model, plan.vocabulary.pad_id)
    train = {"ours": train_ours, "trainer": train_trainer, "trl": train_trl}[kind]
    with tempfile.TemporaryDirectory() as scratch:
        train(plan, model, clock, warm_up + steps, Path(scratch), settings)
    loss = packed_loss(model.eval(), held_out, len(held_out), sliced=True)
    print(json.dumps({**clock.report(warm_up), "held_out_loss": loss}))


def missing(side: str) -> str | None:
    """Why a side cannot run here."""
    if SIDES[side][0] == "trl" and importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    if SIDES[side][0] == "trainer" and importlib.util.find_spec("accelerate") is None:
        return "accelerate is not installed"
    if SIDES[side][1].get("compile") and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        return "no C++ compiler"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps that are timed")
    parser.add_argument("--warm_up", type=int, default=4, help="steps before them")
    parser.add_argument("--rounds", type=int, default=2, help="runs of every side that enters a ratio")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES), help="sides to run")
    parser.add_argument("--run", nargs=2, metavar=("SIDE", "DIR"), help="one side in this process")
    arguments = parser.parse_args()
    if arguments.run:
        return one_run(arguments.run[0], Path(arguments.run[1]), arguments.warm_up, arguments.steps)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sides = []
    for side in arguments.only:
        if why := missing(side):
            print(f"{side}: left out, {why}")
        else:
            sides.append(side)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder)
        packs = (arguments.warm_up + arguments.steps) * PACKS
        plan = build_plan([folder / "train"], seq_len=SEQ_LEN, num_packs=packs, path=folder / "plan")
        build_plan([folder / "held_out"], seq_len=SEQ_LEN, epochs=1, path=folder / "held_out_plan")
        print(f"{plan.describe()}\n{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
        check_same_loss(plan)
        command = [sys.executable, __file__, f"--steps={arguments.steps}", f"--warm_up={arguments.warm_up}", "--run"]
        compared = {"ours", *chain.from_iterable(RATIOS.values())}
        for number in range(arguments.rounds):
            for side in sides if number == 0 else [side for side in sides if side in compared]:
                child = subprocess.run([*command, side, name], capture_output=True, text=True, check=False)
                if child.returncode:
                    sys.exit(f"{side} failed:\n{child.stderr[-3000:]}")
                found[side].append(json.loads(child.stdout.splitlines()[-1]))
    print(f"{'':38s}useful ids/s (all rounds)          padding  useful a step  held-out loss")
    best = {}
    for side, runs in found.items():
        speeds = [run["useful_ids_per_s"] for run in runs]
        best[side] = max(speeds)
        spread = f"{best[side]:8.0f} ({min(speeds):.0f}-{max(speeds):.0f})"
        last = runs[-1]
        print(
            f"{side:38s}{spread:35s}{last['padding']:7.1%}{last['useful_per_step']:15.0f}{last['held_out_loss']:15.3f}"
        )
    ratios = {}
    for ratio, names in RATIOS.items():
        peers = [best[side] for side in names if side in best]
        if "ours" in best and peers:
            ratios[ratio] = round(best["ours"] / max(peers), 3)
    packages = ["torch", "transformers", "lightning", "accelerate", "trl"]
    versions = {p: version(p) for p in packages if importlib.util.find_spec(p) is not None}
    print(json.dumps({"benchmark": "training_throughput", "ratios": ratios, "versions": versions}))


if __name__ == "__main__":
    main()
