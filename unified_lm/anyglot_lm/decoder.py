"""A language model as the engine runs it: ids in, last hidden states out, keys and values in a `SlotCache`.

Two ways to the same numbers. `PlainDecoder` runs the layers of Llama, Mistral, Qwen2 and Qwen3 models as a few dozen
tensor operations on the model's own weights: on a CPU, and in small models anywhere, the time of a step is mostly that
of calling operations, and transformers calls several times as many. `HFDecoder` runs any other model through
transformers. `decoder_of` chooses. Neither knows of prompts, vocabularies or sampling.

Shape suffixes: S streams, Q new positions of each, H hidden size, N heads, K heads of keys and values, G = N / K,
T columns of the cache, D head size.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyglot_lm.cache import SlotCache
from anyglot_lm.int8 import Int8Linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    Linear = Callable[[Tensor], Tensor]

PLAIN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class Decoder(Protocol):
    """What the engine needs of a model."""

    def new_cache(self, slots: int, capacity: int) -> SlotCache: ...

    def prefill(self, cache: SlotCache, first: int, rows: list[list[int]]) -> Tensor:
        """Appends rows of ids to the slots `first ...` (equally long so far); `[S, H]` after the last id of each."""
        ...

    def step(self, cache: SlotCache, ids_S: Tensor) -> Tensor:
        """Appends one id to every stream; `[S, H]` after it."""
        ...


def decoder_of(model: PreTrainedModel, *, compile: bool = False) -> Decoder:
    """The faster decoder that can run `model`.

    Args:
        model: a causal language model in evaluation mode.
        compile: run steps through torch.compile (PlainDecoder only; the first steps of a new shape take long).
    """
    return PlainDecoder(model, compile=compile) if is_plain(model) else HFDecoder(model)


def is_plain(model: PreTrainedModel) -> bool:
    """Whether `PlainDecoder` knows all that this model does: no adapters, windows, or activations but SiLU."""
    config: Any = model.config
    leaves = [module for module in model.modules() if not list(module.children())]
    return (
        type(model).__name__ in PLAIN
        and config.hidden_act == "silu"
        and window_of(config) is None
        and config.rope_parameters.get("rope_type") not in ("dynamic", "longrope")  # angles depend on the length
        and all(isinstance(leaf, nn.Linear | nn.Embedding | Int8Linear | nn.SiLU) or _is_known(leaf) for leaf in leaves)
    )


def _is_known(leaf: nn.Module) -> bool:
    return type(leaf).__name__.endswith(("RMSNorm", "RotaryEmbedding", "SiLUActivation"))


def window_of(config: Any) -> int | None:
    """How many positions back some layer sees at most; None where all see everything."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window: int | None = getattr(config, "sliding_window", None)
    return window if "sliding_attention" in kinds and getattr(config, "use_sliding_window", True) else None


class _Weights(NamedTuple):
    """One layer: `q`, `k`, `v`, `o`, `gate`, `up`, `down` are products; the others are scales of RMSNorm."""

    before: Tensor
    q: Linear
    k: Linear
    v: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    between: Tensor
    gate: Linear
    up: Linear
    down: Linear


