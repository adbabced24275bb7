"""Everything else that is no plain word -> words: addresses, emoji, abbreviations, acronyms, symbols, Roman numerals.

Each function takes and gives text and is linear in it. The lists are short on purpose: an entry is here because voices
read it wrong. Numbers are said by `quantities.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from anyglot_synth.speakable import numbers as n

Match = re.Match[str]


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- characters ---

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("‘’‛′ʼ´", "'"),
        **dict.fromkeys("“”„‟«»″", '"'),
        **dict.fromkeys("‐‑‒−⁃", "-"),
        "—": " — ",
        "―": " — ",
        "⁄": "/",
        "…": "...",
        **dict.fromkeys("™®†‡¶", " "),
        "№": "No. ",
        "©": " copyright ",
        "·": " ",
        "µ": "μ",
        **{c: " " + unicodedata.normalize("NFKC", c).replace("⁄", "/") for c in "½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"},
    }
)
_RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_POWER = re.compile(
    r"(?<=[\w)\]])(?<![⁰¹²³⁴-⁹])(?<![^\W\d_]{2})⁻?[⁰¹²³⁴-⁹]+(?![⁰¹²³⁴-⁹⁄])|⁻[⁰¹²³⁴-⁹]+|(?<![⁰¹⁴-⁹⁻])[²³](?![⁰¹²³⁴-⁹⁄])"
)
"""Powers; after a word raised digits may be a note's: only squares, cubes and what has a minus are said there."""
_LETTERS = str.maketrans(
    {"ø": "o", "Ø": "O", "ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"}
    | {"ð": "th", "Ð": "Th", "þ": "th", "Þ": "Th", "ı": "i"}
)


def standard(text: str) -> str:
    """One spelling of quotes, dashes, digits, fractions and compatibility characters; no control characters."""
    text = _POWER.sub(lambda m: f"^{m[0].translate(_RAISED)}", text).translate(_CHARACTERS)
    if text.isascii():
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", " ", text)
    text = unicodedata.normalize("NFKC", text)
    found = []
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Nd":
            found.append(str(unicodedata.digit(character)))
        elif kind in ("Cc", "Zs", "Zl", "Zp"):
            found.append("\n" if character == "\n" else " ")
        elif kind not in ("Cf", "Cs", "Co", "Cn") or character in "\u200d":
            found.append(character)
    return "".join(found)


