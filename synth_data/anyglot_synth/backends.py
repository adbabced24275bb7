"""`Backend`: one shape for everything that makes a medium from words: voices, painters, players, folders.

A backend is told what to make (`text`), how (`style`, plain JSON) and a seed, and gives an array. With its
`identity` these three make the content address of the file, so a backend must name in it all that changes its output:
engine, version, weights. A backend never writes files of the dataset and never decides what is made; see `stages.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.dialogue import address
from anyglot_tokenizers.errors import AnyglotError


class BackendError(AnyglotError):
    """A backend is not here, or could not make something.

    Args:
        message: one line with the way out.
        retryable: another attempt may succeed (a timeout, a crash, a busy server).
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


@dataclass(frozen=True)
class Made:
    """What a backend made.

    Args:
        array: sound float32 `[samples]` in [-1, 1], or a picture uint8 `[H, W, 3]`.
        sample_rate: Hz of a sound, None for a picture.
        notes: what is worth keeping of how it was made (JSON), such as what a folder's caption was.
        midi: a standard MIDI file with the same notes, if there is one.
    """

    array: NDArray[Any]
    sample_rate: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    midi: bytes | None = None


class Backend(ABC):
    """Makes media of one modality.

    A backend is light until `setup` (it travels to worker processes); after it, `make` may be called any number of
    times by one thread. The same identity, text, style and seed give the same result, as far as the engine allows.
    """

    modality: ClassVar[str]
    """ "speech", "image" or "music"."""
    name: ClassVar[str]
    """Of the engine, as users write it in a recipe."""
    licence: str = "unknown"
    """SPDX name of the licence of what it makes, as far as its weights or files set one."""
    deterministic: bool = True
    """Whether the same request gives the same bytes on another run of the same machine."""
    seeded: bool = True
    """Whether the seed changes the result; where not, equal requests share one file."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON: engine, version and weights (by sha256). Raises `BackendError` where the engine is not here."""

    def setup(self) -> None:
        """Loads what is heavy, once per process. Raises `BackendError`."""
        return None

    @abstractmethod
    def make(self, text: str, style: Mapping[str, Any], seed: int) -> Made:
        """Makes one medium.

        Args:
            text: what to say, or a description.
            style: settings of this engine (of a voice: which voice, rate, pitch, ...).
            seed: of whatever is random in it.

        Raises:
            BackendError: it cannot be made.
        """

    def styles(self) -> Sequence[Mapping[str, Any]]:
        """Those to choose from, e.g. the voices of an engine with what is known of them; one empty style otherwise."""
        return [{}]

    def key(self, text: str, style: Mapping[str, Any], seed: int) -> str:
        """Content address of what `make` gives."""
        return address([self.modality, self.identity(), text, dict(style), seed if self.seeded else 0])


def silent(audio: NDArray[np.float32], threshold: float = 1e-4) -> bool:
    """Whether a sound has no sample beyond the threshold (full scale is 1)."""
    return not len(audio) or float(np.abs(audio).max()) < threshold
