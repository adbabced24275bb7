"""What `anyinstruct` asks a language model, and its own examples: meta-topics, requirements, scenarios, chats.

All wording is this project's own; the recipe (topics, scenarios, chats with descriptions in place of media) is that of
AnyGPT (Zhan et al. 2024, arXiv 2402.12226).
"""

from __future__ import annotations

from dataclasses import dataclass

META_TOPICS: tuple[str, ...] = tuple(
    """
    cooking dinner; baking bread; breakfast habits; tea and coffee; picnics; street food; growing vegetables; house
    plants;
    flower gardens; trees in autumn; birds at the window; cats at home; walking the dog; keeping fish; farm animals;
    insects in summer; a day at the zoo; hiking in the hills; camping; a day at the beach; swimming; cycling to work;
    running in the park; winter sports; football with friends; board games; card games; puzzles; video game evenings;
    dancing; learning the guitar; singing in a choir; piano lessons; drums and rhythm; folk songs; music for sleep;
    music for study; party music; lullabies; concerts in the park; painting with watercolours; drawing portraits of
    pets; pottery; knitting; sewing clothes; woodworking; photography walks; origami; decorating a room; moving house;
    tidying up; laundry day; repairing a bicycle; fixing a tap; the neighbourhood; small shops; the weekly market;
    saving money; gifts for friends; birthdays; weddings; new year; family dinners; grandparents; raising children;
    bedtime stories; first day at school; homework; learning a language; libraries; favourite books; writing a diary;
    handwriting; postcards; train journeys; road trips; airports; old towns; islands; mountains; deserts; rivers and
    lakes;
    rainy days; thunderstorms; snow; sunsets; the night sky; the moon; seasons; the sea; clothes and style; hats and
    shoes;
    haircuts; sleep; healthy habits; stretching; feeling calm; making friends; good manners; jokes; daydreams; dreams;
    hobbies; lost and found; public transport; rooftops and balconies; lighthouses; bridges
    """.replace("\n", " ").split(";")
)
META_TOPICS = tuple(" ".join(topic.split()) for topic in META_TOPICS)
"""Everyday things that people talk about."""


@dataclass(frozen=True)
class Requirement:
    """What a chat must hold.

    Args:
        name: in the data.
        text: as the model is told.
        plan: one entry per turn, user first: "" is words only, "image" or "music" words and that medium.
        weight: of being drawn. Music that a user brings is what models leave out most, so it weighs more.
    """

    name: str
    text: str
    plan: tuple[str, ...]
    weight: float = 1.0


REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement("shows-picture", "the person shows a picture and talks about it", ("image", "", "", "")),
    Requirement("wants-picture", "the person wants a picture, and the assistant makes one", ("", "image", "", "")),
    Requirement("shares-music", "the person shares a piece of music and talks about it", ("music", "", "", ""), 2.0),
    Requirement("wants-music", "the person wants music, and the assistant makes some", ("", "music", "", ""), 1.5),
    Requirement(
        "picture-to-music",
        "the person shows a picture and wants music that goes with it; the assistant says what it sees, then makes "
        "music",
        ("image", "", "", "music"),
        1.5,
    ),
    Requirement(
        "music-to-picture",
        "the person shares music and wants a picture that goes with it; the assistant says what it hears, then draws",
        ("music", "", "", "image"),
        2.0,
    ),
    Requirement(
        "two-pictures",
        "the person shows a picture, and the assistant makes another one that is changed as the person likes",
        ("image", "", "", "image"),
    ),
)


@dataclass(frozen=True)
class Example:
    """One worked example: all three steps of one chat."""

    topic: str
    requirement: str
    scenario: str
    chat: str


