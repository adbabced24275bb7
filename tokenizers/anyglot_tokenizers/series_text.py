"""Time series as digits in text, the alternative to `SeriesVQ`, and the choice between the two on held-out series.

Text needs no tokenizer of its own and any language model reads it, but a number costs several tokens, where a code of
`SeriesVQ` stands for many samples. This file trains through `train.py` and knows no language model.

Shapes: C channels, S samples, N numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyglot_tokenizers.checks import check_media
from anyglot_tokenizers.errors import CodesError, ManifestError, MediaError
from anyglot_tokenizers.series import SeriesLoss, SeriesVQ


class SeriesText:
    """A series `[C, S]` as digits and back, a line per channel such as `1.5 0.02:7,-81,40`.

    That is middle, unit and numbers, which stand for `middle + unit * number`: scaled, of fixed precision and without
    decimal points, as in LLMTIME (Gruver et al., arXiv 2310.07820), with the scale said in the text. Exact to half a
    unit (and to float32).

    Args:
        digits: that 95 % of the numbers have at most; the others have more.
        step: samples per number. 1 writes every sample; else numbers are means of blocks, read by linear interpolation.
    """

    def __init__(self, digits: int = 2, step: int = 1) -> None:
        if min(digits, step) < 1:
            raise ValueError(f"need digits, step >= 1, got {digits}, {step}")
        self.digits, self.step = digits, step

    def write(self, series_CS: Tensor) -> str:
        """The text. Raises MediaError if the series is empty, misshapen or not finite."""
        channels = len(series_CS) if series_CS.ndim else 0
        media_1CS = check_media("series", series_CS[None], "float32[channels, samples]", 3, channels)
        lines = []
        for numbers_N in F.avg_pool1d(media_1CS.double(), self.step, ceil_mode=True)[0]:
            middle = float(f"{float(numbers_N.median()):.9g}")
            spread = float((numbers_N - middle).abs().quantile(0.95)) or float((numbers_N - middle).abs().max())
            unit = float(f"{spread / 10**self.digits:.3g}") or 1.0
            numbers = ",".join(str(round(number)) for number in ((numbers_N - middle) / unit).tolist())
            lines.append(f"{middle:.9g} {unit:.3g}:{numbers}")
        return "\n".join(lines)

    def read(self, text: str) -> Tensor:
        """The series, float32 `[C, N * step]`. Raises CodesError for anything that `write` does not write."""
        try:
            rows = []
            for head, numbers in (line.split(":") for line in text.splitlines()):
                middle, unit = (float(word) for word in head.split())
                numbers_N = torch.tensor([int(number) for number in numbers.split(",")], dtype=torch.float64)
                rows.append(middle + unit * numbers_N)
            series_1CN = torch.stack(rows)[None]
            series_1CS = F.interpolate(series_1CN, scale_factor=self.step, mode="linear").float()
            return check_media("text", series_1CS, "finite numbers", 3, len(rows))[0]
        except (ValueError, RuntimeError, OverflowError, MediaError) as error:
            raise CodesError(f"{text[:40]!r} is no series in digits: {error}") from error


def choose_series_form(
    train: Sequence[Tensor],
    validation: Sequence[Tensor],
    *,
    run_dir: str | os.PathLike[str],
    tokens_per_sample: float = 0.5,
    shapes: int = 3,
    digits: int = 2,
    max_steps: int = 500,
    batch_size: int = 32,
    **options: Any,
) -> tuple[SeriesVQ | SeriesText, dict[str, float]]:
    """Train a `SeriesVQ`, set a `SeriesText` by the same series, and take what reconstructs others better.

    Both get the same budget of tokens, because these are what a language model pays for; a token is a code, or a
    character of the text (as in LLMTIME, where each digit is a token), scales and separators included. The error is
    `nrmse` of `SeriesLoss`: the root of the mean squared error in units of each channel's deviation. It measures what
    the tokens can say, not how well a language model will predict them, and a code says more than a digit.

    Args:
        train: float `[C, samples]` each; digits and step of the text are chosen on them too.
        validation: of the same kind, never trained on.
        run_dir: of the training, see `fit_tokenizer`.
        tokens_per_sample: the budget, for all channels together.
        shapes, digits, options: of `SeriesVQ`; the patch follows from the budget.
        max_steps, batch_size: see `fit_tokenizer`.

    Returns:
        The better one, and the errors on `validation` under "codes" and "text".

    Raises:
        ManifestError: the budget is too small for the shortest series of `train`.
    """
    from anyglot_tokenizers.train import fit_tokenizer

    channels, shortest = len(train[0]), min(series.shape[1] for series in train)
    patch = math.ceil((channels * (digits + 1) + shapes) / tokens_per_sample)
    if patch > shortest:
        raise ManifestError(f"{tokens_per_sample} tokens per sample mean patches of {patch}, series have {shortest}")
    codes = SeriesVQ(patch=patch, channels=channels, shapes=shapes, digits=digits, **options)
    crop = shortest // patch * patch
    settings: dict[str, Any] = {"run_dir": run_dir, "max_steps": max_steps, "batch_size": batch_size, "crop": crop}
    fit_tokenizer(codes, list(train), loss=SeriesLoss(), **settings)
    texts = [_cheapest(digits, train, tokens_per_sample) for digits in range(1, 5)]
    text = min(filter(None, texts), key=lambda form: _error(form, train), default=None)
    if text is None:
        raise ManifestError(f"{tokens_per_sample} tokens per sample are too few for text of series of {shortest}")
    errors = {"codes": _error(codes, validation), "text": _error(text, validation)}
    return (codes if errors["codes"] <= errors["text"] else text), errors


def _cheapest(digits: int, train: Sequence[Tensor], budget: float) -> SeriesText | None:
    """Text of so many digits with the smallest step that keeps to the budget, tokens per sample."""
    samples = sum(series.shape[1] for series in train)
    for step in range(1, max(series.shape[1] for series in train) + 1):
        form = SeriesText(digits, step)
        if sum(len(form.write(series)) for series in train) <= budget * samples:
            return form
    return None


def _error(form: SeriesVQ | SeriesText, series: Sequence[Tensor]) -> float:
    losses = []
    for x_CS in series:
        if isinstance(form, SeriesText):
            again_CS = form.read(form.write(x_CS))
        else:
            again_CS = form.decode(form.encode(x_CS[None]))[0].cpu()
        losses.append(SeriesLoss()(again_CS[None, :, : x_CS.shape[1]], x_CS[None])[0])
    return float(torch.stack(losses).mean().sqrt())
