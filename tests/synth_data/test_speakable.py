from __future__ import annotations

import re
import shutil
import string
import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyglot_synth.dialogue import Dialogue, Part, Turn
from anyglot_synth.forms import in_form
from anyglot_synth.speakable import Dropped, Limits, SpeakableStage, Spoken, speakable
from anyglot_synth.speakable import numbers as n
from anyglot_synth.stages import FILTERED, OK, Item
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import AnyglotError

# What flite and espeak-ng make of the raw text is in parentheses where it was measured.
SAID = [
    # numbers
    ("I have 3 cats.", "I have three cats."),
    ("There are 21 of them.", "There are twenty-one of them."),
    (
        "It costs 1,234,567 in all.",
        "It costs one million two hundred thirty-four thousand five hundred sixty-seven in all.",
    ),
    ("About 12000 people came.", "About twelve thousand people came."),
    ("Pi is 3.14.", "Pi is three point one four."),
    ("It fell to -5 at night.", "It fell to minus five at night."),
    ("a 0.5 share", "a zero point five share."),
    ("Only .5 left", "Only point five left."),
    ("Room 007", "Room zero zero seven."),
    ("the 1st, 2nd, 3rd and 22nd", "the first, second, third and twenty-second."),
    ("the 100th time", "the one hundredth time."),
    ("Version 2.10.3 is out.", "Version two point ten point three is out."),
    ("1/2 of it", "one half of it."),
    ("3/4 cup and 2 1/2 eggs", "three quarters cup and two and a half eggs."),
    ("½ cup, 2½ spoons", "one half cup, two and a half spoons."),
    ("50% off, 12.5% more", "fifty percent off, twelve point five percent more."),
    ("7 billion people", "seven billion people."),
    ("10K views and 2.5M users", "ten thousand views and two point five million users."),
    ("card 4111111111", "card four one one one one one one one one one."),
    ("٣ apples", "three apples."),
    # years, decades
    ("In 1905 and 2024, not 2000", "In nineteen oh five and twenty twenty-four, not two thousand."),
    ("the 1990s", "the nineteen nineties."),
    ("in her 20s", "in her twenties."),
    ("the '80s", "the eighties."),
    ("1914-1918", "nineteen fourteen to nineteen eighteen."),
    # money ("dollar three point five zero")
    ("$3.50", "three dollars and fifty cents."),
    ("$1", "one dollar."),
    ("$0.99", "ninety-nine cents."),
    ("$5 million", "five million dollars."),
    ("$2.5M", "two point five million dollars."),
    ("€20 or 20 €", "twenty euros or twenty euros."),
    ("£1,200.00", "one thousand two hundred pounds."),
    ("$5-$10", "five dollars to ten dollars."),
    ("10€-20€, $10K-$20K", "ten euros-twenty euros, ten thousand dollars-twenty thousand dollars."),
    ("-$50.00 or (-50 €)", "minus fifty dollars or, minus fifty euros."),
    ("a loss of −$2.5M", "a loss of minus two point five million dollars."),
    ("-5K, a 5-K run, 10k-20k", "minus five thousand, a five-K run, ten thousand twenty thousand."),
    ("x = -1/2", "x equals minus one half."),
    ("-1 1/2 miles, 3-1/2", "minus one and a half miles, three to one half."),
    ("food - $50, tax - $5", "food, fifty dollars, tax, five dollars."),
    ("- $50 for food\n- 5K", "fifty dollars for food. five thousand."),
    ("¥500", "five hundred yen."),
    ("It is $.50 or €.5", "It is fifty cents or zero point five euros."),
    ("$-5 or €-.50, 5 €-10 €", "minus five dollars or minus fifty cents, five euros-ten euros."),
    # dates ("twelve slash twenty-five slash ...")
    ("12/25/2024", "December twenty-fifth, twenty twenty-four."),
    ("25/12/2024", "December twenty-fifth, twenty twenty-four."),
    ("2024-12-25", "December twenty-fifth, twenty twenty-four."),
    ("25.12.2024", "December twenty-fifth, twenty twenty-four."),
    ("on July 4, 1776, they", "on July fourth, seventeen seventy-six, they."),
    ("on Dec. 5th", "on December fifth."),
    ("5 March 2020", "fifth March, twenty twenty."),
    ("the 5th of May", "the fifth of May."),
    ("June 5-7", "June fifth to seventh."),
    ("Sept. 2021", "September twenty twenty-one."),
    ("99/99/2024 is no date", "ninety-nine slash ninety-nine slash twenty twenty-four is no date."),
    # times
    ("at 3:05 pm", "at three oh five P M."),
    ("at 14:30", "at fourteen thirty."),
    ("9:00", "nine o'clock."),
    ("open 9am-5pm", "open nine A M to five P M."),
    ("at 5 p.m. We left.", "at five P M. We left."),
    ("at 5 p.m. we left", "at five P M we left."),
    ("It took 1:02:03 hours", "It took one oh two and three seconds hours."),
    ("a ratio of 3:1", "a ratio of three to one."),
    # units ("two kay gee")
    ("2 kg", "two kilograms."),
    ("1 kg", "one kilogram."),
    ("5 km/h", "five kilometers per hour."),
    ("20 °C", "twenty degrees Celsius."),
    ("-3°F", "minus three degrees Fahrenheit."),
    ("5-10 km", "five to ten kilometers."),
    ("12 m² and 3 m³", "twelve square meters and three cubic meters."),
    ("10 GB at 100 Mbps", "ten gigabytes at one hundred megabits per second."),
    ("5'11\"", "five foot eleven."),
    ("a 90° turn", "a ninety degrees turn."),
    ("250 ml milk", "two hundred fifty milliliters milk."),
    ("3 1/2 tsp and 1/2 tsp", "three and a half teaspoons and one half of a teaspoon."),
    ("30 min/day, $5/month", "thirty minutes per day, five dollars per month."),
    ("100°C/212°F", "one hundred degrees Celsius or two hundred twelve degrees Fahrenheit."),
    ("~500 km", "about five hundred kilometers."),
    ("4.5/5 stars", "four point five out of five stars."),
    ("2h15", "two hours fifteen."),
    ("10–20%", "ten to twenty percent."),
    # telephone, codes
    ("Call (555) 123-4567.", "Call five five five, one two three, four five six seven."),
    ("+49 30 1234 5678", "plus four nine, three zero, one two three four, five six seven eight."),
    ("an mp3 of H2O", "an M P three of H two O."),
    ("COVID-19 and B2B", "Covid nineteen and B two B."),
    ("Apt. 4B, 50/50, step 1/3", "Apartment four B, fifty fifty, step one of three."),
    ("Node.js v18.2.0", "Node dot J S version eighteen point two point zero."),
    ("an A+ or a B-", "an A plus or a B minus."),
    ("a 5-year-old", "a five-year-old."),
    ("24/7", "twenty-four seven."),
    ("1920x1080", "nineteen twenty by one thousand eighty."),
    ("2x faster", "two times faster."),
    ("It grew 1.5x. Then 3x", "It grew one point five times. Then three times."),
    ("so y = 3x.", "so y equals three x."),
    ("Simplify 2x. What is 4x?", "Simplify two x. What is four x?"),
    ("1.5x + 2", "one point five x plus two."),
    # abbreviations
    ("Dr. Smith met Mrs. Jones.", "Doctor Smith met Missus Jones."),
    ("Fruit, e.g. apples, i.e. food", "Fruit, for example apples, that is food."),
    ("apples, pears, etc.", "apples, pears, et cetera."),
    ("pens etc. are here", "pens et cetera are here."),
    ("cats vs. dogs", "cats versus dogs."),
    ("St. Peter on Main St.", "Saint Peter on Main Street."),
    ("I live in St. Louis.", "I live in Saint Louis."),
    ("They live in East St. Louis.", "They live in East Saint Louis."),
    ("Visit St. Louis, Mount St. Helens.", "Visit Saint Louis, Mount Saint Helens."),
    ("5 Main St. in St. Paul", "five Main Street in Saint Paul."),
    ("He lives on Main St. She left 5th St. and", "He lives on Main Street. She left fifth Street and."),
    ("see Fig. 3 and No. 5", "see figure three and number five."),
    ("the U.S. Army", "the U S Army."),
    ("Acme Inc. is here", "Acme Incorporated is here."),
    ("coffee w/ milk, w/o sugar", "coffee with milk, without sugar."),
    ("and/or", "and or."),
    # acronyms
    ("NASA and the FBI", "Nasa and the F B I."),
    ("a pdf, hmm", "a P D F, hmm."),
    ("AT&T has a Q&A", "A T and T has a Q and A."),
    ("I know HTML, CSS, and SQL", "I know H T M L, C S S, and S Q L."),
    ("two CPUs", "two C P U's."),
    ("do NOT touch", "do not touch."),
    ("HTML, JSON, OK?", "H T M L, Jason, okay?"),
    ("PLEASE STOP SHOUTING AT ME", "please stop shouting at me."),
    ("UNICEF's plan", "Unicef's plan."),
    # Roman numerals
    ("World War II", "World War two."),
    ("Chapter IV", "Chapter four."),
    ("Henry VIII", "Henry the eighth."),
    ("I think I know", "I think I know."),
    ("World War I ended, the Class I took", "World War one ended, the Class I took."),
    ("Then Charles I met", "Then Charles I met."),
    # addresses ("aitch tee tee pee ess colon slash slash")
    ("See https://example.com.", "See example dot com."),
    ("https://www.example.org/docs", "example dot org slash docs."),
    ("https://example.com/a?id=3&x=9#top", "example dot com."),
    ("Go to example.com now", "Go to example dot com now."),
    ("me.you@my-site.co.uk", "me dot you at my dash site dot co dot uk."),
    ("run main.py", "run main dot py."),
    # Markdown ("asterisk asterisk bold asterisk asterisk")
    ("**bold** and *soft* and _low_", "bold and soft and low."),
    ("***both*** and ~~gone~~", "both and gone."),
    ("# A title\nText", "A title. Text."),
    ("- one\n- two\n* three", "one. two. three."),
    ("1. Wash\n2. Dry", "one: Wash. two: Dry."),
    ("- [x] done", "done."),
    ("> quoted", "quoted."),
    ("a [link](https://a.com/b?c) here", "a link here."),
    ("![a cat](cat.png)", "a cat."),
    ("Call `load_data()` first", "Call load data first."),
    ("above\n\n---\n\nbelow", "above. below."),
    ("It is so [1], they say [2, 3].", "It is so, they say."),
    ("| Name | Age |\n|---|---|\n| Ann | 5 |", "Name: Ann, Age: five."),
    ("a snake_case name", "a snake case name."),
    (r"2 \* 3", "two times three."),
    # HTML
    ("Tom &amp; Jerry", "Tom and Jerry."),
    ("<b>Hi</b><br>there", "Hi there."),
    ("a &lt; b", "a is less than b."),
    # mathematics ("em kay caret")
    ("E = mc^2", "E equals M C squared."),
    ("2 + 2 = 4", "two plus two equals four."),
    ("5 - 3 = 2", "five minus three equals two."),
    ("x ≤ 5 and y >= 2", "x is at most five and y is at least two."),
    ("3 × 4", "three times four."),
    ("so $x = 5$ and $y$", "so x equals five and y."),
    ("f(x) = 3x - 5", "f of x equals three X minus five."),
    ("√9", "the square root of nine."),
    ("π ≈ 3.14", "pi is about three point one four."),
    ("10-5=5. And 12-7=?", "ten minus five equals five. And twelve minus seven equals?"),
    ("(5-3)*2=4, 5-10=-5", "five minus three, times two equals four, five minus ten equals minus five."),
    ("If x-1=0 then y=2x-3", "If x minus one equals zero then y equals two X minus three."),
    ("Write (n-1) and 4x-7", "Write, n minus one, and four X minus seven."),
    ("12/4=3, 12 / 4 = 3", "twelve over four equals three, twelve over four equals three."),
    ("(a+b)/2 and x/2 = 4", "a plus b, over two and x over two equals four."),
    (
        "1/2 - 1/4 = 1/4, 7/10 = 70%",
        "one half minus one quarter equals one quarter, seven tenths equals seventy percent.",
    ),
    ("$10-$5=$5", "ten dollars minus five dollars equals five dollars."),
    ("What is 12-7? Or 9-5", "What is twelve to seven? Or nine to five."),
    ("90-100 = A, B = 80-89", "ninety to one hundred equals A, B equals eighty to eighty-nine."),
    (
        "d = 2024-01-05, id=555-123-4567",
        "d equals January fifth, twenty twenty-four, id equals five five five, one two three, four five six seven.",
    ),
    ("5 m/s = 18 km/h", "five meters per second equals eighteen kilometers per hour."),
    ("a/b/c = T-1, F-16 + B-2", "a slash b slash c equals T one, F sixteen plus B two."),
    ("2x-3x faster, vitamin B-12, x-ray", "two X three times faster, vitamin B twelve, x-ray."),
    (
        "h is 6.6e-34, c is 3e8",
        "h is six point six times ten to the power of minus thirty-four, c is three times ten to the power of eight.",
    ),
    (
        "1.5e-3 m, suite 3E5",
        "one point five times ten to the power of minus three meters, suite three E five.",
    ),
    ("a 2.5D game, version 2.0b here", "a two point five D game, version two point zero B here."),
    ("commit 719e382", "commit seven hundred nineteen E three hundred eighty-two."),
    ("about 7.5ish, 1.2.3a", "about seven point five ish, one point two point three A."),
    ("x^n", "x to the power of n."),
    ("2⁵ is 32, 10⁻³ is small", "two to the power of five is thirty-two, ten to the power of minus three is small."),
    (
        "x⁻¹ and 6.02 × 10²³",
        "x to the power of minus one and six point zero two times ten to the power of twenty-three.",
    ),
    ("(a + b)⁴, as Smith¹ says", "a plus b, to the power of four, as Smith one says."),
    ("The ¹⁴C dating, he said.¹⁰ Then", "The fourteen C dating, he said. ten Then."),
    ("n-3 fatty acids", "n three fatty acids."),
    ("A-Z + B", "A-Z plus B."),
    ("10²–10³ cells, 5×7-8×10", "ten squared, ten cubed cells, five by seven to eight by ten."),
    # symbols, emoji, punctuation
    ("Great! 😀", "Great! grinning face."),
    ("Love ❤️❤️❤️", "Love, heavy black heart."),
    ("Hi :)", "Hi, smiling face."),
    ("R&D @ home", "R and D at home."),
    ("C++ and C#", "C plus plus and C sharp."),
    ("#winning", "hashtag winning."),
    ("A → B", "A to B."),
    ("He said, “Hello.” Then left", "He said, Hello. Then left."),
    ("Wait... what?!", "Wait, what?"),
    ("red, blue (green, ...), and so on", "red, blue, green, and so on."),
    ("Well… Okay", "Well. Okay."),
    ("one (or two) of them", "one, or two, of them."),
    ("this — that", "this, that."),
    ("No!!!", "No!"),
    ("rock 'n' roll", "rock n roll."),
    ("don’t", "don't."),
    ("café Ångström", "cafe Angstrom."),
    ("soooooo good", "soo good."),
    ("line\nline two", "line line two."),
]

