"""`AnyInstruct`: chats with pictures and music written by a language model, from meta-topics to dialogues.

The recipe of AnyGPT (Zhan et al. 2024, arXiv 2402.12226, section 4.2): meta-topics -> topics -> scenarios -> chats of
two or three rounds in which media are descriptions. Each step streams, every answer of the model is kept by content
address (`llm.CachedWriter`), so a run that was killed goes on where it was; what is refused is reported with its
reason. Chats are written freely, as large models can, or guided: turn by turn, with speaker and brackets set by the
program, which models of a hundred million parameters need. No chat is made up by a template.

    python -m anyglot_synth.anyinstruct --out chats --topics 20 --engine transformers --model smollm2 --chat guided
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TextIO, TypeVar

from anyglot_synth.anyinstruct_guided import Draft, write_guided
from anyglot_synth.anyinstruct_parse import Said, read_chat, read_scenario, read_topics
from anyglot_synth.anyinstruct_prompts import (
    EXAMPLES,
    META_TOPICS,
    REQUIREMENTS,
    Example,
    Messages,
    Requirement,
    chat_prompt,
    scenario_prompt,
    topics_prompt,
)
from anyglot_synth.dedup import Deduplicator, words_of
from anyglot_synth.dialogue import ASSISTANT, SPEECH, TEXT, USER, Dialogue, Json, Part, Turn
from anyglot_synth.llm import Asked, CachedWriter, Request, Unusable, Writer, ask_all, build_writer
from anyglot_synth.seeds import rng_of, seed_of
from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.files import atomic_write

T = TypeVar("T")
VERSION = 1
"""Counts changes of prompts, readers and the order of things."""
CHATS = ("free", "guided")


@dataclass(frozen=True)
class Topic:
    """What somebody could talk about."""

    meta: str
    text: str


@dataclass(frozen=True)
class Scenario:
    """Who talks about a topic and wants what."""

    topic: Topic
    requirement: str
    text: str


@dataclass(frozen=True)
class Reject:
    """What a model wrote and nobody wanted. `final`: no other try gave a result either."""

    step: str
    of: str
    reason: str
    detail: str
    text: str
    final: bool = False


class AnyInstruct:
    """See the module.

    Args:
        writer: the language model; wrap it in a `CachedWriter` to go on after a kill.
        seed: another seed gives other chats.
        num_topics: topics to make.
        topics_per_call: asked for at once.
        chat: "free" or "guided".
        tries: answers of the model per topic list, scenario and chat (guided: per turn).
        temperature: of the sampling.
        speech: chance that a chat's user speaks, and that its assistant answers in speech.
        licence: SPDX name of what is made; None takes the writer's.

    Raises:
        AnyglotError: a setting that cannot be.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        seed: int = 0,
        num_topics: int = 100,
        topics_per_call: int = 10,
        chat: str = "free",
        tries: int = 3,
        temperature: float = 0.8,
        speech: float = 0.5,
        licence: str | None = None,
    ) -> None:
        if chat not in CHATS:
            raise AnyglotError(f"chat {chat!r}; use 'free' or 'guided'")
        if min(num_topics, topics_per_call, tries) < 1 or temperature < 0 or not 0 <= speech <= 1:
            raise AnyglotError(
                "num_topics, topics_per_call and tries must be 1 or more, temperature 0 or more, speech 0 to 1"
            )
        self.writer, self.seed, self.num_topics, self.topics_per_call = writer, seed, num_topics, topics_per_call
        self.chat, self.tries, self.temperature, self.speech = chat, tries, temperature, speech
        self.licence = licence or writer.licence

    def config(self) -> Json:
        """JSON of all that changes what is made."""
        settings = {key: value for key, value in vars(self).items() if key != "writer"}
        writer = {"batch_size": self.writer.batch_size, "writer": self.writer.identity()}  # batches decide the topics
        return {"recipe": "anyinstruct", "version": VERSION, **settings, **writer}

    def topics(self) -> Iterator[Topic | Reject]:
        """Topics without near-duplicates, until there are enough or the model has no new ones."""
        order = [META_TOPICS[i] for i in rng_of(self.seed, "meta").permutation(len(META_TOPICS))]
        seen = Deduplicator(threshold=0.6, n=3)
        found = fruitless = 0
        calls = ((round_, meta) for round_ in range(1 << 30) for meta in order)
        while found < self.num_topics and fruitless < len(order):
            batch = list(islice(calls, self.writer.batch_size))
            prompts = [topics_prompt(meta, self.topics_per_call) for _, meta in batch]
            seeds = [seed_of(self.seed, "topics", meta, round_) for round_, meta in batch]
            room = 16 * self.topics_per_call
            asked = self._ask(prompts, seeds, lambda _, text: read_topics(text), room, prefix="1.")
            for (_, meta), answer in zip(batch, asked, strict=True):
                yield from _refusals("topics", meta, answer)
            listed = [
                [(meta, *row) for row in answer.value or ()] for (_, meta), answer in zip(batch, asked, strict=True)
            ]
            fruitless += len(batch)
            for meta, text, no in (row for rows in zip_longest(*listed) for row in rows if row):  # all metas in turn
                if no is None and (match := seen.add(text)):
                    no = Unusable("duplicate", f"of topic {match.number}, {match.similarity:.2f}")
                if no is not None:
                    yield Reject("topics", meta, no.reason, no.detail, text, True)
                elif found < self.num_topics:
                    found, fruitless = found + 1, 0
                    yield Topic(meta, text)

    def scenarios(self, topics: Iterable[Topic]) -> Iterator[Scenario | Reject]:
        """A scenario for each topic, with a requirement drawn by weight."""
        for batch in _batches(topics, self.writer.batch_size):
            wanted = [self._requirement(topic.text) for topic in batch]
            prompts = [
                scenario_prompt(topic.text, requirement, self._examples("scenario", topic.text, requirement))
                for topic, requirement in zip(batch, wanted, strict=True)
            ]
            seeds = [seed_of(self.seed, "scenario", topic.text) for topic in batch]
            asked = self._ask(prompts, seeds, lambda i, text: read_scenario(text, wanted[i]), 80)  # noqa: B023
            for topic, requirement, answer in zip(batch, wanted, asked, strict=True):
                yield from _refusals("scenarios", topic.text, answer)
                if answer.value is not None:
                    yield Scenario(topic, requirement.name, answer.value)

    def chats(self, scenarios: Iterable[Scenario]) -> Iterator[Dialogue | Reject]:
        """A dialogue for each scenario, without near-duplicates of one another and of the prompts' examples."""
        seen = Deduplicator(threshold=0.7)
        for example in EXAMPLES:
            seen.add(words_of(_dialogue(read_chat(example.chat, _required(example.requirement)))))
        write = self._free if self.chat == "free" else self._guided
        for batch in _batches(scenarios, self.writer.batch_size):
            for scenario, answer in zip(batch, write(batch), strict=True):
                yield from _refusals("chats", scenario.text, answer)
                if answer.value is None:
                    continue
                dialogue = self._finish(scenario, answer)
                if match := seen.add(words_of(dialogue)):
                    detail = f"of chat {match.number - len(EXAMPLES)}, {match.similarity:.2f}"
                    yield Reject("chats", scenario.text, "duplicate", detail, words_of(dialogue), True)
                else:
                    yield dialogue

    def _requirement(self, topic: str) -> Requirement:
        weights = [requirement.weight for requirement in REQUIREMENTS]
        rng = rng_of(self.seed, "requirement", topic)
        return REQUIREMENTS[int(rng.choice(len(REQUIREMENTS), p=[weight / sum(weights) for weight in weights]))]

    def _examples(self, step: str, of: str, requirement: Requirement) -> tuple[Example, ...]:
        """Two examples; the last of them keeps the requirement."""
        same = [example for example in EXAMPLES if example.requirement == requirement.name]
        rest = [example for example in EXAMPLES if example.requirement != requirement.name]
        return rest[int(rng_of(self.seed, "examples", step, of).integers(len(rest)))], same[0]

    def _ask(
        self,
        prompts: list[Messages],
        seeds: list[int],
        read: Callable[[int, str], T],
        max_tokens: int,
        *,
        prefix: str = "",
    ) -> list[Asked[T]]:
        asked = zip(prompts, seeds, strict=True)
        requests = [Request(prompt, seed, max_tokens, self.temperature, prefix=prefix) for prompt, seed in asked]
        return ask_all(self.writer, requests, read, self.tries)

    def _chat_prompts(self, batch: list[Scenario]) -> tuple[list[Requirement], list[Messages], list[int]]:
        wanted = [_required(scenario.requirement) for scenario in batch]
        seeds = [seed_of(self.seed, "chat", scenario.text) for scenario in batch]
        prompts = []
        for scenario, requirement in zip(batch, wanted, strict=True):
            rounds = 2 if self.chat == "guided" else 2 + int(rng_of(self.seed, "rounds", scenario.text).integers(2))
            examples = self._examples("chat", scenario.text, requirement)
            prompts.append(chat_prompt(scenario.text, requirement, examples, rounds))
        return wanted, prompts, seeds

    def _free(self, batch: list[Scenario]) -> list[Asked[list[tuple[Said, ...]]]]:
        """Each chat in one answer."""
        wanted, prompts, seeds = self._chat_prompts(batch)
        return self._ask(prompts, seeds, lambda i, text: read_chat(text, wanted[i]), 320, prefix="User:")

    def _guided(self, batch: list[Scenario]) -> list[Asked[list[tuple[Said, ...]]]]:
        """Each chat turn by turn."""
        drafts = [Draft(*row) for row in zip(*self._chat_prompts(batch), strict=True)]
        write_guided(self.writer, drafts, self.tries, self.temperature)
        return [draft.result() for draft in drafts]

    def _finish(self, scenario: Scenario, answer: Asked[list[tuple[Said, ...]]]) -> Dialogue:
        assert answer.value is not None
        chances = rng_of(self.seed, "speech", scenario.text).random(2)
        voices = tuple(SPEECH if chance < self.speech else TEXT for chance in chances)
        meta: Json = {
            "made_by": "language-model",
            "chat": self.chat,
            "seed": answer.seed,
            "meta_topic": scenario.topic.meta,
            "topic": scenario.topic.text,
            "scenario": scenario.text,
            "requirement": scenario.requirement,
            "refused": len(answer.refused),
            "writer": self.writer.identity(),
        }
        return _dialogue(answer.value, voices, self.licence, meta)


