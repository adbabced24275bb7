"""Models with the rows of a `Vocabulary`, and how packed rows run through them.

`new_llama` makes a small one from scratch, `expand_vocabulary` one from a pretrained backbone (`backbone.py` loads it),
`extend_vocabulary` adds modalities to a trained one; `start_from_codebooks` gives the rows of codes the geometry of
their codebooks. `hidden_states` runs packed rows block-diagonally (`position_ids` restart, no attention mask, no cache)
and `assert_no_leak` proves it for a backbone. Knows nothing about losses, data or decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from anyglot_lm.backbone import check_text_rope
from anyglot_lm.rows import Init, new_rows, projected
from anyglot_lm.vocabulary import Vocabulary, id_map
from anyglot_tokenizers.errors import AnyglotError

HEAD_NOISE = 0.1
"""Spread of new rows of the head, see `expand_vocabulary`."""


def new_llama(
    vocabulary: Vocabulary,
    *,
    hidden_size: int = 256,
    num_layers: int = 6,
    num_heads: int = 4,
    max_length: int = 1024,
    tied: bool = True,
    qk_norm: bool = False,
    seed: int = 0,
) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """A randomly initialised Llama with one row per id of `vocabulary`.

    Args:
        vocabulary: gives the number of rows and the pad, bos and eos ids.
        hidden_size: width D; the feed-forward width is 8/3 D, rounded down to a multiple of 64.
        num_layers: decoder layers.
        num_heads: attention heads, without grouping.
        max_length: longest sequence in ids.
        tied: one matrix for input rows and output head. Input rows of their own start with deviation 1, as large as
            what the layers add: Adam's steps then change them slowly, and they keep the geometry they start with.
        qk_norm: normalise queries and keys (arXiv 2302.05442; Chameleon, arXiv 2405.09818): the model is then a Qwen3,
            which is a Llama with just that.
        seed: of the initial weights; the global generator is left as it was.
    """
    config = (Qwen3Config if qk_norm else LlamaConfig)(
        vocab_size=vocabulary.size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
        pad_token_id=vocabulary.controls["pad"],
        bos_token_id=vocabulary.controls["bos"],
        eos_token_id=vocabulary.controls["eos"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config) if isinstance(config, Qwen3Config) else LlamaForCausalLM(config)
        if not tied:
            nn.init.normal_(model.get_input_embeddings().weight)
        return model


@torch.no_grad()
def expand_vocabulary(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    *,
    init: Init = "covariance",
    codebooks: Mapping[str, Tensor] | None = None,
    noise: float = 1.0,
    head_noise: float = HEAD_NOISE,
    controls_from: Mapping[str, int | Sequence[int]] | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> None:
    """Give a pretrained text model the rows of `vocabulary`, in place.

    Old rows, hence the text logits of the model, keep every bit. Tied models stay tied. New rows are drawn with the
    spread of the old ones (`rows.py`): the Hugging Face default (`mean_resizing=True`) makes them practically identical
    and takes minutes. The config's pad, bos and eos become those of the vocabulary.

    Args:
        model: any causal language model.
        vocabulary: `vocabulary.text_size` must be at least the number of rows of the model, or see `overwrite`.
        init: how new rows are drawn: random, mean, covariance or codebook.
        codebooks: for `init="codebook"`: by modality, `[K, C, d]`, as `Tokenizer.codebooks`.
        noise: spread of new input rows, in that of the old ones, where the head is a matrix of its own.
        head_noise: spread of new rows of the head, and of the one matrix of a tied model. What the head has seen makes
            hidden states large: 0.1 keeps the first loss on codes within 2 % of that of a uniform guess
            (`benchmarks/expand.py`, 1,024 codes: 0.7 % above it for SmolLM2-135M and 1.1 % for our nano model; at 1.0,
            38 and 106 %). `random` does not: 10 % for SmolLM2-135M.
        controls_from: control -> id or ids whose rows (their mean, plus 1 % noise) its row starts from, for example
            `{"eos": tokenizer.eos_token_id}`. Also ids that are about to be overwritten.
        overwrite: put the new rows over old ones instead of adding any: `vocabulary.text_size` is then less than the
            number of rows, and the text tokenizer is `truncated` to it, so that its rarest pieces make room (as RT-2
            and OpenVLA do, arXiv 2307.15818, 2406.09246). The model keeps its number of rows.
        seed: of the new rows.

    Raises:
        AnyglotError: the vocabulary does not fit the model's rows, or what `rows.new_rows` refuses.
    """
    rows = _input_rows(model)
    if overwrite:
        if not vocabulary.text_size < rows or vocabulary.size > rows:
            raise AnyglotError(
                f"overwrite=True needs a vocabulary inside the model's {rows} rows, but this one has "
                f"{vocabulary.size} ids ({vocabulary.text_size} of text); truncate the text tokenizer further"
            )
    elif rows > vocabulary.text_size:
        raise AnyglotError(
            f"the model has {rows} rows but the vocabulary keeps only {vocabulary.text_size} text ids; "
            "build the vocabulary with text_size equal to the model's number of rows, or overwrite the rows of rare "
            "text (text.truncated(...) and overwrite=True)"
        )
    first = min(rows, vocabulary.text_size)
    sources = {name: torch.as_tensor(ids).reshape(-1) for name, ids in (controls_from or {}).items()}
    for name, ids in sources.items():
        if name not in vocabulary.controls or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= rows:
            raise AnyglotError(
                f"controls_from: {name!r} from {ids.tolist()}; the controls are {', '.join(vocabulary.controls)}, "
                f"the ids of the model 0 to {rows - 1}"
            )

    def change(weight_VD: Tensor, noise: float) -> Tensor:
        fresh_ND = _draw(model, weight_VD[:first], vocabulary, first, init, noise, codebooks, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, ids in sources.items():
            source_D = weight_VD[ids].float().mean(0)
            own_D = torch.randn(len(source_D), generator=generator).to(source_D.device)
            fresh_ND[vocabulary.controls[name] - first] = source_D + 0.01 * source_D.std() * own_D
        return torch.cat([weight_VD[:first], fresh_ND.to(weight_VD.dtype), weight_VD[vocabulary.size :]])

    _change_rows(model, change, noise, head_noise)
    _name_controls(model, vocabulary)


@torch.no_grad()
def extend_vocabulary(
    model: PreTrainedModel,
    old: Vocabulary,
    new: Vocabulary,
    *,
    init: Init = "covariance",
    codebooks: Mapping[str, Tensor] | None = None,
    noise: float = 1.0,
    head_noise: float = HEAD_NOISE,
    seed: int = 0,
) -> None:
    """Give a model with the rows of `old` those of `new`, in place: the same blocks and more (`old.extended`).

    Ids move, so rows are moved by what they mean (`vocabulary.id_map`) and keep every bit; rows of new blocks are drawn
    like all those the model knows. Data follow with `remap.remap_shards`.

    Args:
        model: with at least the rows of `old`.
        old: what it was trained with.
        new: what it becomes.
        init, codebooks, noise, head_noise, seed: as for `expand_vocabulary`.

    Raises:
        FingerprintError: `new` lacks something of `old`.
        AnyglotError: the model has fewer rows than `old`, or what `rows.new_rows` refuses.
    """
    rows = _input_rows(model)
    if rows < old.size:
        raise AnyglotError(f"the model has {rows} rows, the old vocabulary {old.size} ids; give the model's own one")
    places = torch.from_numpy(id_map(old, new))
    sources = (places >= 0).nonzero()[:, 0]
    places = places[sources]

    def change(weight_VD: Tensor, noise: float) -> Tensor:
        known_ND = weight_VD[sources]
        fresh_ND = _draw(model, known_ND, new, new.text_size, init, noise, codebooks, seed).to(weight_VD.dtype)
        changed_VD = torch.cat([weight_VD[: new.text_size], fresh_ND, weight_VD[new.size :]])
        changed_VD[places] = known_ND
        return changed_VD

    _change_rows(model, change, noise, head_noise)
    _name_controls(model, new)


def _input_rows(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _draw(
    model: PreTrainedModel,
    known_VD: Tensor,
    vocabulary: Vocabulary,
    first: int,
    init: Init,
    noise: float,
    codebooks: Mapping[str, Tensor] | None,
    seed: int,
) -> Tensor:
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    return new_rows(
        known_VD, vocabulary, first, init=init, noise=noise, deviation=deviation, codebooks=codebooks, seed=seed
    )


def _change_rows(
    model: PreTrainedModel, change: Callable[[Tensor, float], Tensor], noise: float, head_noise: float
) -> None:
    """Puts `change(weight, noise)` in the place of the input rows and of the head, at the cost of one copy each."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    tied = head.weight is embedding.weight
    learns = embedding.weight.requires_grad, head.weight.requires_grad
    embedding.weight = nn.Parameter(change(embedding.weight, head_noise if tied else noise), learns[0])
    head.weight = embedding.weight if tied else nn.Parameter(change(head.weight, head_noise), learns[1])
    rows = embedding.num_embeddings = head.out_features = model.config.vocab_size = len(embedding.weight)
    if hasattr(model, "vocab_size"):
        model.vocab_size = rows