DROPPED = [
    ("Use this:\n```python\nprint(1)\n```", "code"),
    ("def f(x):\n    return x", "code"),
    ("#include <stdio.h>", "code"),
    ("for (int i = 0; i < 3; i++) {", "code"),
    ("<script>alert(1)</script>", "code"),
    (r"$$\int x\,dx$$", "maths"),
    (r"so \frac{1}{2} it is", "maths"),
    ("| a | b | c |\n|---|---|---|\n" + "| 1 | 2 | 3 |\n" * 5, "table"),
    ("😀😃😄😁😆", "emoji"),
    ("你好，世界", "script"),
    ("Привет", "script"),
    ("", "empty"),
    ("   \n\t ", "empty"),
    ("...!?", "empty"),
    ("word " * 201, "long"),
    ("a b " * 6000, "long"),
    ("x" * 61, "long-word"),
    ("{a}~[b]~{c}^~|d|*~*", "symbols"),
    ("xkcd qwrt zxcv bnmp", "no-language"),
]


def test_there_are_enough_cases() -> None:
    assert len(SAID) >= 100 and len({text for text, _ in SAID}) == len(SAID)


@pytest.mark.parametrize(("text", "said"), SAID, ids=[text[:40] for text, _ in SAID])
def test_said(text: str, said: str) -> None:
    assert speakable(text) == Spoken(said)