def _dialogue(
    turns: list[tuple[Said, ...]],
    voices: tuple[str, ...] = (TEXT, TEXT),
    licence: str = "unknown",
    meta: Json | None = None,
) -> Dialogue:
    made = [
        Turn(
            (USER, ASSISTANT)[number % 2],
            tuple(Part(voices[number % 2] if said.modality == TEXT else said.modality, said.text) for said in turn),
        )
        for number, turn in enumerate(turns)
    ]
    return Dialogue(tuple(made), "anyinstruct", licence, "any-to-any-chat", meta=meta or {})


def _required(name: str) -> Requirement:
    return next(requirement for requirement in REQUIREMENTS if requirement.name == name)


def _refusals(step: str, of: str, answer: Asked[Any]) -> Iterator[Reject]:
    last = len(answer.refused) - 1
    for number, no in enumerate(answer.refused):
        yield Reject(step, of, no.reason, no.detail, no.text, answer.value is None and number == last)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def write(recipe: AnyInstruct, folder: str | os.PathLike[str]) -> Json:
    """Runs a recipe into a folder: `topics.jsonl`, `scenarios.jsonl`, `dialogues.jsonl`, `rejects.jsonl`,
    `report.json`.

    Files appear when all is done. Returns the report: what was accepted and, by reason, refused.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Counter[str]] = {step: Counter() for step in ("topics", "scenarios", "chats")}
    with ExitStack() as stack:

        def open_(name: str) -> TextIO:
            return stack.enter_context(open(stack.enter_context(atomic_write(folder / name)), "w", encoding="utf-8"))

        rejects = open_("rejects.jsonl")

        def keep(step: str, stream: Iterable[Any], file: TextIO) -> Iterator[Any]:
            for found in stream:
                if isinstance(found, Reject):
                    _line(rejects, asdict(found))
                    counts[step][found.reason] += 1
                    counts[step]["given up"] += found.final
                else:
                    _line(file, found.to_dict() if isinstance(found, Dialogue) else asdict(found))
                    counts[step]["accepted"] += 1
                    yield found

        topics = keep("topics", recipe.topics(), open_("topics.jsonl"))
        scenarios = keep("scenarios", recipe.scenarios(topics), open_("scenarios.jsonl"))
        for number, _ in enumerate(keep("chats", recipe.chats(scenarios), open_("dialogues.jsonl")), start=1):
            print(f"\r{number} chats", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        report: Json = {"config": recipe.config(), **{step: dict(sorted(c.items())) for step, c in counts.items()}}
    with atomic_write(folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _line(file: TextIO, content: Json) -> None:
    file.write(json.dumps(content, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser("anyinstruct", description="Chats with pictures and music by a language model.")
    parser.add_argument("--out", required=True, help="folder; answers of the model are kept below it")
    parser.add_argument("--topics", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat", choices=CHATS, default="free")
    parser.add_argument("--tries", type=int, default=3, help="answers of the model per thing that is wanted")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the sampling; lower for small models")
    parser.add_argument("--engine", default="transformers", help="transformers or openai")
    parser.add_argument("--model", default="smollm2", help="folder or name")
    parser.add_argument("--url", help="of an OpenAI-compatible server, with /v1")
    parser.add_argument("--batch_size", type=int, default=8)
    given = parser.parse_args(arguments)
    config = {"engine": given.engine, "model": given.model, "batch_size": given.batch_size}
    try:
        try:
            Path(given.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AnyglotError(f"--out {given.out}: cannot be a folder ({error.strerror}); give another") from None
        writer = CachedWriter(
            build_writer(config | ({"base_url": given.url} if given.url else {})), Path(given.out) / "answers"
        )
        settings = {key: getattr(given, key) for key in ("seed", "chat", "tries", "temperature")}
        recipe = AnyInstruct(writer, num_topics=given.topics, **settings)
        report = write(recipe, given.out)
    except AnyglotError as error:
        print(f"anyinstruct: {error}", file=sys.stderr)
        return 2
    print(json.dumps({key: report[key] for key in ("topics", "scenarios", "chats")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
