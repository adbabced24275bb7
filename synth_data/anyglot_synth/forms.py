"""`Forms`: what of a dialogue's text is spoken. What is speech already stays speech in all of them.

- "text": nothing, the dialogue stays as it is;
- "user-speech": what the user says is spoken, the answers are written;
- "speech": both speak;
- "chain": the user speaks; the assistant writes what it heard, writes its answer, then speaks it: the chain of
  modality of SpeechGPT (arXiv 2305.11000) and AnyGPT (arXiv 2402.12226). The first part of such an answer is the
  transcript.

Pictures and music stay where they are, and system turns stay text. Parts that a dialogue lists in `meta["written"]`
([turn, part] pairs, from 0) are shown and never spoken. Nothing is spoken here: parts only become parts of speech.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyglot_synth.dialogue import ASSISTANT, SPEECH, TEXT, USER, Dialogue, DialogueError, Part, Turn
from anyglot_synth.seeds import rng_of
from anyglot_tokenizers.errors import AnyglotError

FORMS = ("text", "user-speech", "speech", "chain")


class FormError(AnyglotError):
    """A form that there is not, or weights that cannot be drawn from."""


class Forms:
    """Gives each dialogue a form: one for all, or one drawn by its id and a seed.

    Args:
        form: a name of `FORMS`, or weights by name: {text: 1, speech: 3}.
        seed: with a dialogue's id, decides the draw.
    """

    def __init__(self, form: str | Mapping[str, float] = "text", seed: int = 0) -> None:
        self.weights = checked_weights({form: 1.0} if isinstance(form, str) else form, FORMS, "form")
        self.seed = seed

    def config(self) -> dict[str, Any]:
        """JSON of it."""
        return {"weights": self.weights, "seed": self.seed}

    def __call__(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue in its form."""
        return in_form(dialogue, draw(self.weights, self.seed, dialogue.id, "form"))


def checked_weights(weights: Mapping[str, float], names: tuple[str, ...], what: str) -> dict[str, float]:
    """The weights, in the order of `names`. Raises `FormError`."""
    if not isinstance(weights, Mapping):
        raise FormError(f"{what} is {weights!r}; use one of {', '.join(names)}, or weights by name")
    for name, weight in weights.items():
        if name not in names:
            raise FormError(f"there is no {what} {name!r}; use some of: {', '.join(names)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise FormError(f"the weight of {what} {name!r} is {weight!r}; use a number of 0 or more")
    if not sum(weights.values()) > 0:
        raise FormError(f"the weights of the {what}s add up to 0; give one of them a weight")
    return {name: float(weights[name]) for name in names if name in weights}


def draw(weights: Mapping[str, float], *names: int | str) -> str:
    """One of the names by weight, decided by a seed and names (see `seeds.py`)."""
    total = sum(weights.values())
    at = float(rng_of(*names).random()) * total
    for name, weight in weights.items():
        at -= weight
        if at < 0 and weight > 0:
            return name
    return [name for name, weight in weights.items() if weight > 0][-1]


def in_form(dialogue: Dialogue, form: str) -> Dialogue:
    """The dialogue in a form of `FORMS`; its `meta` says which. Raises `FormError`, `DialogueError`."""
    if form not in FORMS:
        raise FormError(f"there is no form {form!r}; use one of: {', '.join(FORMS)}")
    if form == "text":
        return dialogue
    pairs = dialogue.meta.get("written", ())
    try:
        written = {(int(turn), int(part)) for turn, part in pairs}
    except (TypeError, ValueError, OverflowError):
        raise DialogueError(f"meta.written is {pairs!r:.60}; give [turn, part] pairs, or rename the field") from None
    turns: list[Turn] = []
    for number, turn in enumerate(dialogue.turns):
        says = [part.modality == TEXT and (number, j) not in written for j, part in enumerate(turn.parts)]
        spoken = tuple(replace(p, modality=SPEECH) if said else p for p, said in zip(turn.parts, says, strict=True))
        if turn.role == USER or (turn.role == ASSISTANT and form == "speech"):
            turns.append(replace(turn, parts=spoken))
        elif turn.role == ASSISTANT and form == "chain":
            turns.append(replace(turn, parts=_chain(turns, turn.parts, says)))
        else:
            turns.append(turn)
    task = "spoken-chat" if dialogue.task == "chat" else dialogue.task
    meta = {key: value for key, value in dialogue.meta.items() if key != "written"}
    return replace(dialogue, turns=tuple(turns), task=task, meta={**meta, "form": form})


def _chain(before: list[Turn], parts: tuple[Part, ...], says: list[bool]) -> tuple[Part, ...]:
    asked = before[-1].parts if before and before[-1].role == USER else ()
    heard = " ".join(part.text for part in asked if part.modality == SPEECH)
    answer = " ".join(part.text for part, said in zip(parts, says, strict=True) if said)
    transcript = (Part(TEXT, heard),) if heard else ()
    return (*transcript, *parts, *((Part(SPEECH, answer),) if answer else ()))