@pytest.mark.parametrize(("text", "reason"), DROPPED, ids=[text[:30] for text, _ in DROPPED])
def test_dropped(text: str, reason: str) -> None:
    found = speakable(text)
    assert isinstance(found, Dropped) and found.reason == reason and found.detail


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
@pytest.mark.parametrize(
    ("text", "misread"),
    [
        ("**bold**", "ae s t er ih s k"),  # asterisk
        ("on 12/25/2024", "s l ae sh"),  # slash
        ("at https://example.com", "ey ch t iy t iy p iy"),  # h t t p
        ("2 kg", "k ey jh iy"),  # k g
        ("E = mc^2", "k eh r eh t"),  # caret
        ("x_y or `a_b`", "n d er s k ao r"),  # underscore
    ],
)
def test_what_a_voice_misreads_is_gone(text: str, misread: str) -> None:
    def phones(words: str) -> str:
        done = subprocess.run(["flite", "-t", words, "-ps", "-o", "none"], capture_output=True, text=True, check=True)
        return done.stdout

    found = speakable(text)
    assert isinstance(found, Spoken)
    assert misread in phones(text) and misread not in phones(found.text)


def test_the_limits_are_limits() -> None:
    assert speakable("one two three", Limits(max_words=3)) == Spoken("one two three.")
    assert speakable("one two three four", Limits(max_words=3)) == Dropped("long", "4 words; 3 are the limit")
    assert isinstance(speakable("🐈🐕🐎🐖 animals", Limits(max_emoji=4)), Spoken)
    assert isinstance(speakable("| a |\n|---|\n| 1 |\n| 2 |", Limits(max_cells=1)), Dropped)
    assert speakable("3/4/2025", Limits(day_first=True)) == Spoken("April third, twenty twenty-five.")
    assert speakable("3/4/2025") == Spoken("March fourth, twenty twenty-five.")