class PlainDecoder:
    """Llama-like layers in plain operations, on the weights of `model` (nothing is copied)."""

    def __init__(self, model: PreTrainedModel, *, compile: bool = False) -> None:
        config: Any = model.config
        base: Any = model.model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.epsilon, self.norm = config.rms_norm_eps, base.norm.weight
        self.embedding, self.rotary = base.embed_tokens.weight, base.rotary_emb
        self.layers = [_weights(layer) for layer in base.layers]
        self.turns_2TD: Tensor | None = None
        self._forward = torch.compile(self._layers, dynamic=True) if compile else self._layers

    def new_cache(self, slots: int, capacity: int) -> SlotCache:
        like = self.embedding
        # Rotations of all positions: cosines, and sines with the signs that rolling by half a head needs.
        cos_TD, sin_TD = (x[0] for x in self.rotary(like[:1], torch.arange(capacity, device=like.device)[None]))
        signs_D = torch.ones(self.size, device=like.device, dtype=like.dtype)
        signs_D[: self.size // 2] = -1
        self.turns_2TD = torch.stack([cos_TD, sin_TD * signs_D])
        shape = (len(self.layers), self.kv_heads, self.size)
        return SlotCache(*shape, slots=slots, capacity=capacity, dtype=like.dtype, device=like.device)

    def prefill(self, cache: SlotCache, first: int, rows: list[list[int]]) -> Tensor:
        lengths = [len(row) for row in rows]
        cache.begin_rows(first, lengths)
        ids_SQ = pad(rows, self.embedding.device)
        hidden_SQH = self._layers(cache, ids_SQ)
        last_S = torch.tensor(lengths, device=ids_SQ.device) - 1
        return hidden_SQH[torch.arange(len(rows), device=ids_SQ.device), last_S]

    def step(self, cache: SlotCache, ids_S: Tensor) -> Tensor:
        cache.begin_step()
        return self._forward(cache, ids_S[:, None])[:, 0]

    def _layers(self, cache: SlotCache, ids_SQ: Tensor) -> Tensor:
        streams, width = ids_SQ.shape
        heads, kv_heads, size, epsilon = self.heads, self.kv_heads, self.size, self.epsilon
        assert self.turns_2TD is not None
        cos, sin = self.turns_2TD[:, cache.positions_SQ].unsqueeze(3).unbind(0)  # [S, Q, 1, D] each
        hidden = F.embedding(ids_SQ, self.embedding)
        for index, layer in enumerate(self.layers):
            normal = F.rms_norm(hidden, hidden.shape[-1:], layer.before, epsilon)
            query = layer.q(normal).view(streams, width, heads, size)
            key = layer.k(normal).view(streams, width, kv_heads, size)
            value = layer.v(normal).view(streams, width, kv_heads, size)
            if layer.q_norm is not None:
                query = F.rms_norm(query, (size,), layer.q_norm, epsilon)
                key = F.rms_norm(key, (size,), layer.k_norm, epsilon)
            both = torch.cat([query, key], 2)
            both = torch.addcmul(both * cos, both.roll(size // 2, -1), sin)
            query, key = both[:, :, :heads].transpose(1, 2), both[:, :, heads:].transpose(1, 2)
            keys, values = cache.append(index, key, value.transpose(1, 2))
            if width == 1:  # grouped heads as so many queries: keys and values need no copies
                grouped = query.reshape(streams, kv_heads, heads // kv_heads, size)
                seen = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=cache.mask)
                seen = seen.reshape(streams, 1, heads * size)
            else:
                if cache.mask is not None and heads != kv_heads:  # with a mask, groups cost fused kernels on a GPU
                    keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
                seen = F.scaled_dot_product_attention(
                    query, keys, values, attn_mask=cache.mask, is_causal=cache.mask is None, enable_gqa=True
                )
                seen = seen.transpose(1, 2).reshape(streams, width, heads * size)
            hidden = hidden + layer.o(seen)
            normal = F.rms_norm(hidden, hidden.shape[-1:], layer.between, epsilon)
            hidden = hidden + layer.down(F.silu(layer.gate(normal)) * layer.up(normal))
        return F.rms_norm(hidden, hidden.shape[-1:], self.norm, epsilon)


def _weights(layer: Any) -> _Weights:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return _Weights(
        before=layer.input_layernorm.weight,
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        o=_linear(attention.o_proj),
        between=layer.post_attention_layernorm.weight,
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
    )


def _linear(module: nn.Module) -> Linear:
    """The product of a layer, past the costs of calling a module."""
    if isinstance(module, nn.Linear):
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module.forward


class HFDecoder:
    """Any causal language model of transformers, through its own forward pass ("sdpa" or "eager" attention).

    With a mask of ours transformers leaves out windows: the engine keeps rows shorter than one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        self.backbone: Any = model.get_decoder()
        self.device, self.dtype = model.get_input_embeddings().weight.device, model.dtype
        self.num_layers: int = config.num_hidden_layers
        self.kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def new_cache(self, slots: int, capacity: int) -> SlotCache:
        shape = (self.num_layers, self.kv_heads, self.size)
        return SlotCache(*shape, slots=slots, capacity=capacity, dtype=self.dtype, device=self.device)

    def prefill(self, cache: SlotCache, first: int, rows: list[list[int]]) -> Tensor:
        lengths = [len(row) for row in rows]
        cache.begin_rows(first, lengths)
        hidden_SQH = self._run(cache, pad(rows, self.device))
        return hidden_SQH[torch.arange(len(rows)), torch.tensor(lengths) - 1]

    def step(self, cache: SlotCache, ids_S: Tensor) -> Tensor:
        cache.begin_step()
        return self._run(cache, ids_S[:, None])[:, 0]

    def _run(self, cache: SlotCache, ids_SQ: Tensor) -> Tensor:
        from anyglot_lm.hf_cache import HFCache

        width, mask = ids_SQ.shape[1], cache.mask
        if mask is None:  # without any, transformers would make one of its own from the positions
            mask = torch.full((1, 1, width, cache.stop), -torch.inf, dtype=self.dtype, device=self.device)
            mask = mask.triu(1 + cache.stop - width)
        output = self.backbone(
            input_ids=ids_SQ,
            attention_mask=mask.expand(len(ids_SQ), -1, -1, -1),
            position_ids=cache.positions_SQ.expand(len(ids_SQ), -1),
            past_key_values=HFCache(cache),
            use_cache=True,
        )
        hidden_SQH: Tensor = output.last_hidden_state
        return hidden_SQH


def pad(rows: list[list[int]], device: torch.device) -> Tensor:
    """int64 `[S, Q]`: rows of ids, padded on the right."""
    ids_SQ = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for slot, row in enumerate(rows):
        ids_SQ[slot, : len(row)] = torch.tensor(row)
    return ids_SQ.to(device)
