"""Dialogues about nanoworld: every statement in them is true, splits are kept, an index is enough."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from anyglot_synth.dialogue import Dialogue
from anyglot_synth.grammar_phrases import PHRASES, phrasings
from anyglot_synth.grammar_writer import FOLLOWING, OPENINGS, GrammarWriter
from anyglot_synth.nanoworld.language import apply_edit, parse, same_answer
from anyglot_synth.nanoworld.scene import Scene
from anyglot_tokenizers.errors import AnyglotError


@pytest.fixture(scope="module", params=["train", "test"])
def dialogues(request: pytest.FixtureRequest) -> list[Dialogue]:
    return list(GrammarWriter(request.param, seed=3).dialogues(600))


def truth(dialogue: Dialogue) -> dict[tuple[int, int], dict[str, Any]]:
    return {(entry["turn"], entry["part"]): entry for entry in dialogue.meta["truth"]}


def test_all_parts_tell_the_truth(dialogues: list[Dialogue]) -> None:
    kinds: Counter[str] = Counter()
    for dialogue in dialogues:
        dialogue.check()
        known = truth(dialogue)
        for i, turn in enumerate(dialogue.turns):
            assert turn.role == ("user", "assistant")[i % 2]
            for j, part in enumerate(turn.parts):
                entry = known.pop((i, j), {"kind": "none"})
                kinds[entry["kind"]] += 1
                if entry["kind"] == "scene":
                    assert parse(part.text) == Scene.from_dict(entry["scene"])
                elif entry["kind"] == "answer":
                    assert same_answer(part.text, entry["answer"]), (part.text, entry["answer"])
                else:
                    assert part.modality in ("text", "speech"), "a medium without its truth"
        assert not known
    assert min(kinds[kind] for kind in ("scene", "answer", "asked", "none")) > 50


def test_edits_give_what_they_say(dialogues: list[Dialogue]) -> None:
    edits = 0
    for dialogue in dialogues:
        known = truth(dialogue)
        for number, act in enumerate(dialogue.meta["acts"]):
            if act != "edit":
                continue
            said = dialogue.turns[2 * number].parts[0].text
            earlier = [known[key] for key in sorted(known) if key[0] < 2 * number]
            earlier = [known[key] for key in sorted(known) if key[0] < 2 * number]
            scenes = [Scene.from_dict(entry["scene"]) for entry in earlier if "scene" in entry]
            made = next(known[key] for key in sorted(known) if key[0] == 2 * number + 1)
            instruction = re.search(r"\b(make|turn|move|remove|add)\b[^.?]*", said)
            assert instruction
            after = apply_edit(scenes[-1], instruction.group().removesuffix(" for me"))
            if "before" not in dialogue.meta["acts"][:number]:  # that describes an older scene
                assert after == Scene.from_dict(made["scene"])
                edits += 1
    assert edits > 30


def test_every_act_occurs(dialogues: list[Dialogue]) -> None:
    assert {act for dialogue in dialogues for act in dialogue.meta["acts"]} == {*OPENINGS, *FOLLOWING}


def test_every_direction_between_modalities_occurs(dialogues: list[Dialogue]) -> None:
    pairs = Counter()
    for dialogue in dialogues:
        known = truth(dialogue)
        for i in range(0, len(dialogue.turns), 2):
            given = {p.modality for j, p in enumerate(dialogue.turns[i].parts) if known.get((i, j), {}).get("scene")}
            made = {p.modality for j, p in enumerate(dialogue.turns[i + 1].parts) if (i + 1, j) in known}
            pairs.update((a, b) for a in given for b in made)
    modalities = ("text", "speech", "image", "music")
    missing = {(a, b) for a in modalities for b in modalities} - set(pairs)
    assert missing <= {("music", "music"), ("image", "image"), ("text", "text"), ("speech", "text")}, missing


def test_splits_keep_their_scenes_and_their_words(dialogues: list[Dialogue]) -> None:
    split = dialogues[0].meta["split"]
    for dialogue in dialogues:
        scenes = [Scene.from_dict(entry["scene"]) for entry in dialogue.meta["truth"] if "scene" in entry]
        held_out = [scene.has_held_out for scene in scenes]
        assert not any(held_out) if split == "train" else not held_out or held_out[0]
    other = "test" if split == "train" else "train"
    fixed = {p for name in PHRASES for p in phrasings(name, other) if "{" not in p} - {
        p for name in PHRASES for p in phrasings(name, split)
    }
    said = {part.text for dialogue in dialogues for turn in dialogue.turns for part in turn.parts}
    # "how many things are there?" is a question of the world's own language, too.
    assert said & fixed <= {"how many things are there?"}


def test_no_phrasing_is_in_both_splits() -> None:
    for name, known in PHRASES.items():
        assert len(set(known)) == len(known)
        assert set(phrasings(name, "train")) | set(phrasings(name, "test")) == set(known)
        assert not set(phrasings(name, "train")) & set(phrasings(name, "test"))


def test_an_index_is_enough(dialogues: list[Dialogue]) -> None:
    writer = GrammarWriter(dialogues[0].meta["split"], seed=3)
    assert writer.dialogue(577) == dialogues[577]
    assert Dialogue.from_dict(dialogues[577].to_dict()) == dialogues[577]
    assert list(writer.dialogues(3, start=10)) == dialogues[10:13]
    assert list(islice(writer.dialogues(), 3)) == dialogues[:3]
    assert GrammarWriter(dialogues[0].meta["split"], seed=4).dialogue(0) != dialogues[0]
    assert len({dialogue.id for dialogue in dialogues}) > 0.98 * len(dialogues)


def test_scenes_and_words_can_be_of_different_splits() -> None:
    for dialogue in GrammarWriter("train", phrasings="test").dialogues(50):
        scenes = [Scene.from_dict(entry["scene"]) for entry in dialogue.meta["truth"] if "scene" in entry]
        assert not any(scene.has_held_out for scene in scenes)


def test_settings() -> None:
    quiet = list(GrammarWriter(speech=0, max_rounds=1).dialogues(200))
    assert {len(dialogue.turns) for dialogue in quiet} == {2}
    spoken = [d for d in quiet for t in d.turns for p in t.parts if p.modality == "speech"]
    assert {act for d in spoken for act in d.meta["acts"]} == {"say", "draw-and-say"}
    with pytest.raises(AnyglotError, match="use 'train' or 'test'"):
        GrammarWriter("validation")
    with pytest.raises(AnyglotError, match="max_rounds 0"):
        GrammarWriter(max_rounds=0)
