"""`anyglot train tokenizer/*`: shipped YAMLs fit their classes, runs end with a tokenizer and honest figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from anyglot_recipes.cli import main
from anyglot_recipes.tokenizer import FitConfig, TokenizerRecipe, _build, train_tokenizer
from anyglot_recipes.train import CONFIGS, find_recipe, parse_recipe
from anyglot_tokenizers import ManifestError, load, read_audio, read_image, write_audio, write_image
from anyglot_tokenizers.meaning import HeardVQ
from anyglot_tokenizers.train import LitTokenizer

SHIPPED = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("tokenizer/*.yaml"))
SHORT = [
    "--train.max_steps=8",
    "--train.batch_size=4",
    "--train.log_every=4",
    "--train.validate_every=4",
    "--train.precision=32-true",
]
TINY_IMAGE = ["--media.side=16", "--model={channels: [8, 8], downsample_factor: 8, codebook_size: 8, stage_steps: 2}"]
TINY_SPEECH = [
    "--media.crop_seconds=0.2",
    "--model={dim: 16, encoder_depth: 1, decoder_depth: 1, codebook_dim: 8, num_quantizers: 2, codebook_size: 8, "
    "stage_steps: 2, num_mels: 20}",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(16):
        write_image(folder / f"{index}.png", torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(index)))
    (folder / "bad.png").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    for index in range(12):
        noise = torch.randn(1, 8000, generator=torch.Generator().manual_seed(index)) * 0.1
        write_audio(folder / f"{index}-{index % 3}.wav", noise, 16000)
    return folder


def test_each_modality_has_a_laptop_and_a_gpu_size() -> None:
    assert {f"tokenizer/{name}{size}" for name in ("image", "speech", "music") for size in ("", "_gpu")} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_fits_its_class(name: str) -> None:
    """Built with all its options, but narrow."""
    _, config = parse_recipe(find_recipe(name), ["--data", "somewhere"])
    assert isinstance(config, TokenizerRecipe) and config.data == "somewhere"
    train, image = config.train, "image" in name
    narrow = {"channels": [8] * len(config.model["channels"])} if image else {"dim": 8, "semantic_dim": 8}
    config.model |= narrow
    discriminator = train.adversary.get("discriminator", {}) | {"width": 4} | ({} if image else {"period_width": 1})
    options = {
        "adversary_start": train.adversary_start,
        "adversary": {**train.adversary, "discriminator": discriminator},
    }
    tokenizer = _build(config)
    module = LitTokenizer(tokenizer, max_steps=train.max_steps, loss=train.loss, ema_decay=train.ema_decay, **options)
    assert (module.adversary is None) == (train.adversary_start is None)
    assert tokenizer.modality == name.split("/")[1].removesuffix("_gpu")
    assert train.warmup_steps < train.max_steps and (train.adversary_start or 0) < train.max_steps
    if image:
        assert config.media.side % tokenizer.spec.downsample_factor == 0 and config.media.keep_side >= config.media.side


def test_a_folder_of_pictures(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "train",
        "tokenizer/image",
        "--data",
        str(pictures),
        "--run_dir",
        str(tmp_path / "run"),
        "--split.share=0.3",
    ]
    assert main([*command, *SHORT, *TINY_IMAGE]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"]["left_out"] == 1 and report["files"]["train"] + report["files"]["held_out"] == 16
    tokenizer = load(tmp_path / "run" / "tokenizer")
    names = {json.loads(line)["name"] for line in (tmp_path / "run/media/index.jsonl").read_text().splitlines()[1:]}
    assert names == {f"{index}.png" for index in range(16)}
    media = read_image(pictures / "0.png", size=16)[None]
    assert tokenizer.decode(tokenizer.encode(media)).shape == media.shape
    assert report["held_out"]["step"] == 8 and {"psnr", "usage/0", "perplexity/0"} <= set(report["train"])
    assert (tmp_path / "run/training/samples/0000008/images.png").is_file()
    assert main([*command, *SHORT, *TINY_IMAGE]) == 0  # done: nothing is trained again
    assert json.loads(capsys.readouterr().out) == report
    assert main([*command, *SHORT, *TINY_IMAGE, "--seed=5"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_other_media_in_the_same_run(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(pictures.glob("*.png"))[:12]:
        (other / path.name).write_bytes(path.read_bytes())
    command = ["train", "tokenizer/image", "--run_dir", str(tmp_path / "run"), "--split.share=0.3", *SHORT, *TINY_IMAGE]
    assert main([*command, "--data", str(pictures)]) == 0
    assert main([*command, "--data", str(other)]) == 2
    assert "other media" in capsys.readouterr().err


def test_a_trained_tokenizer_goes_on_with_its_decoder_alone(speech: Path, tmp_path: Path) -> None:
    def run(name: str, *more: str) -> dict:
        given = [
            "--data",
            str(speech),
            "--run_dir",
            str(tmp_path / name),
            "--split.share=0.3",
            "--teacher.source=",
            *more,
        ]
        function, config = parse_recipe(find_recipe("tokenizer/speech"), [*given, *SHORT, *TINY_SPEECH])
        report: dict = function(config)  # type: ignore[assignment]
        return report

    run("one", "--train.adversary_start=null")
    start = str(tmp_path / "one" / "tokenizer")
    report = run("two", "--train.adversary_start=null", "--start", start, "--train.from_codes=1")
    one, two = load(start), load(tmp_path / "two" / "tokenizer")
    media = read_audio(speech / "0-0.wav", sample_rate=16000)[None]
    assert torch.equal(one.encode(media).codes, two.encode(media).codes)
    assert not torch.equal(one.decode(one.encode(media)), two.decode(two.encode(media)))
    assert "usage/0" in report["train"] and "usage/1" not in report["train"]


def test_what_cannot_be_trained_is_refused_before_data_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    HeardVQ(dim=8, depth=1, channels=8).save_pretrained(tmp_path / "heard")
    given = [
        "--start",
        str(tmp_path / "heard"),
        "--data",
        str(tmp_path / "nowhere"),
        "--run_dir",
        str(tmp_path / "run"),
    ]
    assert main(["train", "tokenizer/speech", *given]) == 2
    assert "HeardVQ cannot be trained here" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("teacher", ["", "own"])
def test_a_folder_of_speech(teacher: str, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(speech), "--run_dir", str(tmp_path), f"--teacher.source={teacher}", "--teacher.steps=2"]
    arguments += ["--split.group=-(.)", "--split.share=0.3", "--split.held_out=['*-2.wav']"]
    assert main(["train", "tokenizer/speech", *arguments, *SHORT, *TINY_SPEECH, "--train.adversary_start=null"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == {"train": 8, "held_out": 4, "left_out": 0}
    codec = load(tmp_path / "tokenizer")
    assert codec.modality == "speech" and ("semantic_dim" in codec.config) == bool(teacher)
    assert {"mel", "usage/1"} <= set(report["held_out"])
    assert len(list((tmp_path / "training/samples/0000008").glob("*.wav"))) == 8


def test_wrong_settings_are_one_line(pictures: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({}, "--data"),
        ({"data": str(pictures), "tokenizer": "anyglot_tokenizers.image:Nobody"}, "module:Class"),
        ({"data": str(pictures), "tokenizer": "anyglot_tokenizers.errors:MediaError"}, "no tokenizer"),
        ({"data": str(pictures), "model": {"colour": 1}}, "arguments of"),
        ({"data": str(tmp_path / "nowhere")}, "no such folder"),
        ({"data": str(pictures), "train": FitConfig(from_codes=1)}, "give --start"),
    ):
        with pytest.raises(ManifestError, match=message):
            train_tokenizer(TokenizerRecipe(run_dir=str(tmp_path / "run"), **changes))
