"""Rows for ids that a language model does not know yet: four ways to draw them.

Everything is drawn at once for one matrix: `mean + noise * draws`, the draws shaped by the rows that are known. Where
the rows go, and that old ones stay as they are, is the concern of `model.py`.

    random      normal, with the deviation that the model's config starts with; knows nothing of the old rows
    mean        the mean of the old rows, and their deviation column by column
    covariance  the mean of the old rows, and their full covariance: sums of 8 old rows with signs, in one sparse GEMM
    codebook    as mean, but codes lie to each other as the entries of their tokenizer's codebook do

For `covariance`, `(x1 + x2 + x3 + x4 - x5 - x6 - x7 - x8) / sqrt(8)` of old rows x, drawn with replacement, has mean 0
and exactly their covariance, for a small part of what a factor of that D x D matrix takes (5 s by Cholesky and a dense
GEMM where this takes 0.3 s, 20,000 rows of width 2,048).

Shapes: V old rows, N new rows, D width, K codebooks of C entries of width d.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from anyglot_lm.vocabulary import Block, Vocabulary
from anyglot_tokenizers.errors import AnyglotError

Init = Literal["random", "mean", "covariance", "codebook"]
SUMMED = 8
"""Old rows in a row drawn by `covariance`."""
OWN_SHARE = 0.3
"""Share of a draw of its own in a code's row (the rest, in quadrature, is its entry): dead entries stay distinct."""


@torch.no_grad()
def new_rows(
    known_VD: Tensor,
    vocabulary: Vocabulary,
    first: int,
    *,
    init: Init,
    noise: float,
    deviation: float,
    codebooks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Tensor:
    """Rows float32 [N, D] for the ids `[first, vocabulary.size)`, on the device of `known_VD`.

    Every modality has draws of its own, by seed and name: they do not depend on which others there are.

    Args:
        known_VD: the rows to be like.
        vocabulary: says which ids are codes.
        first: the first new id, at most `vocabulary.text_size`.
        init: how they are drawn, see above.
        noise: scale of the draws; 1 gives the spread of the known rows. `random` takes no notice of it.
        deviation: of `random`.
        codebooks: for `codebook`: by modality, `[K, C, d]`, as `Tokenizer.codebooks`; others start as with `mean`.
        seed: of the draws.

    Raises:
        AnyglotError: an unknown `init`, `codebook` without codebooks, or codebooks that do not fit their blocks.
    """
    if init not in get_args(Init):
        raise AnyglotError(f"init={init!r}; use one of {', '.join(get_args(Init))}")
    if init == "codebook" and not codebooks:
        raise AnyglotError("init='codebook' needs the tokenizers' codebooks; pass codebooks={modality: [K, C, d]}")
    width, device = known_VD.shape[1], known_VD.device
    spans = [("open", first, vocabulary.open_size)]
    spans += [(block.modality, block.end_id, block.stop_id) for block in vocabulary.blocks]
    spans.append(("unused", spans[-1][2], vocabulary.size))
    draws_ND = torch.empty(vocabulary.size - first, width)
    for name, low, high in spans:
        generator, own_ND = _generator(seed, name), draws_ND[low - first : high - first]
        if init == "covariance":
            picked_NS = torch.randint(len(known_VD), (len(own_ND), SUMMED), generator=generator)
            own_ND.copy_(_signed_sums(known_VD.float(), picked_NS))
            continue
        own_ND.normal_(generator=generator)
        if init == "codebook" and codebooks and name in codebooks:
            for start, stop, row_CD in projected(vocabulary.block(name), codebooks[name], width, generator):
                code_CD = draws_ND[start - first : stop - first]
                code_CD.mul_(OWN_SHARE).add_(row_CD, alpha=(1 - OWN_SHARE**2) ** 0.5)
    draws_ND = draws_ND.to(device)
    if init == "random":
        return draws_ND.mul_(deviation)
    mean_D = known_VD.mean(0, dtype=torch.float32)
    if init == "covariance":
        return draws_ND.mul_(noise).add_(mean_D)
    centred_VD = known_VD.float() - mean_D
    variances_D = centred_VD.square_().sum(0) / (len(centred_VD) - 1)  # var(0) takes ten times as long on a CPU
    return draws_ND.mul_(noise * variances_D.sqrt()).add_(mean_D)


def _signed_sums(known_VD: Tensor, picked_NS: Tensor) -> Tensor:
    signs_NS = torch.ones(picked_NS.shape)
    signs_NS[:, SUMMED // 2 :] = -1
    weights_NS = (signs_NS / SUMMED**0.5).to(known_VD)
    return embedding_bag(picked_NS.to(known_VD.device), known_VD, per_sample_weights=weights_NS, mode="sum")


def standard_entries(block: Block, codebook_KCd: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """`(first id, one past the last, entries [C, d])` per codebook of a block, centred and of unit mean square.

    Raises:
        AnyglotError: a codebook has fewer quantizers or another size than its block.
    """
    entries_KCd = codebook_KCd.float().cpu()
    if entries_KCd.shape[0] < block.num_quantizers or entries_KCd.shape[1] != block.codebook_size:
        raise AnyglotError(
            f"{block.modality}: the tokenizer has codebooks {list(entries_KCd.shape[:2])}, the vocabulary needs "
            f"[{block.num_quantizers}, {block.codebook_size}]; take the tokenizer that made the vocabulary"
        )
    for index in range(block.num_quantizers):
        entry_Cd = entries_KCd[index] - entries_KCd[index].mean(0)
        yield (*block.codebook_slice(index), entry_Cd / entry_Cd.square().mean().sqrt().clamp(min=1e-8))


def projected(
    block: Block, codebook_KCd: Tensor, width: int, generator: torch.Generator
) -> Iterator[tuple[int, int, Tensor]]:
    """`(first id, one past the last, rows [C, D])` per codebook of a block, rows of about unit variance.

    An entry (see `standard_entries`) is projected by a random matrix, one per modality, so that the entries of residual
    quantizers keep their geometry.
    """
    dims = codebook_KCd.shape[2]
    projection_dD = torch.randn(dims, width, generator=generator) / dims**0.5
    for first, last, entry_Cd in standard_entries(block, codebook_KCd):
        yield first, last, entry_Cd @ projection_dD


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