def fold(text: str) -> str:
    """Letters with accents -> without: "café" -> "cafe"."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKD", text.translate(_LETTERS))
    return "".join(character for character in text if not unicodedata.combining(character))


# --- emoji ---

_EMOTICONS = {
    ":)": "smiling face",
    ":-)": "smiling face",
    ":D": "grinning face",
    ":-D": "grinning face",
    ";)": "winking face",
    ";-)": "winking face",
    ":(": "sad face",
    ":-(": "sad face",
    ":P": "playful face",
    "<3": "heart",
}
_EMOTICON = re.compile(r"(?<!\S)(?:" + "|".join(map(re.escape, _EMOTICONS)) + r")(?![^\s.,!?])")
_JOINERS = "\u200d\ufe0f\ufe0e\u20e3"


def emoji(text: str) -> tuple[str, int]:
    """(the text with pictures named between commas, how many): one name for a run of the same picture."""
    text, count = _EMOTICON.subn(lambda m: f", {_EMOTICONS[m[0]]}, ", text)
    if text.isascii():
        return text, count
    found: list[str] = []
    last = ""
    joined = False  # by a joiner: a picture of several parts has the name of its first
    for character in text:
        code = ord(character)
        if character in _JOINERS or 0x1F3FB <= code <= 0x1F3FF or 0xE0020 <= code <= 0xE007F:
            joined = joined or character == "\u200d"
        elif 0x1F1E6 <= code <= 0x1F1FF or (unicodedata.category(character) == "So" and character not in "°"):
            name = "flag" if 0x1F1E6 <= code <= 0x1F1FF else _picture_name(character)
            if name != last and not joined:
                found.append(f", {name}, ")
                count += 1
            last, joined = name, False
        else:
            found.append(character)
            last, joined = last if character.isspace() else "", False
    return "".join(found), count


def _picture_name(character: str) -> str:
    name = unicodedata.name(character, "picture").lower()
    return re.sub(r"[^a-z ]+", " ", name.removesuffix(" sign").removesuffix(" symbol"))


# --- addresses ---

_TOP = "com|org|net|edu|gov|io|ai|co|uk|de|fr|eu|us|info|dev|app|me|tv|ca|au|ch|nl|se|it|es|jp|cn|in|biz"
_EMAIL = re.compile(r"(?<![\w.+-])([\w.+-]{1,64})@((?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24})\b")
_URL = re.compile(r"<?\b(?:https?|ftp)://([^\s<>\"]{1,2000})>?|(?<![\w.@/])(www\.[^\s<>\"]{1,2000})", re.I)
_DOMAIN = re.compile(
    rf"(?<![\w.@/-])((?:[A-Za-z0-9-]{{2,63}}\.){{1,4}}(?:{_TOP}))((?:/[\w.~-]{{0,80}}){{0,8}})(?![\w@-]|\.\w)"
)
_FILE = re.compile(r"(?<=[a-z0-9])\.(?=[a-z]{1,6}\b)(?![a-z]\.)")


def addresses(text: str) -> str:
    """E-mail addresses in full; of a URL its host, and its path where that is one or two plain words."""
    if "." not in text:
        return text
    if "@" in text:
        text = _EMAIL.sub(lambda m: f"{_spelled(m[1])} at {_spelled(m[2])}", text)
    text = _URL.sub(_url, text)
    text = _DOMAIN.sub(lambda m: _host(m[1], m[2]), text)
    return _FILE.sub(" dot ", text)


def _url(m: Match) -> str:
    whole = m[1] or m[2]
    bare = whole.rstrip(".,;:!?)'*_")
    host, _, path = bare.partition("/")
    host = host.rpartition("@")[2].partition(":")[0].partition("?")[0].partition("#")[0]
    return _host(host, f"/{path}" if path else "") + " " + re.sub(r"[^.,;:!?]", "", whole[len(bare) :])


def _host(host: str, path: str) -> str:
    words = path.strip("/").split("/") if path.strip("/") else []
    plain = len(words) <= 2 and all(re.fullmatch(r"[A-Za-z-]{1,24}", word) for word in words)
    return " slash ".join([_spelled(host.lower().removeprefix("www.")), *(words if plain else ())])


def _spelled(text: str) -> str:
    for mark, word in ((".", "dot"), ("_", "underscore"), ("-", "dash"), ("+", "plus")):
        text = text.replace(mark, f" {word} ")
    return text


# --- abbreviations ---

_ABBREVIATIONS = {
    "Dr.": "Doctor",
    "Mr.": "Mister",
    "Mrs.": "Missus",
    "Ms.": "Miz",
    "Prof.": "Professor",
    "Rev.": "Reverend",
    "Gen.": "General",
    "Sgt.": "Sergeant",
    "Capt.": "Captain",
    "Lt.": "Lieutenant",
    "Gov.": "Governor",
    "Sen.": "Senator",
    "Hon.": "Honorable",
    "Mt.": "Mount",
    "Ft.": "Fort",
    "Apt.": "Apartment",
    "Ave.": "Avenue",
    "Blvd.": "Boulevard",
    "Rd.": "Road",
    "e.g.": "for example",
    "i.e.": "that is",
    "cf.": "compare",
    "vs.": "versus",
    "viz.": "namely",
    "approx.": "approximately",
    "dept.": "department",
    "Dept.": "Department",
    "est.": "estimated",
    "incl.": "including",
    "max.": "maximum",
    "misc.": "miscellaneous",
    "et al.": "and others",
}
_MAY_END = {
    "etc.": "et cetera",
    "Etc.": "Et cetera",
    "Jr.": "Junior",
    "Sr.": "Senior",
    "Inc.": "Incorporated",
    "Ltd.": "Limited",
    "Corp.": "Corporation",
    "Co.": "Company",
    "Ph.D.": "P H D",
    "Bros.": "Brothers",
}
_ABBREVIATION = re.compile(
    r"(?<![\w.])(?:"
    + "|".join(map(re.escape, sorted([*_ABBREVIATIONS, *_MAY_END], key=len, reverse=True)))
    + r")(?!\w)"
)
_BEFORE_NUMBERS = {"No": "number", "no": "number", "Nos": "numbers", "Fig": "figure", "fig": "figure"}
_BEFORE_NUMBERS |= {"Figs": "figures", "Vol": "volume", "vol": "volume", "Ch": "chapter", "ch": "chapter"}
_BEFORE_NUMBERS |= {"Sec": "section", "Eq": "equation", "pp": "pages", "p": "page", "ca": "about", "v": "version"}
_BEFORE_NUMBER = re.compile(rf"(?<![\w.])({'|'.join(_BEFORE_NUMBERS)})\.[ ]?(?=\d)")
_INITIALS = re.compile(r"(?<![\w.])(?!(?<=\d )[AaPp]\.[Mm]\.)(?:[A-Za-z]\.){2,8}(?!\w)")
_SAINT = re.compile(r"\bSt\.(?=[ ][A-Z])")
_STREET = re.compile(r"(?<=[a-z] )St\.(?=[ ,.]|$)")
_BEFORE_STREET = re.compile(
    r"\w,? (?!(?:Mount|Mt|Port|Fort|Lake|Cape|Sault|East|West|North|South) )(?:[A-Z][\w'-]*|\d\w*) $"
)


def abbreviations(text: str) -> str:
    """ "Dr." -> "Doctor"; a dot that also ends the sentence stays."""
    text = (
        re.sub(r"(?<!\S)w/o\b", "without", re.sub(r"(?<!\S)w/[ ]?(?=\w)(?!o\b)", "with ", text))
        if "w/" in text
        else text
    )
    text = re.sub(r"\band/or\b", "and or", re.sub(r"\b([Vv])s\b(?!\.)", r"\1ersus", text))
    if "." not in text:
        return text
    text = _BEFORE_NUMBER.sub(lambda m: f"{_BEFORE_NUMBERS[m[1]]} ", text)
    text = _ABBREVIATION.sub(_abbreviation, text)
    text = _STREET.sub(_street, text)
    text = _SAINT.sub("Saint", text)
    return _INITIALS.sub(lambda m: " ".join(m[0].replace(".", "").upper()) + _stop(m, next_capital=False), text)


def _abbreviation(m: Match) -> str:
    return _ABBREVIATIONS[m[0]] if m[0] in _ABBREVIATIONS else _MAY_END[m[0]] + _stop(m)


def _street(m: Match) -> str:
    """Before a name a street only where it has one itself, within a sentence: "on Main St. We", not "in St. Louis"."""
    named = re.match(r" [A-Z]", m.string[m.end() : m.end() + 2])
    saint = named and not _BEFORE_STREET.search(m.string[max(0, m.start() - 40) : m.start()])
    return m[0] if saint else "Street" + _stop(m)


def _stop(m: Match, next_capital: bool = True) -> str:
    after = m.string[m.end() : m.end() + 40].lstrip(" \"')*")
    return "." if not after or after[0] == "\n" or (next_capital and after[0].isupper()) else ""


# --- Roman numerals ---

_COUNTED = "Chapter|Part|War|Act|Volume|Section|Phase|Type|Class|Book|Appendix|Article|Scene|Stage|Episode|Tier|Bowl"
_RULERS = (
    "Henry|Louis|Elizabeth|Charles|George|Edward|James|William|Richard|Philip|Napoleon|Frederick|Ferdinand|Francis|"
    "Nicholas|Alexander|Peter|Paul|Pius|Benedict|Leo|Innocent|Gregory|Clement|Urban|Otto|Ivan|Ramses|Ptolemy|Catherine"
)
_COUNTED_ROMAN = re.compile(rf"\b({_COUNTED})[ ]([IVXL]{{1,7}})\b(?![.']\w)")
_RULER_ROMAN = re.compile(rf"\b({_RULERS})[ ]([IVX]{{1,6}})\b(?![.']\w)")


def roman_numerals(text: str) -> str:
    """Only where they are clear: "Chapter IV" -> "Chapter four", "Henry VIII" -> "Henry the eighth"."""

    def is_me(m: Match) -> bool:  # "and then Charles I think", "the class I took"
        return m[2] == "I" and bool(re.match(r" (?!of\b)[a-z]", m.string[m.end() : m.end() + 4]))

    def counted(m: Match) -> str:
        number = n.roman(m[2])
        unclear = number is None or (is_me(m) and m[1] not in ("War", "Act", "Chapter", "Volume", "Phase"))
        return m[0] if number is None or unclear else f"{m[1]} {n.cardinal(number)}"

    def ruler(m: Match) -> str:
        number = n.roman(m[2])
        return m[0] if number is None or is_me(m) else f"{m[1]} the {n.ordinal(number)}"

    return _RULER_ROMAN.sub(ruler, _COUNTED_ROMAN.sub(counted, text))


# --- acronyms ---

_WORDS_IN_CAPITALS = _set(
    "AM AN AND ARE AS AT BE BUT BY CAN DO DID FOR GET GO GOT HAS HAD HE HER HIM HIS HOW IF IN IS ITS LET ME MY NO NOT "
    "NOW OF OFF OLD ON ONE OR OUR OUT OWN SEE SHE SO THE TO TOO TRY TWO UP USE WAS WAY WE WHO WHY YES YET YOU ALL ANY "
    "BIG DAY END NEW TOP RED HOT BAD ADD ASK MAY SAY RUN SET PUT RAY FAQ PIN SIM RAM ROM GIF HI OH MAN FUN WOW LOL "
    "STOP FREE BEST SALE NEXT"
)
_SAID = {"OK": "okay", "JSON": "Jason", "JPEG": "jay peg", "ASCII": "askey", "YAML": "yammel", "VS": "versus"}
_SPELLED = _set("IEEE USSR USDA UCLA NAACP UEFI IELTS AARP OECD IUPAC IATA AIIB")
_HUMMED = _set("hm hmm hmmm mm mmm sh shh shhh pst psst pfft tsk brr grr nth")
_MUTE = re.compile(r"(?<![A-Za-z'’-])[bcdfghjklmnpqrstvwxz]{2,5}(?![A-Za-z'’-])")
_ACRONYM = re.compile(r"(?<![A-Za-z])([A-Z]{2,24})('s|s)?(?![A-Za-z])")


def acronyms(text: str) -> str:
    """FBI -> "F B I", NASA -> "Nasa", pdf -> "P D F", DON'T SHOUT -> "don't shout".

    A word in capitals of four letters or more is said as a word where it looks like one, of three or fewer where it is
    a common one.
    """
    words = re.findall(r"[A-Za-z]{2,}", text)
    loud = sum(word.isupper() for word in words)
    if len(words) >= 4 and loud > 0.6 * len(words):
        text = re.sub(r"\bi\b", "I", text.lower())
    return _MUTE.sub(lambda m: m[0] if m[0] in _HUMMED else " ".join(m[0].upper()), _ACRONYM.sub(_acronym, text))


def _acronym(m: Match) -> str:
    word, end = m[1], m[2] or ""
    if word in _SAID:
        return _SAID[word] + end
    if word in _WORDS_IN_CAPITALS or (len(word) > 3 and word not in _SPELLED and pronounceable(word)):
        return (word.lower() if word in _WORDS_IN_CAPITALS else word.capitalize()) + end
    return " ".join(word) + ("'s" if end else "")


def pronounceable(word: str) -> bool:
    """Whether capitals look like a word: they have vowels, no long run of either kind, and a start that words have."""
    word = word.lower()
    if not re.search(r"[aeiouy]", word) or re.search(r"[^aeiouy]{4}|[aeiouy]{4}", word):
        return False
    start = re.match(r"[^aeiouy]*", word)
    cluster = start[0] if start else ""
    return len(cluster) < 2 or cluster in _STARTS


_STARTS = _set(
    "bl br ch cl cr dr dw fl fr gh gl gn gr kl kn kr ph pl pr ps rh sc sch scr sh shr sk sl sm sn sp spl spr sq st str "
    "sw th thr tr tw wh wr"
)

# --- symbols ---

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega"
)
_GREEK_LETTERS = {
    letter: f" {name} "
    for small, name in zip("αβγδεζηθικλμνξοπρστυφχψω", _GREEK.split(), strict=True)
    for letter in (small, small.upper())
}
_WORDS = {
    "+": "plus",
    "×": "times",
    "÷": "divided by",
    "=": "equals",
    "≠": "is not equal to",
    "≈": "is about",
    "≤": "is at most",
    "≥": "is at least",
    "<": "is less than",
    ">": "is greater than",
    "±": "plus or minus",
    "√": "the square root of",
    "∞": "infinity",
    "∑": "the sum of",
    "∏": "the product of",
    "∫": "the integral of",
    "∂": "partial",
    "∈": "in",
    "∀": "for all",
    "∃": "there is",
    "∅": "the empty set",
    "∴": "therefore",
    "→": "to",
    "←": "from",
    "↔": "to and from",
    "&": "and",
    "@": "at",
    "%": "percent",
    "°": "degrees",
    "§": "section",
    "/": "slash",
    "\\": "backslash",
    "$": "dollars",
    "€": "euros",
    "£": "pounds",
    "¥": "yen",
    "₹": "rupees",
    "¢": "cents",
}
_SYMBOLS = str.maketrans({mark: f" {word} " for mark, word in _WORDS.items()} | _GREEK_LETTERS)
_PER = "day|week|month|year|hour|minute|second|person|night|serving|item|user"
_COMPARISONS: tuple[tuple[re.Pattern[str], str | Callable[[Match], str]], ...] = (
    (re.compile(r"(?<![\w/~])~[ ]?(?=[$€£]?\d)"), "about "),
    (re.compile(r"(\d[ ]?(?:°[CF]|km|mi|m|cm|ft|kg|lbs?|g|oz|ml|L))/(?=\d)"), r"\1 or "),
    (
        re.compile(r"(?<=[\w%$€£.)])/(day|week|month|year|hour|minute|second|person|night|serving|item|user)\b"),
        r" per \1",
    ),
    (re.compile(r"(?<![\w/])km/h(?![\w/])"), "kilometers per hour"),
    (re.compile(r"(?<!\w)[nN]/[aA](?!\w)"), "not applicable"),
    (re.compile(r"\b([fgh])(')?\(([a-z])\)"), lambda m: f"{m[1]} {'prime ' if m[2] else ''}of {m[3]}"),
    (re.compile(r"(?<![\w-])([A-F])-(?![\w-])"), r"\1 minus"),
    (
        re.compile(r"(?<![\w&])([A-Z]{1,3})&([A-Z]{1,3})(?![\w&])"),
        lambda m: f"{' '.join(m[1])} and {' '.join(m[2])}",
    ),
    (re.compile(r"\bv(?=\d)"), "version "),
    (re.compile(r"<=>|<->"), " ↔ "),
    (re.compile(r"<="), " ≤ "),
    (re.compile(r">="), " ≥ "),
    (re.compile(r"!="), " ≠ "),
    (re.compile(r"={2,3}"), " = "),
    (re.compile(r"[-=]{1,2}>|➜|➔|⇒|⟶"), " → "),
    (re.compile(r"<-{1,2}(?=\s)"), " ← "),
    (re.compile(r"\b([Cc])\+\+"), r"\1 plus plus"),
    (re.compile(r"\b([CF])#"), r"\1 sharp"),
    (re.compile(r"(?<!\w)#(?=[A-Za-z])"), "hashtag "),
    (re.compile(r"(?<=\d)[ ]?(km|cm|mm|m|ft)\^2(?!\w)"), r" sq\1"),
    (re.compile(r"(?<=\d)[ ]?(km|cm|mm|m|ft)\^3(?!\w)"), r" cu\1"),
    (re.compile(r"\^2(?!\w)"), " squared "),
    (re.compile(r"\^3(?!\w)"), " cubed "),
    (re.compile(r"\^\(?(-?\w{1,8})\)?"), r" to the power of \1 "),
    (re.compile(r"(?<=[\w)])[ ]?\*[ ]?(?=[\w(])"), " times "),
    (re.compile(r"(?:(?<=\d[ap]m)|(?<=\d [ap]m))[ ]?[-–—][ ]?(?=\d)", re.I), " to "),
    (re.compile(r"(?<=[A-Za-z])-(?=\d)"), " "),
    (re.compile(r"(?<=[a-z)])[ ]-[ ](?=[a-z(\d][ =)])"), " minus "),
)


def comparisons(text: str) -> str:
    """Signs of several characters, before digits are said."""
    for pattern, said in _COMPARISONS:
        text = pattern.sub(said, text)
    return text


def symbols(text: str) -> str:
    """Signs of one character, after digits are said."""
    return text.translate(_SYMBOLS).replace("_", " ")
