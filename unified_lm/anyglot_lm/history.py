"""HistoryNoise: in training, some codes that an answer has said are others when they are read back.

A model that writes speech after a text can guess the next sound from the sounds before it, and learns to: what never
followed them in training is not said, whatever the text asks for. In half of the documents some of the answer's own
codes are replaced by random ones of their codebook; what they were stays the target. What was said is then a worse
guide than what was asked (as in word dropout: Bowman et al. 2016, arXiv 1511.06349; here ids are replaced, as their
masks would be ids that decoding never meets). Prompts, text and what validation measures are never touched.

It makes no batches and knows nothing of steps: the caller gives a seed for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import ManifestError

NOISY = 0.5
"""Share of documents whose answers are touched; the others show codes as decoding meets them."""


def check_rates(rates: Mapping[str, float], modalities: Sequence[str]) -> None:
    """Raises ManifestError: a name that is none of the `modalities` with codes, or a rate that is no share."""
    for name, rate in rates.items():
        if name not in modalities:
            raise ManifestError(f"history_noise: no modality {name!r} with codes; there are {', '.join(modalities)}")
        if not 0 <= rate <= 1:
            raise ManifestError(f"history_noise: {name} {rate} is no share; give a number from 0 to 1")


class HistoryNoise:
    """Replaces codes of answers in packed batches.

    Args:
        vocabulary: of the ids.
        rates: modality -> share of its codes that are replaced, in the documents that are touched.

    Raises:
        ManifestError: see `check_rates`.
    """

    def __init__(self, vocabulary: Vocabulary, rates: Mapping[str, float]) -> None:
        check_rates(rates, [block.modality for block in vocabulary.blocks])
        self._rates = [(vocabulary.block(name), rate) for name, rate in rates.items() if rate]

    def __bool__(self) -> bool:
        return bool(self._rates)

    def __call__(self, batch: Mapping[str, Tensor], seed: int) -> Tensor:
        """`input_ids` of a packed batch (`data.py`) with noise: int64 `[B, T]`.

        A row's is a function of the row and the seed, so it does not matter which rows are a batch, and on which rank.
        """
        ids_BT, labels_BT, position_BT = (batch[name] for name in ("input_ids", "labels", "position_ids"))
        length = ids_BT.shape[1]
        keys = (ids_BT * torch.arange(1, length + 1, device=ids_BT.device)).sum(1).tolist()
        drawn = [
            torch.rand(3, length + 1, generator=torch.Generator().manual_seed((seed + key) % 2**63)) for key in keys
        ]
        draws_BT, other_BT, of_document_BT = torch.stack(drawn, dim=1).to(ids_BT.device)  # the same on every device
        draws_BT, other_BT = draws_BT[:, :length], other_BT[:, :length]
        first_BT = position_BT == 0
        document_BT = first_BT.long().cumsum(1)
        before_BT = torch.cat([torch.full_like(labels_BT[:, :1], -1), labels_BT[:, :-1]], dim=1)
        own_BT = (before_BT == ids_BT) & ~first_BT & (of_document_BT.gather(1, document_BT) < NOISY)
        noisy_BT = ids_BT
        for block, rate in self._rates:
            code_BT = ids_BT - block.first_id
            hit_BT = own_BT & (draws_BT < rate) & (code_BT >= 0) & (ids_BT < block.stop_id)
            book_BT = code_BT.div(block.codebook_size, rounding_mode="floor") * block.codebook_size + block.first_id
            drawn_BT = (other_BT * block.codebook_size).long().clamp_max(block.codebook_size - 1)
            noisy_BT = torch.where(hit_BT, book_BT + drawn_BT, noisy_BT)
        return noisy_BT
