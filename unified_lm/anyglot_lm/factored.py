"""Rows of ids that are made of digits: the row of an id is the sum of a row for each of its digits.

Some tokenizers' ids are combinations (`Tokenizer.factors`): of a pattern and its colors (`TwoToneVQ`), of levels (FSQ),
of bits (LFQ). A free row for each id must be learnt id by id; here every id that shares a digit teaches it, and an id
that training never met has a row that means something, at both ends: logits of a sum are sums, so the probability of
a combination is that of its digits, given what stands before. To that comes a learnt projection of the id's codebook
entry, so that digits that look alike start alike. (MAGVIT-v2, arXiv 2310.05737, splits large codebooks in the same way,
but writes the digits one after the other.)

`factor_rows` puts such matrices into a model, `unfactor_rows` takes them out again: what is left is a plain Hugging
Face model with one row per id, which anything can load. Nothing here trains or saves.

Shapes: V ids, D width, C ids of a codebook, d dims of its entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyglot_lm.model import make_rows_plain
from anyglot_lm.rows import standard_entries
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import AnyglotError


class _Codebook(nn.Module):
    """Rows `[C, D]` of the ids of one codebook."""

    digits: Tensor
    entries_Cd: Tensor

    def __init__(self, factors: Sequence[int], entries_Cd: Tensor, width: int, deviation: float) -> None:
        super().__init__()
        ids_C = torch.arange(len(entries_Cd))
        places = torch.tensor(factors).cumprod(0) // torch.tensor(factors)
        self.register_buffer(
            "digits", ids_C[None] // places[:, None] % torch.tensor(factors)[:, None], persistent=False
        )
        self.register_buffer("entries_Cd", entries_Cd, persistent=False)
        scale = deviation / (len(factors) + 1) ** 0.5  # of each digit's rows, and of the projected entries
        self.tables = nn.ParameterList(torch.randn(size, width) * scale for size in factors)
        self.projection_dD = nn.Parameter(torch.randn(entries_Cd.shape[1], width) * scale / entries_Cd.shape[1] ** 0.5)

    def forward(self) -> Tensor:
        rows_CD = self.entries_Cd.to(self.projection_dD.dtype) @ self.projection_dD
        for table, digit_C in zip(self.tables, self.digits, strict=True):
            rows_CD = rows_CD + F.embedding(digit_C, table)
        return rows_CD


class FactoredRows(nn.Module):
    """A matrix `[V, D]`: plain rows, and between them those of codebooks whose ids have digits."""

    def __init__(self, weight_VD: Tensor, spans: Mapping[tuple[int, int], _Codebook]) -> None:
        super().__init__()
        self.spans = sorted(spans)
        self.codebooks = nn.ModuleList(spans[span] for span in self.spans)
        kept = torch.ones(len(weight_VD), dtype=torch.bool)
        for first, last in self.spans:
            kept[first:last] = False
        self.plain = nn.Parameter(weight_VD.detach()[kept].clone())

    @property
    def weight(self) -> Tensor:
        """The whole matrix `[V, D]`, made anew, in the dtype of its parameters also under autocast."""
        parts, at, used = [], 0, 0
        with torch.autocast(self.plain.device.type, enabled=False):
            for (first, last), codebook in zip(self.spans, self.codebooks, strict=True):
                parts += [self.plain[used : used + first - at], codebook()]
                used, at = used + first - at, last
            return torch.cat([*parts, self.plain[used:]])


class FactoredEmbedding(FactoredRows):
    """ids int64 `[*]` -> rows `[*, D]`."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class FactoredHead(nn.Module):
    """Hidden states `[*, D]` -> logits `[*, V]`. A tied head holds its embedding as `rows`."""

    def __init__(self, rows: FactoredRows) -> None:
        super().__init__()
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """See `FactoredRows`."""
        return self.rows.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


def factor_rows(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    codebooks: Mapping[str, Tensor],
    factors: Mapping[str, Sequence[int]] | None = None,
    *,
    seed: int = 0,
) -> None:
    """Make the rows of codes sums, in place; they start anew, as wide as the model's rows were.

    Args:
        model: with the rows of `vocabulary`, plain.
        vocabulary: says which ids are codes.
        codebooks: by modality, `[K, C, d]`, as `Tokenizer.codebooks`; modalities without one keep their rows.
        factors: by modality, as `Tokenizer.factors`; without, an id is one digit: a free row and its projected entry.
        seed: of the new rows.

    Raises:
        AnyglotError: factors that do not multiply to the codebook's size, codebooks that do not fit their block, or a
            model whose rows are not plain.
    """
    entries: dict[tuple[int, int], tuple[tuple[int, ...], Tensor]] = {}
    for block in vocabulary.blocks:
        if block.modality not in codebooks:
            continue
        digits = tuple((factors or {}).get(block.modality, (block.codebook_size,)))
        if math.prod(digits) != block.codebook_size:
            raise AnyglotError(
                f"{block.modality}: factors {digits} do not make {block.codebook_size} ids; give its own"
            )
        for first, last, entry_Cd in standard_entries(block, codebooks[block.modality]):
            entries[first, last] = digits, entry_Cd
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not (isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear) and head.bias is None):
        raise AnyglotError("factor_rows needs a model with plain rows and no bias of the head; call it once, first")
    tied = head.weight is embedding.weight

    def rows_of(weight_VD: Tensor, kind: type[FactoredRows]) -> FactoredRows:
        width, deviation = weight_VD.shape[1], float(weight_VD.detach().std())
        rows = kind(weight_VD, {span: _Codebook(*found, width, deviation) for span, found in entries.items()})
        return rows.to(weight_VD.device, weight_VD.dtype)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = rows_of(embedding.weight, FactoredEmbedding)
        outputs = inputs if tied else rows_of(head.weight, FactoredRows)
    model.set_input_embeddings(inputs)
    model.set_output_embeddings(FactoredHead(outputs))


def unfactor_rows(model: PreTrainedModel) -> PreTrainedModel:
    """Back to a plain model with a row per id, in place; one without such rows stays as it is."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, FactoredEmbedding) and isinstance(head, FactoredHead):
        make_rows_plain(model, tied=head.rows is embedding)
    return model
