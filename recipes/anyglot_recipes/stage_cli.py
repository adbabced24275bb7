"""The one program behind the stage recipes: LightningCLI from a YAML file to a model folder.

    RUN_DIR/plan  last.ckpt  logs/version_*/metrics.csv  tensorboard/  curves.png  config.yaml  model/

`Trainer`, `Stage` and `StageData` are configured by their own arguments (`anyglot train align --help`). A run that is
started again goes on from `last.ckpt`; its settings are those of the YAML and the command line, never those that a
checkpoint remembers. What a stage trains and on what is in `stage.py` and `stage_data.py`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from anyglot_lm.checkpoint import AtomicCheckpoint
from anyglot_lm.segments import Template
from anyglot_lm.train import check_checkpoint_every, draw_run
from anyglot_recipes.dpo import DPOData, DPOStage
from anyglot_recipes.stage import Stage
from anyglot_recipes.stage_data import StageData, round_end
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.files import atomic_write
from anyglot_tokenizers.precision import resolve_precision

PROGRAMS: dict[str, tuple[type[Stage], type[StageData]]] = {"stage": (Stage, StageData), "dpo": (DPOStage, DPOData)}
PRECISIONS = {"auto": "auto", "bf16": "bf16-mixed", "fp32": "32-true"}


class KeepConfig(Callback):
    """Writes all settings to `config.yaml` of the run folder, once the run has accepted its checkpoint."""

    def __init__(self, cli: StageCLI) -> None:
        self.cli = cli

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with atomic_write(Path(self.cli.config_init.run_dir) / "config.yaml") as temporary:
                temporary.write_text(self.cli.parser.dump(self.cli.config, skip_none=False))


EXPORTS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class StageCLI(LightningCLI):
    """Parses a stage's settings and makes its model, data and trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--program", type=str, help="stage, or dpo for preference tuning")
        parser.add_argument("--run_dir", type=str, default="runs/stage", help="everything is written below")
        parser.add_argument("--precision", type=str, default="auto", help="auto, bf16 or fp32; quantizers stay fp32")
        parser.add_argument(
            "--checkpoint_every", type=int, default=50, help="steps between checkpoints, a multiple of model.log_every"
        )
        parser.add_argument("--export_dtype", type=str, default="bf16", help="of the exported model, bf16 or fp32")

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyper-parameters beat the command line; here they never do."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with this program's precision, strategy, loggers and checkpoint."""
        config = self.config_init
        check_checkpoint_every(config.checkpoint_every, self.model.log_every)
        if config.precision not in PRECISIONS:
            raise ManifestError(f"precision {config.precision!r}; use {', '.join(PRECISIONS)}")
        precision = PRECISIONS[config.precision]
        precision = resolve_precision(precision) if precision == "auto" else precision
        if config.export_dtype not in EXPORTS:
            raise ManifestError(f"export_dtype {config.export_dtype!r}; use {', '.join(EXPORTS)}")
        if config.trainer.accumulate_grad_batches != 1 or config.trainer.val_check_interval is not None:
            raise ManifestError(
                "trainer.accumulate_grad_batches and trainer.val_check_interval follow from data.packs_per_step and "
                "data.val_every; give those instead"
            )
        own = {"precision": "precision", "logger": "run_dir", "log_every_n_steps": "model.log_every"}
        given = [name for name in own if getattr(config.trainer, name) is not None]
        if given:
            raise ManifestError(
                f"{', '.join(f'trainer.{name}' for name in given)}: is set by this program; give "
                f"{', '.join(f'--{own[name]}' for name in given)} instead"
            )
        if self.model.frozen_dtype is None:
            self.model.frozen_dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
        if self.model.frozen_dtype == torch.bfloat16 and not precision.startswith("bf16"):
            raise ManifestError(
                f"model.frozen_dtype bf16 needs bf16 arithmetic, but precision {config.precision} is fp32 here; give "
                "--precision bf16, or --model.frozen_dtype auto"
            )
        run_dir = Path(config.run_dir)
        loggers: list[Logger] = [CSVLogger(run_dir, name="logs"), TensorBoardLogger(run_dir, name="tensorboard")]
        kwargs = {"logger": loggers, "precision": precision, **kwargs}
        if config.trainer.strategy == "fsdp2":
            if self.model.keep_text:
                raise ManifestError(
                    "model.keep_text runs the model once more on ranks with plain text, which FSDP2 does not allow; "
                    "give trainer.strategy ddp, or leave model.keep_text out"
                )
            devices = config.trainer.devices
            if not str(devices).isdigit():
                raise ManifestError(f"trainer.strategy fsdp2 needs trainer.devices as a number, not {devices!r}")
            world = int(devices) * config.trainer.num_nodes
            kwargs["strategy"] = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
            kwargs["precision"] = "32-true"  # FSDP2 casts what it gathers, so autocast has nothing to do
            self.model.param_dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
        self.checkpoint = AtomicCheckpoint(run_dir / "last.ckpt", config.checkpoint_every)
        kwargs["callbacks"] = [*(config.trainer.callbacks or []), self.checkpoint, KeepConfig(self)]
        kwargs["log_every_n_steps"] = self.model.log_every
        return super().instantiate_trainer(**kwargs)


