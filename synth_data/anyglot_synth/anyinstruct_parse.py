"""Reads what language models write for `anyinstruct`: lists of topics, scenarios, chats with `[image: ...]`.

Small models bend every format a little, so the readers are lenient about form and strict about content; whatever they
do not take is an `Unusable` with a reason. Famous people and works are found by a short list and by capitals in the
middle of a sentence: that is a help, no guarantee.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from anyglot_synth.anyinstruct_prompts import Requirement
from anyglot_synth.dialogue import IMAGE, MUSIC
from anyglot_synth.llm import Unusable

MAX_WORDS = 25
"""Of an utterance; the model is asked for 15."""
MIN_DESCRIPTION, MAX_DESCRIPTION = 3, 30
MAX_IMAGES, MAX_MUSIC = 2, 1

_BANNED = re.compile(
    r"https?:|www\.|as an ai|language "
    r"model|\bvideo|\bchart\b|\bgraph\b|\bessay\b|\bthesis\b|\bsexy?\b|\bnude\b|\bgun\b|"
    r"\bkill|\bpregnan|\bkiss|\bnaked|\bdrunk|\bblood|\bsuicid|\bscene:|\brule:|\bsubject:|\bplaceholder\b|_{2,}|\{|\}|<|>",
    re.IGNORECASE,
)
_FAMOUS = re.compile(
    r"\b(mozart|beethoven|bach|chopin|vivaldi|picasso|monet|gogh|vinci|mona lisa|starry "
    r"night|warhol|disney|mickey|pixar|"
    r"beatles|elvis|madonna|beyonc[eé]|taylor swift|michael jackson|shakespeare|einstein|potter|star wars|pok[eé]mon|"
    r"barbie|batman|superman|spotify|youtube|eiffel|bohemian rhapsody)\b",
    re.IGNORECASE,
)
_LINKING = frozenset(
    [
        "with",
        "that",
        "this",
        "they",
        "them",
        "their",
        "have",
        "from",
        "what",
        "your",
        "when",
        "then",
        "there",
        "would",
        "like",
        "some",
        "very",
    ]
)
"""Words that may come often."""
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+ [A-Z][a-z]+")
_MUSICAL = re.compile(
    r"\b(music|musical|melod|tune|song|guitar|piano|violin|fiddle|flute|drum|bass|string|cello|harp|trumpet|saxophone|horn|"
    r"organ|synth|choir|voice|vocal|percussion|beat|rhythm|tempo|jazz|folk|pop|rock|classical|ambient|electronic|blues|"
    r"country|reggae|lullaby|orchestra|acoustic|bell|accordion|ukulele|banjo|harmon|chord|instrument|slow|fast|upbeat)",
    re.IGNORECASE,
)
_MEDIUM = re.compile(
    r"[\[(]\s*(image|picture|photo|drawing|music|song|audio|melody|tune)\s*[:\-]\s*([^\[\]()]*)(?:[\])]|$)",
    re.IGNORECASE,
)
_SPEAKER = re.compile(r"^\W*(user|person|human|assistant|ai|bot)\W*?:\W*?(?=[\w\[(\"'¿¡]|$)", re.IGNORECASE)
_ITEM = re.compile(r"^\s*(?:\d+\s*[.):]|[-*•])\s*(.+)$")
_USERS = ("user", "person", "human")


@dataclass(frozen=True)
class Said:
    """A piece of a turn: words (`modality` "text"), or what a picture or music is."""

    modality: str
    text: str


def clean(text: str) -> str:
    """One line without markup and quotation marks around it."""
    text = re.sub(r"[*_`#]+", "", " ".join(text.split()))
    return text.strip().strip("\"'“”").strip()


def check(text: str, least: int, most: int) -> str:
    """The text, if it has so many words and nothing that is not wanted."""
    count = len(re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+", text))
    if not least <= count <= most:
        raise Unusable("length", f"{count} words, wanted are {least} to {most}")
    if found := _BANNED.search(text):
        raise Unusable("banned", repr(found.group()))
    if found := _FAMOUS.search(text) or _NAME.search(text):
        raise Unusable("famous", repr(found.group()))
    words = Counter(word for word in re.findall(r"[^\W\d_]{4,}", text.lower()) if word not in _LINKING)
    if words and words.most_common(1)[0][1] > (1 if most <= 10 else 2):
        raise Unusable("repetitive", repr(words.most_common(1)[0][0]))
    letters = sum(letter.isalpha() or letter.isspace() for letter in text)
    if letters < 0.8 * len(text):
        raise Unusable("not-words", f"{letters} letters among {len(text)} characters")
    return text


def read_topics(text: str) -> list[tuple[str, Unusable | None]]:
    """(line, why it is not taken or None) of a numbered list. Raises `Unusable` where there is no list."""
    found = [item.group(1) for item in map(_ITEM.match, text.splitlines()) if item]
    if not found:
        raise Unusable("no-list", "no numbered lines")
    topics: list[tuple[str, Unusable | None]] = []
    for item in found:
        topic = re.split(r":\s|\s[-–]\s|\.\s", clean(item))[0].strip(" .,;:!?").lower()
        try:
            topics.append((check(topic, 2, 10), None))
        except Unusable as no:
            topics.append((topic, no))
    return topics


def sentences(text: str, most: int) -> str:
    """The first whole sentences of a text that have up to so many words; at least one, whatever its length."""
    kept = ""
    for sentence in re.findall(r"[^.!?]+[.!?]+[\"”']?|[^.!?]+$", text):
        if kept and len((kept + sentence).split()) > most:
            break
        kept += sentence
    return kept.strip()


def read_scenario(text: str, requirement: Requirement) -> str:
    """A scenario of one or two sentences which speaks of what its requirement needs."""
    text = re.split(r"\n\s*\n|\n(?=Subject:|Rule:|Scene:)", text.strip())[0]
    text = sentences(clean(re.sub(r"^(scene|scenario)\s*:", "", text, flags=re.IGNORECASE)), 45)
    if not text.endswith((".", "!", "?")):
        raise Unusable("unfinished", text[-40:])
    check(text, 8, 60)
    pictures = re.search(r"\b(picture|photo|image|draw|paint|sketch|illustrat)", text, re.IGNORECASE)
    if IMAGE in requirement.plan and not pictures:
        raise Unusable("requirement", f"{requirement.name}: no picture in it")
    if MUSIC in requirement.plan and not _MUSICAL.search(text):
        raise Unusable("requirement", f"{requirement.name}: no music in it")
    return text


def read_utterance(text: str) -> str:
    """Words of one turn, without media."""
    text = sentences(clean(_MEDIUM.sub("", text)), MAX_WORDS)
    if re.search(r"[\[\]()]", text):
        raise Unusable("brackets", text[:60])
    return check(text, 2, MAX_WORDS)


def read_description(text: str, modality: str) -> str:
    """What a picture shows or how music sounds."""
    text = clean(text).strip(" .;,")
    if modality == MUSIC and not _MUSICAL.search(text):
        raise Unusable("not-music", text[:60])
    return check(text, MIN_DESCRIPTION, MAX_DESCRIPTION)


def read_turn(text: str) -> tuple[Said, ...]:
    """Words and media of a turn, in order."""
    parts: list[Said] = []
    end = 0
    for medium in _MEDIUM.finditer(text):
        before = text[end : medium.start()]
        if clean(before).strip(" .,;:"):
            parts.append(Said("text", read_utterance(before)))
        modality = IMAGE if medium.group(1).lower() in ("image", "picture", "photo", "drawing") else MUSIC
        parts.append(Said(modality, read_description(medium.group(2), modality)))
        end = medium.end()
    if clean(text[end:]).strip(" .,;:"):
        parts.append(Said("text", read_utterance(text[end:])))
    if not parts:
        raise Unusable("empty", "a turn without words")
    return tuple(parts)


def read_chat(text: str, requirement: Requirement) -> list[tuple[Said, ...]]:
    """Turns of a chat, the user's first and the assistant's last.

    Raises:
        Unusable: "speakers" (they do not take turns), "rounds" (fewer than 2), "media" (too many), "requirement", or
            what is wrong with one of its turns.
    """
    spoken: list[tuple[bool, str]] = []
    for line in text.splitlines():
        if re.match(r"\W*(scene|rule|subject|note)\b.*:", line, re.IGNORECASE):
            break
        if speaker := _SPEAKER.match(line):
            spoken.append((speaker.group(1).lower() in _USERS, line[speaker.end() :]))
        elif line.strip() and spoken:
            spoken[-1] = (spoken[-1][0], f"{spoken[-1][1]} {line}")
    if not spoken:
        raise Unusable("speakers", "nobody speaks")
    in_turn = next((n for n, (is_user, _) in enumerate(spoken) if is_user != (n % 2 == 0)), len(spoken))
    if in_turn < min(4, len(spoken)):
        raise Unusable("speakers", f"they take turns {in_turn} times only")
    spoken = spoken[: min(6, in_turn // 2 * 2)]  # small models do not end
    if len(spoken) < 4:
        raise Unusable("rounds", f"{len(spoken)} turns, wanted are 4 or 6")
    return check_chat([read_turn(line) for _, line in spoken], requirement)


def check_chat(turns: list[tuple[Said, ...]], requirement: Requirement) -> list[tuple[Said, ...]]:
    """The turns, if the media are those that are wanted and nobody says the same twice."""
    held = [[part.modality for part in turn] for turn in turns]
    count = {modality: sum(turn.count(modality) for turn in held) for modality in (IMAGE, MUSIC)}
    if count[IMAGE] > MAX_IMAGES or count[MUSIC] > MAX_MUSIC:
        raise Unusable("media", f"{count[IMAGE]} pictures and {count[MUSIC]} pieces of music")
    for number, modality in enumerate(requirement.plan):
        if modality and not any(modality in turn for turn in held[number % 2 :: 2]):
            raise Unusable(
                "requirement", f"{requirement.name}: {'user' if number % 2 == 0 else 'assistant'} has no {modality}"
            )
    said = [part.text.lower() for turn in turns for part in turn]
    if len(set(said)) < len(said):
        raise Unusable("repeats", "the same twice")
    return turns
