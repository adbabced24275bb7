"""Numbers as English words (American: no "and"), from whole numbers and strings of digits, without their context."""

from __future__ import annotations

import re

_SMALL = tuple(
    re.findall(
        r"\w+",
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen",
    )
)
_TENS = tuple(re.findall(r"\w+", "zero ten twenty thirty forty fifty sixty seventy eighty ninety"))
_SCALES = ("", "thousand", "million", "billion", "trillion")
_IRREGULAR = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
LARGEST = 10**15 - 1
"""The largest number that is said as one; longer ones are said digit by digit."""


def cardinal(number: int) -> str:
    """`-21` -> "minus twenty-one". From -LARGEST to LARGEST; beyond, digit by digit."""
    if number < 0:
        return f"minus {cardinal(-number)}"
    if number > LARGEST:
        return digits(str(number))
    if number < 20:
        return _SMALL[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return _TENS[ten] + (f"-{_SMALL[one]}" if one else "")
    if number < 1000:
        hundred, rest = divmod(number, 100)
        return f"{_SMALL[hundred]} hundred" + (f" {cardinal(rest)}" if rest else "")
    groups: list[str] = []
    scale = 0
    while number:
        number, group = divmod(number, 1000)
        if group:
            groups.append(f"{cardinal(group)} {_SCALES[scale]}".strip())
        scale += 1
    return " ".join(reversed(groups))


def ordinal(number: int) -> str:
    """`21` -> "twenty-first"."""
    return ordinal_words(cardinal(number))


def ordinal_words(words: str) -> str:
    """ "twenty-one" -> "twenty-first": the last word of a cardinal made ordinal."""
    head, mark, last = words[: _last(words)], "", words[_last(words) :]
    if last in _IRREGULAR:
        return head + mark + _IRREGULAR[last]
    return head + (last[:-1] + "ieth" if last.endswith("y") else f"{last}th")


def _last(words: str) -> int:
    return max(words.rfind(" "), words.rfind("-")) + 1


def year(number: int) -> str:
    """1905 -> "nineteen oh five", 2000 -> "two thousand", 2024 -> "twenty twenty-four"; others as a cardinal."""
    if not 1100 <= number <= 2099 or 2000 <= number <= 2009:
        return cardinal(number)
    century, rest = divmod(number, 100)
    if not rest:
        return f"{cardinal(century)} hundred"
    return f"{cardinal(century)} {'oh ' if rest < 10 else ''}{cardinal(rest)}"


def digits(text: str) -> str:
    """ "907" -> "nine zero seven"; what is no digit is left out."""
    return " ".join(_SMALL[int(character)] for character in text if character in "0123456789")


def plural(words: str) -> str:
    """ "nineteen ninety" -> "nineteen nineties", "six" -> "sixes"."""
    if words.endswith("y"):
        return f"{words[:-1]}ies"
    return words + ("es" if words.endswith(("x", "s", "ch", "sh")) else "s")


def decimal(text: str) -> str:
    """ "-1,234.50" -> "minus one thousand two hundred thirty-four point five zero": as many decimals as written.

    Args:
        text: ASCII digits with optional sign, thousands separators `,` and one `.`.
    """
    sign = "minus " if text.startswith("-") else ""
    whole, dot, fraction = text.lstrip("+-").replace(",", "").partition(".")
    said = digits(whole) if len(whole) > 1 and whole.startswith("0") else cardinal(int(whole or "0"))
    return sign + said + (f" point {digits(fraction)}" if dot and fraction else "")


def fraction(top: int, bottom: int) -> str:
    """`3, 4` -> "three quarters"; denominators from 2 to 20 and 100 by name, others as "a over b"."""
    if bottom not in range(2, 21) and bottom != 100:
        return f"{cardinal(top)} over {cardinal(bottom)}"
    name = {2: "half", 4: "quarter", 100: "hundredth"}.get(bottom) or ordinal(bottom)
    return f"{cardinal(top)} {name if top == 1 else 'halves' if bottom == 2 else name + 's'}"


def roman(text: str) -> int | None:
    """`"XIV"` -> 14; None unless it is a numeral in its usual form."""
    total, rest = 0, text
    for value, letters in _ROMAN:
        while rest.startswith(letters):
            total, rest = total + value, rest[len(letters) :]
    return total if total and not rest and to_roman(total) == text else None


def to_roman(number: int) -> str:
    """Inverse of `roman`, for 1 to 3999."""
    found = ""
    for value, letters in _ROMAN:
        count, number = divmod(number, value)
        found += letters * count
    return found


_ROMAN = (
    (1000, "M"),
    (900, "CM"),
    (500, "D"),
    (400, "CD"),
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
    (1, "I"),
)