EXAMPLES: tuple[Example, ...] = (
    Example(
        "my tomatoes turn yellow",
        "shows-picture",
        "A man who grows tomatoes on his balcony shows a picture of a plant with yellow leaves and asks what it lacks.",
        "User: Why do my tomato leaves look like this? [image: a tomato plant in a clay pot with yellow spotted "
        "leaves]\n"
        "Assistant: The lower leaves are yellow, so the soil may be too wet.\n"
        "User: How often should I water it?\n"
        "Assistant: Every second day is enough, and only when the soil feels dry.",
    ),
    Example(
        "a card for my sister",
        "wants-picture",
        "A woman wants a picture for her sister's birthday card, with something her sister loves: hot air balloons.",
        "User: Can you draw something with hot air balloons for a birthday card?\n"
        "Assistant: Here is a cheerful one. [image: three colourful hot air balloons over green hills in the "
        "morning sun]\n"
        "User: It is lovely, she will be happy.\n"
        "Assistant: I am glad, and happy birthday to her!",
    ),
    Example(
        "music for a slow Sunday",
        "shares-music",
        "A student shares a calm guitar piece that he plays on Sundays and asks what it would be good for.",
        "User: I play this on Sundays. When would you listen to it? [music: slow acoustic guitar, soft and warm, "
        "folk style]\n"
        "Assistant: It is calm and warm, so I would play it at breakfast.\n"
        "User: Would it help me to read?\n"
        "Assistant: Yes, there are no words in it that would disturb you.",
    ),
    Example(
        "waking up in a good mood",
        "wants-music",
        "A nurse with early shifts asks for a bright tune to wake up to, with piano and a light beat.",
        "User: I need a bright tune to wake up to.\n"
        "Assistant: This one should get you going. [music: bright piano melody with a light drum beat, happy pop "
        "style]\n"
        "User: Great, I will use it tomorrow.\n"
        "Assistant: Have a good shift!",
    ),
    Example(
        "the sea in a storm",
        "picture-to-music",
        "A sailor shows a picture of waves in a storm and wants music that feels the same.",
        "User: I took this from the pier. [image: dark high waves under grey clouds with white foam]\n"
        "Assistant: The waves look wild and heavy, and the sky is very dark.\n"
        "User: Can you make music that feels like that?\n"
        "Assistant: I chose low strings for the waves. [music: deep dramatic strings with rolling drums, stormy and "
        "fast]",
    ),
    Example(
        "a tune from my village",
        "music-to-picture",
        "A woman shares a lively fiddle tune from her village and wants a picture of what it makes one think of.",
        "User: This is played at our summer feast. [music: lively fiddle dance with hand claps, folk style]\n"
        "Assistant: It is fast and merry, and I can hear people clapping.\n"
        "User: Please draw what it makes you think of.\n"
        "Assistant: I think of a dance outside. [image: people dancing in a circle on a village square at dusk]",
    ),
    Example(
        "a warmer living room",
        "two-pictures",
        "A couple shows a picture of their grey living room and wants to see it with warm colours.",
        "User: Our living room looks cold. [image: a grey living room with a white sofa and bare walls]\n"
        "Assistant: The walls are bare and everything is grey or white.\n"
        "User: How would it look with warm colours?\n"
        "Assistant: With orange cushions it is cosier. [image: a living room with a white sofa, orange cushions and "
        "a lamp]",
    ),
)


Messages = tuple[tuple[str, str], ...]
_TOPIC_EXAMPLES = (
    (
        "windows and doors",
        "the view from my kitchen window\na squeaking garden door\npainting the front door blue\ncurtains for a "
        "small room\n"
        "rain against the glass\na cat that waits at the door",
    ),
    (
        "village life",
        "the bells on Sunday morning\na walk to the old mill\nfresh milk from a neighbour\nthe summer dance on the "
        "square\n"
        "lanterns on a winter evening\na bench under the lime tree",
    ),
)


def topics_prompt(meta: str, num: int) -> Messages:
    """Asks for topics of a meta-topic, one a line."""

    def ask(about: str, count: int) -> str:
        return (
            f"List {count} small everyday subjects that somebody could talk about with a friendly assistant. All "
            f"belong to: "
            f"{about}. Each is a different short phrase of two to eight words, and pictures or music would fit in. "
            f"No school "
            "subjects, charts or films, no famous people or works. Number them, one a line, and write nothing else."
        )

    messages: list[tuple[str, str]] = []
    for about, listed in _TOPIC_EXAMPLES:
        lines = listed.split("\n")
        numbered = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
        messages += [("user", ask(about, len(lines))), ("assistant", numbered)]
    return (*messages, ("user", ask(meta, num)))


def scenario_prompt(topic: str, requirement: Requirement, examples: tuple[Example, ...]) -> Messages:
    """Asks for one scenario."""
    told = (
        "A person chats with an assistant that can see and make pictures, and hear and make music. I give you a "
        "subject and a rule; you write the scene of such a chat in one or two plain sentences: who the person is and "
        "what they want. Keep the rule."
    )

    def ask(about: str, rule: str) -> str:
        return f"Subject: {about}\nRule: {rule}"

    messages = [("system", told)]
    for example in examples:
        messages += [("user", ask(example.topic, requirement_of(example).text)), ("assistant", example.scenario)]
    return (*messages, ("user", ask(topic, requirement.text)))


def chat_prompt(scenario: str, requirement: Requirement, examples: tuple[Example, ...], rounds: int) -> Messages:
    """Asks for one chat."""
    told = (
        "You write short chats between a person (User) and an assistant (Assistant) that can see and make pictures, "
        "and hear and make music. Where a picture or music is shown, say what it is in square brackets: [image: ...] "
        "or [music: ...]. Each line has 4 to 15 words beside the brackets. Music is described by style, mood and "
        "instruments. At most two pictures and one piece of music. No famous people, films, songs or paintings."
    )

    def ask(scene: str, rule: str, turns: int) -> str:
        return f"Scene: {scene}\nRule: {rule}.\nUser and Assistant take turns, {turns} times each."

    messages = [("system", told)]
    for example in examples:
        messages += [("user", ask(example.scenario, requirement_of(example).text, 2)), ("assistant", example.chat)]
    return (*messages, ("user", ask(scenario, requirement.text, rounds)))


def requirement_of(example: Example) -> Requirement:
    """The requirement that an example keeps."""
    return next(requirement for requirement in REQUIREMENTS if requirement.name == example.requirement)
