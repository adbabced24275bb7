"""Sums as they are written -> `-` as "minus", `/` as "over", where it is clear that they are no range or fraction.

Numbers and single letters with signs between them are a sum if there is a `=`, a `+` or the like, or if `-` follows
`x`, `2x` or `(n`. So 9-5, 3/4 and 12-7 alone, 90-100 = A, T-1, F-16 and dates stay as they are. Numbers and other signs
are said by `quantities.py` and `words.py`. So are those of 6.6e-34, which is 6.6 times 10 to the power of minus 34.
"""

from __future__ import annotations

import re

Match = re.Match[str]

_NUMBER = r"[$€£]?(?:0|[1-9]\d{0,2}(?:,\d{3}){1,4}|[1-9]\d{0,14})(?:\.\d{1,9})?[a-z%]?"
_TERM = rf"\({{0,3}}-?(?:{_NUMBER}|[A-Za-z])(?!\w|[.,]\d)!?\){{0,3}}!?"
_SIGN = r"(?:[ ]?(?:[<>!=]=|[-–+*/×÷=<>≤≥≠^])[ ]?|(?<=\))(?=\())"
_SUM = re.compile(
    rf"(?<![\w.,:/@#&$€£–-])(?<!\d ){_TERM}(?:{_SIGN}{_TERM}){{1,24}}(?![-–/:]\w)(?:[ ]?=(?=[ ]?(?:[?_]|$)))?"
)
_CERTAIN = re.compile(r"[+*×÷^]")
_UNKNOWN = re.compile(r"(?:(?<!\w)[xyz]|\d[nxyz])-\d{1,15}(?!\w)|\(n-\d(?!\w)")
_SIZES = re.compile(r"\d+([×^])\d+[-–]\d+\1\d+")  # 5×7-8×10 and 10^2-10^3 are ranges
_MINUS = re.compile(r"(?<=[\w)%!])[ ]?[-–][ ]?")
_OVER = re.compile(r"([\w.,%)!]+)([ ]?/[ ]?)(?=(\(?-?[\w.,]+))")
_SCIENTIFIC = re.compile(r"(?<![\w.,])(\d{1,20}(?:\.\d{1,20})?)([eE])([+-]?)(\d{1,3})(?!\w|\.\d)")


def arithmetic(text: str) -> str:
    """The text with the signs of its sums said that could be misread; linear in the text."""
    text = _SCIENTIFIC.sub(_scientific, text)
    return _SUM.sub(_sum, text) if re.search("[-–/]", text) else text


def _scientific(m: Match) -> str:
    number, mark, sign, power = m.groups()
    if not sign and "." not in number and (mark == "E" or len(number + power) > 4):
        return m[0]  # room 3E5, a commit 719483e547
    return f"{number} times 10 to the power of {'minus ' if sign == '-' else ''}{int(power)}"


def _sum(m: Match) -> str:
    found = m[0]
    equal = re.search("[=<>≤≥≠]", found)
    certain = bool(_CERTAIN.search(found))
    if not (equal or certain or _UNKNOWN.search(found)) or re.search(r"\w/\w+/\w", found) or _SIZES.fullmatch(found):
        return found

    def minus(sign: Match) -> str:
        before, after = found[: sign.start()], found[sign.end() :]
        if re.fullmatch(r"[A-Z]-[A-Z\d]|\d-[A-Z]", before[-1:] + sign[0] + after[:1]):
            return sign[0]  # F-16, 3-D, A-Z
        first, second = re.search(r"(?<![\w.])\d{1,15}$", before), re.match(r"\d{1,15}(?![\w.,])", after)
        rising = first and second and int(first[0]) < int(second[0])
        return sign[0] if rising and not certain and not re.search(r"=[ ]?-", after) else " minus "  # 90-100 = A

    return _OVER.sub(_over, _MINUS.sub(minus, found))


def _over(m: Match) -> str:
    top, sign, bottom = m.groups()
    if top.isdigit() and bottom.isdigit() and int(top) < int(bottom) and sign == "/":
        return m[0]  # 1/2
    return m[0] if len(top) == len(bottom) == 1 and (top + bottom).isalpha() else f"{top} over "  # m/s