def _name_controls(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    for config in (model.config, model.generation_config):
        for name in ("pad", "bos", "eos"):
            setattr(config, f"{name}_token_id", vocabulary.controls[name])
    if model.get_input_embeddings().padding_idx is not None:  # a row without gradient
        model.get_input_embeddings().padding_idx = vocabulary.pad_id


@torch.no_grad()
def make_rows_plain(model: PreTrainedModel, *, tied: bool) -> None:
    """Put a plain embedding and a plain head, without bias, in the place of modules that make their `weight` [V, D]."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight_VD = embedding.weight
    plain = nn.Embedding(weight_VD.shape[0], weight_VD.shape[1], _weight=weight_VD)
    line = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False, device="meta")
    line.weight = plain.weight if tied else nn.Parameter(head.weight)
    model.set_input_embeddings(plain)
    model.set_output_embeddings(line)


@torch.no_grad()
def start_from_codebooks(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    codebooks: Mapping[str, Tensor],
    *,
    noise: float = 0.3,
    seed: int = 0,
) -> None:
    """Start the input rows of codes from their codebook entries, in place: codes that sound or look alike start alike.

    A code that training rarely meets, such as those of an unheard speaker, then means what its neighbours mean. An
    entry, centred and scaled over its codebook, is projected by a random matrix (one per modality, so that the entries
    of residual quantizers keep their geometry), brought to the spread of the rows as they are, and mixed with them.

    Args:
        model: with the rows of `vocabulary`; if tied, its head starts likewise.
        vocabulary: says which rows are codes.
        codebooks: by modality, `[K, C, d]`, as `Tokenizer.codebooks`; modalities without one keep their rows.
        noise: share of the old rows in the new ones, 0 to 1 (the rest in quadrature).
        seed: of the projections.

    Raises:
        AnyglotError: a codebook has fewer quantizers or another size than its block.
    """
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    for block in vocabulary.blocks:
        if block.modality not in codebooks:
            continue
        for first, last, row_CD in projected(block, codebooks[block.modality], weight.shape[1], generator):
            old_CD = weight[first:last].float()
            new_CD = (1 - noise**2) ** 0.5 * old_CD.std() * row_CD.to(old_CD.device) + noise * old_CD
            weight[first:last] = new_CD.to(weight.dtype)


def hidden_states(decoder: Any, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, D] of packed rows: documents (restarting positions) never see each other.

    transformers finds the documents from `position_ids` only without an attention mask and without a cache. Its flash
    attention does so only in a batch of one, so for it the rows become one row [1, B * T] (which needs a GPU to run:
    here only the shapes are tested).
    """
    shape = input_ids_BT.shape
    if "flash" in str(getattr(getattr(decoder, "config", None), "_attn_implementation", "")):
        input_ids_BT, position_ids_BT = input_ids_BT.reshape(1, -1), position_ids_BT.reshape(1, -1)
    out = decoder(input_ids=input_ids_BT, position_ids=position_ids_BT, attention_mask=None, use_cache=False)
    hidden: Tensor = out.last_hidden_state.reshape(*shape, -1)
    return hidden


@torch.no_grad()
def assert_no_leak(
    model: PreTrainedModel,
    *,
    lengths: tuple[int, ...] = (5, 9, 3),
    tolerance: float = 1e-4,
    forward: Callable[[Any, Tensor, Tensor], Tensor] = hidden_states,
) -> None:
    """Check that packed documents do not attend to each other: packed, they give what each gives alone.

    Two rows hold the same documents in opposite order, so a kernel that looks at the first row only is found too.

    Args:
        model: a causal language model, on any device.
        lengths: ids of the documents.
        tolerance: largest difference of final hidden states, in their root mean square (1 after the final norm of most
            backbones, dozens in some).
        forward: the call to check, `(decoder, input_ids [B, T], position_ids [B, T]) -> hidden states [B, T, D]`.

    Raises:
        UnsupportedError: positions that are not rotary or have several axes.
        AnyglotError: a difference above `tolerance`, with its size.
    """
    check_text_rope(model.config, type(model).__name__)
    was_training = model.training
    model.eval()
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, len(weight), (1, n), generator=generator).to(weight.device) for n in lengths]
    positions = [torch.arange(n, device=weight.device)[None] for n in lengths]

    def both_ways(parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.cat(parts, 1), torch.cat(parts[::-1], 1)])

    try:
        packed = forward(model.base_model, both_ways(documents), both_ways(positions))
        alone = [forward(model.base_model, d, p) for d, p in zip(documents, positions, strict=True)]
    finally:
        model.train(was_training)
    expected = both_ways(alone).float()
    worst = ((packed.float() - expected).abs().max() / expected.square().mean().sqrt()).item()
    if not worst <= tolerance:
        raise AnyglotError(
            f"packed documents leak into each other in this backbone (largest difference {worst:.2g}); call it as "
            "model.hidden_states does, with an attention implementation that honours position_ids (sdpa, eager or "
            "flex_attention)"
        )
