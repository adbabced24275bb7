"""Backbones: a small Llama from scratch, or any Hugging Face causal LM with its vocabulary expanded.

`new_llama` and `expand_vocabulary` make models whose rows are those of a `Vocabulary`, `start_from_codebooks` gives the
rows of codes the geometry of their codebooks; `hidden_states` runs packed rows block-diagonally (`position_ids`
restart, no attention mask, no cache) and `assert_no_leak` proves it for a backbone. Knows nothing about losses, data or
decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import AnyglotError


def new_llama(
    vocabulary: Vocabulary,
    *,
    hidden_size: int = 256,
    num_layers: int = 6,
    num_heads: int = 4,
    max_length: int = 1024,
    tied: bool = True,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A randomly initialised Llama with one row per id of `vocabulary`.

    Args:
        vocabulary: gives the number of rows and the pad, bos and eos ids.
        hidden_size: width D; the feed-forward width is 8/3 D, rounded down to a multiple of 64.
        num_layers: decoder layers.
        num_heads: attention heads, without grouping.
        max_length: longest sequence in ids.
        tied: one matrix for input rows and output head. Input rows of their own start with deviation 1, as large as
            what the layers add: Adam's steps then change them slowly, and they keep the geometry they start with.
        seed: of the initial weights; the global generator is left as it was.
    """
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        use_cache=False,
        attn_implementation="sdpa",
        pad_token_id=vocabulary.controls["pad"],
        bos_token_id=vocabulary.controls["bos"],
        eos_token_id=vocabulary.controls["eos"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        if not tied:
            nn.init.normal_(model.get_input_embeddings().weight)
        return model


def expand_vocabulary(model: PreTrainedModel, vocabulary: Vocabulary, *, noise: float = 1.0, seed: int = 0) -> None:
    """Append the rows of `vocabulary` that a pretrained text model lacks, in place.

    New rows are the mean of the old ones plus `noise` times their per-column standard deviation times a normal draw:
    the Hugging Face default (`mean_resizing=True`) makes them practically identical and takes minutes. Old rows, hence
    the text logits of the model, keep every bit. Tied models stay tied.

    Args:
        model: any causal LM; its vocabulary must hold exactly `vocabulary.text_size` text rows or fewer padded ones.
        vocabulary: `vocabulary.text_size` must be at least the number of text ids the model knows.
        noise: scale of the random part.
        seed: of the new rows.

    Raises:
        AnyglotError: the model already has more rows than the vocabulary has text ids.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    old = embedding.weight.shape[0]
    if old > vocabulary.text_size:
        raise AnyglotError(
            f"the model has {old} rows but the vocabulary keeps only {vocabulary.text_size} text ids; "
            "build the vocabulary with text_size equal to the model's number of rows"
        )
    with torch.random.fork_rng(devices=[]):  # it draws rows that are replaced below
        model.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    weights = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    with torch.no_grad():
        for weight in weights:
            mean, std = weight[:old].float().mean(0), weight[:old].float().std(0)
            rows = mean + noise * std * torch.randn(vocabulary.size - old, weight.shape[1], generator=generator)
            weight[old:] = rows.to(weight.dtype)


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
        entries_KCd = codebooks[block.modality].float().cpu()
        if entries_KCd.shape[0] < block.num_quantizers or entries_KCd.shape[1] != block.codebook_size:
            raise AnyglotError(
                f"{block.modality}: the tokenizer has codebooks {list(entries_KCd.shape[:2])}, the vocabulary needs "
                f"[{block.num_quantizers}, {block.codebook_size}]; take the tokenizer that made the vocabulary"
            )
        width = entries_KCd.shape[2]
        projection_dD = torch.randn(width, weight.shape[1], generator=generator) / width**0.5
        for index in range(block.num_quantizers):
            first, last = block.codebook_slice(index)
            entry_Cd = entries_KCd[index] - entries_KCd[index].mean(0)
            row_CD = entry_Cd / entry_Cd.square().mean().sqrt().clamp(min=1e-8) @ projection_dD
            old_CD = weight[first:last].float()
            new_CD = (1 - noise**2) ** 0.5 * old_CD.std() * row_CD.to(old_CD.device) + noise * old_CD
            weight[first:last] = new_CD.to(weight.dtype)


def hidden_states(decoder: Any, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, D] of packed rows: documents (restarting positions) never see each other.

    transformers finds the documents from `position_ids` only without an attention mask and without a cache.
    """
    out = decoder(input_ids=input_ids_BT, position_ids=position_ids_BT, attention_mask=None, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden


@torch.no_grad()
def assert_no_leak(model: PreTrainedModel, *, lengths: tuple[int, ...] = (5, 9, 3), tolerance: float = 1e-4) -> None:
    """Check that packed documents do not attend to each other: packed logits equal those of each document alone.

    Raises:
        AnyglotError: they differ by more than `tolerance`, with the largest difference.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    rows = int(model.get_input_embeddings().weight.shape[0])
    documents = [torch.randint(0, rows, (1, n), generator=generator) for n in lengths]
    positions = [torch.arange(n)[None] for n in lengths]
    packed = hidden_states(model.base_model, torch.cat(documents, 1), torch.cat(positions, 1))
    alone = torch.cat([hidden_states(model.base_model, d, p) for d, p in zip(documents, positions, strict=True)], 1)
    model.train(was_training)
    worst = (packed - alone).abs().max().item()
    if worst > tolerance:
        raise AnyglotError(
            f"packed documents leak into each other in this backbone (largest difference {worst:.2g}); "
            "use an attention implementation that honours position_ids (sdpa, eager or flex)"
        )