PIECES = st.sampled_from(
    [
        *"0123456789$%*_`#[](){}<>|/\\^~@&+=-–—.,;:!?'\"…°½²é 你😀\n\t\u200d\ufe0f",
        *("1,000", "12/25/2024", "3:05 pm", "5 kg", "FBI", "NASA", "Dr.", "e.g.", "http://", "a@b.com", "**", "```"),
        *("| a |", "|---|", "IV", "Charles I", "&amp;", "<b>", "St.", "etc.", "mp3", "CPUs", "I", "the", "Chapter"),
        *("w/o", "No.", "p.m.", "'80s", "->", "and/or", "1990s", " import x", "Main", "vs", ":)", "May", "Mar. ", "x"),
    ]
)
ALPHABET = set(string.ascii_letters + " .,?!;:'-")


def check(text: str) -> None:
    found = speakable(text)
    if isinstance(found, Dropped):
        assert found.reason and "\n" not in found.detail
        return
    assert set(found.text) <= ALPHABET
    assert found.text[0] in string.ascii_letters and found.text[-1] in ".?!;"
    assert re.search(r"[.,?!;:]{2}|  | [.,?!;:]", found.text) is None
    assert speakable(found.text) == found


@given(st.lists(PIECES, max_size=25).map("".join))
@settings(max_examples=400, deadline=None)
def test_pieces_of_trouble_stay_within_the_alphabet_and_are_stable(text: str) -> None:
    check(text)


