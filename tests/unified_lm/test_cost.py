"""The calculator against real models: parameters, optimizer states, what autograd keeps, counted FLOPs."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from anyglot_lm.cost import (
    BACKBONES,
    DEVICES,
    GIB,
    PRECISIONS,
    PRESETS,
    Backbone,
    activation_bytes,
    estimate,
    flops_per_id,
)
from anyglot_lm.factored import factor_rows
from anyglot_lm.model import new_llama
from anyglot_lm.tuning import Lora, choose_trained
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import ManifestError
from anyglot_tokenizers.optim import MuonAdamW

KINDS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
OLD, NEW, RANK, IDS = 200, 100, 16, 128


def build(kind: str = "llama", preset: str | None = None, **settings: Any) -> Any:
    """A small model with OLD + NEW rows, prepared for a preset."""
    numbers: dict[str, Any] = dict(
        vocab_size=OLD + NEW,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    if kind == "qwen2":
        del numbers["head_dim"]
    model = AutoModelForCausalLM.from_config(KINDS[kind](**{**numbers, **settings}))
    if preset is not None:
        lora = Lora(r=RANK) if preset == "lora" else None
        choose_trained(model, preset, first_new=OLD, lora=lora, train_old_rows=preset == "full")  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_real_models(kind: str, tied: bool) -> None:
    bias = {"attention_bias": True} if kind in ("llama", "qwen3") else {}
    for settings in ({}, bias, {"mlp_bias": True} if kind == "llama" else {}):
        model = build(kind, tie_word_embeddings=tied, **settings)
        backbone = Backbone.from_config(model.config)
        assert backbone.parameters() == sum(p.numel() for p in model.parameters())
        assert backbone == Backbone.from_config(json.loads(model.config.to_json_string()))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("llama-1.3b", 1_345_423_360),
        ("llama-7b", 6_738_415_616),
    ],
)
def test_parameters_of_published_models(name: str, published: int) -> None:
    assert BACKBONES[name].parameters() == published


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_of_weights_gradients_and_states(preset: str, tied: bool, optimizer: str) -> None:
    model = build("qwen3", preset, tie_word_embeddings=tied)
    stepper = MuonAdamW(model, lr=1e-3, muon=optimizer == "muon")
    model(input_ids=torch.arange(OLD - 30, OLD + 30)[None]).logits.square().mean().backward()
    stepper.step()
    states = [v for state in stepper.state.values() for v in state.values() if v.ndim]  # but for AdamW's step counts
    cost = estimate(
        Backbone.from_config({**model.config.to_dict(), "vocab_size": OLD}),
        vocab_size=OLD + NEW,
        preset=preset,
        train_old_rows=preset == "full",
        lora_rank=RANK,
        optimizer=optimizer,
        precision="32-true",
    )
    assert cost.memory["weights"] == sum(p.nbytes for p in model.parameters())
    assert cost.memory["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert cost.memory["optimizer"] == sum(v.nbytes for v in states)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_full_leaves_old_rows_alone_unless_told() -> None:
    model = build()
    choose_trained(model, "full", first_new=OLD)
    backbone = Backbone.from_config({**model.config.to_dict(), "vocab_size": OLD})
    split = estimate(backbone, vocab_size=OLD + NEW)
    assert split.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = estimate(backbone, vocab_size=OLD + NEW, train_old_rows=True)
    assert whole.trained == whole.parameters == split.parameters
    assert estimate(backbone).trained == backbone.parameters()


def kept_bytes(model: Any, precision: str) -> int:
    """Bytes of what autograd keeps from the ids to the final hidden states, without weights and copies of weights."""
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(IDS)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            model.base_model(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state.square().sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_activations_are_what_autograd_keeps(kind: str, precision: str, preset: str) -> None:
    model = build(kind)
    if precision == "bf16-true":
        model = model.bfloat16()
    choose_trained(
        model,
        preset,  # type: ignore[arg-type]
        first_new=OLD,
        lora=Lora(r=RANK) if preset == "lora" else None,
        train_old_rows=preset == "full",
    )
    backbone = Backbone.from_config(model.config)
    said = activation_bytes(backbone, IDS, PRECISIONS[precision], preset=preset, lora_rank=RANK)
    assert said == pytest.approx(kept_bytes(model, precision), rel=0.005)


def test_checkpointing_keeps_the_input_of_each_layer() -> None:
    kept = []
    for layers in (2, 6):
        model = build(num_hidden_layers=layers).train()
        model.gradient_checkpointing_enable()
        kept.append(kept_bytes(model, "32-true"))
    backbones = [Backbone.from_config(build(num_hidden_layers=layers).config) for layers in (2, 6)]
    said = [activation_bytes(b, IDS, PRECISIONS["32-true"], checkpointing=True) for b in backbones]
    assert said[1] - said[0] == kept[1] - kept[0] == 4 * IDS * 64 * 4
    assert said[1] < activation_bytes(backbones[1], IDS, PRECISIONS["32-true"]) / 3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts(preset: str, tied: bool) -> None:
    model = build("llama", preset, tie_word_embeddings=tied)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(IDS)[None]).logits.sum().backward()
    linear = sum(
        flops for operator, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(operator)
    )
    settings: dict[str, Any] = {"new_rows": OLD + NEW if preset == "full" else NEW, "lora_rank": RANK}
    assert flops_per_id(model, 0) * IDS == linear
    assert flops_per_id(model.config, 0, preset, **settings) * IDS == linear
    assert flops_per_id(model, 0, preset, **settings) * IDS == linear
    # Forward and backward (twice the forward) of the two products of attention, half of them behind the mask.
    assert flops_per_id(model, IDS) - flops_per_id(model, 0) == 3 * (2 * 2 * IDS * 96 / 2) * 3


@pytest.mark.parametrize("tied", [False, True])
def test_a_factored_head_costs_what_its_matrix_costs(tied: bool) -> None:
    vocabulary = Vocabulary.build(100, BlockSpec("image", "i", 64, grid=(2, 2)))
    model = new_llama(vocabulary, hidden_size=64, num_layers=2, num_heads=2, tied=tied)
    plain = flops_per_id(model, 64)
    factor_rows(model, vocabulary, {"image": torch.randn(1, 64, 4)}, {"image": (8, 8)})
    with torch.no_grad():
        assert flops_per_id(model, 64) == plain
        assert plain - flops_per_id(model, 64, head_rows=vocabulary.size - 10) == 6 * 10 * 64


def test_flops_of_a_sliced_head_and_of_the_second_forward() -> None:
    model = build()
    whole = flops_per_id(model, 64)
    assert whole - flops_per_id(model, 64, head_rows=100) == 6 * 200 * 64
    assert whole - flops_per_id(model.config, 64, head_rows=100) == 6 * 200 * 64
    layers = Backbone.from_config(model.config).layer_weights() * 3
    assert flops_per_id(model, 64, checkpointing=True) - whole == 2 * layers + 2 * 64 * 96 * 3


def test_seven_billion_parameters_near_the_rule_of_thumb() -> None:
    flops = flops_per_id(BACKBONES["llama-7b"], 2048)
    weights = BACKBONES["llama-7b"].parameters() - 32000 * 4096  # input rows are looked up, not multiplied
    assert flops == pytest.approx(6 * weights + 6 * 32 * 4096 * 2048, rel=1e-4)  # norms
    cost = estimate(BACKBONES["llama-7b"], device="a100", seq_len=2048, mfu=0.5, tokens=1e12, gpus=8)
    assert cost.ids_per_s == pytest.approx(8 * 0.5 * 312e12 / flops)
    assert cost.days == pytest.approx(1e12 / cost.ids_per_s / 86400)


def test_sharding_divides_what_is_kept() -> None:
    one = estimate(BACKBONES["llama-7b"], checkpointing=True, gpus=8)
    eight = estimate(BACKBONES["llama-7b"], checkpointing=True, gpus=8, fsdp=8)
    for part in ("weights", "gradients", "optimizer"):
        assert eight.memory[part] == -(-one.memory[part] // 8)
    assert one.memory["buckets"] == one.memory["gradients"] and eight.memory["buckets"] == 0
    assert not one.fits and eight.fits and one.ids_per_s == eight.ids_per_s
    # 16 bytes per parameter: weights, gradients and two states in float32.
    assert sum(one.memory[part] for part in ("weights", "gradients", "optimizer")) == 16 * one.parameters


def test_sharded_weights_come_in_the_dtype_of_matmuls() -> None:
    settings: dict[str, Any] = {"vocab_size": 65536, "gpus": 8, "fsdp": 8}
    mixed, true = (estimate(BACKBONES["llama-7b"], precision=p, **settings) for p in ("bf16-mixed", "bf16-true"))
    for part in ("copies", "activations"):
        assert mixed.memory[part] == true.memory[part]
    assert mixed.memory["weights"] == pytest.approx(2 * true.memory["weights"])


def test_active_parameters_are_all_but_the_other_input_rows() -> None:
    tied, untied = BACKBONES["qwen3-0.6b"], BACKBONES["llama-7b"]
    assert estimate(tied).active == tied.parameters()  # the head reads all rows
    assert estimate(untied).active == untied.parameters() - 31999 * 4096


def test_table_and_dictionary_say_the_same() -> None:
    cost = estimate(
        BACKBONES["smollm2-135m"], name="smollm2-135m", vocab_size=57344, preset="lora", device="4090", tokens=1e9
    )
    content = json.loads(json.dumps(cost.to_dict()))
    table = cost.describe()
    assert content["total_bytes"] == sum(content["memory"].values())
    assert f"{content['total_bytes'] / GIB:.2f}" in table and f"{content['ids_per_s']:,.0f}" in table
    assert content["fits"] is True and "fits in 24" in table
    assert "57,344 rows" in table and "(lora)" in table and "hours for 1 G ids" in table
    assert "second forward" not in table and "buckets" not in table


def test_device_rates_name_their_source() -> None:
    assert all("NVIDIA" in device.source and 1e14 < device.flops < 1e15 for device in DEVICES.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preset": "half"}, "preset 'half'.*full, lora, rows"),
        ({"optimizer": "sgd"}, "optimizer 'sgd'"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"device": "tpu"}, "device 'tpu'.*h100"),
        ({"preset": "rows"}, "vocab_size 32000 brings no new rows"),
        ({"preset": "lora", "vocab_size": 40000, "train_old_rows": True}, "train_old_rows"),
        ({"gpus": 8, "fsdp": 3}, "fsdp=3 does not divide gpus=8"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"mfu": 40}, "mfu is 40"),
        ({"tokens": 0}, "tokens is 0"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        estimate(BACKBONES["llama-7b"], **settings)


def test_unknown_architectures_and_missing_numbers() -> None:
    with pytest.raises(ManifestError, match="model_type 'mamba'"):
        Backbone.from_config({"model_type": "mamba"})
    with pytest.raises(ManifestError, match="hidden_size is None"):
        Backbone.from_config({"model_type": "llama", "vocab_size": 10})


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_bytes_of_the_loss(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of what the loss allocates in its backward pass, against the formula."""
    from torch.utils._python_dispatch import TorchDispatchMode

    import anyglot_lm.cost as module
    from anyglot_lm.loss import SliceTable, span_nll

    ids, rows, width, chunk = 1024, 8192, 64, 1 << 20
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    hidden = torch.randn(ids, width, dtype=dtype, requires_grad=True)
    head = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    table = SliceTable([0], [rows], torch.zeros(rows, dtype=torch.long))
    known = {tensor.untyped_storage().data_ptr() for tensor in (hidden, head)}
    live: dict[int, int] = {}
    peak = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal peak
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in known | live.keys():
                        live[storage.data_ptr()] = storage.nbytes()
                        weakref.finalize(storage, live.pop, storage.data_ptr(), None)
            peak = max(peak, sum(live.values()))
            return out

    nll = span_nll(hidden, head, torch.randint(0, rows, (ids,)), table, sliced=False, chunk=chunk).nll.sum()
    with Watch():
        nll.backward()
    monkeypatch.setattr(module, "LOSS_CHUNK", chunk)
    backbone = Backbone(rows, width, 1, 1, 1, 1, 1, tied=True)
    said = module._loss_bytes(backbone, ids, PRECISIONS[precision], rows, rows)
    assert said == pytest.approx(peak, rel=0.15)
