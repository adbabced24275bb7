"""Filters of words: another language than promised, words that are not wanted, personal data. They need no media.

What is found is named by its kind and place and never repeated in the reject's reason (a blocked phrase, which is the
user's own, is).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from anyglot_synth.backends import BackendError
from anyglot_synth.dialogue import Dialogue
from anyglot_synth.filters.base import Filter
from anyglot_synth.pii import KINDS, find
from anyglot_synth.stages import Filtered, Item
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import AnyglotError


def texts(dialogue: Dialogue) -> Iterator[tuple[str, str]]:
    """("turn 2 (user)", text) of every part that has words: also descriptions, and what a voice is given."""
    for number, turn in enumerate(dialogue.turns, start=1):
        for part in turn.parts:
            for text in dict.fromkeys((part.text, part.spoken_text or "")):
                if text.strip():
                    yield f"turn {number} ({turn.role})", text


def _version() -> str:
    try:
        return version("py3langid")
    except PackageNotFoundError as error:
        raise BackendError("py3langid is not installed; install it with: pip install 'anyglot[synth]'") from error


@cache
def _identifier() -> Any:
    _version()
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@dataclass
class LanguageFilter(Filter):
    """Turns that are surely in another language than the dialogue says (py3langid, 97 languages, BSD).

    Short texts look like anything, so turns with few letters pass, and so do those that the identifier is not sure of.

    Args:
        languages: allowed ones (ISO 639-1); empty: the language of each dialogue.
        min_letters: shorter turns pass.
        min_confidence: probability of the other language from which a turn counts as that.
    """

    name: ClassVar[str] = "language"
    languages: Sequence[str] = ()
    min_letters: int = 24
    min_confidence: float = 0.9

    def __post_init__(self) -> None:
        self.require(not isinstance(self.languages, str), f"languages is {self.languages!r}; give a list")
        self.require(0 < self.min_confidence <= 1, f"min_confidence is {self.min_confidence}; use above 0, up to 1")

    def config(self) -> dict[str, Any]:
        return super().config() | {"languages": list(self.languages), "py3langid": _version()}

    def setup(self) -> None:
        _identifier()

    def run(self, item: Item, store: Store) -> Item:
        allowed = {tag.split("-")[0].lower() for tag in self.languages or [item.dialogue.language]}
        found: dict[str, None] = {}
        for number, turn in enumerate(item.dialogue.turns, start=1):
            text = " ".join(part.text for part in turn.parts)
            if sum(map(str.isalpha, text)) < self.min_letters:
                continue
            language, confidence = _identifier().classify(text)
            found[str(language)] = None
            if language not in allowed and confidence >= self.min_confidence:
                detail = f"turn {number} ({turn.role}) is {language} ({100 * confidence:.0f} % sure)"
                raise Filtered("language", detail, languages=list(found))
        return item.with_facts(languages=list(found))


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


@dataclass
class BlocklistFilter(Filter):
    """Whole words and phrases of a list, whatever their case and the marks between words. `ass` is not in `class`.

    Args:
        path: UTF-8 file with a word or phrase on each line; empty lines and those that begin with `#` are left out.

    Raises:
        AnyglotError: the file cannot be read, has a line without words, or no words at all.
    """

    name: ClassVar[str] = "blocklist"
    path: str
    _phrases: dict[str, list[tuple[str, ...]]] = field(init=False, repr=False, default_factory=dict)
    _sha256: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        try:
            content = Path(self.path).read_bytes()
            lines = content.decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise AnyglotError(f"{self.path}: cannot be read as a blocklist ({error})") from error
        self._sha256 = sha256(content).hexdigest()
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.startswith("#"):
                phrase = tuple(_tokens(line))
                self.require(bool(phrase), f"{self.path}, line {number} has no words")
                self._phrases.setdefault(phrase[0], []).append(phrase)
        self.require(bool(self._phrases), f"{self.path} has no phrases; leave the filter out, or write some")

    def config(self) -> dict[str, Any]:
        return {"filter": self.name, "version": self.version, "sha256": self._sha256}

    def run(self, item: Item, store: Store) -> Item:
        for where, text in texts(item.dialogue):
            words = _tokens(text)
            for i, word in enumerate(words):
                for phrase in self._phrases.get(word, ()):
                    if tuple(words[i : i + len(phrase)]) == phrase:
                        raise Filtered("blocklist", f"{where}: {' '.join(phrase)!r}")
        return item


@dataclass
class PiiFilter(Filter):
    """Personal data, see `anyglot_synth.pii` for what is found and what is not.

    Args:
        kinds: which of email, iban, card, ssn, ip, phone.
    """

    name: ClassVar[str] = "pii"
    version: ClassVar[int] = 2
    kinds: Sequence[str] = KINDS

    def __post_init__(self) -> None:
        self.require(set(self.kinds) <= set(KINDS), f"kinds {list(self.kinds)}: use some of {', '.join(KINDS)}")

    def config(self) -> dict[str, Any]:
        return super().config() | {"kinds": list(self.kinds)}

    def run(self, item: Item, store: Store) -> Item:
        counts: Counter[str] = Counter()
        first = ""
        for where, text in texts(item.dialogue):
            for found in find(text, tuple(self.kinds)):
                counts[found.kind] += 1
                first = first or f"{where}: {found.kind}"
        if counts:
            raise Filtered("pii", first, pii=dict(sorted(counts.items())))
        return item