DEFAULTS = {
    "max_epochs": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
}


def parse_stage(program: str, arguments: Sequence[str], name: str = "stage") -> StageCLI:
    """Model, data and trainer of a stage, from `--config=FILE` and `--key=value` arguments; nothing has run yet."""
    model, data = PROGRAMS[program]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # argv is another program's
        return StageCLI(
            model,
            data,
            run=False,
            args=list(arguments),
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=DEFAULTS,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": f"anyglot train {name}", "default_env": False},
        )


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """`{"data.shards": ["a"], "run_dir": "b"}` -> `['--data.shards=["a"]', "--run_dir=b"]`."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in plain.items()]


def check_whole_names(settings: Mapping[str, Any], name: str) -> None:
    """Refuse what `--name.model.lr=1` makes of a chain's settings of a stage: sections, of which only some would count.

    Raises:
        ManifestError: a setting that is not named as a whole, such as "model.lr".
    """
    nested = sorted(key for key, value in settings.items() if isinstance(value, dict) and "." not in key)
    if nested:
        raise ManifestError(
            f"{name} holds {', '.join(nested)} as sections; give its settings by their whole names, as in "
            f"""--{name} '{{"model.lr": 0.0001, "trainer.max_steps": 100}}' (all: they replace those of the YAML)"""
        )


def run_stage(program: str, arguments: Sequence[str], name: str = "stage") -> dict[str, Any] | None:
    """Run a stage, or go on with it.

    Returns:
        Its last loss, run folder and model folder; None on every rank but the first.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("anyglot_lm").setLevel(logging.INFO)
    for noise in (
        "You defined a `validation_step`",
        ".*isinstance\\(treespec, LeafSpec\\)",
        ".*does not have many workers",
    ):
        warnings.filterwarnings("ignore", message=noise)
    cli = parse_stage(program, arguments, name)
    rounds = cli.datamodule.adapt_rounds
    for round in range(rounds):
        if round:
            cli = parse_stage(program, arguments, name)
        _fit(cli, round, rounds)
    run_dir = Path(cli.config_init.run_dir)
    cli.model.export(run_dir / "model", EXPORTS[cli.config_init.export_dtype])
    if not cli.trainer.is_global_zero:
        return None
    return {"loss": cli.model.last_loss, "run_dir": str(run_dir), "model": str(run_dir / "model")}


def _fit(cli: StageCLI, round: int, rounds: int) -> None:
    """Train to the end of a round, from where the run stands; a round that is over is left alone."""
    run_dir, trainer = Path(cli.config_init.run_dir), cli.trainer
    module, data = cli.model, cli.datamodule
    if trainer.max_steps < 1:
        raise ManifestError("trainer.max_steps is missing; the plan and the schedule need the length of the run")
    if data.val_shards and data.val_every > trainer.max_steps:
        raise ManifestError(
            f"data.val_every {data.val_every} is beyond trainer.max_steps {trainer.max_steps}, so nothing would be "
            "validated; lower it, or leave out data.val_shards"
        )
    module.max_steps = trainer.max_steps
    template = Template.load(module.start / "template.json")
    data.attach(run_dir, module.vocabulary, template, trainer.max_steps, round)
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    trainer.val_check_interval = data.val_every * trainer.accumulate_grad_batches
    last = round + 1 == rounds
    if not last and data.is_over():
        return
    trainer.fit_loop.epoch_loop.max_steps = round_end(trainer.max_steps, rounds, round)
    cli.checkpoint.fit(trainer, module, data)
    if trainer.global_step < trainer.fit_loop.epoch_loop.max_steps and not trainer.should_stop:
        raise ManifestError(
            f"{run_dir}: the data ended after {trainer.global_step} of {trainer.fit_loop.epoch_loop.max_steps} steps; "
            "the plan there was made with other settings of data: give those back, or choose another run_dir"
        )
    if trainer.is_global_zero:
        draw_run(run_dir)
        if not last:
            data.next_round(module.last)
