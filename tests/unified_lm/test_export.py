"""Exports: plain transformers folders that load without us, still load with us, and say what they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig

from anyglot_lm.export import export, markers, with_markers
from anyglot_lm.hf_text import HFTextTokenizer
from anyglot_lm.model import new_llama
from anyglot_lm.segments import CHAT, Sample, Segment
from anyglot_lm.text import TextTokenizer
from anyglot_lm.unified import UnifiedModel
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import CheckpointError, ManifestError
from anyglot_tokenizers.image import ImageVQ

SAYINGS = ["a large red circle at the top left", "make the square blue", "the user asks the assistant"] * 4

WITHOUT_US = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("anyglot"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = load_file(folder + "/../ids.safetensors")["ids"]
    with torch.no_grad():
        save_file({"logits": model(input_ids=ids).logits}, folder + "/../logits.safetensors")
    use = model.generation_config
    print(type(model).__name__, use.bos_token_id, use.eos_token_id, use.pad_token_id, use.repetition_penalty)
assert not [name for name in sys.modules if name.startswith("anyglot")]
"""


def byte_level() -> HFTextTokenizer:
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(SAYINGS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    raw.add_tokens([AddedToken("<think>", special=False), AddedToken("        ", special=False)])
    return HFTextTokenizer(raw.to_str().encode())


def write_model(folder: Path, text: Any) -> Path:
    image = ImageVQ(channels=(8,), patch=8, downsample_factor=8, codebook_size=16, codebook_dim=8).eval()
    vocabulary = Vocabulary.build(
        text.size + 7,  # rows of a backbone are padded
        BlockSpec.from_code_spec(image.spec, pattern="raster", grid=(2, 2)),
        text_fingerprint=text.fingerprint,
    )
    llama = new_llama(vocabulary, hidden_size=32, num_layers=2, num_heads=2, max_length=160)
    llama.generation_config = GenerationConfig(repetition_penalty=1.3, do_sample=True)
    UnifiedModel(llama, vocabulary, CHAT, text, {"image": image}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "model", byte_level())


@pytest.fixture(scope="module")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sp") / "model", TextTokenizer.train(SAYINGS, vocab_size=300))


@pytest.fixture(scope="module")
def exported(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "exported"
    report = export(hf_model, out, license="apache-2.0", base_model="someone/tiny-lm")
    assert report["auto_tokenizer"] and report["architecture"] == "LlamaForCausalLM" and report["dtype"] == "float32"
    return out


def test_loads_without_us_with_the_same_logits(hf_model: Path, sp_model: Path, tmp_path: Path) -> None:
    expected, lines = [], []
    for name, source in (("hf", hf_model), ("sp", sp_model)):
        export(source, tmp_path / name / "out", dtype="fp32")
        model = UnifiedModel.from_pretrained(source)
        ids = torch.randint(0, model.vocabulary.size, (3, 20))
        save_file({"ids": ids}, tmp_path / name / "ids.safetensors")
        with torch.no_grad():
            expected.append(model.model(input_ids=ids).logits)
        controls = model.vocabulary.controls
        lines.append(f"LlamaForCausalLM {controls['bos']} {controls['eos']} {controls['pad']} None")
    command = [sys.executable, "-I", "-c", WITHOUT_US, str(tmp_path / "hf" / "out"), str(tmp_path / "sp" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == lines
    for name, logits in zip(("hf", "sp"), expected, strict=True):
        found = load_file(tmp_path / name / "logits.safetensors")["logits"]
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["hf_model", "sp_model"])
def test_is_still_our_folder(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source, out = request.getfixturevalue(kind), tmp_path / "out"
    report = export(source, out, dtype="bf16")
    assert report["dtype"] == "bfloat16" and json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = UnifiedModel.from_pretrained(source), UnifiedModel.from_pretrained(out)
    assert after.vocabulary.fingerprint == before.vocabulary.fingerprint
    assert after.text.fingerprint == before.text.fingerprint
    assert after.tokenizers["image"].fingerprint == before.tokenizers["image"].fingerprint
    for name, weight in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], weight.bfloat16().float())
    assert not [file for file in out.rglob("*") if file.suffix in (".py", ".bin", ".pt")]
    after.save_pretrained(out)  # over the export: a plain model folder again
    again = UnifiedModel.from_pretrained(out)
    assert again.text.fingerprint == before.text.fingerprint
    assert export(out, tmp_path / "again")["auto_tokenizer"] == report["auto_tokenizer"]


@pytest.fixture(scope="module")
def pair(exported: Path) -> tuple[Any, UnifiedModel]:
    """The export as transformers and as we read it."""
    return AutoTokenizer.from_pretrained(exported), UnifiedModel.from_pretrained(exported)


TURNS = st.lists(st.text(max_size=30), min_size=1, max_size=5)


@given(TURNS)
@example(["  two  spaces, a tab\t, lines\r\n\n         nine ", ""])
@example(["<|im_start|>user<|im_end|><think><|endoftext|><s>", "\n", "<|anyglot|>"])
@example(["e\u0301 \u212b \x00\ufeff\u200b \U0001f600", "        ", " x"])
def test_chat_template_writes_our_ids(pair: tuple[Any, UnifiedModel], turns: list[str]) -> None:
    tokenizer, model = pair
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    sample = Sample([Segment("text", turn, roles[i % 2]) for i, turn in enumerate(turns)])  # type: ignore[arg-type]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert whole == model.template.render(sample, model.vocabulary, model.text)[0].tolist()
    if len(turns) % 2:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == model.template.prompt(sample, model.vocabulary, model.text).tolist()
        parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        assert tokenizer.apply_chat_template(parts, add_generation_prompt=True)["input_ids"] == prompt


def test_auto_tokenizer(pair: tuple[Any, UnifiedModel], tmp_path: Path) -> None:
    tokenizer, model = pair
    controls = model.vocabulary.controls
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert named == (controls["bos"], controls["eos"], controls["pad"])
    ids = model.text.encode("a red  circle         <|im_end|>")
    assert tokenizer("a red  circle         <|im_end|>")["input_ids"] == ids
    assert tokenizer.decode([*ids, controls["eos"], model.vocabulary.size - 1], skip_special_tokens=True) == (
        "a red  circle         <|im_end|>"
    )
    batch = tokenizer(["a", "a red circle"], padding=True)["input_ids"]
    assert batch[0][0] == controls["pad"] and len(batch[0]) == len(batch[1])
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a red")["input_ids"] == model.text.encode("a red")


@pytest.mark.parametrize(
    ("messages", "prompt", "message"),
    [
        ([{"role": "system", "content": "a"}], True, "there is no system"),
        ([{"role": "assistant", "content": "a"}] * 2, False, "take turns"),
        ([{"role": "user", "content": [{"type": "image"}]}], True, "AnyglotProcessor takes media"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}], True, "a message here is one text"),
        ([{"role": "user", "content": "say <|anyglot:eos|>"}], True, "AnyglotProcessor takes any text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], True, "the last word"),
    ],
)
def test_what_the_chat_template_cannot_write_exactly(
    pair: tuple[Any, UnifiedModel], messages: list[Any], prompt: bool, message: str
) -> None:
    with pytest.raises(TemplateError, match=message):
        pair[0].apply_chat_template(messages, add_generation_prompt=prompt)


def test_card(pair: tuple[Any, UnifiedModel], exported: Path, sp_model: Path, tmp_path: Path) -> None:
    card = (exported / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "any-to-any",
        "base_model": "someone/tiny-lm",
        "tags": ["anyglot", "image"],
    }
    vocabulary = pair[1].vocabulary
    block = vocabulary.block("image")
    assert (
        f"| {block.first_id} to {block.stop_id - 1} | 32 | codes of image: {block.first_id} + 16 * codebook + code |"
        in body
    )
    rows = [line.split("|")[1:3] for line in body.splitlines() if line.startswith("| ") and line[2].isdigit()]
    bounds = [[int(x) for x in ids.split(" to ")] for ids, _ in rows]
    assert [low[0] for low in bounds[1:]] == [high[-1] + 1 for high in bounds[:-1]], "every id is in one row"
    assert (bounds[0][0], bounds[-1][-1]) == (0, vocabulary.size - 1)
    assert [int(count) for _, count in rows] == [b[-1] - b[0] + 1 for b in bounds]
    assert "| image | `ImageVQ` | 2 x 16 | raster | 2x2 cells | apache-2.0 |" in body
    assert "chat template" in body and "--skip-tokenizer-init" not in body
    export(sp_model, tmp_path / "out")
    other = (tmp_path / "out" / "README.md").read_text()
    assert "There is no `AutoTokenizer`" in other and "--skip-tokenizer-init" in other and "base_model" not in other


def test_tokenizers_without_gaps_stay_as_they_are() -> None:
    content = {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}, "added_tokens": []}
    assert with_markers(content, {"<|x|>": 7}) is None


def test_markers_are_the_only_special_tokens() -> None:
    text = byte_level()
    vocabulary = Vocabulary.build(text.size + 100)
    found = with_markers(json.loads(text._content), markers(vocabulary))
    assert found is not None
    special = {token["content"]: token["id"] for token in found["added_tokens"] if token["special"]}
    assert special == {f"<|anyglot:{name}|>": place for name, place in vocabulary.controls.items()}
    again = Tokenizer.from_str(json.dumps(found))
    rng = np.random.default_rng(0)
    for _ in range(200):
        phrase = "".join(rng.choice(["<|im_end|>", "<think>", "        ", "red", " ", "\n", "x"], 6))
        assert again.encode(phrase).ids == text.encode(phrase)


def test_wrong_use(hf_model: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="exists already"):
        export(hf_model, exported)
    with pytest.raises(ManifestError, match=r"nowhere.config.json: cannot be read"):
        export(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(CheckpointError, match="needs code of its own"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
