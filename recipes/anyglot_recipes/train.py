"""`anyglot train`: a recipe's YAML against its program.

A chain of stages (nano, field, ...) is configured by a typed dataclass: every key of its YAML is a field, documented
there (`anyglot train nano --help`). A single stage of training is configured by the arguments of its classes, see
`stage_cli.py`. Command-line values beat the YAML's. What a recipe does is in its own module.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from anyglot_tokenizers.errors import ManifestError

CONFIGS = Path(__file__).parent / "configs"
PROGRAMS = {
    "nano": ("anyglot_recipes.nano", "nano", "NanoConfig"),
    "field": ("anyglot_recipes.field", "field_trial", "FieldConfig"),
    "tune": ("anyglot_recipes.tune", "tune", "TuneConfig"),
    "smol": ("anyglot_recipes.smol", "smol", "SmolConfig"),
    "nano_dpo": ("anyglot_recipes.nano_dpo", "nano_dpo", "NanoDPOConfig"),
    "nano_denoise": ("anyglot_recipes.nano_denoise", "nano_denoise", "NanoDenoiseConfig"),
    "nano_chat": ("anyglot_recipes.nano_chat", "nano_chat", "NanoChatConfig"),
    "nano_shots": ("anyglot_recipes.nano_shots", "nano_shots", "NanoShotsConfig"),
    "progressive": ("anyglot_recipes.progressive", "progressive", "ProgressiveConfig"),
    "tokenizer": ("anyglot_recipes.tokenizer", "train_tokenizer", "TokenizerRecipe"),
}
STAGES = ("stage", "dpo")
"""Programs of `stage_cli.py`."""


def find_recipe(name: str | None) -> Path:
    """The YAML of a shipped recipe's name, or the path itself.

    Raises:
        ManifestError: there is no such recipe.
    """
    shipped = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
    if name is None:
        raise ManifestError(f"which recipe? shipped are {', '.join(shipped)}; or give the path of a YAML file")
    path = CONFIGS / f"{name}.yaml" if name in shipped else Path(name)
    if not path.is_file():
        raise ManifestError(
            f"{name}: no such recipe; shipped are {', '.join(shipped)}, or give the path of a YAML file"
        )
    return path


def parse_recipe(path: Path, overrides: Sequence[str]) -> tuple[Callable[[Any], dict[str, Any] | None], Any]:
    """(the recipe's function, its configuration) of a YAML file and `--key value` overrides.

    `--config more.yaml` among the overrides layers another file over the first; later arguments win.

    Raises:
        ManifestError: the file is no YAML mapping or names no known program. Unknown keys and wrong types end the
            process with code 2 and a message of jsonargparse.
    """
    from jsonargparse import ArgumentParser

    program = program_of(path)
    module_name, function_name, class_name = PROGRAMS[program]
    module = importlib.import_module(module_name)
    config_class = getattr(module, class_name)
    parser = ArgumentParser(prog=f"anyglot train {path.stem}", default_env=False)
    parser.add_argument("--config", action="config", help="another YAML file over this one; later values win")
    parser.add_argument("--program", type=str, help="the recipe's program")
    parser.add_class_arguments(config_class)
    arguments = parser.instantiate(parser.parse_args([f"--config={path}", *overrides]))
    values = {k: v for k, v in vars(arguments).items() if k not in ("config", "program")}
    return getattr(module, function_name), config_class(**values)


def program_of(path: Path) -> str:
    """The program that a recipe's YAML names.

    Raises:
        ManifestError: the file is no YAML mapping or names no known program.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    program = content.get("program") if isinstance(content, dict) else None
    if program not in (*PROGRAMS, *STAGES):
        raise ManifestError(f"{path}: needs a key 'program' with one of {', '.join((*PROGRAMS, *STAGES))}")
    return str(program)


def run_recipe(name: str | None, overrides: Sequence[str]) -> int:
    """Run a recipe; its report goes to stdout as one JSON object (from the first of several devices)."""
    path = find_recipe(name)
    program = program_of(path)
    if program in STAGES:
        from anyglot_recipes.stage_cli import run_stage

        report = run_stage(program, [f"--config={path}", *overrides], path.stem)
    else:
        function, config = parse_recipe(path, overrides)
        report = function(config)
    if report is not None:
        print(json.dumps(report))
    return 0
