"""`anyglot expand`: a small Llama and its tokenizer become a model folder, which a modality is then added to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from anyglot_lm.segments import Sample, Segment
from anyglot_lm.shards import ShardWriter
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import id_map
from anyglot_recipes.expand import add_parser, parse_blocks
from anyglot_recipes.pairs import write_pairs
from anyglot_tokenizers.errors import AnyglotError, ManifestError

SAYINGS = ["a large red circle at the top left", "make the square blue"]
ROWS = 448  # of the backbone


@pytest.fixture(scope="module")
def tokenizers(tiny_model: UnifiedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers")
    for modality, tokenizer in tiny_model.tokenizers.items():
        tokenizer.save_pretrained(path / modality)
    return path


def run(words: Sequence[object]) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["expand", *map(str, words)])
    code: int = arguments.run(arguments)
    return code


def text_logits(model: torch.nn.Module, ids: torch.Tensor, size: int) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits[..., :size]
    return found


def test_a_model_folder_from_a_backbone(
    backbone: Path, tokenizers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = ["image.grid=4x4", "speech.num_quantizers=1", "speech.max_frames=40", "speech.pattern=first"]
    words = ["--backbone", backbone, "--tokenizers", tokenizers, "--blocks", *blocks, "--out", tmp_path / "m", "--json"]
    assert run(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["modalities"] == ["image", "music", "speech"] and report["text"] == ROWS
    model = UnifiedModel.from_pretrained(tmp_path / "m")
    assert model.template.tells_texts_apart  # a transcript and the answer after it stay two
    assert (model.vocabulary.block("image").grid, model.vocabulary.block("image").pattern) == ((4, 4), "raster")
    assert model.vocabulary.block("speech").max_length == 40 and model.vocabulary.block("music").num_quantizers == 2
    assert (tmp_path / "m" / "tokenizer.json").is_file() and not (tmp_path / "m" / "text.model").exists()
    ids = torch.tensor([model.text.encode(SAYINGS[0])])
    plain = AutoModelForCausalLM.from_pretrained(backbone)
    assert torch.equal(text_logits(model.model, ids, ROWS), text_logits(plain, ids, ROWS))
    weight = model.model.get_input_embeddings().weight
    eos, old = model.vocabulary.controls["eos"], plain.config.eos_token_id
    assert (weight[eos] - weight[old]).abs().max() < 0.1 * weight[:ROWS].std()
    assert model.model.config.eos_token_id == eos
    for to in ("image", "speech", "text"):
        assert model.generate(to, text="a red <|im_end|> circle", max_ids=60).modality == to

    image = torch.zeros(2, 4, 4, dtype=torch.int64).numpy()
    with ShardWriter(tmp_path / "shards", model.vocabulary, model.template, text=model.text) as writer:
        writer.add_sample(Sample([Segment("text", SAYINGS[0], "user"), Segment("image", image, "assistant")]), "t")


def test_a_modality_is_added_to_the_folder(backbone: Path, tokenizers: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    given = [tokenizers / "image", f"speech={tokenizers / 'speech'}"]
    run(["--backbone", backbone, "--tokenizers", *given, "--blocks", "image.grid=4x4", "--out", first])
    add = ["--add", f"music={tokenizers / 'music'}", "--blocks", "music.max_frames=30", "--init", "codebook"]
    run(["--model", first, *add, "--out", second])
    old, new = UnifiedModel.from_pretrained(first), UnifiedModel.from_pretrained(second)
    assert new.vocabulary.modalities == ("image", "speech", "music") and set(new.tokenizers) == {
        "image",
        "speech",
        "music",
    }
    places = torch.from_numpy(id_map(old.vocabulary, new.vocabulary))
    sample = Sample([Segment("text", SAYINGS[1], "user")])
    ids = torch.from_numpy(old.template.prompt(sample, old.vocabulary, old.text))[None]
    used = (places >= 0).nonzero()[:, 0]
    before = text_logits(old.model, ids, old.vocabulary.size)[..., used]
    after = text_logits(new.model, places[ids], new.vocabulary.size)[..., places[used]]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert new.generate("music", text="sing", max_ids=60).media is not None
    with pytest.raises(ManifestError, match="named twice"):
        run(["--model", first, "--add", f"speech={tokenizers / 'music'}", "--out", tmp_path / "x"])
    with pytest.raises(AnyglotError, match="they are for --backbone"):
        run(["--model", first, "--add", tokenizers / "music", "--overwrite", "--out", tmp_path / "x"])


def test_rare_text_makes_room(backbone: Path, tokenizers: Path, tmp_path: Path) -> None:
    given = ["--tokenizers", f"speech={tokenizers / 'speech'}", "--init", "mean", "--rope_scaling", "yarn:2"]
    run(["--backbone", backbone, *given, "--overwrite", "--out", tmp_path / "m"])
    model = UnifiedModel.from_pretrained(tmp_path / "m")
    assert len(model.model.get_input_embeddings().weight) == ROWS
    assert model.vocabulary.size == 384 and model.vocabulary.text_size == 384 - 5 - 1 - 1 - 32
    assert model.text.size <= model.vocabulary.text_size and model.max_length == 1280
    assert model.text.decode(model.text.encode(SAYINGS[0])) == SAYINGS[0]
    assert model.generate("speech", text=SAYINGS[0], max_ids=40).media is not None


def test_what_is_there_is_left_alone(backbone: Path, tokenizers: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    given = ["--backbone", backbone, "--tokenizers", tokenizers / "music", "--overwrite", "--out", tmp_path / "m"]
    assert run(given) == 0, "an empty folder"
    before = (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ManifestError, match="m: exists already; delete it, or give another --out"):
        run([*given, "--seed", "1"])
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == before


def test_prepared_pairs_read_either_text_tokenizer(backbone: Path, tokenizers: Path, tmp_path: Path) -> None:
    run(["--backbone", backbone, "--tokenizers", tokenizers / "music", "--out", tmp_path / "m"])
    with pytest.raises(AnyglotError, match="prepared"):  # after the model folder was read
        write_pairs(tmp_path / "prepared", tmp_path / "m")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image"], "MODALITY.KEY=VALUE"),
        (["image.size=3"], "KEY one of num_quantizers"),
        (["image.grid=axb"], "is no number"),
        (["speech.max_frames=many"], "is no number"),
    ],
)
def test_wrong_blocks(words: list[str], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        parse_blocks(words)


def test_wrong_use_is_one_clear_error(backbone: Path, tokenizers: Path, tmp_path: Path) -> None:
    start = ["--backbone", backbone, "--out", tmp_path / "x", "--tokenizers"]
    with pytest.raises(
        ManifestError, match="image: its codes lie on a grid of axes height, width; .* image.grid=16x16"
    ):
        run([*start, tokenizers])
    with pytest.raises(ManifestError, match="blocks for 'image', which has no tokenizer here"):
        run([*start, tokenizers / "music", "--blocks", "image.grid=4x4"])
    with pytest.raises(ManifestError, match="a second tokenizer for 'music'"):
        run([*start, tokenizers / "music", f"music={tokenizers / 'music'}"])
    with pytest.raises(AnyglotError, match="init='huh'"):
        run([*start, tokenizers / "music", "--init", "huh"])
    with pytest.raises(AnyglotError, match="write TYPE:FACTOR"):
        run([*start, tokenizers / "music", "--rope_scaling", "yarn"])
    assert not (tmp_path / "x").exists()
