"""Choosing among legal ids: settings per modality, and one id per row by inverse-CDF sampling.

Every row has random numbers of its own (counter-based: Philox keyed by the row's seed), one per id, so what a row says
does not depend on which rows share its batch. This file knows no model and no grammar.

Shape suffixes: G rows, C width of the slice of legal ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anyglot_tokenizers.errors import AnyglotError


class GenerationError(AnyglotError):
    """The model, the prompts or the settings do not allow generation."""


@dataclass(frozen=True)
class Sampling:
    """How to choose among the legal ids of one modality.

    Filters apply in the order repetition penalty, temperature, top-k, min-p, top-p.

    Args:
        temperature: divides the logits; 0 (less than 1e-5) is greedy, filters are then ignored.
        top_k: keep only the k likeliest ids; 0 keeps all.
        top_p: keep the likeliest ids up to this much probability (nucleus sampling, Holtzman et al. 2019).
        min_p: drop ids less likely than this share of the likeliest (Nguyen et al. 2024).
        repetition_penalty: divides positive and multiplies negative logits of ids that the row has already
            written in this answer (CTRL, Keskar et al. 2019); 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        checks = [
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, ">= 0 (0 is greedy)"),
            ("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 keeps every id)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "> 0 (1 is off)"),
        ]
        for name, value, good, rule in checks:
            if not good:
                raise GenerationError(f"Sampling.{name} is {value}; it must be {rule}")


LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest id is taken: quotients would leave float32."""

PLAUSIBLE = 0.05
"""See `guided`."""

GREEDY = Sampling(temperature=0.0)


def row_seeds(seed: int, num_rows: int) -> list[int]:
    """Seeds of the rows of `generate(..., seed=seed)`: pass one of them alone to repeat one row alone.

    Seeds count modulo 2**64, so there are negative ones.
    """
    return [int(value) for value in np.random.SeedSequence(seed % 2**64).generate_state(num_rows, np.uint64)]


def row_draws(seed: int, count: int) -> np.ndarray:
    """float64[count] in [0, 1): the row's random numbers, a multiple of 2**-32 each.

    The coarse step makes u * total < total exactly: inverse-CDF sampling can never land behind the last id.
    """
    bits = np.random.Philox(key=seed % 2**128).random_raw(count)
    return (bits >> np.uint64(32)).astype(np.float64) * 2.0**-32


def join_ends(logits_GC: Tensor, eos: int, user: int) -> None:
    """Gives eos the chance of both ends of a turn, in place: of the last one, and of one that the user goes on after.

    Of a conversation in the training, eos stands at the very end only; every other answer ends with the user's marker.
    """
    logits_GC[:, eos] = torch.logaddexp(logits_GC[:, eos], logits_GC[:, user])


def join_all_ends(logits_GC: Tensor, ends: slice, mask: Tensor) -> None:
    """Gives the legal ends of a text, in place, the chance of all its ends: eos, the roles' markers, and start ids.

    Where a request wants a medium after the text, but the model would rather end its turn, the text is as much at its
    end: without this, it would go on with whatever follows most likely but for the end.

    Args:
        logits_GC: without the mask.
        ends: columns of the ids that end a text.
        mask: `[C]` or `[G, C]`, 0 where an id is legal, else -inf. Where no end is, nothing changes that is legal.
    """
    all_G1 = logits_GC[:, ends].logsumexp(-1, keepdim=True)
    shift_G1 = all_G1 - (logits_GC[:, ends] + mask[..., ends]).logsumexp(-1, keepdim=True)
    logits_GC[:, ends] += shift_G1.where(shift_G1.isfinite(), 0)  # others may have forbidden the ends that are legal


def level_text(logits_GC: Tensor, text: slice, temperature: float) -> None:
    """Gives text the chance of all its ids together, in place, where it is one choice among others.

    A medium has one start id, but a text may begin with many words: the likeliest of them, or all of them at a low
    temperature, would lose against a start id that is less likely than text. (top-k, top-p and min-p look at single
    ids all the same.)
    """
    if temperature < LEAST_TEMPERATURE:
        most_G1 = logits_GC[:, text].amax(-1, keepdim=True)
    else:
        most_G1 = temperature * (logits_GC[:, text] / temperature).logsumexp(-1, keepdim=True)
    shift_G1 = logits_GC[:, text].logsumexp(-1, keepdim=True) - most_G1
    logits_GC[:, text] += shift_G1.where(shift_G1.isfinite(), 0)


def guided(conditional_GC: Tensor, unconditional_GC: Tensor, scale: float) -> Tensor:
    """Logits of classifier-free guidance; beyond scale 1 only of plausible ids, -inf for the rest.

    Where an id is unlikely with the prompt and still less likely without, guidance alone would make it the likeliest of
    all. Plausible are ids at least `PLAUSIBLE` times as likely as the best one, as in contrastive decoding (Li et al.
    2022, arXiv 2210.15097).
    """
    plausible_GC = conditional_GC > -torch.inf
    if scale > 1:
        plausible_GC &= conditional_GC >= conditional_GC.amax(-1, keepdim=True) + math.log(PLAUSIBLE)
    guided_GC = unconditional_GC + scale * (conditional_GC - unconditional_GC)
    return guided_GC.masked_fill(~plausible_GC, -torch.inf)


def penalise(logits_GC: Tensor, seen_GC: Tensor, penalty: float) -> Tensor:
    """Makes ids already seen less likely (penalty > 1): divides positive logits, multiplies negative ones."""
    lower = torch.where(logits_GC > 0, logits_GC / penalty, logits_GC * penalty)
    return torch.where(seen_GC, lower, logits_GC)


def sample(logits_GC: Tensor, draws_G: Tensor, settings: Sampling) -> Tensor:
    """One id per row: one random number per row and id, whatever the slice's width.

    Args:
        logits_GC: float32, -inf where illegal; at least one finite entry per row.
        draws_G: float64 in [0, 1), multiples of 2**-32.
        settings: temperature and filters.

    Returns:
        int64[G], offsets into the slice.
    """
    if settings.temperature < LEAST_TEMPERATURE:
        return logits_GC.argmax(-1)
    logits_GC = (logits_GC - logits_GC.amax(-1, keepdim=True)) / settings.temperature
    if 0 < settings.top_k < logits_GC.shape[-1]:
        least_G1 = logits_GC.topk(settings.top_k, dim=-1).values[:, -1:]
        logits_GC = logits_GC.masked_fill(logits_GC < least_G1, -torch.inf)
    if settings.min_p > 0:
        logits_GC = logits_GC.masked_fill(logits_GC < np.log(settings.min_p), -torch.inf)  # the best logit is 0
    if settings.top_p < 1:
        sorted_GC, order_GC = logits_GC.sort(-1, descending=True)
        shares_GC = sorted_GC.softmax(-1)
        before_GC = shares_GC.cumsum(-1) - shares_GC
        before_GC[:, 0] = -1.0  # the likeliest stays, however small top_p is
        logits_GC = logits_GC.scatter(-1, order_GC, sorted_GC.masked_fill(before_GC >= settings.top_p, -torch.inf))
    total_GC = logits_GC.double().exp().cumsum(-1)
    chosen_G = torch.searchsorted(total_GC, draws_G[:, None] * total_GC[:, -1:], right=True)[:, 0]
    return chosen_G.clamp(max=logits_GC.shape[-1] - 1)  # logits that are not numbers must not leave the slice
