"""Shipped YAMLs parse against their programs; command-line values win; mistakes are one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyglot_recipes.chain import BlockConfig, LMConfig, Run, check_lm
from anyglot_recipes.cli import main
from anyglot_recipes.nano import tokenizers_of
from anyglot_recipes.shipped import NANO
from anyglot_recipes.train import CONFIGS, PROGRAMS, find_recipe, parse_recipe, program_of
from anyglot_tokenizers.errors import ManifestError

CHAINS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if program_of(path) in PROGRAMS]


@pytest.mark.parametrize("path", CHAINS, ids=lambda p: p.stem)
def test_every_shipped_chain_parses(path: Path) -> None:
    """(Stages are parsed and run in test_stage.py.)"""
    _, config = parse_recipe(path, [])
    if hasattr(config, "lm"):
        assert config.lm.max_steps > 0
        assert config.lm.checkpoint_every % config.lm.log_every == 0


def test_command_line_beats_yaml() -> None:
    _, config = parse_recipe(find_recipe("nano"), ["--lm.max_steps", "7", "--image.model.num_patterns=64"])
    assert config.lm.max_steps == 7
    assert config.image.model["num_patterns"] == 64
    assert config.image.model["num_tones"] == 16


def test_later_yaml_layers_over_the_first(tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("lm: {max_steps: 9}\n")
    _, config = parse_recipe(find_recipe("nano"), [f"--config={more}"])
    assert config.lm.max_steps == 9
    assert config.lm.blocks["music"].num_quantizers == 2


def test_tokenizers_that_are_taken_must_be_there(tmp_path: Path) -> None:
    def refused(message: str, *given: str) -> None:
        function, config = parse_recipe(find_recipe("nano_short"), [f"--run_dir={tmp_path / 'run'}", *given])
        with pytest.raises(ManifestError, match=message):
            function(config)
        assert not (tmp_path / "run").exists()

    refused(r"there is no .*tokenizers/image.*text\.model", f"--tokenizers={tmp_path}")
    refused("has tokenizers of its own", f"--tokenizers={NANO}", f"--start={NANO}", "--lm.factored=false")
    assert len(set(tokenizers_of(NANO))) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--lm.precision=bf16", "precision 'bf16' is not one of"),
        ("--speech.precision=bf16", "precision 'bf16' is not one of"),
        ("--lm.modality_weights={sound: 2}", "no modality 'sound'; there are text, image, .*speech"),
        ("--lm.modality_weights={speech: -1}", "the factor of 'speech' is -1"),
        ("--lm.blocks.sound={pattern: first}", r"lm\.blocks: no modality sound; there are image, speech, music"),
        ("--lm.blocks.speech.pattern=spiral", "unknown pattern 'spiral'"),
        ("--lm.blocks.speech.input_pattern=spiral", "unknown pattern 'spiral'"),
        ("--lm.blocks.music.num_quantizers=9", "music: num_quantizers=9, but the tokenizer has"),
        ("--lm.text_vocab_size=257", r"lm\.text_vocab_size 257 must be 258"),
        ("--lm.lr=-0.001", r"lm\.lr -0\.001 must be positive"),
        ("--lm.rows_lr=-1", r"lm\.rows_lr -1\.0 must be 0 or more"),
        ("--lm.cooldown=-0.5", r"lm\.cooldown -0\.5 a share"),
    ],
)
def test_settings_that_would_fail_after_hours_are_refused_at_once(given: str, message: str, tmp_path: Path) -> None:
    function, config = parse_recipe(find_recipe("nano_short"), [f"--run_dir={tmp_path / 'run'}", given])
    with pytest.raises(ManifestError, match=message):
        function(config)
    assert not (tmp_path / "run").exists()


def test_factors_of_one_codebook_are_known() -> None:
    check_lm(LMConfig(blocks={"music": BlockConfig(num_quantizers=2)}, modality_weights={"text": 2, "music/1": 0.5}))


def test_unknown_recipe_names_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nonesuch"]) == 2
    assert "nano" in capsys.readouterr().err


def test_yaml_without_program(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("seed: 1\n")
    with pytest.raises(ManifestError, match="program"):
        parse_recipe(bad, [])


def test_unknown_key_ends_with_code_2() -> None:
    with pytest.raises(SystemExit) as end:
        parse_recipe(find_recipe("nano"), ["--lm.max_stepz", "7"])
    assert end.value.code == 2


def test_what_a_kill_left_of_a_part_goes_when_it_is_made_again(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        (tmp_path / "parts" / f".{folder.name}.abc123").mkdir()  # as a ShardWriter's
        raise KeyboardInterrupt

    run = Run(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        run.once("parts/1", killed)
    (tmp_path / "parts" / ".10.tmp.abc123").mkdir()  # another part's
    run.once("parts/1", lambda folder: None)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [".10.tmp.abc123", "1"]


def test_settings_are_what_they_say(tmp_path: Path) -> None:
    Run(tmp_path, {"lr": 1e-3, "seed": 1})
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"seed": 1.0, "lr": 0.001}))  # written by another program
    Run(tmp_path, {"lr": 1e-3, "seed": 1})
    path.write_text("{")
    with pytest.raises(ManifestError, match=r"settings\.json: cannot be read .* choose another --run_dir"):
        Run(tmp_path, {"lr": 1e-3, "seed": 1})


def test_runs_from_before_history_noise_and_rows_lr_go_on(tmp_path: Path) -> None:
    settings = {"lm": LMConfig(max_steps=7)}
    Run(tmp_path, settings)
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert kept["lm"]["max_steps"] == 7 and not {"history_noise", "rows_lr"} & kept["lm"].keys()
    with pytest.raises(ManifestError, match=r"lm\.history_noise: nothing then"):
        Run(tmp_path, {"lm": LMConfig(max_steps=7, history_noise={"speech": 0.3})})
    with pytest.raises(ManifestError, match=r"lm\.rows_lr: nothing then, 0\.0 now"):
        Run(tmp_path, {"lm": LMConfig(max_steps=7, rows_lr=0.0)})
