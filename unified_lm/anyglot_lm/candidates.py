"""Several answers to a prompt, and the one of them that the model itself reads best.

A model that reads what it writes can check it. Of some answers `best_of` takes the one of the largest

    log P(answer | prompt) + log P(description | medium of the answer)

where the description is the prompt's text; of a medium, what the model writes about it; or the text that the answer
begins with. The noisy channel of speech recognition and of dialogue (Li et al. 2016, arXiv 1510.03055); DALL-E
(arXiv 2102.12092) and Tortoise rank pictures and speech likewise, with a second model. It helps where a description
says what the answer must show, so it is no way to answer questions. Where many codes are details that nobody asked for,
as in photos and human speech, the first term takes what is plain, and `prior=0` leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from anyglot_lm.engine import GenerationError, Sampling, row_seeds
from anyglot_lm.grammar import TEXT, Request
from anyglot_lm.likelihood import log_likelihoods
from anyglot_lm.parts import Output
from anyglot_lm.segments import Role, Sample, Segment
from anyglot_lm.unified import UnifiedModel

DESCRIPTION = Request(order=(TEXT,), max_ids=128)
Reader = Callable[[Sequence[Tensor]], Sequence[Segment]]
"""Decoded media, such as pictures `[3, H, W]`, as segments of the user."""


def best_of(
    model: UnifiedModel,
    samples: Sequence[Sample],
    request: Request,
    *,
    num: int = 8,
    temperature: float = 0.7,
    sampling: Mapping[str, Sampling] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    guidance: Mapping[str, float] | None = None,
    prior: float = 1.0,
    told: Sequence[str] | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> list[list[Output]]:
    """Answers each sample `num` times and keeps the best; `num` times the work of `UnifiedModel.respond`, and a little.

    Args:
        model: must know how to write about every medium involved.
        samples: prompts of one segment each.
        request: asks for one medium, or for text and then a medium.
        num: answers to each sample.
        temperature: of all answers but the first.
        sampling: settings of the first answer, whose other settings are those of all, by modality.
        seed, batch_size, guidance: as for `respond`.
        prior: factor of the answer's own log-probability. At 0 the reading alone chooses; a text on the way then keeps
            its settings of `sampling`, which should be greedy, since how likely it is does not count.
        told: what each answer is to show or say, where that is not the prompt's text; unused after a text on the way.
        readers: how media of a modality are read, where the model does not read the codes that it writes.

    Raises:
        GenerationError: another prompt or request, or answers that the model cannot read.
    """
    order = request.order or ()
    if num < 1 or not order or order[-1] == TEXT or order[:-1] not in ((), (TEXT,)):
        raise GenerationError(f"the best of {num} is for answers of a medium, or of text and a medium, not {order}")
    if any([segment.role for segment in sample.segments] != ["user"] for sample in samples):
        raise GenerationError(f"the best of {num} is for prompts of one segment of the user")
    settings = dict(sampling or {})
    drawn = {
        modality: replace(settings.get(modality, Sampling()), temperature=temperature)
        for modality in (*((TEXT,) if prior else ()), *model.vocabulary.modalities)
    }
    if TEXT in settings:
        drawn.setdefault(TEXT, settings[TEXT])
    how: dict[str, Any] = {"batch_size": batch_size, "guidance": guidance, "decode": False}
    first = model.respond(samples, request, sampling, seed, **how)
    seeds = row_seeds(seed, len(samples) * num)[len(samples) :]
    repeated = [sample for sample in samples for _ in range(num - 1)]
    more = model.respond(repeated, request, drawn, seeds, **how)
    answers = [a for i, one in enumerate(first) for a in [one, *more[i * (num - 1) : (i + 1) * (num - 1)]]]
    if len(order) > 1:
        texts = [answer[0].text or "" for answer in answers]
    else:
        texts = [text for text in (descriptions(model, samples) if told is None else told) for _ in range(num)]
    if reader := (readers or {}).get(order[-1]):
        media = reader([output.media for (*_, output) in model.with_media(answers) if output.media is not None])
    else:
        media = [_segment(answer[-1], "user") for answer in answers]
    own: list[float | None] = [0.0] * len(answers)
    if prior:
        prompts = [sample for sample in samples for _ in range(num)]
        given = [
            Sample([*prompt.segments, *(_segment(output, "assistant") for output in answer)])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        own = log_likelihoods(model, given, mean=False)
    read = [Sample([one, Segment(TEXT, text, "assistant")]) for one, text in zip(media, texts, strict=True)]
    scores = [
        -np.inf if a is None or b is None else prior * a + b
        for a, b in zip(own, log_likelihoods(model, read, mean=False), strict=True)
    ]
    values_SN = np.array(scores).reshape(len(samples), num)
    if not np.isfinite(values_SN.max(1, initial=-np.inf)).all():
        raise GenerationError(
            "no answer can be read back: its codes are not written as the model reads them (another pattern or fewer "
            "codebooks than in a prompt), or answer and description are too long for the model"
        )
    best = [answers[i * num + int(j)] for i, j in enumerate(values_SN.argmax(1))]
    return best if reader else model.with_media(best)


def descriptions(model: UnifiedModel, samples: Sequence[Sample]) -> list[str]:
    """The text of each prompt, or the likeliest text of the model about its medium."""
    media = [i for i, sample in enumerate(samples) if sample.segments[0].modality != TEXT]
    greedy = {TEXT: Sampling(temperature=0.0)}
    written = model.respond([samples[i] for i in media], DESCRIPTION, greedy)
    found = [str(sample.segments[0].content) for sample in samples]
    for i, answer in zip(media, written, strict=True):
        found[i] = answer[0].text or ""
    return found


def _segment(output: Output, role: Role) -> Segment:
    return Segment(output.modality, (output.text or "") if output.codes is None else output.codes.numpy(), role)
