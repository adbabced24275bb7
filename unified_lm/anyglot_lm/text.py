"""Text to ids and back, exactly: a sentencepiece model with byte fallback and nothing else.

The ids are exactly those of the model, `[0, size)`. It has no control pieces, no normalisation, no dummy
prefix: for every valid string `decode(encode(text)) == text`, whatever the script or the white space.
`"<s>"` or `"<|user|>"` in a text are ordinary pieces: controls live in the vocabulary, out of reach of any
text. Piece 0, sentencepiece's mandatory "unknown", is never produced by `encode` and decodes to nothing.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from anyglot_lm.files import write_bytes
from anyglot_tokenizers.errors import ManifestError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Sentencepiece writes a space as this character, so a literal one has to travel as its bytes to come back.
_SPACE_MARK = "\u2581"


def check_unicode(text: str) -> None:
    """Raises `ManifestError` for a string that is no Unicode text (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"text holds the lone surrogate {text[error.start]!r} and is no valid Unicode; read it as UTF-8"
        ) from error


def check_text_ids(ids: Sequence[int] | np.ndarray, size: int) -> list[int]:
    """`ids` as integers. Raises `ManifestError` for one outside `[0, size)`."""
    pieces = [int(i) for i in ids]
    bad = [i for i in pieces if not 0 <= i < size]
    if bad:
        raise ManifestError(f"id {bad[0]} is no text id (0 to {size - 1}); cut media and control ids out first")
    return pieces


class TextTokenizer:
    """A text tokenizer.

    `TextTokenizer.train` or `.load` make one; `fingerprint` is the sha256 of its model file.
    """

    file_name = "text.model"

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor: SentencePieceProcessor = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ManifestError(f"not a sentencepiece model ({error}); train one with TextTokenizer.train") from error
        self._model = model
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        if 0 in mark:
            raise ManifestError("the sentencepiece model has no byte fallback; train one with TextTokenizer.train")
        self._mark_ids = mark

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        path: str | Path | None = None,
        *,
        vocab_size: int = 8000,
        model_type: Literal["unigram", "bpe"] = "unigram",
    ) -> TextTokenizer:
        """Trains a model on `texts` and saves it to `path`, if given.

        `vocab_size` counts all ids and must be at least 257 (256 bytes and "unknown") plus one per distinct
        character. A small corpus may give fewer ids than asked for; the model's `size` is what counts.
        """
        from sentencepiece import SentencePieceTrainer

        if vocab_size < 258:
            raise ManifestError(f"vocab_size={vocab_size}; byte fallback alone needs 257 ids, use at least 258")
        lines = [line for text in texts for line in text.replace(_SPACE_MARK, " ").splitlines() if line.strip()]
        if not lines:
            raise ManifestError("no text to train a tokenizer on; give at least one non-empty text")
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                byte_fallback=True,
                character_coverage=1.0,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                hard_vocab_limit=False,
                split_digits=True,
                max_sentence_length=1 << 20,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                unk_id=0,
                num_threads=4,
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            raise ManifestError(
                f"sentencepiece could not train {vocab_size} ids on {len(lines)} lines ({error}); use "
                "another vocab_size, 257 plus one per distinct character at least"
            ) from error
        tokenizer = cls(model.getvalue())
        if path is not None:
            tokenizer.save(path)
        return tokenizer

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """Reads a `text.model` file."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        try:
            return cls(model)
        except ManifestError as error:
            raise ManifestError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the `text.model` file, atomically."""
        write_bytes(path, self._model)

    @property
    def size(self) -> int:
        """Number of ids."""
        return int(self._processor.vocab_size())

    @property
    def unknown_id(self) -> int:
        """The one id that no text has; a grammar may leave it out."""
        return int(self._processor.unk_id())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the model file."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Text -> ids in `[0, size)`.

        Raises `ManifestError` for a string that is no Unicode text (lone surrogates).
        """
        check_unicode(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE_MARK)):
            if i:
                ids += self._mark_ids
            if part:
                ids += self._processor.encode(part, out_type=int)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids -> text; exact inverse of `encode`. Bytes that are no UTF-8 become U+FFFD, the unknown id nothing.

        Raises:
            ManifestError: an id outside `[0, size)`.
        """
        pieces = check_text_ids(ids, self.size)
        unknown = self.unknown_id
        return str(self._processor.decode([i for i in pieces if i != unknown]))

    def __getstate__(self) -> bytes:
        return self._model

    def __setstate__(self, state: bytes) -> None:
        self.__init__(state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"TextTokenizer(size={self.size}, fingerprint={self.fingerprint[:12]})"
