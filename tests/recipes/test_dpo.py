"""Preference tuning: the reference is the start, the loss is DPO's, a kill changes nothing, two ranks are as one."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from anyglot_lm.data import PackedDataset
from anyglot_lm.engine import Sampling
from anyglot_lm.plan import Plan, build_plan
from anyglot_lm.segments import Sample, Segment
from anyglot_lm.shards import ShardWriter
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes.dpo import DPOStage, score_pairs
from anyglot_recipes.evaluate import Checkers
from anyglot_recipes.nano import test_items as nano_items
from anyglot_recipes.nano_dpo import NanoDPOConfig, nano_dpo, sampled_pairs
from anyglot_recipes.stage_cli import run_stage
from anyglot_recipes.tasks import PAIRS, prompt
from anyglot_synth.nanoworld.scene import score
from anyglot_tokenizers.errors import AnyglotError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
COLORS = ["red", "green", "blue", "white"]
SMALL = {
    "trainer.max_steps": 4,
    "trainer.accelerator": "cpu",
    "trainer.gradient_clip_val": 1.0,
    "model.lr": 0.01,
    "model.log_every": 1,
    "model.warmup_steps": 1,
    "data.seq_len": 160,
    "data.batch_size": 2,
    "data.packs_per_step": 4,
    "checkpoint_every": 2,
    "precision": "fp32",
    "export_dtype": "fp32",
}
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: UnifiedModel) -> Path:
    """A start folder, and pairs of a right and a wrong caption or picture in `train` and `held_out`."""
    root = tmp_path_factory.mktemp("world")
    tiny_model.save_pretrained(root / "start")
    for name, values in (("train", range(16)), ("held_out", range(4))):
        with ShardWriter(root / name, tiny_model.vocabulary, text=tiny_model.text) as writer:
            for value in values:
                for shown in (value, value + 1 + value // 4):
                    picture = np.full((1, 4, 4), value % 16)
                    text = Segment("text", f"a {COLORS[shown % 4]} square" + " at the top" * (shown % 3), "assistant")
                    writer.add_sample(Sample([Segment("image", picture, "user"), text]), "image->text")
                for shown in (value, value + 1):
                    drawn = Segment("image", np.full((1, 4, 4), shown % 16), "assistant")
                    writer.add_sample(Sample([Segment("text", COLORS[value % 4], "user"), drawn]), "text->image")
    return root


def arguments(world: Path, folder: Path, **settings: Any) -> list[str]:
    given = {
        "run_dir": folder,
        "model.start": world / "start",
        "data.shards": [str(world / "train")],
        **SMALL,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    return [f"--{k}={json.dumps(v) if isinstance(v, (list, dict)) else v}" for k, v in given.items()]


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Run:
    def call(name: str = "run", **settings: Any) -> dict[str, Any]:
        report = run_stage("dpo", arguments(world, tmp_path / name, **settings), "dpo")
        assert report is not None
        return report

    return call


def log(run_dir: str | Path) -> dict[int, dict[str, float]]:
    """Metrics by step, of all starts."""
    found: dict[int, dict[str, float]] = {}
    files = sorted(Path(run_dir).glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
    for file in files:
        with file.open() as opened:
            for row in csv.DictReader(opened):
                values = {k: float(v) for k, v in row.items() if v}
                found.setdefault(int(values["step"]), {}).update(values)
    return found


@pytest.mark.parametrize("preset", ["rows", "lora", "full"])
def test_the_reference_is_the_start(run: Run, world: Path, preset: str) -> None:
    """No margin before the first step; then the margin is that of the exported model against the start folder."""
    held_out = {"data__val_shards": [str(world / "held_out")], "data__val_every": 4, "data__val_packs": 4}
    report = run(model__preset=preset, model__beta=0.5, **held_out)
    lines = log(report["run_dir"])
    assert lines[1]["preference/margin"] == 0.0 and lines[1]["preference/accuracy"] == 0.0
    assert lines[1]["preference/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert lines[4]["preference/margin"] != 0.0
    plan = Plan.load(Path(report["run_dir"]) / "val_plan")
    before_P2, after_P2 = (score_pairs(place, world / "held_out") for place in (world / "start", report["model"]))
    gained_P = 0.5 * ((after_P2 - before_P2) @ torch.tensor([1.0, -1.0], dtype=torch.float64))
    drawn_P = gained_P[torch.from_numpy(np.asarray(plan.docs[::2]) // 2).long()]
    assert lines[4]["val/preference/margin"] == pytest.approx(drawn_P.mean().item(), rel=1e-3, abs=1e-5)
    assert lines[4]["val/preference/accuracy"] == pytest.approx((drawn_P > 0).double().mean().item())
    assert {"val/loss", "loss", "loss/text", "grad_norm"} <= lines[4].keys()


def test_a_preference_is_learnt(run: Run, tiny_model: UnifiedModel, world: Path, tmp_path: Path) -> None:
    """Long captions over short ones, which every model finds likelier."""
    with ShardWriter(tmp_path / "pairs", tiny_model.vocabulary, text=tiny_model.text) as writer:
        for value in range(8):
            picture = Segment("image", np.full((1, 4, 4), value), "user")
            for text in (f"a {COLORS[value % 4]} square", "two"):
                writer.add_sample(Sample([picture, Segment("text", text, "assistant")]), "image->text")
    report = run(trainer__max_steps=12, data__shards=[str(tmp_path / "pairs")], model__preset="full")
    before_P2, after_P2 = (score_pairs(place, tmp_path / "pairs") for place in (world / "start", report["model"]))
    assert before_P2.shape == (8, 2) and (before_P2[:, 0] < before_P2[:, 1]).all()
    assert (after_P2 - before_P2).diff(dim=1).max() < -1
    assert log(report["run_dir"])[12]["preference/accuracy"] == 1.0
    assert (Path(report["run_dir"]) / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def stage(world: Path) -> DPOStage:
    """A stage whose trained weights have left the start, outside of a run."""
    stage = DPOStage(
        beta=0.5, label_smoothing=0.1, sft_weight=0.3, start=str(world / "start"), preset="full", train_old_rows=True
    )
    stage.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    stage.configure_model()
    stage.targets_per_pack = 2.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in stage.lm.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return stage


def batch_of(plan: Plan, empty_rows: int = 0) -> dict[str, Tensor]:
    """All packs of a plan, and rows of padding."""
    rows = PackedDataset(plan)
    batch = rows.__getitems__(range(len(rows))).batch
    pads = torch.full((empty_rows, plan.seq_len), plan.vocabulary.pad_id)
    empty = {"input_ids": pads, "labels": torch.full_like(pads, -100)}
    empty["position_ids"] = torch.arange(plan.seq_len).expand(empty_rows, -1)
    return {name: torch.cat([values, empty[name]]) for name, values in batch.items()}


def direct_loss(stage: DPOStage, start: Path, plan: Plan) -> tuple[Tensor, Any]:
    """(the summed loss in float64, the policy it is of), document by document and by the formula of the paper."""
    policy = copy.deepcopy(stage.model).double().eval()
    reference = UnifiedModel.from_pretrained(start).model.double().eval()
    lo, hi, class_of_id = stage.vocabulary.slice_table()

    def logp(model: Any, number: int) -> tuple[Tensor, int]:
        ids, targets = plan.doc(number)
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
        total = torch.zeros((), dtype=torch.float64)
        for t in np.flatnonzero(targets[1:]).tolist():
            low, high = (int(edge[class_of_id[ids[t + 1]]]) for edge in (lo, hi))
            total = total + F.log_softmax(logits[t, low:high], -1)[int(ids[t + 1]) - low]
        return total, int(targets[1:].sum())

    loss = torch.zeros((), dtype=torch.float64)
    for number in plan.docs[::2].tolist():
        (chosen, count), (rejected, _) = logp(policy, number), logp(policy, number + 1)
        with torch.no_grad():
            anchor = logp(reference, number)[0] - logp(reference, number + 1)[0]
        margin = 0.5 * (chosen - rejected - anchor)
        loss = loss - 0.9 * F.logsigmoid(margin) - 0.1 * F.logsigmoid(-margin) - 0.3 * chosen / count
    return loss, policy


def test_gradients_are_those_of_the_formula(stage: DPOStage, world: Path) -> None:
    """Rows of several pairs, their padding, and a row of padding only, against float64 without any packing."""
    plan = build_plan([world / "train"], seq_len=160, num_packs=3, together=2)
    assert min(len(plan.pack(i)) for i in range(3)) >= 4
    batch = batch_of(plan, empty_rows=1)
    kept = [p.detach().clone() for p in stage.lm.parameters()]
    loss = stage.training_step(batch, 0)
    assert all(torch.equal(p, old) for p, old in zip(stage.lm.parameters(), kept, strict=True))
    loss.backward()
    expected, policy = direct_loss(stage, world / "start", plan)
    (expected / (2.0 * 4)).backward()
    assert loss.item() == pytest.approx(expected.item() / 8, rel=1e-5)
    wanted = {name: p.grad for name, p in policy.named_parameters()}
    for name, p in stage.model.named_parameters():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(p.grad.double(), wanted[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert stage._extra_metrics()["preference/loss"] != 0.0


def test_the_start_is_put_away_under_autocast_too(stage: DPOStage, world: Path) -> None:
    """Copies in bf16 that autocast keeps of the start's weights must not reach the policy's pass."""
    batch = batch_of(build_plan([world / "train"], seq_len=160, num_packs=3, together=2))
    exact_N = stage.lm(batch["input_ids"], batch["position_ids"], batch["labels"]).nll.nll
    with torch.autocast("cpu", torch.bfloat16):
        _, sums, out = stage._pair_loss(batch)
    assert sums[1] != 0.0
    torch.testing.assert_close(out.nll.nll, exact_N, rtol=0.05, atol=0.05)


def test_a_batch_without_a_pair_reaches_every_parameter(stage: DPOStage, world: Path) -> None:
    plan = build_plan([world / "train"], seq_len=96, num_packs=1, together=2)
    batch = {name: values[1:] for name, values in batch_of(plan, empty_rows=2).items()}
    loss = stage.training_step(batch, 0)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in stage.lm.parameters())
    assert stage._extra_metrics() == {f"preference/{name}": 0.0 for name in ("loss", "margin", "accuracy")}


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("preset", ["full", "lora"])
def test_a_killed_run_ends_with_the_same_bytes(run: Run, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    whole = run("whole", model__preset=preset)
    real = DPOStage.training_step

    def dies(self: DPOStage, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 5:  # of two micro-batches a step: in the third step, after the checkpoint of the second
            raise Killed
        return real(self, batch, batch_idx)

    monkeypatch.setattr(DPOStage, "training_step", dies)
    with pytest.raises(Killed):
        run("cut", model__preset=preset)
    monkeypatch.setattr(DPOStage, "training_step", real)
    again = run("cut", model__preset=preset)
    assert len(list(Path(again["run_dir"]).glob("logs/version_*"))) == 2
    names = ("loss", "preference/loss", "preference/margin", "preference/accuracy")
    lines = [{s: [v[n] for n in names] for s, v in log(r["run_dir"]).items()} for r in (whole, again)]
    assert lines[0] == lines[1]
    one, two = (load_file(Path(r["model"]) / "model.safetensors") for r in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__learned_weights": "true"}, "model.learned_weights does not apply to dpo"),
        ({"model__z_loss": 0.1}, "model.z_loss does not apply to dpo"),
        ({"model__history_noise": "{image: 0.1}"}, "model.history_noise does not apply to dpo"),
        ({"model__keep_text": 1.0, "model__preset": "lora"}, "model.keep_text does not apply to dpo"),
        ({"data__condition_dropout": 0.1}, "condition_dropout=0.1 with together=2"),
    ],
)
def test_wrong_settings_are_one_clear_error(run: Run, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AnyglotError, match=message):
        run(**settings)


@pytest.mark.slow
def test_two_ranks_are_as_one(run: Run, world: Path, tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    """FSDP2 and DDP on two gloo processes, with validation in between: the log of one process."""
    held_out = {"data__val_shards": [str(world / "held_out")], "data__val_every": 2, "data__val_packs": 4}
    cases = [("fsdp2", "full"), ("fsdp2", "lora"), ("ddp", "full")]
    runs = []
    for strategy, preset in cases:
        place = tmp_path / f"{strategy}-{preset}"
        shape = {"trainer__devices": 2, "trainer__strategy": strategy, "data__batch_size": 1, "model__preset": preset}
        runs.append(arguments(world, place, **held_out, **shape))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    (tmp_path / "program.py").write_text(
        "import json, os, sys, torch\nfrom anyglot_recipes.stage_cli import run_stage\ntorch.set_num_threads(1)\n"
        "for arguments in json.load(open(sys.argv[1])):\n    run_stage('dpo', arguments, 'dpo')\n"
        "os._exit(0)\n"  # as in `stage_program.py`
    )
    run_ranks(tmp_path / "program.py", tmp_path / "runs.json", seconds=600)
    one = {preset: log(run(preset, model__preset=preset, **held_out)["run_dir"]) for preset in ("full", "lora")}
    names = {"loss", "preference/loss", "preference/margin", "val/preference/margin", "grad_norm"}
    for strategy, preset in cases:
        alone, together = one[preset], log(tmp_path / f"{strategy}-{preset}")
        assert alone.keys() == together.keys() == {1, 2, 3, 4} and names <= alone[4].keys()
        for step, line in alone.items():
            for name in names & line.keys():
                assert together[step][name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), (strategy, preset, name)


def test_the_nanoworld_recipe(world: Path, tmp_path: Path) -> None:
    dpo = {"trainer.max_steps": 2, "trainer.accelerator": "cpu", "model.lora": None, "model.preset": "full"}
    dpo |= {
        "data.seq_len": 512,
        "data.batch_size": 1,
        "data.packs_per_step": 2,
        "data.val_every": 2,
        "data.val_packs": 2,
    }
    dpo |= {"model.log_every": 1, "checkpoint_every": 1, "model.lr": 0.01, "model.warmup_steps": 1}
    tasks = ["text->image", "image->text", "text->music", "music->speech"]
    config = NanoDPOConfig(str(tmp_path), model=str(world / "start"), tasks=tasks, scenes=4, held_out=3, dpo=dpo, n=0)
    report = nano_dpo(config)
    assert report is not None
    preference = report["preference"]
    rows = {row["task"]: row for row in report["rows"]}
    assert {"text->image", "image->text", "text->music"} <= rows.keys() <= set(tasks)
    assert preference["pairs"] == sum(row["pairs"] for row in rows.values()) and rows["text->image"]["pairs"] == 3
    assert 0 <= preference["before"] <= 1 and preference["margin"] != 0.0
    assert report["before"] is report["after"] is None
    vocabulary = UnifiedModel.from_pretrained(report["model"]).vocabulary
    plan = build_plan([tmp_path / "pairs"], seq_len=512, epochs=1, together=2, vocabulary=vocabulary)
    for number in range(0, int(plan.starts[-1]), 2):
        (right, targets), (wrong, others) = plan.doc(number), plan.doc(number + 1)
        assert np.array_equal(right[: targets.argmax()], wrong[: others.argmax()]), "one prompt"
        assert not np.array_equal(right, wrong) or "text" not in plan.shards[0].task_names[plan.shards[0].tasks[number]]
    assert nano_dpo(config) == report, "nothing is done twice"


def test_pairs_of_the_model_s_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model's best and worst of three, graded again; drawn hotly, for it seldom errs."""
    monkeypatch.setattr("anyglot_recipes.nano_dpo.Sampling", partial(Sampling, temperature=1.5))
    model = UnifiedModel.from_pretrained(NanoDPOConfig().model)
    items = nano_items(model, 8)
    tasks = ["music->image", "image->text"]
    pairs = list(sampled_pairs(items, model, tasks, seed=0, candidates=3))
    assert {task for task, *_ in pairs} == set(tasks)
    checkers = Checkers()
    for task, *answers in pairs:
        asked = [[s for s in answer.segments if s.role == "user"] for answer in answers]
        assert asked[0] == asked[1]
        target = task.partition("->")[2]
        said = [answer.segments[-1].content for answer in answers]
        media = said if target == "text" else model.decode_media(target, said)
        items_of = [i for i in items if prompt(i, task).segments[0] == asked[0][0]]
        best, worst = (score(items_of[0].scene, scene) for _, scene in checkers.read(target, media))
        assert best > worst


def test_the_recipe_names_its_tasks() -> None:
    with pytest.raises(AnyglotError, match=r"tasks \['image->smell'\].*text->image"):
        nano_dpo(NanoDPOConfig(tasks=["image->smell"]))
    with pytest.raises(AnyglotError, match="dpo holds model as sections"):
        nano_dpo(NanoDPOConfig(dpo={"model": {"lr": "1"}, "model.lora": {"r": 2}}))
    with pytest.raises(AnyglotError, match="candidates 1; a pair needs 2 answers"):
        nano_dpo(NanoDPOConfig(candidates=1))
    assert NanoDPOConfig().tasks == list(PAIRS)