@given(st.text(max_size=120))
@settings(max_examples=300, deadline=None)
def test_any_text_stays_within_the_alphabet_and_is_stable(text: str) -> None:
    check(text)


TROUBLE = (
    *(
        "a",
        "1",
        "-",
        "*",
        "_",
        "[",
        "(",
        "<a ",
        "1,",
        "1.",
        "1-",
        "a.",
        "| ",
        "A",
        "http://",
        "@",
        "`",
        "\\",
        "$1",
        "😀",
    ),
    *("\n", "9/", "- ", "1:", "&", "a*b ", "[a](", "**a", "12:3", "Dr.", "#", "x^", "> ", "w/", "|-", " a_", "1 "),
)


@pytest.mark.parametrize("piece", TROUBLE)
def test_no_text_takes_long(piece: str) -> None:
    from anyglot_synth.speakable.text import MAX_CHARACTERS

    for length in (MAX_CHARACTERS, 100_000):
        text = (piece * length)[:length]
        start = time.process_time()
        speakable(text)
        speakable(f"[{text}")
        assert time.process_time() - start < 2.0


def test_numbers_read_back() -> None:
    words = {n.cardinal(i): i for i in range(2000)}
    assert len(words) == 2000
    assert n.cardinal(10**15 - 1).startswith("nine hundred ninety-nine trillion")
    assert n.cardinal(10**15) == "one " + " ".join(["zero"] * 15)
    said = "first second third fifth eighth ninth twelfth twentieth twenty-first fortieth one~hundredth"
    assert " ".join(n.ordinal(i).replace(" ", "~") for i in (1, 2, 3, 5, 8, 9, 12, 20, 21, 40, 100)) == said
    assert [n.year(y) for y in (1100, 1999, 2000, 2009, 2010, 2100)] == [
        "eleven hundred",
        "nineteen ninety-nine",
        "two thousand",
        "two thousand nine",
        "twenty ten",
        "two thousand one hundred",
    ]
    assert all(n.roman(n.to_roman(i)) == i for i in range(1, 4000))
    assert n.roman("IIII") is None and n.roman("") is None and n.roman("IC") is None


