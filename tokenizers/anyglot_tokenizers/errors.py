"""The errors users meet.

Each prints as one line that names what was wrong and the way out. This file knows nothing of files, models or
tensors. Mistakes of this package itself are `assert`s, never these.
"""

from __future__ import annotations

from os import PathLike


class AnyglotError(Exception):
    """Base of all errors caused by the input, the configuration or the environment."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # what others' errors say, quoted in ours, may have many lines


class MediaError(AnyglotError):
    """A media file or array that cannot be used.

    Args:
        path: the file, or a short name for an array (for example `"audio batch"`).
        problem: what is wrong, with the offending value.
        hint: what to do about it.
    """

    def __init__(self, path: str | PathLike[str], problem: str, hint: str) -> None:
        super().__init__(path, problem, hint)
        self.path = str(path)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return " ".join(f"{self.path}: {self.problem}; {self.hint}".split())


class CodesError(AnyglotError):
    """Codes that do not fit the tokenizer: wrong shape, wrong count of quantizers, ids out of range."""


class ManifestError(AnyglotError):
    """A manifest or configuration with missing or impossible entries."""


class FingerprintError(AnyglotError):
    """Two parts were made for different tokenizers, vocabularies or data plans."""


class CheckpointError(AnyglotError):
    """Weights that are unreadable, unsafe (pickle), incomplete, or not the ones recorded."""


class UnsupportedError(AnyglotError):
    """Something this tokenizer cannot do by its nature: decode without a decoder, chunk an unbounded context."""


class LicenseWarning(UserWarning):
    """The licence of loaded weights is unknown or forbids commercial use."""
