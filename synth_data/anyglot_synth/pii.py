"""Personal data in text, by pattern and by checksum: what can be told from plain numbers and dates.

| kind | what counts | what does not |
|---|---|---|
| `email` | an address with a domain | domains that cannot be: example.com, .test, .invalid, ... (RFC 2606) |
| `phone` | `+` and 8 to 15 digits; North American ones with separators, after "call" also spaces | fictional, dates |
| `card` | 13 to 19 digits that a card network uses, Luhn's checksum right, also before a date or a code | others |
| `iban` | a country's two letters, its length where it is known, and a right checksum (ISO 7064) | other codes |
| `ip` | an address of the public internet, IPv4 or IPv6 | private, loopback and documentation addresses, versions |
| `ssn` | a US social security number with hyphens, of a range that is issued | dates, part numbers |

Names and street addresses are not looked for: patterns find too many that are none. Numbers in words are not either, so
look at a text before it is made speakable. Patterns are written to take linear time on any text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}+@((?:[A-Za-z0-9-]{1,63}+\.){1,8}[A-Za-z]{2,24})(?![A-Za-z0-9-])"
)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d(?:[ .()/-]{0,2}\d){7,14}+"
    r"|(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])([2-9]\d\d)[ .-](\d{4}))(?!\w|[.-]\d)"
)
_PHONE_AFTER_WORD = re.compile(  # three numbers are many things
    r"(?i:\b(?:call|dial|phone|telephone|tel|fax|mobile|cell|text)(?: (?:me|us|him|her|them))?"
    r"(?: (?:at|on|is|number))*[.:]? )(?P<all>(?:1 )?[2-9]\d\d ([2-9]\d\d)[ .-](\d{4}))(?!\w|[.-]\d)"
)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}+(?!\w|[.-]\d)")
_CARD_AMONG_DIGITS = re.compile(  # a date or a code may come after it: as cards are printed
    r"(?<![\w.-])(?=(?P<all>\d{13,19}+|\d{4}([ -])\d{4}\2\d{4}\2\d{4}|\d{4}([ -])\d{6}\3\d{4,5}+)(?!\w|[.-]\d))"
)
_IBAN_LENGTHS = {  # of the registry of ISO 13616
    15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
}  # fmt: skip
_KNOWN = "|".join(
    rf"(?:{lands.replace(' ', '|')})\d\d(?: ?[A-Z0-9]){{{length - 4}}}" for length, lands in _IBAN_LENGTHS.items()
)
_IBAN = re.compile(rf"(?<!\w)(?=(?P<all>{_KNOWN}|[A-Z]{{2}}\d\d(?: ?[A-Z0-9]){{11,30}}+)(?!\w))")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}+(?:\.\d{1,3}+){3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{3,39}+(?![\w:])")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")
_RESERVED = (".test", ".example", ".invalid", ".localhost")
_NETWORKS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|"
    r"3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)


@dataclass(frozen=True)
class Found:
    """Something personal in a text: its kind and where it stands (`text[start:end]`)."""

    kind: str
    start: int
    end: int


def luhn(digits: str) -> bool:
    """Luhn's checksum (ISO/IEC 7812) of a number with its check digit."""
    doubled = [int(digit) * (2 if i % 2 else 1) for i, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def iban_checksum(code: str) -> bool:
    """ISO 13616: the first four letters moved to the end, letters as numbers from A = 10, modulo 97 is 1."""
    return int("".join(str(int(letter, 36)) for letter in code[4:] + code[:4])) % 97 == 1


def _email(found: re.Match[str]) -> bool:
    domain = found[1].lower()
    return not (domain.endswith(_RESERVED) or re.fullmatch(r"(?:.*\.)?example\.(?:com|org|net)", domain))


def _phone(found: re.Match[str]) -> bool:
    exchange, line = found.groups()[-2:]
    return not (exchange == "555" and line.startswith("01"))


def _card(found: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", found[_group(found)])
    return bool(_NETWORKS.fullmatch(digits)) and luhn(digits)


def _ipv4(found: re.Match[str]) -> bool:
    """Public; four single digits are a version more often than an address."""
    try:
        address = ipaddress.IPv4Address(found[0])
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and any(len(part) > 1 for part in found[0].split("."))


def _ipv6(found: re.Match[str]) -> bool:
    """Of the block that is given out (2000::/3); `a::b` is code."""
    try:
        address = ipaddress.IPv6Address(found[0].removesuffix(":") if not found[0].endswith("::") else found[0])
    except ValueError:
        return False
    return address.is_global and int(address) >> 125 == 1


_KINDS: dict[str, list[tuple[re.Pattern[str], Callable[[re.Match[str]], bool]]]] = {
    "email": [(_EMAIL, _email)],
    "iban": [(_IBAN, lambda found: iban_checksum(found["all"].replace(" ", "")))],
    "card": [(_CARD, _card), (_CARD_AMONG_DIGITS, _card)],
    "ssn": [(_SSN, lambda _: True)],
    "ip": [(_IPV4, _ipv4), (_IPV6, _ipv6)],
    "phone": [(_PHONE, _phone), (_PHONE_AFTER_WORD, _phone)],
}
KINDS = tuple(_KINDS)


def find(text: str, kinds: tuple[str, ...] = KINDS) -> Iterator[Found]:
    """Everything of these kinds, kind by kind."""
    for kind in kinds:
        starts: set[int] = set()
        for pattern, right in _KINDS[kind]:
            for found in pattern.finditer(text):
                if found.start() not in starts and right(found):
                    starts.add(found.start())
                    yield Found(kind, *found.span(_group(found)))


def _group(found: re.Match[str]) -> str | int:
    """What of a match is meant: patterns that look ahead, so that the next may begin inside, call it `all`."""
    return "all" if "all" in found.re.groupindex else 0