def spoken_item(*texts: str, language: str = "en") -> Item:
    parts = tuple(Part("speech", text) for text in texts)
    return Item(
        0, Dialogue((Turn("user", parts), Turn("assistant", (Part("text", "`x`"),))), "test", language=language)
    )


def test_the_stage_keeps_both_texts(tmp_path) -> None:
    done = SpeakableStage()(spoken_item("I paid $5."), Store(tmp_path))
    assert done.status == OK
    asked, answer = done.dialogue.turns
    assert asked.parts[0] == Part("speech", "I paid $5.", "I paid five dollars.")
    assert answer.parts[0] == Part("text", "`x`")
    assert done.facts == {"spoken_words": [4]}


def test_the_stage_ends_what_should_not_be_said_or_shows_it(tmp_path) -> None:
    item = spoken_item("Hello", "```\ncode\n```")
    ended = SpeakableStage()(item, Store(tmp_path))
    assert (ended.status, ended.stage, ended.reason) == (FILTERED, "speakable", "code")
    shown = SpeakableStage(unspeakable="text")(item, Store(tmp_path))
    assert shown.status == OK and shown.dialogue.turns[0].parts[1] == Part("text", "```\ncode\n```")
    assert shown.facts["shown"] == ["code"]
    foreign = SpeakableStage()(spoken_item("Guten Tag", language="de"), Store(tmp_path))
    assert foreign.reason == "language"
    with pytest.raises(AnyglotError, match="unspeakable is 'drop'; use one of: filter, text"):
        SpeakableStage(unspeakable="drop")


def test_what_is_shown_is_shown_once(tmp_path) -> None:
    code = "```\ncode\n```"

    def shown(asked: list[str], answer: str) -> list[list[tuple[str, str]]]:
        said = Turn("user", tuple(Part("text", text) for text in asked)), Turn("assistant", (Part("text", answer),))
        chain = in_form(Dialogue(said, "s"), "chain")
        done = SpeakableStage(unspeakable="text")(Item(0, chain), Store(tmp_path))
        done.dialogue.check()
        return [[(part.modality, part.text) for part in turn.parts] for turn in done.dialogue.turns]

    assert shown(["Write it."], code) == [[("speech", "Write it.")], [("text", "Write it."), ("text", code)]]
    assert shown([code], "Nice.") == [[("text", code)], [("text", "Nice."), ("speech", "Nice.")]]
    assert shown(["What is it?", code], "Code.") == [
        [("speech", "What is it?"), ("text", code)],
        [("text", "What is it?"), ("text", "Code."), ("speech", "Code.")],
    ]


def test_only_what_is_written_word_by_word_is_not_shown_again(tmp_path) -> None:
    code = "```\ncode\n```"

    def shown(turn: Turn, form: str = "text", **meta: object) -> list[str]:
        asked = Turn("user", (Part("text", "Show it."),))
        item = Item(0, in_form(Dialogue((asked, turn), "s", meta=meta), form))
        done = SpeakableStage(unspeakable="text")(item, Store(tmp_path))
        return [part.text for part in done.dialogue.turns[1].parts]

    inside = f"It is not {code} but another."
    assert shown(Turn("assistant", (Part("text", inside), Part("speech", code)))) == [inside, code]
    answer = Turn("assistant", (Part("text", "Run"), Part("text", "A sign."), Part("text", code)))
    assert shown(answer, "chain", written=[[1, 1]]) == ["Show it.", "Run", "A sign.", code]
