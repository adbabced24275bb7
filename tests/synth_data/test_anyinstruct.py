"""The AnyInstruct recipe: what readers take and refuse (SmolLM2's own answers among it), and whole runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_synth.anyinstruct import AnyInstruct, Reject, Scenario, Topic, main, write
from anyglot_synth.anyinstruct_parse import (
    Said,
    read_chat,
    read_description,
    read_scenario,
    read_topics,
    read_utterance,
)
from anyglot_synth.anyinstruct_prompts import (
    EXAMPLES,
    META_TOPICS,
    REQUIREMENTS,
    Requirement,
    requirement_of,
)
from anyglot_synth.anyinstruct_source import AnyInstructSource
from anyglot_synth.dialogue import Dialogue
from anyglot_synth.llm import CachedWriter, Request, Unusable, Writer
from anyglot_synth.sources import BadRow
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import AnyglotError

BY_NAME = {requirement.name: requirement for requirement in REQUIREMENTS}


def refusal(function: object, *arguments: object) -> str:
    with pytest.raises(Unusable) as no:
        function(*arguments)  # type: ignore[operator]
    return no.value.reason


def test_our_own_examples_are_what_we_ask_for() -> None:
    assert {example.requirement for example in EXAMPLES} == set(BY_NAME)
    for example in EXAMPLES:
        requirement = requirement_of(example)
        turns = read_chat(example.chat, requirement)
        assert [[said.modality for said in turn if said.modality != "text"] for turn in turns] == [
            [modality] if modality else [] for modality in requirement.plan
        ]
        assert read_scenario(example.scenario, requirement) == example.scenario
        assert read_topics(f"1. {example.topic}")[0][1] is None


def test_meta_topics_are_a_hundred_different_ones() -> None:
    assert len(set(META_TOPICS)) == len(META_TOPICS) >= 100
    assert all(topic == " ".join(topic.split()) for topic in META_TOPICS)


def test_topics_of_a_small_model() -> None:
    """As SmolLM2-135M wrote them."""
    listed = read_topics(
        "1. A walk to the old mill\n2) **Fresh bread**: how to bake it\n- a smile on a child's face\n3. wine\n"
        "4. the night she was chosen to be the first person to choose the first lady of all the people who have ever\n"
        "5. a sailboat in a sailboat\n6. a video of the beach\n\nYou cannot use these subjects:\n7. mozart at home"
    )
    taken = [text for text, no in listed if no is None]
    assert taken == ["a walk to the old mill", "fresh bread", "a smile on a child's face"]
    assert [no.reason for _, no in listed if no] == ["length", "length", "repetitive", "banned", "famous"]
    assert refusal(read_topics, "Sure! Here you are.") == "no-list"


def test_scenarios() -> None:
    wants = BY_NAME["wants-picture"]
    good = "A woman wants a picture of her garden for her mother. She likes roses most of all."
    assert read_scenario(f"Scene: {good}\n\nSubject: another", wants) == good
    assert read_scenario(f'"{good}"', wants) == good
    assert refusal(read_scenario, "A woman wants music for her garden in the evening sun.", wants) == "requirement"
    assert refusal(read_scenario, "A man wants a picture.", wants) == "length"
    assert (
        refusal(read_scenario, "A man who lives in a village wants a picture of his house and", wants) == "unfinished"
    )
    assert refusal(read_scenario, good, BY_NAME["shares-music"]) == "requirement"


def test_utterances_and_descriptions() -> None:
    assert read_utterance(' "I like it." ') == "I like it."
    walk = "And then we walked on and on until we came to the old bridge over the river at noon, hungry and tired. "
    long = "It is a lovely day. " + walk
    assert read_utterance(long) == "It is a lovely day."
    assert refusal(read_utterance, "word " * 40) == "length"
    assert refusal(read_utterance, "As an AI I cannot see pictures.") == "banned"
    assert refusal(read_utterance, "It looks like a painting by Vincent Price to me.") == "famous"
    assert refusal(read_utterance, "See https://example.org for it") == "banned"
    assert refusal(read_utterance, "What is this (an apple") == "brackets"
    assert refusal(read_utterance, "$$ 33 !! 55 -- 66 == 1") == "not-words"
    assert refusal(read_utterance, "a sweet sweet song with a sweet voice and sweet drums") == "repetitive"
    assert read_utterance("I like that, with that view, and that I like with tea.")
    assert read_description("slow piano, soft and warm ", "music") == "slow piano, soft and warm"
    assert refusal(read_description, "a beautiful glass of wine", "music") == "not-music"
    assert refusal(read_description, "a song by the Beatles with guitar", "music") == "famous"


CHAT = (
    "**User:** Why do my leaves look like this? [Image: a plant with yellow leaves]\n"
    "Assistant - : The soil may be too wet.\n"
    "Human: How often should\nI water it?\n"
    "AI: Every second day is enough.\n"
)


def test_bent_formats_are_read() -> None:
    shows = BY_NAME["shows-picture"]
    turns = read_chat(CHAT.replace(" - :", ":"), shows)
    assert turns[0] == (Said("text", "Why do my leaves look like this?"), Said("image", "a plant with yellow leaves"))
    assert turns[2] == (Said("text", "How often should I water it?"),)
    with_rest = CHAT.replace(" - :", ":") + "User: And the pot?\n\nScene: A man wants music."
    assert read_chat(with_rest, shows) == turns, "a last question without an answer is left out"
    endless = CHAT.replace(" - :", ":") + "User: And the pot?\n" * 3
    assert read_chat(endless, shows) == turns
    unclosed = (
        "User: My plant [picture: a plant in a pot\nAssistant: It is green.\nUser: Thank you!\nAssistant: Any time!"
    )
    assert read_chat(unclosed, shows)[0][-1] == Said("image", "a plant in a pot")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("AI: Every second day is enough.\n", ""), "rounds"),
        (("Human:", "Assistant:"), "speakers"),
        (("[Image: a plant with yellow leaves]", ""), "requirement"),
        (("The soil may", "[music: slow piano music] [music: fast drums and bass] The soil may"), "media"),
        (("Every second day is enough.", "The soil may be too wet."), "repeats"),
        (("a plant with yellow leaves", "Mona Lisa with yellow leaves"), "famous"),
        (("Every second day is enough.", ""), "empty"),
    ],
)
def test_chats_that_are_refused(change: tuple[str, str], reason: str) -> None:
    chat = CHAT.replace(" - :", ":")
    assert change[0] in chat
    assert refusal(read_chat, chat.replace(*change), BY_NAME["shows-picture"]) == reason


@given(st.text(max_size=300), st.sampled_from(REQUIREMENTS))
def test_readers_bear_anything(text: str, requirement: Requirement) -> None:
    for chat in (text, f"User: {text}\nAssistant: {text}\nUser: so\nAssistant: no"):
        try:
            turns = read_chat(chat, requirement)
        except Unusable as no:
            assert no.reason
        else:
            assert len(turns) in (4, 6)
    for read in (read_utterance, lambda text: read_scenario(text, requirement), read_topics):
        try:
            read(text)
        except Unusable as no:
            assert no.reason


class Storyteller(Writer):
    """A small writer of sentences by rule that keeps the formats, mostly: one answer in three is of no use.

    It stands where a good language model would, so that the recipe's ways can be followed in seconds.
    """

    name = "storyteller"
    batch_size = 4
    licence = "CC0-1.0"
    nouns = ("garden", "river", "candle", "bridge", "lantern", "kitchen", "meadow", "harbour", "window", "orchard")
    moods = ("quiet", "bright", "golden", "gentle", "merry", "wild", "misty", "cosy", "warm", "lonely")

    def __init__(self, bad: float = 0.33) -> None:
        self.bad, self.asked = bad, 0

    def identity(self) -> dict[str, object]:
        return {"engine": self.name, "bad": self.bad}

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        assert len(requests) <= self.batch_size
        self.asked += len(requests)
        return [request.prefix + self.say(request) for request in requests]

    def thing(self, rng: np.random.Generator) -> str:
        mood, place = str(rng.choice(self.moods)), " ".join(rng.choice(self.nouns, 2, replace=False))
        return f"a {mood} {place}"

    def say(self, request: Request) -> str:
        rng = np.random.default_rng(request.seed)
        asked = request.messages[-1][1]
        if request.prefix == "1.":
            return "\n".join(f"{'' if i == 1 else i}{'' if i == 1 else '.'} {self.thing(rng)}" for i in range(1, 11))
        if rng.random() < self.bad:
            return "Sorry, as an AI I cannot do that."
        if asked.startswith("Subject"):
            return f"A baker who loves {self.thing(rng)} shares a picture and some piano music, and wants more of both."
        rule = re.search(r"Rule: (.*)\.\n", asked)
        assert rule
        plan = next(requirement.plan for requirement in REQUIREMENTS if requirement.text == rule[1])
        if request.stop:  # guided
            music = request.prefix.endswith("[music:")
            return f" slow piano, {self.thing(rng)}" if music else f" I think of {self.thing(rng)}"
        lines = []
        for number, modality in enumerate(plan):
            shown = f" [{modality}: slow piano, {self.thing(rng)}]" if modality else ""
            lines.append(f"{('User', 'Assistant')[number % 2]}: I think of {self.thing(rng)}.{shown}")
        return "\n".join(lines).removeprefix("User:")


@pytest.mark.parametrize("chat", ["free", "guided"])
def test_a_whole_run(tmp_path: Path, chat: str) -> None:
    recipe = AnyInstruct(CachedWriter(Storyteller(), tmp_path / "answers"), num_topics=60, chat=chat)
    report = write(recipe, tmp_path)
    read = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("topics", "scenarios", "dialogues", "rejects")
    }
    assert len(read["topics"]) == report["topics"]["accepted"] == 60
    assert len({row["text"] for row in read["topics"]}) == 60
    assert len({row["meta"] for row in read["topics"]}) >= 4, "all meta-topics in turn"
    assert 45 < len(read["scenarios"]) <= 60 and 35 < len(read["dialogues"]) <= 60
    for row in read["dialogues"]:
        dialogue = Dialogue.from_dict(row)
        requirement = BY_NAME[dialogue.meta["requirement"]]
        media = [[p.modality for p in turn.parts if p.modality in ("image", "music")] for turn in dialogue.turns]
        assert media == [[modality] if modality else [] for modality in requirement.plan]
        assert dialogue.meta["made_by"] == "language-model" and dialogue.meta["chat"] == chat
        assert dialogue.licence == "CC0-1.0" and dialogue.meta["writer"]["engine"] == "storyteller"
        words = {
            (turn.role, p.modality) for turn in dialogue.turns for p in turn.parts if p.modality in ("text", "speech")
        }
        assert len(words) == 2, "a speaker keeps to speech or to text"
    assert len({row["meta"]["requirement"] for row in read["dialogues"]}) == len(REQUIREMENTS)
    assert any(row["reason"] == "banned" and not row["final"] for row in read["rejects"])
    given_up = sum(row["final"] for row in read["rejects"] if row["step"] != "topics")
    assert given_up == 60 - len(read["dialogues"]), "every topic became a chat or has its reason"
    counted = report["chats"]
    assert counted["accepted"] == len(read["dialogues"]) and counted.get("given up", 0) + counted["accepted"] == len(
        read["scenarios"]
    )


def test_a_run_that_was_killed_goes_on_as_it_would_have(tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    write(AnyInstruct(CachedWriter(Storyteller(), tmp_path / "a"), num_topics=20, chat="guided"), tmp_path / "whole")
    inner = Storyteller()
    recipe = AnyInstruct(CachedWriter(inner, tmp_path / "b"), num_topics=20, chat="guided")
    scenarios = recipe.scenarios(topic for topic in recipe.topics() if isinstance(topic, Topic))
    chats = recipe.chats(scenario for scenario in scenarios if isinstance(scenario, Scenario))
    while not isinstance(next(chats), Dialogue):
        pass
    del chats, scenarios
    before = inner.asked
    write(recipe, tmp_path / "killed")
    total = inner.asked
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    fresh = Storyteller()
    write(AnyInstruct(CachedWriter(fresh, tmp_path / "b"), num_topics=20, chat="guided"), tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "whole") and fresh.asked == 0
    assert 0 < before < total


def test_rare_requirements_are_drawn_more_often() -> None:
    recipe = AnyInstruct(Storyteller(), num_topics=1)
    drawn = [recipe._requirement(f"topic {i}").name for i in range(3000)]
    total = sum(requirement.weight for requirement in REQUIREMENTS)
    for requirement in REQUIREMENTS:
        assert drawn.count(requirement.name) / 3000 == pytest.approx(requirement.weight / total, abs=0.03)
    assert BY_NAME["shares-music"].weight > BY_NAME["shows-picture"].weight


def test_copies_of_the_examples_are_refused() -> None:
    class Parrot(Storyteller):
        """Gives back the last example of its prompt."""

        def say(self, request: Request) -> str:
            return request.messages[-2][1].removeprefix("User:")

    recipe = AnyInstruct(Parrot(), num_topics=3)
    scenarios = [Scenario(Topic("x", f"topic {i}"), name, f"scene {i}") for i, name in enumerate(BY_NAME)]
    chats = list(recipe.chats(scenarios))
    assert len(chats) == len(BY_NAME)
    assert all(isinstance(chat, Reject) and chat.reason == "duplicate" and chat.final for chat in chats)


def test_a_model_without_ideas_ends(tmp_path: Path) -> None:
    class Mute(Storyteller):
        """Says nothing of use."""

        def say(self, request: Request) -> str:
            return "hm"

    report = write(AnyInstruct(Mute(), num_topics=5, tries=1), tmp_path)
    assert report["topics"] == {"given up": 108, "length": 108}
    assert report["chats"] == {}


def test_halves_of_characters_end_nothing(tmp_path: Path) -> None:
    class Broken(Storyteller):
        """Its answers end in the first half of an emoji."""

        def say(self, request: Request) -> str:
            return super().say(request) + " \ud83d"

    found = list(AnyInstructSource(Broken(), str(tmp_path / "answers"), num_topics=30, tries=1).read(Store(tmp_path)))
    chats = [one for one in found if isinstance(one, Dialogue)]
    for chat in chats:
        chat.check()
    assert chats


def test_as_a_source_of_a_pipeline(tmp_path: Path) -> None:
    source = AnyInstructSource(Storyteller(), str(tmp_path / "answers"), num_topics=30, tries=1)
    found = list(source.read(Store(tmp_path)))
    chats = [one for one in found if isinstance(one, Dialogue)]
    lost = [one for one in found if isinstance(one, BadRow)]
    assert len(found) == 30 and len(chats) > 5 and lost
    assert all(re.fullmatch(r"'.*': (scenarios|chats): \w+.*", one.error) for one in lost)
    again = Storyteller()
    assert (
        list(AnyInstructSource(again, str(tmp_path / "answers"), num_topics=30, tries=1).read(Store(tmp_path))) == found
    )
    assert again.asked == 0
    assert source.config()["writer"] == {"engine": "storyteller", "bad": 0.33}


def test_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AnyglotError, match="chat 'loose'"):
        AnyInstruct(Storyteller(), chat="loose")
    with pytest.raises(AnyglotError, match="num_topics"):
        AnyInstruct(Storyteller(), num_topics=0)
    plain, warm = (AnyInstruct(Storyteller(), temperature=t).config() for t in (0.8, 0.9))
    assert plain != warm and json.dumps(plain)
    large = Storyteller()
    large.batch_size = Storyteller.batch_size + 1
    assert AnyInstruct(large).config() != AnyInstruct(Storyteller()).config(), "batches decide the topics"
    assert replace(REQUIREMENTS[0], weight=2.0) != REQUIREMENTS[0]
    assert main(["--out", str(tmp_path), "--engine", "openai", "--model", "x"]) == 2
    assert "needs the option 'base_url'" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert main(["--out", str(tmp_path / "file"), "--engine", "openai", "--model", "x"]) == 2
    error = capsys.readouterr().err
    assert "file: cannot be a folder (File exists); give another" in error and error.count("\n") == 1
