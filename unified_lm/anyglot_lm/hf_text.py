"""Text to ids and back with the tokenizer of a pretrained model: a `tokenizer.json` of Hugging Face tokenizers.

The same contract as `text.TextTokenizer`: a text becomes text ids only, and comes back exactly. So what such a file
does beyond that is taken out when it is read: no bos or eos is added, "<|im_end|>" in a text is ordinary characters,
no Unicode normalisation (NFC) changes it, and bytes that a byte-level one has no ids for get some at the end (so `size`
may exceed the model's rows by a few). Chat formats live in the template, not here. `load_text` reads either
kind of text tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anyglot_lm.files import write_bytes
from anyglot_lm.text import TextTokenizer, check_text_ids, check_unicode
from anyglot_tokenizers.errors import ManifestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PHRASES = (
    "Two  spaces,\ttab\r\n\n end ",
    " 3 de\u0301ja\u0300-vu, 12.50 \u20ac",
    "\u4f60\u597d \U0001f600\u200d\U0001f680",
)


class HFTextTokenizer:
    """A text tokenizer; `from_backbone`, `load` or `load_text` make one.

    Args:
        content: a `tokenizer.json`.

    Raises:
        ManifestError: it is none, or does not give every text back.
    """

    file_name = "tokenizer.json"

    def __init__(self, content: bytes) -> None:
        from tokenizers import Tokenizer

        try:
            self._json = _plain(json.loads(content))
            self._content = json.dumps(self._json, ensure_ascii=False, separators=(",", ":")).encode()
            self._tokenizer: Tokenizer = Tokenizer.from_str(self._content.decode())
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ManifestError(f"not a tokenizer.json ({error}); take the file of a fast tokenizer") from error
        self._tokenizer.encode_special_tokens = True
        self._check()

    def _check(self) -> None:
        for text in (*_letters(), *_PHRASES):
            if self.decode(self.encode(text)) != text:
                raise ManifestError(
                    f"the text tokenizer changes {text!r} to {self.decode(self.encode(text))!r}; take one that gives "
                    "every text back, such as byte-level BPE with all 256 bytes"
                )

    @classmethod
    def from_backbone(cls, path_or_name: str | os.PathLike[str], *, gguf_file: str | None = None) -> HFTextTokenizer:
        """The tokenizer of a pretrained model: a folder or hub name, or a GGUF file in it.

        Raises:
            ManifestError: there is none, or it has no fast form.
        """
        from transformers import AutoTokenizer

        options = {} if gguf_file is None else {"gguf_file": gguf_file}
        try:
            found = AutoTokenizer.from_pretrained(os.fspath(path_or_name), trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ManifestError(f"{path_or_name}: its text tokenizer does not load ({error}); add it") from error
        backend = getattr(found, "backend_tokenizer", None)
        if backend is None:
            raise ManifestError(f"{path_or_name}: its text tokenizer has no fast form; add a tokenizer.json")
        try:
            return cls(backend.to_str().encode())
        except ManifestError as error:
            raise ManifestError(f"{path_or_name}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> HFTextTokenizer:
        """Reads a `tokenizer.json` file."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        try:
            return cls(content)
        except ManifestError as error:
            raise ManifestError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the file as it is used, atomically; transformers reads it too."""
        write_bytes(path, self._content)

    def truncated(self, size: int) -> HFTextTokenizer:
        """The same tokenizer with the ids `[0, size)` only: without the last, hence rarest, merges.

        Every text stays encodable, rare words in more ids.

        Raises:
            ManifestError: no BPE, or fewer ids than there are bytes.
        """
        if self._json["model"].get("type") != "BPE":
            raise ManifestError(f"a tokenizer of type {self._json['model'].get('type')} has no merges to drop; use BPE")
        limit = size
        while limit > 0:
            content = json.loads(self._content)
            kept = content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if i < limit}
            merges = [(m, m.split(" ", 1) if isinstance(m, str) else m) for m in content["model"]["merges"]]
            content["model"]["merges"] = [m for m, (a, b) in merges if a in kept and b in kept and a + b in kept]
            content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < limit]
            found = HFTextTokenizer(json.dumps(content).encode())
            if found.size <= size:
                return found
            limit -= found.size - size  # bytes that lost their ids got new ones
        raise ManifestError(f"{size} text ids are too few for a byte-level tokenizer; leave it more")

    @cached_property
    def size(self) -> int:
        """One past the largest id. The model may have more rows, as padding."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the file as it is used."""
        return hashlib.sha256(self._content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Text -> ids in `[0, size)`, none of them special.

        Raises `ManifestError` for a string that is no Unicode text (lone surrogates).
        """
        check_unicode(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids -> text; inverse of `encode`. Bytes that are no UTF-8 become U+FFFD, special ids their names.

        Raises:
            ManifestError: an id outside `[0, size)`.
        """
        pieces = check_text_ids(ids, self.size)
        return str(self._tokenizer.decode(pieces, skip_special_tokens=False))

    def __getstate__(self) -> bytes:
        return self._content

    def __setstate__(self, state: bytes) -> None:
        self.__init__(state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"HFTextTokenizer(size={self.size}, fingerprint={self.fingerprint[:12]})"


AnyText = TextTokenizer | HFTextTokenizer
"""Either kind of text tokenizer: both have encode, decode, size, fingerprint, save and file_name."""


EXPORTED_FOLDER = "text"
"""Where exports keep the model's own text tokenizer; the `tokenizer.json` beside their weights is for transformers."""


def load_text(folder: str | Path) -> AnyText:
    """The text tokenizer of a model folder: its `text.model` or its `tokenizer.json`.

    Raises:
        ManifestError: neither is there, or both are.
    """
    kinds: tuple[type[AnyText], ...] = (TextTokenizer, HFTextTokenizer)
    exported = Path(folder) / EXPORTED_FOLDER / HFTextTokenizer.file_name
    if exported.is_file():
        return HFTextTokenizer.load(exported)
    found = [kind for kind in kinds if (Path(folder) / kind.file_name).is_file()]
    names = " and ".join(kind.file_name for kind in kinds)
    if not found:
        raise ManifestError(f"{folder}: has no text tokenizer ({names.replace('and', 'or')}); copy the folder again")
    if len(found) > 1:
        raise ManifestError(f"{folder}: holds both {names}; keep the one the model was made with")
    return found[0].load(Path(folder) / found[0].file_name)


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """Without what would add ids to a text, cut it, change it, or read markup in it."""
    content = {**content, "post_processor": None, "truncation": None, "padding": None}
    if (content.get("normalizer") or {}).get("type") == "NFC":
        content["normalizer"] = None
    # "Special" ones are never found in a text. Runs of spaces are text, whatever list they are on.
    content["added_tokens"] = [
        {**token, "special": not token["content"].isspace()} for token in content.get("added_tokens") or []
    ]
    if "'ByteLevel'" in str(content.get("pre_tokenizer")):
        _complete(content)
    return content


def _complete(content: dict[str, Any]) -> None:
    """Ids, after all others, for the bytes that have none: SmolLM2's training text had not seen every one."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = content["model"]["vocab"]
    missing = sorted(set(ByteLevel.alphabet()) - set(vocab))
    next_id = 1 + max([*vocab.values(), *(token["id"] for token in content["added_tokens"])], default=-1)
    content["model"]["vocab"] = {**vocab, **{letter: next_id + i for i, letter in enumerate(missing)}}


def _letters() -> Iterator[str]:
    """Letters that between them have every byte that UTF-8 uses."""
    yield from map(chr, range(0xC0))
    yield from (chr((lead - 0xC0) << 6) for lead in range(0xC3, 0xE0))
    yield from (chr(max(0x800, (lead - 0xE0) << 12)) for lead in range(0xE0, 0xF0))
    yield from (chr(max(0x10000, (lead - 0xF0) << 18)) for lead in range(0xF0, 0xF5))
