"""Rows for ids that a language model does not know yet: four ways to draw them.

Everything is drawn at once for one matrix: `mean + noise * draws`, the draws shaped by the rows that are known. Where
the rows go, and that old ones stay as they are, is the concern of `model.py`.

    random      normal, with the deviation that the model's config starts with; knows nothing of the old rows
    mean        the mean of the old rows, and their deviation column by column
    covariance  the mean of the old rows, and their full covariance: one GEMM with its Cholesky factor
    codebook    as mean, but codes lie to each other as the entries of their tokenizer's codebook do

Shapes: V old rows, N new rows, D width, K codebooks of C entries of width d.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from anyglot_lm.vocabulary import Block, Vocabulary
from anyglot_tokenizers.errors import AnyglotError

Init = Literal["random", "mean", "covariance", "codebook"]
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
    width = known_VD.shape[1]
    spans = [("open", first, vocabulary.open_size)]
    spans += [(block.modality, block.end_id, block.stop_id) for block in vocabulary.blocks]
    spans.append(("unused", spans[-1][2], vocabulary.size))
    draws_ND = torch.empty(vocabulary.size - first, width)
    for name, low, high in spans:
        generator = _generator(seed, name)
        draws_ND[low - first : high - first] = torch.randn(high - low, width, generator=generator)
        if init == "codebook" and codebooks and name in codebooks:
            for start, stop, row_CD in projected(vocabulary.block(name), codebooks[name], width, generator):
                own_CD = draws_ND[start - first : stop - first]
                own_CD.mul_(OWN_SHARE).add_(row_CD, alpha=(1 - OWN_SHARE**2) ** 0.5)
    draws_ND = draws_ND.to(known_VD.device)
    if init == "random":
        return draws_ND.mul_(deviation)
    known_VD = known_VD.float()
    mean_D = known_VD.mean(0)
    if init != "covariance":
        return draws_ND.mul_(noise * known_VD.std(0)).add_(mean_D)
    centred_VD = known_VD - mean_D
    covariance_DD = centred_VD.T @ centred_VD / (len(known_VD) - 1)
    variances_D = covariance_DD.diagonal()
    variances_D += 1e-6 * variances_D.mean() + 1e-30  # fewer rows than columns: still positive definite
    return torch.addmm(mean_D, draws_ND, torch.linalg.cholesky(covariance_DD).T, alpha=noise)


def projected(
    block: Block, codebook_KCd: Tensor, width: int, generator: torch.Generator
) -> Iterator[tuple[int, int, Tensor]]:
    """`(first id, one past the last, rows [C, D])` per codebook of a block, rows of about unit variance.

    An entry, centred and scaled over its codebook, is projected by a random matrix (one per modality, so that the
    entries of residual quantizers keep their geometry).

    Raises:
        AnyglotError: a codebook has fewer quantizers or another size than its block.
    """
    entries_KCd = codebook_KCd.float().cpu()
    if entries_KCd.shape[0] < block.num_quantizers or entries_KCd.shape[1] != block.codebook_size:
        raise AnyglotError(
            f"{block.modality}: the tokenizer has codebooks {list(entries_KCd.shape[:2])}, the vocabulary needs "
            f"[{block.num_quantizers}, {block.codebook_size}]; take the tokenizer that made the vocabulary"
        )
    projection_dD = torch.randn(entries_KCd.shape[2], width, generator=generator) / entries_KCd.shape[2] ** 0.5
    for index in range(block.num_quantizers):
        entry_Cd = entries_KCd[index] - entries_KCd[index].mean(0)
        yield (
            *block.codebook_slice(index),
            entry_Cd / entry_Cd.square().mean().sqrt().clamp(min=1e-8) @ projection_dD,
        )


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
