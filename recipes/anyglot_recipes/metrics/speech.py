"""Words of speech: errors of a transcript against references, and how alike two voices are.

The errors and their normaliser are the house's (`anyglot_synth.scoring`, by jiwer). Recognisers are those of
`anyglot_synth.recognise`. Nothing here is loaded before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from anyglot_tokenizers.errors import ManifestError

if TYPE_CHECKING:
    from anyglot_synth.recognise import Recogniser
    from anyglot_tokenizers.measures import SpeakerOf

VOICE_SECONDS = 0.5
"""Shorter sounds are filled with silence before a speaker encoder hears them: it needs a third of a second."""


def error_rate(
    heard: str, references: Sequence[str], *, letters: bool = False, language: str = "en"
) -> tuple[float, float]:
    """(edits / length, length) against the reference with the lowest rate; length in words, or letters and spaces.

    The mean of rates weighted by lengths is the error rate of a set: all edits over all words. Above 1 where more was
    heard than said. Length 0 is a reference without words.

    Args:
        heard: what came out.
        references: what is right; at least one.
        letters: letters instead of words.
        language: BCP-47 tag; in English digits are read out, in others they stay digits.
    """
    from anyglot_synth.scoring import letter_errors, word_errors

    measure = letter_errors if letters else word_errors
    found = [measure(reference, heard, language) for reference in references]
    best = min(found, key=lambda errors: (errors.rate, -errors.total))
    return best.rate, float(best.total)


def open_recogniser(name: str) -> Recogniser:
    """A recogniser by its engine (`sphinx`, `nanoworld`), by the folder of a model of transformers, or as a recipe
    describes it (JSON with `engine`). Its engine is loaded, so that what is missing shows before the model runs.

    Raises:
        AnyglotError: no such thing, or its package or weights are missing.
    """
    from anyglot_synth.recognise import RECOGNISERS, make_recogniser

    config: Any = name
    if name.lstrip().startswith("{"):
        try:
            config = json.loads(name)
        except ValueError as error:
            raise ManifestError(f"--recogniser {name}: is not JSON ({error})") from error
    elif Path(name).is_dir():
        config = {"engine": "hf", "path": name}
    elif "/" in name:
        raise ManifestError(
            f"--recogniser {name}: no such folder; give the local folder of a model, or one of {', '.join(RECOGNISERS)}"
        )
    recogniser = make_recogniser(config)
    recogniser.identity()
    recogniser.setup()
    return recogniser


def voice(encoder: SpeakerOf, audio: Tensor, sample_rate: int) -> Tensor:
    """The embedding `[D]` of length 1 of the voice in audio float32 `[C, samples]`."""
    mono = audio.mean(0, keepdim=True)
    mono = F.pad(mono, (0, max(0, round(VOICE_SECONDS * sample_rate) - mono.shape[1])))
    return F.normalize(encoder(mono, sample_rate).flatten().float(), dim=0)


def transcribe(recogniser: Recogniser, audios: Sequence[Tensor], sample_rate: int) -> list[str]:
    """What is heard in each audio float32 `[C, samples]`."""
    return recogniser.transcribe([np.asarray(audio.mean(0), np.float32) for audio in audios], sample_rate)
