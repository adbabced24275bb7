"""What a model wrote for the items of an evaluation, and what others see and hear in it, each computed once.

A *side* is one of three things that can stand as the answer to an item: "output" (what the model wrote), "rebuilt" (the
first right answer through the model's tokenizer) and "original" (the first right answer as it is). Judges of media are
injected (`Judges`). Scores are in `scores.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from anyglot_lm.unified import Output, UnifiedModel
from anyglot_recipes.data_eval.items import TEXT, Content, Item, Task, others
from anyglot_tokenizers.media import read_audio, read_image

if TYPE_CHECKING:
    import numpy as np

    from anyglot_recipes.metrics.joint import JointSpace
    from anyglot_synth.recognise import Recogniser
    from anyglot_tokenizers.measures import SpeakerOf

Side = Literal["output", "rebuilt", "original"]
T = TypeVar("T")

CHUNK = 32
"""Media decoded, or read, at once."""
ROUNDS = 5
"""Other items that each output is given to, for the chance level."""
VOICE_RATE = 16_000


@dataclass(frozen=True)
class Judges:
    """What looks and listens, None where it was not given, and the language of texts (see `scoring.normal`)."""

    clip: JointSpace | None = None
    clap: JointSpace | None = None
    speaker: SpeakerOf | None = None
    speaker_name: str = "given"
    recogniser: Recogniser | None = None
    language: str = "en"


class Evidence:
    """Items, outputs and judges.

    Args:
        model: that answered.
        task: what it did.
        items: what it was asked.
        outputs: the answer to each item, None where there is none. Media are codes.
        judges: what looks and listens.
        rng: draws the other items of the chance level.
    """

    def __init__(
        self,
        model: UnifiedModel,
        task: Task,
        items: Sequence[Item],
        outputs: Sequence[Output | None],
        judges: Judges,
        rng: np.random.Generator,
    ) -> None:
        self.model, self.task, self.items, self.outputs, self.judges = model, task, items, outputs, judges
        self.others = others(len(items), rng, ROUNDS)
        self._seen: dict[tuple[str, str], list[Tensor | None]] = {}
        self._heard: dict[str, list[str | None]] = {}

    @cached_property
    def texts(self) -> list[str | None]:
        """What was written for each item."""
        return [None if output is None else output.text for output in self.outputs]

    def rate(self, modality: str) -> int | None:
        """Hz of a modality's sounds; None of pictures and text."""
        return None if modality == TEXT else self.model.tokenizers[modality].spec.sample_rate

    def each(
        self,
        modality: str,
        side: Side,
        look: Callable[[list[Tensor]], Sequence[T]],
        rate: int | None = None,
        which: Sequence[int] | None = None,
    ) -> list[T | None]:
        """`look` at a medium of each item, a few at a time; None where there is none.

        Args:
            modality: of the media.
            side: "output" and "rebuilt" are of the modality that is asked for.
            look: pictures float32 `[3, H, W]` in [0, 1], or sounds `[C, samples]`, to whatever it finds.
            rate: Hz of originals; default the tokenizer's. Others always have the tokenizer's.
            which: items; default all.
        """
        found: list[T | None] = [None] * len(self.items)
        there = [i for i in (range(len(self.items)) if which is None else which) if self._has(i, modality, side)]
        for start in range(0, len(there), CHUNK):
            group = there[start : start + CHUNK]
            for i, result in zip(group, look(self._media(group, modality, side, rate)), strict=True):
                found[i] = result
        return found

    def _has(self, i: int, modality: str, side: Side) -> bool:
        return self.outputs[i] is not None if side == "output" else self.items[i].has(modality)

    def _media(self, group: Sequence[int], modality: str, side: Side, rate: int | None) -> list[Tensor]:
        if side == "original":
            return [self._original(self.items[i].contents[modality][0], modality, rate) for i in group]
        codes: list[Tensor] = []
        for i in group:
            output = self.outputs[i]
            if side == "rebuilt":
                codes.append(torch.from_numpy(self.items[i].codes[modality]))
            else:
                assert output is not None and output.codes is not None
                codes.append(output.codes)
        return self.model.decode_media(modality, codes)

    def _original(self, content: Content, modality: str, rate: int | None) -> Tensor:
        assert not isinstance(content, str)
        own = self.rate(modality)
        return read_image(content) if own is None else read_audio(content, sample_rate=rate or own)

    def vectors(self, space: JointSpace, modality: str, side: Side) -> list[Tensor | None]:
        """Unit vector `[D]` of each item's text or medium in a joint space; of several texts, of the first."""
        key = (f"{id(space)} {modality}", side)
        if key not in self._seen:
            if modality == TEXT:
                written = self.texts if side == "output" else [next(iter(item.texts()), None) for item in self.items]
                there = [text for text in written if text]
                vectors = iter(list(space.texts(there)) if there else [])
                self._seen[key] = [next(vectors) if text else None for text in written]
            else:
                own, wanted = self.rate(modality), space.sample_rate

                def look(media: list[Tensor]) -> Sequence[Tensor]:
                    if own is not None and wanted is not None and side != "original":
                        media = [resampled(sound, own, wanted) for sound in media]
                    return list(space.media(media))

                self._seen[key] = self.each(modality, side, look, wanted)
        return self._seen[key]

    def voices(self, side: Side) -> list[Tensor | None]:
        """Unit vector `[D]` of the voice in each item's speech."""
        from anyglot_recipes.metrics.speech import voice

        modality, encoder = self.task.asked, self.judges.speaker
        assert encoder is not None
        key = ("voice", side)
        if key not in self._seen:
            rate = VOICE_RATE if side == "original" else self.rate(modality)
            assert rate is not None
            self._seen[key] = self.each(modality, side, lambda media: [voice(encoder, m, rate) for m in media], rate)
        return self._seen[key]

    def transcripts(self, side: Side) -> list[str | None]:
        """What the recogniser hears in each item's speech."""
        from anyglot_recipes.metrics.speech import transcribe

        modality, recogniser = self.task.asked, self.judges.recogniser
        rate = self.rate(modality)
        assert recogniser is not None and rate is not None
        if side not in self._heard:
            self._heard[side] = self.each(modality, side, lambda media: transcribe(recogniser, media, rate), rate)
        return self._heard[side]


def resampled(sound_CS: Tensor, rate: int, wanted: int) -> Tensor:
    """A sound float32 `[C, samples]` at another rate (soxr)."""
    if rate == wanted:
        return sound_CS
    import soxr

    return torch.from_numpy(soxr.resample(sound_CS.numpy().T, rate, wanted, quality="HQ").T.copy())
