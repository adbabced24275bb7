"""Filters on real media: each finds what it is for, passes what it should, and says what it measured."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from anyglot_synth.dialogue import Dialogue, MediaFile, Part, Turn, address
from anyglot_synth.filters import FILTERS, make_filter
from anyglot_synth.filters.duplicate import NearDuplicateFilter
from anyglot_synth.filters.sound import flat_share, pace, silence_of
from anyglot_synth.stages import FAILED, FILTERED, OK, Item, Stage
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import AnyglotError

RATE = 16_000
Float32 = np.ndarray[Any, np.dtype[np.float32]]


def sine(seconds: float, hertz: float = 220.0, peak: float = 0.3, rate: int = RATE) -> Float32:
    return (peak * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def quiet(seconds: float) -> Float32:
    return np.zeros(int(seconds * RATE), np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data")


def spoken(store: Store, *sounds: Float32, text: str = "hello there, how are you today") -> Item:
    parts = [
        Part("speech", text, text.lower(), store.put_sound(address([i, s.tobytes().hex()]), s, RATE))
        for i, s in enumerate(sounds)
    ]
    return Item(0, Dialogue(tuple(Turn("user", (part,)) for part in parts), "test"))


def pictured(store: Store, *pictures: np.ndarray[Any, np.dtype[np.uint8]]) -> Item:
    parts = tuple(Part("image", "a thing", media=store.put_picture(address(p.tobytes().hex()), p)) for p in pictures)
    return Item(0, Dialogue((Turn("user", parts),), "test"))


def written(*texts: str, language: str = "en", index: int = 0) -> Item:
    turns = tuple(Turn("user" if i % 2 == 0 else "assistant", (Part("text", text),)) for i, text in enumerate(texts))
    return Item(index, Dialogue(turns, "test", language=language))


def test_names_settings_and_their_errors(tmp_path: Path) -> None:
    blocklist = tmp_path / "words.txt"
    blocklist.write_text("heck\n", encoding="utf-8")
    for name, cls in FILTERS.items():
        made = make_filter({"filter": name, **({"path": str(blocklist)} if name == "blocklist" else {})})
        assert isinstance(made, cls) and made.name == name
        assert made.config()["filter"] == name
        assert pickle.loads(pickle.dumps(made)).config() == made.config()  # it travels to workers
    with pytest.raises(AnyglotError, match=r"no filter 'silense'; did you mean 'silence'"):
        make_filter("silense")
    with pytest.raises(AnyglotError, match=r"filter 'silence' has no option 'max_shares'; it has: max_share, "):
        make_filter({"filter": "silence", "max_shares": 1})
    with pytest.raises(AnyglotError, match="names no filter"):
        make_filter({"max_share": 1})
    for bad in ({"filter": "silence", "max_share": 0}, {"filter": "duration", "min_seconds": 9, "max_seconds": 1},
                {"filter": "clipping", "modalities": ["image"]}, {"filter": "loudness", "min_lufs": -90},
                {"filter": "pii", "kinds": ["name"]}, {"filter": "picture", "max_aspect": 0.5},
                {"filter": "language", "min_confidence": 2}, {"filter": "media", "modalities": ["text"]}):  # fmt: skip
        with pytest.raises(AnyglotError, match=f"filter {bad['filter']}: "):
            make_filter(bad)


def test_settings_are_in_the_fingerprint() -> None:
    assert make_filter("silence").config() != make_filter({"filter": "silence", "max_gap": 1.0}).config()


def ended(stage: Stage, item: Item, store: Store) -> tuple[str, str]:
    found = stage(item, store)
    return found.status, found.reason


def test_duration(store: Store) -> None:
    stage = make_filter("duration")
    text = "hello there, how are you today"  # 23 letters
    good = stage(spoken(store, sine(2.0)), store)
    assert good.status == OK and good.facts == {"seconds": [2.0], "pace": [pytest.approx(11.5, abs=0.6)]}
    assert pace(text, 2.0) == pytest.approx(good.facts["pace"][0], abs=0.01)
    assert pace("12", 1.0) == len("twelve")
    found = stage(spoken(store, sine(2.0), sine(0.5), sine(0.1)), store)  # the second is too fast, the third too short
    assert (found.status, found.stage, found.reason) == (FILTERED, "duration", "pace")
    assert found.detail.startswith("turn 2 (user): 4") and found.facts["seconds"] == [2.0, 0.5, 0.1]
    assert ended(stage, spoken(store, sine(0.1), text="no"), store) == (FILTERED, "duration")
    assert ended(stage, spoken(store, sine(0.3), text="no"), store) == (OK, "")  # too few letters for a pace
    assert ended(stage, spoken(store, sine(9.0)), store) == (FILTERED, "pace")


def test_a_part_without_a_file_is_no_matter_of_taste(store: Store) -> None:
    item = Item(0, Dialogue((Turn("user", (Part("speech", "hello"),)),), "test"))
    for name in ("duration", "silence", "clipping", "loudness"):
        assert ended(make_filter(name), item, store) == (FAILED, "input")
    assert ended(make_filter("media"), item, store) == (FILTERED, "no_media")


def test_silence(store: Store) -> None:
    sound = np.concatenate([quiet(0.5), sine(1.0), quiet(0.25), sine(1.0), quiet(1.0)])
    found = silence_of(sound, RATE)
    assert (found.lead, found.gap, found.tail) == pytest.approx((0.5, 0.25, 1.0), abs=0.011)
    assert found.share == pytest.approx(1.75 / 3.75, abs=0.02)
    assert silence_of(sound * 0.01, RATE).gap == pytest.approx(found.gap)  # relative to its own level
    assert silence_of(quiet(1.0), RATE).share == silence_of(quiet(0.0), RATE).share == 1.0
    stage = make_filter({"filter": "silence", "max_share": 0.5, "max_lead": 0.6, "max_tail": 1.1, "max_gap": 0.5})
    assert ended(stage, spoken(store, sound), store) == (OK, "")
    before, after = np.concatenate([quiet(0.7), sine(2.0)]), np.concatenate([sine(2.0), quiet(1.2)])
    within, most = np.concatenate([sine(1.0), quiet(0.6), sine(1.0)]), np.concatenate([sine(0.3), quiet(0.4)])
    for bad in (quiet(2.0), before, after, within, most):
        assert ended(stage, spoken(store, bad), store) == (FILTERED, "silence")
    facts = stage(spoken(store, sound, quiet(1.0)), store).facts
    assert facts["silence"] == [pytest.approx(found.share, abs=1e-3), 1.0]


def test_clipping(store: Store) -> None:
    stage = make_filter("clipping")
    loud = np.clip(sine(1.0, 220, 1.5), -1, 1)
    assert flat_share(loud) > 0.3
    assert flat_share(loud * 0.2) == pytest.approx(flat_share(loud), abs=0.01)  # made softer afterwards
    assert flat_share(sine(1.0, 220, 0.99)) == flat_share(quiet(1.0)) == 0
    assert ended(stage, spoken(store, loud), store) == ended(stage, spoken(store, loud * 0.2), store)
    assert ended(stage, spoken(store, loud), store) == (FILTERED, "clipping")
    assert ended(stage, spoken(store, sine(1.0, 60, 0.99)), store) == (OK, "")


def test_loudness(store: Store) -> None:
    stage = make_filter({"filter": "loudness", "min_lufs": -30, "max_lufs": -10})
    assert stage(spoken(store, sine(2.0, 997, 0.1)), store).facts == {"lufs": [pytest.approx(-23.0, abs=0.11)]}
    assert ended(stage, spoken(store, sine(2.0, 997, 0.01)), store) == (FILTERED, "loudness")
    assert ended(stage, spoken(store, sine(2.0, 997, 0.9)), store) == (FILTERED, "loudness")
    assert stage(spoken(store, quiet(1.0)), store).facts == {"lufs": [-70.0]}


def test_language(store: Store) -> None:
    pytest.importorskip("py3langid")
    stage = make_filter("language")
    english = "Please tell me which train goes to the harbour this evening."
    german = "Bitte sag mir, welcher Zug heute Abend zum Hafen fährt und wann er ankommt."
    assert stage(written(english, "Certainly, the blue line goes there."), store).facts == {"languages": ["en"]}
    found = stage(written(english, german), store)
    assert (found.status, found.reason, found.facts["languages"]) == (FILTERED, "language", ["en", "de"])
    assert found.detail.startswith("turn 2 (assistant) is de") and "Hafen" not in found.detail
    assert ended(stage, written(german, language="de-AT"), store) == (OK, "")
    assert ended(stage, written("Danke!", "Oui.", "Ja, genau."), store) == (OK, "")  # too short to be sure
    assert ended(make_filter({"filter": "language", "languages": ["en", "de"]}), written(german), store) == (OK, "")
    assert ended(make_filter({"filter": "language", "languages": ["fr"]}), written(english), store)[0] == FILTERED


def test_blocklist(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# not these\nass\n\nDumb  Bell\nnaïve\n", encoding="utf-8")
    stage = make_filter({"filter": "blocklist", "path": str(path)})
    for good in ("the class passes the bass", "a dumb, old bell", "dumbbell", "naive"):
        assert ended(stage, written(good), store) == (OK, "")
    for bad in ("An ASS!", "a dumb-bell", "the DUMB\nbell rings", "so nai\u0308ve"):
        assert ended(stage, written("fine", bad), store) == (FILTERED, "blocklist")
    before = stage.config()
    path.write_text("ass\n", encoding="utf-8")
    assert make_filter({"filter": "blocklist", "path": str(path)}).config() != before
    path.write_bytes(b"\xef\xbb\xbf# a comment after a byte order mark\nass\n")
    assert ended(make_filter({"filter": "blocklist", "path": str(path)}), written("a comment"), store) == (OK, "")
    path.write_text("# nothing yet\n", encoding="utf-8")
    with pytest.raises(AnyglotError, match="has no phrases"):
        make_filter({"filter": "blocklist", "path": str(path)})
    path.write_text("...\n", encoding="utf-8")
    with pytest.raises(AnyglotError, match="line 1 has no words"):
        make_filter({"filter": "blocklist", "path": str(path)})
    with pytest.raises(AnyglotError, match="cannot be read"):
        make_filter({"filter": "blocklist", "path": str(tmp_path)})


def test_pii_is_named_and_not_repeated(store: Store) -> None:
    found = make_filter("pii")(written("hello", "write to jane@firm.com or 415-555-2671"), store)
    assert (found.status, found.reason, found.detail) == (FILTERED, "pii", "turn 2 (assistant): email")
    assert found.facts == {"pii": {"email": 1, "phone": 1}}
    assert ended(make_filter({"filter": "pii", "kinds": ["ssn"]}), written("jane@firm.com"), store) == (OK, "")


def test_picture(store: Store) -> None:
    rng = np.random.default_rng(0)
    stage = make_filter("picture")
    noise = rng.integers(0, 256, (64, 128, 3), dtype=np.uint8)
    lines = np.full((128, 128, 3), 255, np.uint8)
    lines[60:62, 20:100] = 0
    good = stage(pictured(store, noise, lines), store)
    assert good.status == OK and good.facts["side"] == [64, 128] and good.facts["aspect"] == [2.0, 1.0]
    assert ended(stage, pictured(store, noise[:32]), store) == (FILTERED, "small")
    assert ended(stage, pictured(store, np.concatenate([noise, noise], 1)), store) == (FILTERED, "aspect")
    assert ended(stage, pictured(store, np.full((64, 64, 3), (0, 90, 200), np.uint8)), store) == (
        FILTERED,
        "one_colour",
    )


def test_media(store: Store) -> None:
    stage = make_filter("media")
    item = spoken(store, sine(1.0))
    assert stage(item, store) == item
    media = item.dialogue.turns[0].parts[0].media
    assert media is not None
    soundfile.write(store.path(media), sine(0.5), RATE, format="FLAC")
    assert ended(stage, item, store) == (FILTERED, "damaged")
    store.path(media).unlink()
    assert ended(stage, item, store) == (FILTERED, "no_media")
    nowhere = MediaFile("objects/aa/none.png", "0" * 64)
    seen = Item(0, Dialogue((Turn("user", (Part("image", "x", media=nowhere), Part("text", "y"))),), "test"))
    assert ended(stage, seen, store) == (FILTERED, "no_media")
    assert ended(make_filter({"filter": "media", "modalities": ["speech"]}), seen, store) == (OK, "")


def test_near_duplicates_in_source_order(store: Store) -> None:
    bread = "How do I bake a good loaf of bread at home"
    texts = [f"{bread}?", "Tell me about the moons of Jupiter, please.", bread, bread.replace("good", "really good")]
    items = [written(text, index=3 * i) for i, text in enumerate(texts)]
    stage = make_filter({"filter": "near_duplicate", "threshold": 0.5})
    assert isinstance(stage, NearDuplicateFilter) and stage.ordered
    found = [stage(item, store) for item in items]
    assert [item.status for item in found] == [OK, OK, FILTERED, FILTERED]
    assert [item.facts.get("duplicate_of") for item in found] == [None, None, 0, 0]
    assert found[2].reason == "duplicate" and "as item 0" in found[2].detail
    stage.setup()
    assert [stage(item, store) for item in items] == found  # a run that goes on starts from the front
    with pytest.raises(AssertionError, match="source order"):
        stage(items[0], store)


def test_equal_words_about_other_pictures_are_no_duplicates(store: Store) -> None:
    def item(index: int, picture: str, question: str, given: bool = True) -> Item:
        media = MediaFile("objects/aa/x.png", picture * 64, {"given": True} if given else {})
        asked = (Part("image", "", media=media), Part("text", question))
        return Item(index, Dialogue((Turn("user", asked), Turn("assistant", (Part("text", "Yes."),))), "test"))

    where = "Where in this picture is the small animal that all of them look at?" * 4
    stage = make_filter({"filter": "near_duplicate", "threshold": 0.5})
    items = [item(0, "a", where), item(1, "b", where), item(2, "b", where + "?"), item(3, "a", "Is it a cat?")]
    items += [item(4, "a", "Is it a dog?"), item(5, "c", "So it is.", False), item(6, "d", "So it is.", False)]
    assert [stage(one, store).facts.get("duplicate_of") for one in items] == [None, None, 1, None, None, None, 5]


def test_settings_of_the_wrong_kind_are_told() -> None:
    with pytest.raises(AnyglotError, match="'duration': max_seconds is '9'; give a number"):
        make_filter({"filter": "duration", "max_seconds": "9"})
    with pytest.raises(AnyglotError, match="languages is 'en'; give a list"):  # not the languages e and n
        make_filter({"filter": "language", "languages": "en"})
