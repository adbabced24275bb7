"""`[image: a cat on a roof]` in text -> parts: media as words, the form in which AnyGPT's chats were written.

Kinds are image, music and speech, with some other names for them, in any letter case; a description may hold brackets
that match. `[1]`, `[sic]` and other brackets are text. No media are made here.
"""

from __future__ import annotations

import re

from anyglot_synth.dialogue import IMAGE, MUSIC, SPEECH, TEXT, DialogueError, Part

_KINDS = {
    "image": IMAGE,
    "picture": IMAGE,
    "photo": IMAGE,
    "img": IMAGE,
    "music": MUSIC,
    "song": MUSIC,
    "melody": MUSIC,
    "speech": SPEECH,
    "voice": SPEECH,
    "audio": SPEECH,
}
_OPEN = re.compile(rf"\[\s{{0,9}}({'|'.join(_KINDS)})\s{{0,9}}(?::|(?=\]))", re.I)
_BRACKET = re.compile(r"[\[\]]")


def parts_of(text: str, spoken: bool = False) -> tuple[Part, ...]:
    """The parts of a text in order; words between media are text, or speech if `spoken`. Empty text has none.

    Raises:
        DialogueError: a placeholder without a description, or without its end.
    """
    found: list[Part] = []
    at = 0
    while opening := _OPEN.search(text, at):
        end = _end(text, opening.end())
        kind = opening[1].lower()
        if end is None:
            raise DialogueError(f"the placeholder {text[opening.start() :][:40]!r} has no closing bracket")
        description = " ".join(text[opening.end() : end].split())
        if not description:
            raise DialogueError(f"a placeholder without a description: {text[opening.start() : end + 1][:40]!r}")
        found += _words(text[at : opening.start()], spoken)
        found.append(Part(_KINDS[kind], description))
        at = end + 1
    return (*found, *_words(text[at:], spoken))


def _words(text: str, spoken: bool) -> list[Part]:
    return [Part(SPEECH if spoken else TEXT, text.strip())] if text.strip() else []


def _end(text: str, start: int) -> int | None:
    """Where the bracket that is open at `start` closes."""
    depth = 1
    for bracket in _BRACKET.finditer(text, start):
        depth += 1 if bracket[0] == "[" else -1
        if not depth:
            return bracket.start()
    return None
