"""`SpeakableStage`: gives every part of speech its spoken text, and ends dialogues that no voice should say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

from anyglot_synth.dialogue import ASSISTANT, SPEECH, TEXT, Dialogue, Part, Turn
from anyglot_synth.speakable.text import Dropped, Limits, speakable
from anyglot_synth.stages import Filtered, Item, Stage
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import AnyglotError

VERSION = 6
"""Counts changes of what is said: part of a job's fingerprint."""
CHOICES = ("filter", "text")


class SpeakableStage(Stage):
    """Sets `Part.spoken_text` of parts of speech that have none; `Part.text` stays as it was.

    Args:
        unspeakable: what becomes of a dialogue with a part that should not be spoken: "filter" ends it, "text" keeps
            it and shows that part as text, once: where a turn of the form `chain` has it as text already, it goes.
        max_words, max_emoji, max_cells, max_symbols, day_first: see `Limits`.
    """

    name: ClassVar[str] = "speakable"

    def __init__(
        self,
        unspeakable: str = "filter",
        max_words: int = 200,
        max_emoji: int = 3,
        max_cells: int = 12,
        max_symbols: float = 0.15,
        day_first: bool = False,
    ) -> None:
        if unspeakable not in CHOICES:
            raise AnyglotError(f"stage speakable: unspeakable is {unspeakable!r}; use one of: {', '.join(CHOICES)}")
        self.unspeakable = unspeakable
        self.limits = Limits(max_words, max_emoji, max_cells, max_symbols, day_first)

    def config(self) -> dict[str, Any]:
        """See `Stage`."""
        return {"stage": self.name, "version": VERSION, "unspeakable": self.unspeakable, **asdict(self.limits)}

    def run(self, item: Item, store: Store) -> Item:
        """See `Stage`. Filters with the reason that `speakable` gives, or "language" where the text is not English."""
        words: list[int] = []
        shown: list[str] = []

        def say(i: int, j: int, turn: Turn, part: Part) -> Part:
            if part.modality != SPEECH or part.media is not None:
                return part
            if part.spoken_text is None:
                if not item.dialogue.language.lower().startswith("en"):
                    detail = f"the text is {item.dialogue.language!r}; only English is made speakable"
                    raise Filtered("language", detail)
                found = speakable(part.text, self.limits)
                if isinstance(found, Dropped):
                    if self.unspeakable == "filter":
                        raise Filtered(found.reason, f"turn {i + 1} ({turn.role}): {found.detail}")
                    shown.append(found.reason)
                    return replace(part, modality=TEXT)
                part = replace(part, spoken_text=found.text)
            words.append(len((part.spoken_text or "").split()))
            return part

        dialogue = item.dialogue.map_parts(say)
        facts = {"spoken_words": words, **({"shown": shown} if shown else {})}
        return replace(item, dialogue=_once(item.dialogue, dialogue)).with_facts(**facts)


def _once(before: Dialogue, after: Dialogue) -> Dialogue:
    """The dialogue without speech that became text and says what its turn had written already.

    In the form `chain` transcripts of speech that became text go too: there is nothing to hear.
    """
    turns: list[Turn] = []
    was_heard = is_heard = ""
    for old, new in zip(before.turns, after.turns, strict=True):
        written = [part.text for part in old.parts if part.modality == TEXT]
        pairs = zip(old.parts, new.parts, strict=True)
        parts = [part for was, part in pairs if part.modality == was.modality or not _is_joined(part.text, written)]
        transcribed = new.role == ASSISTANT and before.meta.get("form") == "chain" and was_heard != is_heard
        if transcribed and parts[0] == Part(TEXT, was_heard):
            parts[:1] = [Part(TEXT, is_heard)] if is_heard else []
        was_heard, is_heard = (" ".join(p.text for p in turn.parts if p.modality == SPEECH) for turn in (old, new))
        turns.append(replace(new, parts=tuple(parts)))
    return replace(after, turns=tuple(turns))


def _is_joined(text: str, written: Sequence[str]) -> bool:
    """Whether a text is some of those written, whole, in order, with a space between: as `chain` joins them."""
    begun = {""}
    for one in written:
        longer = [f"{start} {one}" if start else one for start in begun]
        begun |= {start for start in longer if text.startswith(start)}
    return text in begun
