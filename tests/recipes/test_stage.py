"""Stages: from a model folder to a model folder, exactly resumed, with the settings that were asked for."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anyglot_lm.files import fingerprint_of, sha256_file
from anyglot_lm.plan import Plan
from anyglot_lm.segments import Sample, Segment, Template
from anyglot_lm.shards import ShardWriter
from anyglot_lm.unified import UnifiedModel
from anyglot_recipes import stage_cli
from anyglot_recipes.cli import main
from anyglot_recipes.stage import Stage
from anyglot_recipes.stage_cli import parse_stage, run_stage
from anyglot_recipes.stage_data import StageData
from anyglot_recipes.train import CONFIGS, STAGES, program_of
from anyglot_tokenizers.errors import AnyglotError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
RECIPES = [path for path in sorted(CONFIGS.rglob("*.yaml")) if program_of(path) in STAGES]
COLORS = ["red", "green", "blue", "white"]
SMALL = ["--trainer.max_steps=4", "--model.log_every=1", "--model.warmup_steps=1", "--checkpoint_every=2"]
SMALL += ["--data.seq_len=64", "--data.batch_size=1", "--data.packs_per_step=2", "--precision=fp32"]
SMALL += ["--trainer.accelerator=cpu", "--export_dtype=fp32"]


def write(folder: Path, model: UnifiedModel, samples: list[tuple[str, Sample]]) -> str:
    with ShardWriter(folder, model.vocabulary, text=model.text) as writer:
        for task, sample in samples:
            writer.add_sample(sample, task)
    return str(folder)


def picture(value: int) -> np.ndarray:
    return np.full((1, 4, 4), value)


def caption(value: int, *, wrong: bool = False) -> Sample:
    text = COLORS[(value + wrong) % 4]
    return Sample([Segment("image", picture(value), "user"), Segment("text", text, "assistant")])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: UnifiedModel) -> dict[str, str]:
    """A start folder and shards: captions both ways, plain text, pairs of right and wrong captions."""
    root = tmp_path_factory.mktemp("world")
    tiny_model.save_pretrained(root / "start")
    pairs = []
    for value in range(16):
        drawing = Sample(
            [Segment("text", COLORS[value % 4], "user"), Segment("image", picture(value % 4), "assistant")]
        )
        pairs += [("image->text", caption(value % 4)), ("text->image", drawing)]
    plain = [("text", Sample([Segment("text", f"{c} and {d}", "assistant")])) for c in COLORS for d in COLORS]
    twos = [("captions", s) for v in range(16) for s in (caption(v % 4), caption(v % 4, wrong=True))]
    return {
        "start": str(root / "start"),
        "pairs": write(root / "pairs", tiny_model, pairs),
        "text": write(root / "text", tiny_model, plain),
        "preferences": write(root / "preferences", tiny_model, twos),
    }


@pytest.fixture
def run(world: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def call(*arguments: str, program: str = "stage", data: str = "pairs", name: str = "run") -> dict[str, Any]:
        call.folder = tmp_path / name  # type: ignore[attr-defined]
        common = [f"--run_dir={tmp_path / name}", f"--model.start={world['start']}", f'--data.shards=["{world[data]}"]']
        report = run_stage(program, [*common, *SMALL, *arguments])
        assert report is not None
        return report

    return call


def log(run_dir: str | Path) -> list[dict[str, float]]:
    """The lines of the last start's metrics.csv."""
    files = sorted(Path(run_dir).glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
    with files[-1].open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_stage_runs(path: Path, world: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    """Two steps of each YAML, with only what the machine and the tiny data demand changed."""
    content = yaml.safe_load(path.read_text())
    shards = world["preferences" if content["program"] == "dpo" else "pairs"]
    arguments = [f"--run_dir={tmp_path / 'run'}", f"--model.start={world['start']}", f'--data.shards=["{shards}"]']
    arguments += [
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.strategy=auto",
    ]
    arguments += ["--data.seq_len=96", "--data.batch_size=1", "--data.packs_per_step=2", "--data.num_workers=0"]
    arguments += ["--model.log_every=1", "--checkpoint_every=2", "--model.compile=false", "--data.max_repetition=50"]
    if "replay" in content["data"]:
        arguments += [f'--data.replay=["{world["text"]}"]']
    assert main(["train", str(path), *arguments]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["loss"] > 0
    assert UnifiedModel.from_pretrained(report["model"]).generate("text", text="red", max_ids=8).text is not None


def test_a_stage_leaves_everything_in_its_folder(run: Callable[..., dict[str, Any]]) -> None:
    report = run("--data.condition_dropout=0.2")
    folder = Path(report["run_dir"])
    assert {"plan", "last.ckpt", "logs", "tensorboard", "curves.png", "config.yaml", "model"} <= {
        p.name for p in folder.iterdir()
    }
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((folder / "tensorboard").rglob("events.out.tfevents*"))
    lines = log(folder)
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4]
    expected = {"loss", "loss/text", "accuracy/image", "uniform/image", "perplexity/image", "grad_norm", "output_norm"}
    assert expected | {"lr", "mfu", "padding", "ids_per_s", "useful_ids_per_s"} <= set(lines[-1])
    assert 0 <= lines[-1]["padding"] < 1 and lines[-1]["grad_norm"] > 0
    assert lines[-1]["uniform/image"] == pytest.approx(np.log(17), rel=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(report["model"])
    assert type(plain).__name__ == "LlamaForCausalLM"


def test_presets_leave_old_rows_alone(run: Callable[..., dict[str, Any]], world: dict[str, str]) -> None:
    start = UnifiedModel.from_pretrained(world["start"])
    first_new = start.vocabulary.text_size
    before = start.model.get_input_embeddings().weight
    layer = start.model.model.layers[0].mlp.up_proj.weight
    for preset in ("rows", "lora", "full"):
        report = run(f"--model.preset={preset}", "--model.weight_decay=0.5", name=preset)
        after = UnifiedModel.from_pretrained(report["model"]).model
        rows = after.get_input_embeddings().weight
        assert torch.equal(rows[:first_new], before[:first_new])
        assert not torch.equal(rows[first_new:], before[first_new:])
        assert torch.equal(after.model.layers[0].mlp.up_proj.weight, layer) == (preset == "rows")


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`killing(n)`: from now on the n-th micro-batch of a run dies, counted from 0; -1 for never."""
    real = Stage.training_step

    def at(batch: int) -> None:
        def step(self: Stage, data: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            if batch_idx == batch:
                raise Killed
            return real(self, data, batch_idx)

        monkeypatch.setattr(Stage, "training_step", step)

    return at


def tensors(report: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(report["model"]) / "model.safetensors")


@pytest.mark.parametrize("preset", ["full", "lora"])
@pytest.mark.parametrize("cut", [4, 5, 7])
def test_a_killed_stage_ends_with_the_same_bytes(
    run: Callable[..., dict[str, Any]], killing: Callable[[int], None], preset: str, cut: int
) -> None:
    whole = run(f"--model.preset={preset}", name="whole")
    killing(cut)  # two micro-batches a step, a checkpoint every two steps
    with pytest.raises(Killed):
        run(f"--model.preset={preset}", name="cut")
    killing(-1)
    again = run(f"--model.preset={preset}", name="cut")
    assert again["loss"] == whole["loss"]
    for name, value in tensors(whole).items():
        assert torch.equal(tensors(again)[name], value)


def test_an_interrupted_stage_tells_how_to_go_on(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "training_step", interrupted)
    given = [f"--run_dir={tmp_path / 'run'}", f"--model.start={world['start']}", f'--data.shards=["{world["pairs"]}"]']
    assert main(["train", "align", *given, *SMALL, "--data.replay_share=0"]) == 130
    assert "stopped; run the same command again to continue" in capsys.readouterr().err


def test_the_command_line_beats_the_checkpoint(
    run: Callable[..., dict[str, Any]], killing: Callable[[int], None]
) -> None:
    killing(5)
    with pytest.raises(Killed):
        run("--model.lr=0.001", "--model.cooldown=0")
    killing(-1)
    run("--model.lr=0.125", "--model.rows_lr=0.25", "--model.cooldown=0")
    assert [line["lr"] for line in log(run.folder)] == [0.125, 0.125]  # type: ignore[attr-defined]


def test_a_run_folder_of_another_start_is_refused(
    run: Callable[..., dict[str, Any]], world: dict[str, str], tmp_path: Path
) -> None:
    """Trained weights fit the frozen ones that they were trained on, and no others."""
    run("--model.preset=lora")
    shutil.copytree(world["start"], tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for changed in (f"--model.start={tmp_path / 'other'}", "--model.lora.alpha=8"):
        with pytest.raises(AnyglotError, match="started from another model than .*give another --run_dir"):
            run("--model.preset=lora", changed)
    shutil.copytree(world["start"], tmp_path / "moved")
    run("--model.preset=lora", f"--model.start={tmp_path / 'moved'}")


@pytest.mark.parametrize("preset", ["rows", "lora", "full"])
def test_a_stage_begins_with_the_weights_of_another_run(run: Callable[..., dict[str, Any]], preset: str) -> None:
    """At a rate of zero nothing changes, so what comes out is what the first run made."""
    first = run(f"--model.preset={preset}", name="first")
    taken = f"--model.weights_from={Path(first['run_dir']) / 'last.ckpt'}"
    second = run(f"--model.preset={preset}", taken, "--model.lr=0", "--model.rows_lr=0", name="second")
    made, again = tensors(first), tensors(second)
    assert made.keys() == again.keys() and all(torch.equal(made[name], again[name]) for name in made)
    fresh = run(f"--model.preset={preset}", "--model.lr=0", "--model.rows_lr=0", name="fresh")
    assert any(not torch.equal(made[name], tensor) for name, tensor in tensors(fresh).items())


def test_weights_of_a_run_that_does_not_fit_are_refused(
    run: Callable[..., dict[str, Any]], world: dict[str, str], tmp_path: Path
) -> None:
    report = run("--model.preset=lora", "--model.lora.r=4", name="first")
    taken = f"--model.weights_from={Path(report['run_dir']) / 'last.ckpt'}"
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((Path(report["run_dir"]) / "last.ckpt").read_bytes()[:1000])
    for arguments, message in (
        (["--model.preset=lora", taken, "--model.lora.r=2"], "shape .* this run trains .*give the model.preset"),
        (["--model.preset=lora", taken, "--model.lora.alpha=8"], "another model than"),
        (["--model.preset=lora", f"--model.weights_from={broken}"], "broken.ckpt: no checkpoint of a training"),
        (["--model.preset=lora", f"--model.weights_from={tmp_path / 'none.ckpt'}"], "none.ckpt: no checkpoint"),
        (["--model.preset=lora", f"--model.weights_from={tmp_path}"], "in shards.* start from the model folder"),
    ):
        with pytest.raises(AnyglotError, match=message):
            run(*arguments, name="other")
    assert not (tmp_path / "other" / "last.ckpt").exists()


def test_factors_of_the_loss_are_not_taken(run: Callable[..., dict[str, Any]]) -> None:
    first = run("--model.learned_weights=true", name="first")
    run(f"--model.weights_from={Path(first['run_dir']) / 'last.ckpt'}", name="second")


@pytest.mark.parametrize("program", ["stage", "dpo"])
def test_a_run_goes_on_only_with_what_it_began_with(run: Callable[..., dict[str, Any]], program: str) -> None:
    """For DPO it is the reference, which no checkpoint holds."""
    how: dict[str, Any] = {"program": program, "data": "preferences" if program == "dpo" else "pairs"}
    few, more = (
        f"--model.weights_from={Path(run(f'--model.lr={lr}', name=f'at {lr}')['run_dir']) / 'last.ckpt'}"
        for lr in (0.001, 0.01)
    )
    run(few, **how)
    for other in ([more], []):
        with pytest.raises(AnyglotError, match="began with other weights"):
            run(*other, **how)
    run(few, **how)


def test_frozen_weights_in_half_the_memory(run: Callable[..., dict[str, Any]], world: dict[str, str]) -> None:
    report = run("--model.preset=rows", "--model.frozen_dtype=bf16", "--precision=bf16")
    start = load_file(Path(world["start"]) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(tensors(report)[name], start[name].bfloat16().float())
    changed = (tensors(report)["model.embed_tokens.weight"] != start["model.embed_tokens.weight"]).any(1)
    assert changed.any()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_frozen_weights_follow_the_arithmetic(world: dict[str, str], precision: str, dtype: torch.dtype) -> None:
    options = ["--model.preset=rows", "--model.frozen_dtype=auto", f"--precision={precision}"]
    cli = parse_stage("stage", [f"--model.start={world['start']}", '--data.shards=["x"]', *SMALL, *options])
    assert {p.dtype for p in cli.model.build().parameters() if not p.requires_grad} == {dtype}


def test_frozen_weights_are_not_in_checkpoints(run: Callable[..., dict[str, Any]]) -> None:
    report = run("--model.preset=rows")
    state = torch.load(Path(report["run_dir"]) / "last.ckpt", weights_only=True)["state_dict"]
    assert list(state) == ["lm.model.model.embed_tokens.new", "lm.model.lm_head.new"]


def test_the_lagging_modality_gets_more(run: Callable[..., dict[str, Any]]) -> None:
    report = run("--data.adapt_rounds=2", "--data.adapt_strength=1.0", "--data.max_repetition=100")
    first, second = (Plan.load(Path(report["run_dir"]) / f"plan-{r}") for r in (0, 1))
    assert len(second) == 2 * len(first) == 8 and second.phases[0].fingerprint == first.fingerprint
    shares = [{s.name: s.weight for s in phase.sources} for phase in second.phases]
    line = log(Path(report["run_dir"]))
    assert line, "the second round logs"
    lags = {
        task: line[0][f"loss/{m}"] / line[0][f"uniform/{m}"]
        for task, m in (("image->text", "text"), ("text->image", "image"))
    }
    more = max(lags, key=lags.__getitem__)
    assert shares[1][more] > shares[0][more]


def test_a_round_without_a_log_line_of_its_own_counts(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds end between two log lines, and a run may stop there: the mixture follows the losses all the same."""
    settings = ["--data.adapt_rounds=2", "--data.max_repetition=100", "--model.log_every=4", "--checkpoint_every=4"]
    plan = Plan.load(Path(run(*settings, name="whole")["run_dir"]) / "plan-1")
    first, second = ({s.name: s.weight for s in phase.sources} for phase in plan.phases)
    assert first != second

    def stop(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(StageData, "next_round", stop)
        run(*settings, name="cut")
    again = Plan.load(Path(run(*settings, name="cut")["run_dir"]) / "plan-1")
    assert again.fingerprint == plan.fingerprint


def test_plain_text_is_kept(run: Callable[..., dict[str, Any]]) -> None:
    """The divergence from the start is logged, and smaller the more it costs; without the option there is none."""
    options = ["--model.preset=lora", "--model.lr=0.003", "--trainer.max_steps=16", "--model.cooldown=0"]
    kept = {}
    for factor in (0.0, 1e-6, 100.0):
        report = run(*options, f"--model.keep_text={factor}", data="text", name=f"keep-{factor}")
        kept[factor] = [line["kept/text"] for line in log(report["run_dir"]) if "kept/text" in line]
    assert not kept[0.0] and len(kept[1e-6]) == len(kept[100.0]) == 16
    assert 0 < kept[100.0][-1] < 0.5 * kept[1e-6][-1]


def test_learned_weights_are_logged_and_resume(run: Callable[..., dict[str, Any]]) -> None:
    report = run("--model.learned_weights=true")
    last = log(report["run_dir"])[-1]
    assert {"weight/text", "weight/image"} <= set(last)
    assert (
        "lm.weights.log_variance" in torch.load(Path(report["run_dir"]) / "last.ckpt", weights_only=True)["state_dict"]
    )


def test_validation_logs_text_perplexity(run: Callable[..., dict[str, Any]], world: dict[str, str]) -> None:
    report = run(f'--data.val_shards=["{world["text"]}"]', "--data.val_packs=2", "--data.val_every=2")
    lines = [line for line in log(report["run_dir"]) if "val/text_perplexity" in line]
    assert len(lines) == 2
    assert lines[0]["val/text_perplexity"] == pytest.approx(np.exp(lines[0]["val/text"]), rel=1e-5)


def test_validation_that_never_comes_is_refused(run: Callable[..., dict[str, Any]], world: dict[str, str]) -> None:
    with pytest.raises(AnyglotError, match="data.val_every 5 is beyond trainer.max_steps 4"):
        run(f'--data.val_shards=["{world["text"]}"]', "--data.val_every=5")


def test_replay_keeps_its_share_where_tasks_are_the_same(
    run: Callable[..., dict[str, Any]], world: dict[str, str], tmp_path: Path, tiny_model: UnifiedModel
) -> None:
    """Captions learnt anew and old captions replayed have one name; shares stay what they were asked for."""
    new = write(tmp_path / "new", tiny_model, [("image->text", caption(v % 4)) for v in range(64)])
    old = write(tmp_path / "old", tiny_model, [("image->text", caption(v % 4)) for v in range(8)])
    given = [f'--data.shards=["{new}"]', f'--data.replay=["{old}"]', "--data.replay_share=0.5"]
    report = run(*given, "--trainer.max_steps=16")
    sources = Plan.load(Path(report["run_dir"]) / "plan").phases[0].sources
    assert [source.weight for source in sources] == [0.5, 0.5]
    with pytest.raises(AnyglotError, match="both learnt anew and replayed"):
        run(*given, "--data.adapt_rounds=2", name="adaptive")


def test_shards_of_another_template_are_refused(
    run: Callable[..., dict[str, Any]], world: dict[str, str], tiny_model: UnifiedModel, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "new", tiny_model.vocabulary, Template(version=2), text=tiny_model.text) as writer:
        writer.add_sample(caption(1), "image->text")
    with pytest.raises(AnyglotError, match="template anyglot-chat version 2, the model has anyglot-chat version 1"):
        run(f'--data.shards=["{tmp_path / "new"}"]')


def test_pairs_must_have_one_prompt(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(AnyglotError, match="different prompts; dpo needs documents in twos"):
        run(program="dpo", data="pairs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.shards=[]"], "data.shards is empty"),
        (["--data.replay_share=0.5"], "give both or neither"),
        (["--data.phases=[{share: 1}]", "--data.condition_dropout=0.5"], "condition_dropout is 0.5 with data.phases"),
        (["--data.packs_per_step=3", "--data.batch_size=2"], "no multiple of data.batch_size 2 x 1 devices"),
        (["--checkpoint_every=3", "--model.log_every=2"], "no multiple of log_every"),
        (["--model.start=nowhere"], "model.start 'nowhere' is no model folder"),
        (["--model.frozen_dtype=bf16"], "frozen_dtype bf16 needs bf16 arithmetic"),
        (["--precision=fp16"], "precision 'fp16'; use auto, bf16, fp32"),
        (["--export_dtype=fp16"], "export_dtype 'fp16'; use bf16, fp32"),
        (["--trainer.accumulate_grad_batches=2"], "follow from data.packs_per_step"),
        (["--trainer.val_check_interval=2"], "follow from data.packs_per_step and data.val_every"),
        (["--trainer.precision=32-true"], "trainer.precision: is set by this program; give --precision instead"),
        (["--trainer.logger=false"], "trainer.logger: is set by this program; give --run_dir instead"),
        (["--trainer.log_every_n_steps=1"], "trainer.log_every_n_steps: .* give --model.log_every instead"),
        (["--data.batch_size=0"], "data.batch_size 0: too low"),
        (["--data.adapt_rounds=0", "--data.val_every=0"], "data.adapt_rounds 0, data.val_every 0: too low"),
        (["--data.num_workers=-1"], "data.num_workers -1: too low"),
        (["--data.seed=-1", "--data.adapt_strength=-1"], r"data.seed -1, data.adapt_strength -1\.0: too low"),
        (
            ["--trainer.strategy=fsdp2", "--trainer.devices=2", "--model.preset=lora", "--model.keep_text=1"],
            "FSDP2 does not",
        ),
        (["--model.keep_text=1"], "preset 'full' has none; leave model.keep_text out"),
        (["--model.history_noise={smell: 0.1}"], "history_noise: no modality 'smell' with codes; there are image"),
        (["--model.freeze=['tower']"], "'tower' is found in no parameter"),
        (["--trainer.strategy=fsdp2", "--trainer.devices=auto"], "needs trainer.devices as a number"),
    ],
)
def test_wrong_settings_are_one_clear_error(
    run: Callable[..., dict[str, Any]], arguments: list[str], message: str
) -> None:
    with pytest.raises(AnyglotError, match=message):
        run(*arguments)


def test_a_later_round_keeps_to_the_settings_of_its_plan(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, fit = ["--data.adapt_rounds=2", "--data.max_repetition=100", "--trainer.max_steps=8"], stage_cli._fit

    def first_alone(cli: Any, round: int, rounds: int) -> None:
        if round:
            raise Killed
        fit(cli, round, rounds)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(stage_cli, "_fit", first_alone)
        run(*settings)
    for changed, message in (
        ("--data.packs_per_step=4", "packs of all rounds so far 16, not 32"),
        ("--data.seed=7", "seed 0, not 7"),
        ("--data.condition_dropout=0.5", "condition_dropout 0.0, not 0.5"),
    ):
        with pytest.raises(AnyglotError, match=f"plan-1: made with {message}"):
            run(*settings, changed)
    assert len(Plan.load(Path(run(*settings)["run_dir"]) / "plan-1")) == 16


@pytest.fixture
def rounds(world: dict[str, str], tiny_model: UnifiedModel, tmp_path: Path) -> Callable[..., StageData]:
    """`rounds(round, **settings)`: the data of a run of two rounds, the first of which is over."""

    def data(round: int, shards: str = world["pairs"], **settings: Any) -> StageData:
        budgets = {"modality_budgets": {"image": 0.7}, "max_repetition": 100.0, **settings}
        made = StageData([shards], adapt_rounds=2, seq_len=64, **budgets)
        made.attach(tmp_path / "run", tiny_model.vocabulary, tiny_model.template, 8, round)
        made.accumulation(1)
        return made

    first = data(0)
    first.prepare_data()
    first.plan = Plan.load(tmp_path / "run" / "plan-0")
    first.next_round({"loss/text": 2.0, "loss/image": 3.0, "uniform/text": 5.0, "uniform/image": 4.0})
    return data


def test_a_later_round_keeps_to_its_mixture(rounds: Callable[..., StageData], tmp_path: Path) -> None:
    rounds(1).prepare_data()
    with pytest.raises(AnyglotError, match=r"plan-1: made with weights .*, not .*'text->image': 0\.75}"):
        rounds(1, weights={"image->text": 1.0, "text->image": 3.0}).prepare_data()
    before = (tmp_path / "run" / "plan-1" / "docs.npy").read_bytes()
    rounds(1, max_repetition=99.0, modality_budgets={"image": 0.6}).prepare_data()  # of the next round
    assert (tmp_path / "run" / "plan-1" / "docs.npy").read_bytes() == before


def test_a_run_keeps_the_plan_that_it_began_with(rounds: Callable[..., StageData], tmp_path: Path) -> None:
    """Plans of before are of other documents, where limits met dropped prompts; their runs go on all the same."""
    path = tmp_path / "run" / "plan-0"
    content = json.loads((path / "plan.json").read_text())
    (phase,), docs = content["phases"], np.load(path / "docs.npy")[::-1]
    np.save(path / "docs.npy", docs)
    known = [s["fingerprint"] for s in content["shards"]]
    arrays = {name: sha256_file(path / f"{name}.npy") for name in ("pack_offsets", "docs")}
    phase["fingerprint"] = fingerprint_of({"parameters": phase["parameters"], "shards": known, "arrays": arrays})
    (path / "plan.json").write_text(json.dumps(content | {"fingerprint": phase["fingerprint"]}))
    rounds(0).prepare_data()
    assert Plan.load(path).fingerprint == phase["fingerprint"]
    rounds(0, max_repetition=99.0).prepare_data()
    assert Plan.load(path).fingerprint != phase["fingerprint"], "other settings are another plan"


def test_a_run_goes_on_with_shards_that_were_moved(
    rounds: Callable[..., StageData], world: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(world["pairs"], tmp_path / "moved")
    for round in (0, 1):
        before = Plan.load(tmp_path / "run" / f"plan-{round}")
        rounds(round, shards=str(tmp_path / "moved")).prepare_data()
        plan = Plan.load(tmp_path / "run" / f"plan-{round}")
        assert plan.fingerprint == before.fingerprint and plan.shards[0].path == tmp_path / "moved"
    with pytest.raises(AnyglotError, match="plan-1: made with the shards .*give the old shards back"):
        rounds(1, shards=world["text"]).prepare_data()


def test_a_damaged_checkpoint_is_one_clear_error(run: Callable[..., dict[str, Any]]) -> None:
    path = Path(run()["run_dir"]) / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(AnyglotError, match=r"last\.ckpt: no readable checkpoint .*; delete it to begin"):
        run()


def test_dropout_has_the_masks_of_its_step(run: Callable[..., dict[str, Any]], killing: Callable[[int], None]) -> None:
    drops = "--model.lora={r: 2, dropout: 0.5}"
    whole = run("--model.preset=lora", drops, name="whole")
    killing(5)
    with pytest.raises(Killed):
        run("--model.preset=lora", drops, name="cut")
    killing(-1)
    assert run("--model.preset=lora", drops, name="cut")["loss"] == whole["loss"]
    assert run("--model.preset=lora", "--model.lora={r: 2}", name="none")["loss"] != whole["loss"]
