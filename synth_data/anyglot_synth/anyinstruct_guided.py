"""Chats written turn by turn: the model fills in words, the program says whose turn it is and what is shown when.

Small models lose the thread of a format; here they cannot. The order of pictures and music is the requirement's plan,
so such chats are more alike than free ones. A turn that is refused is tried again alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from anyglot_synth.anyinstruct_parse import Said, check_chat, read_description, read_utterance
from anyglot_synth.anyinstruct_prompts import Messages, Requirement
from anyglot_synth.dialogue import TEXT
from anyglot_synth.llm import Asked, Refused, Request, Unusable, Writer, ask_all
from anyglot_synth.seeds import seed_of

ROLES = ("User", "Assistant")


@dataclass
class Draft:
    """A chat while it is written.

    Args:
        requirement: what it must hold, with the plan of its turns.
        prompt: what asks for it.
        seed: of it.
    """

    requirement: Requirement
    prompt: Messages
    seed: int
    turns: list[tuple[Said, ...]] = field(default_factory=list)
    text: str = ""
    refused: tuple[Refused, ...] = ()
    alive: bool = True

    @property
    def role(self) -> str:
        """Whose turn it is."""
        return ROLES[len(self.turns) % 2]

    @property
    def medium(self) -> str:
        """What the last turn shows: "image", "music" or nothing ("")."""
        return self.requirement.plan[len(self.turns) - 1]

    def result(self) -> Asked[list[tuple[Said, ...]]]:
        """The chat, if all of its turns were written and fit together."""
        if self.alive:
            try:
                return Asked(check_chat(self.turns, self.requirement), self.seed, self.refused)
            except Unusable as no:
                self.refused += (Refused(no.reason, no.detail, self.text),)
        return Asked(None, self.seed, self.refused)


def write_guided(writer: Writer, drafts: Sequence[Draft], tries: int, temperature: float) -> None:
    """Writes the turns of several chats: all chats' first, then all second, and so on.

    Raises:
        WriterError: the writer gives no answers.
    """

    def fill(
        chosen: list[Draft], begun: list[str], stop: str, read: Callable[[Draft, str], Said]
    ) -> list[tuple[Draft, Said]]:
        requests = [
            Request(draft.prompt, seed_of(draft.seed, stop, len(draft.turns)), 40, temperature, (stop, "\n"), prefix)
            for draft, prefix in zip(chosen, begun, strict=True)
        ]
        asked = ask_all(writer, requests, lambda i, t: read(chosen[i], t.removeprefix(requests[i].prefix)), tries)
        for draft, answer in zip(chosen, asked, strict=True):
            draft.refused += answer.refused
            draft.alive = answer.value is not None
        return [(draft, answer.value) for draft, answer in zip(chosen, asked, strict=True) if answer.value]

    while alive := [d for d in drafts if d.alive and len(d.turns) < len(d.requirement.plan)]:
        for draft, said in fill(alive, [f"{d.text}{d.role}:" for d in alive], "[", _read_words):
            draft.text += f"{draft.role}: {said.text}"
            draft.turns.append((said,))
        shown = [draft for draft in alive if draft.alive and draft.medium]
        for draft, said in fill(shown, [f"{d.text} [{d.medium}:" for d in shown], "]", _read_medium):
            draft.text += f" [{said.modality}: {said.text}]"
            draft.turns[-1] += (said,)
        for draft in alive:
            draft.text += "\n"


def _read_words(draft: Draft, text: str) -> Said:
    said = Said(TEXT, read_utterance(text))
    if any(said in turn for turn in draft.turns):
        raise Unusable("repeats", said.text)
    return said


def _read_medium(draft: Draft, text: str) -> Said:
    return Said(draft.medium, read_description(text, draft.medium))
