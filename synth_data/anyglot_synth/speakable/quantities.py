"""What has digits in it -> words: money, dates, times, telephone numbers, units, ranges, fractions, years, codes.

One ordered list of patterns, each linear in the text: a number is bounded in length and begins where no digit is
before it. Months come first in 12/25/2024 unless `day_first`; 25/12/2024 can only be the 25th.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from anyglot_synth.speakable import numbers as n

Match = re.Match[str]
_NUM = r"(?:\d{1,3}(?:,\d{3}){1,5}|\d{1,20})(?:\.\d{1,20})?"
_START = r"(?<![\w.])(?<!\d,)"
_PART = r"(?<![\w/.,])(?:(\d{1,6})[ ])?(\d{1,6})/(\d{1,6})"
_SIGNED = r"(?:(?<![\w)\d])-)?" + _NUM

MONTHS = tuple(
    re.findall(r"\w+", "January February March April May June July August September October November December")
)
_MONTH = r"(?:" + "|".join(f"{m[:3]}(?:{m[3:]})?" if m != "May" else "May" for m in MONTHS) + r"|Sept)\.?"

_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "US$": ("dollar", "dollars", "cent", "cents"),
    "USD": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "EUR": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "GBP": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "", ""),
    "JPY": ("yen", "yen", "", ""),
    "₹": ("rupee", "rupees", "paisa", "paise"),
    "INR": ("rupee", "rupees", "paisa", "paise"),
}
_CURRENCY = r"(?:US\$|USD|EUR|GBP|JPY|INR|[$€£¥₹])"
_SCALES = {"k": "thousand", "m": "million", "mn": "million", "b": "billion", "bn": "billion", "t": "trillion"}
_SCALE = r"(?:(?:\s(?:thousand|million|billion|trillion)|[ ]?(?:[kKMBT]|bn|mn|m))\b)"

_PLAIN_SCALE = r"(?:\s(?:thousand|million|billion|trillion)|[kKM]|bn|mn|(?<=\.\d)[BT]|(?<=\.\d\d)[BT])"

_AMOUNT = (
    rf"{_CURRENCY}[ ]?\d|{_NUM}(?:{_SCALE}?[ ]?{_CURRENCY}|{_PLAIN_SCALE})(?!\w)|"
    r"(?:\d{1,6}[ ])?\d{1,6}/\d{1,6}(?![\d/])"
)
"""Before which a minus is said: other numbers have it said with them."""

_UNITS = {
    "%": ("percent", "percent"),
    "°C": ("degree Celsius", "degrees Celsius"),
    "°F": ("degree Fahrenheit", "degrees Fahrenheit"),
    "°": ("degree", "degrees"),
    "km/h": ("kilometer per hour", "kilometers per hour"),
    "kph": ("kilometer per hour", "kilometers per hour"),
    "mph": ("mile per hour", "miles per hour"),
    "m/s": ("meter per second", "meters per second"),
    "sqkm": ("square kilometer", "square kilometers"),
    "sqm": ("square meter", "square meters"),
    "sqcm": ("square centimeter", "square centimeters"),
    "sqmm": ("square millimeter", "square millimeters"),
    "sqft": ("square foot", "square feet"),
    "cukm": ("cubic kilometer", "cubic kilometers"),
    "cum": ("cubic meter", "cubic meters"),
    "cucm": ("cubic centimeter", "cubic centimeters"),
    "cumm": ("cubic millimeter", "cubic millimeters"),
    "cuft": ("cubic foot", "cubic feet"),
    "km": ("kilometer", "kilometers"),
    "m": ("meter", "meters"),
    "cm": ("centimeter", "centimeters"),
    "mm": ("millimeter", "millimeters"),
    "nm": ("nanometer", "nanometers"),
    "mi": ("mile", "miles"),
    "ft": ("foot", "feet"),
    "yd": ("yard", "yards"),
    "kg": ("kilogram", "kilograms"),
    "g": ("gram", "grams"),
    "mg": ("milligram", "milligrams"),
    "lb": ("pound", "pounds"),
    "lbs": ("pound", "pounds"),
    "oz": ("ounce", "ounces"),
    "L": ("liter", "liters"),
    "l": ("liter", "liters"),
    "ml": ("milliliter", "milliliters"),
    "mL": ("milliliter", "milliliters"),
    "tbsp": ("tablespoon", "tablespoons"),
    "tsp": ("teaspoon", "teaspoons"),
    "h": ("hour", "hours"),
    "hr": ("hour", "hours"),
    "hrs": ("hour", "hours"),
    "min": ("minute", "minutes"),
    "mins": ("minute", "minutes"),
    "s": ("second", "seconds"),
    "sec": ("second", "seconds"),
    "secs": ("second", "seconds"),
    "ms": ("millisecond", "milliseconds"),
    "Hz": ("hertz", "hertz"),
    "kHz": ("kilohertz", "kilohertz"),
    "MHz": ("megahertz", "megahertz"),
    "GHz": ("gigahertz", "gigahertz"),
    "kB": ("kilobyte", "kilobytes"),
    "KB": ("kilobyte", "kilobytes"),
    "MB": ("megabyte", "megabytes"),
    "GB": ("gigabyte", "gigabytes"),
    "TB": ("terabyte", "terabytes"),
    "Mbps": ("megabit per second", "megabits per second"),
    "W": ("watt", "watts"),
    "kW": ("kilowatt", "kilowatts"),
    "kWh": ("kilowatt hour", "kilowatt hours"),
    "MW": ("megawatt", "megawatts"),
    "V": ("volt", "volts"),
    "mA": ("milliamp", "milliamps"),
    "J": ("joule", "joules"),
    "kJ": ("kilojoule", "kilojoules"),
    "cal": ("calorie", "calories"),
    "kcal": ("kilocalorie", "kilocalories"),
    "dB": ("decibel", "decibels"),
    "ha": ("hectare", "hectares"),
    "px": ("pixel", "pixels"),
}
_UNIT = "|".join(re.escape(unit) for unit in sorted(_UNITS, key=len, reverse=True))
_TELEPHONE = (
    r"(?<![\w-])(?:\+\d{1,3}(?:[ -]\(?\d{2,4}\)?){2,5}|"
    r"(?:\+?1[ -.])?(?:\(\d{3}\)[ ]?|\d{3}[-. ])\d{3}[-. ]\d{4})(?![\w-])"
)


def say_quantities(text: str, day_first: bool = False) -> str:
    """The text with everything that has digits said; letters around may change only where they belong to it."""
    if not any(character.isdigit() for character in text):
        return text
    for pattern, say in _rules(day_first):
        text = pattern.sub(say, text)
    return text


@cache
def _rules(day_first: bool) -> list[tuple[re.Pattern[str], Callable[[Match], str] | str]]:
    return [
        (re.compile(r"(?<![\w/.-])(\d{4})-(\d{2})-(\d{2})(?:T(?=\d{2}:))?(?![\w-])"), _iso_date),
        (re.compile(r"(?<![\w/.])(\d{1,2})/(\d{1,2})/(\d{4}|\d{2})(?![\w/])"), lambda m: _date(m, day_first)),
        (re.compile(r"(?<![\w/.])(\d{1,2})\.(\d{1,2})\.(\d{4})(?!\w|\.\d)"), lambda m: _date(m, True)),
        (
            re.compile(
                rf"\b({_MONTH})[ ](\d{{1,2}})(?:st|nd|rd|th)?(?:[ ]?[-–][ ]?(\d{{1,2}})(?:st|nd|rd|th)?)?"
                r"(?:(,)?[ ](\d{4})\b)?(?![\w:/%]|[.,]\d)"
            ),
            _month_day,
        ),
        (
            re.compile(rf"\b(\d{{1,2}})(?:st|nd|rd|th)?[ ](of[ ])?({_MONTH})(?:(,)?[ ](\d{{4}})\b)?(?![\w]|[.,]\d)"),
            _day_month,
        ),
        (re.compile(rf"\b({_MONTH})(,?[ ])(?=\d{{4}}\b)"), lambda m: month_name(m[1]) + m[2]),
        (
            re.compile(r"(?<![\w/.])(24/7|9/11|50/50)(?![\w/])"),
            lambda m: " ".join(n.cardinal(int(d)) for d in m[1].split("/")),
        ),
        (re.compile(r"(?<![\w:.])(\d{1,2}):(\d{2})(?::(\d{2}))?(?![\d:])(?:[ ]?([AaPp])\.?[ ]?[Mm]\b(\.)?)?"), _time),
        (re.compile(r"(?<![\w:.])(\d{1,2})[ ]?([AaPp])(?:\.[ ]?[Mm]\.|[Mm]\b)"), _hour),
        (re.compile(r"(?<![\w:])(\d{1,6}):(\d{1,6})(?![\w:])"), r"\1 to \2"),
        (re.compile(_TELEPHONE), lambda m: _groups(m[0])),
        (re.compile(r"(?i)(?<=call )\d{3}-\d{4}(?![\w-])|\b555-\d{4}(?![\w-])"), lambda m: _groups(m[0])),
        (re.compile(r"(?<![\w-])\d{1,20}(?:-\d{1,20}){3,10}(?![\w-])"), lambda m: _groups(m[0])),
        (re.compile(r"(?<=[\d%])(?:-|[ ]?[–—][ ]?)(?=[$€£¥]?\d)"), " to "),
        (re.compile(rf"(?<![\w)°%$€£¥₹/-])-(?={_AMOUNT})"), " minus "),  # before a sum, 5K or 1/2
        (re.compile(rf"(?<!\d)(?<!\d )({_CURRENCY})[ ]?-(?=\.?\d)"), r" minus \1"),
        (re.compile(rf"({_CURRENCY})[ ]?\.(?=\d)"), r"\g<1>0."),
        (re.compile(rf"({_CURRENCY})[ ]?({_NUM})({_SCALE})?(?![\w]|[.,]\d)"), lambda m: _money(m[1], m[2], m[3])),
        (re.compile(rf"{_START}({_NUM})({_SCALE})?[ ]?({_CURRENCY})(?![\w])"), lambda m: _money(m[3], m[1], m[2])),
        (re.compile(r"(?<!\w)(\d)[’']\s?(\d{1,2})[\"”](?!\w)"), lambda m: f"{_say(m[1])} foot {_say(m[2])}"),
        (re.compile(r"(?<![\w.:])(\d{1,2})h(\d{2})(?!\w)"), r"\1 hours \2"),
        (re.compile(r"(?i)\b((?:step|part|page|day) \d{1,4})/(?=\d)"), r"\1 of "),
        (re.compile(r"(?<![\w/.,])(\d{1,6}\.\d{1,6})/(?=\d{1,6}(?![\w/]|[.,]\d))"), r"\1 out of "),
        (re.compile(rf"{_PART}[ ]?({_UNIT})(?![\w^°/]|-\d)"), _unit_fraction),
        (re.compile(rf"(?<![A-Za-z\d./])(?<!\d,)({_SIGNED})[ ]?({_UNIT})(?![\w^°/]|-\d)"), _unit),
        (re.compile(rf"{_START}({_NUM})({_PLAIN_SCALE})(?!\w)"), _scaled),
        (re.compile(r"(?<![\w.,])(\d{1,3}(?:,\d{3}){1,4}|\d{1,15})(?:st|nd|rd|th)\b"), lambda m: n.ordinal(_int(m[1]))),
        (re.compile(r"(?<!\w)['’]?((?:\d\d)?\d0)['’]?s\b"), lambda m: n.plural(_decade(int(m[1])))),
        (re.compile(rf"{_PART}(?![\w/]|[.,]\d)"), _fraction),
        (re.compile(r"(?<![\w.])\d{1,9}(?:\.\d{1,9}){2,8}(?!\w|\.\d)"), lambda m: _version(m[0])),
        (re.compile(r"(?<=\d)[x×](?=\d)|(?<=\d)[ ]x[ ](?=\d)"), " by "),
        (re.compile(r"(?<=\d)x(?=[.,;:!?)](?!\w)|\s*$)"), _times),
        (re.compile(r"(?<=\d)(\.\d{1,20})x(?=[ ][=+*/<>-])"), r"\1 x"),
        (re.compile(r"(?<=\d)x(?=[ ](?!minus|times)[A-Za-z]{2})"), " times"),
        (re.compile(r"(?<=\d)[ ]-[ ](?=\d)|(?<![\w)])-[ ]?(?=\.?\d)"), " minus "),
        (re.compile(r"(?<![\w)])\+(?=\d)"), "plus "),
        (re.compile(r"#(?=\d)"), "number "),
        (re.compile(r"(?<![\w.,])(1[1-9]\d\d|20\d\d)(?![\w]|[.,]\d)"), lambda m: n.year(int(m[1]))),
        (re.compile(rf"{_START}{_NUM}(?![\w]|\.\d)"), lambda m: _say(m[0])),
        (re.compile(r"(?<![\w])\.(\d{1,20})(?!\w)"), lambda m: f"point {n.digits(m[1])}"),
        (
            re.compile(r"(?<![\w.])(\d{1,20}(?:\.\d{1,20}){1,8})([A-Za-z]{1,20})"),
            lambda m: f"{_version(m[1])} {_code(m[2])} ",
        ),
        (re.compile(r"[A-Za-z]*\d[A-Za-z\d]*"), lambda m: f" {_code(m[0])} "),
    ]


def month_name(text: str) -> str:
    """ "Sept." -> "September"."""
    return next(month for month in MONTHS if month.startswith(text[:3]))


def _int(text: str) -> int:
    return int(text.replace(",", ""))


def _say(text: str) -> str:
    """A number as it is written: long runs of digits that are no round number, one by one."""
    bare = text.lstrip("-")
    if bare.isdigit() and len(bare) > 9 and not bare.endswith("000"):
        return n.digits(bare)
    if bare.startswith("0") and len(bare) > 1 and bare.isdigit():
        return n.digits(bare)
    return n.decimal(text)


def _full_date(year: int, month: int, day: int) -> str | None:
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return None
    return f"{MONTHS[month - 1]} {n.ordinal(day)}, {n.year(year)}"


def _iso_date(m: Match) -> str:
    said = _full_date(int(m[1]), int(m[2]), int(m[3]))
    return f"{said} " if said and m[0].endswith("T") else said or m[0]


def _date(m: Match, day_first: bool) -> str:
    first, second, year = int(m[1]), int(m[2]), int(m[3])
    if len(m[3]) == 2:
        year += 2000 if year < 70 else 1900
    if first > 12 or (day_first and second <= 12):
        first, second = second, first
    return _full_date(year, first, second) or m[0]


def _month_day(m: Match) -> str:
    month, day, last, _comma, year = m.groups()
    if not 1 <= int(day) <= 31 or (last and not 1 <= int(last) <= 31):
        return m[0]
    said = f"{month_name(month)} {n.ordinal(int(day))}" + (f" to {n.ordinal(int(last))}" if last else "")
    return said + (f", {n.year(int(year))}" if year else "")


def _day_month(m: Match) -> str:
    day, of, month, _comma, year = m.groups()
    if not 1 <= int(day) <= 31:
        return m[0]
    stop = "." if month.endswith(".") and not year and len(month) > 4 else ""
    said = f"{n.ordinal(int(day))} of {month_name(month)}" if of else f"{n.ordinal(int(day))} {month_name(month)}"
    return said + (f", {n.year(int(year))}" if year else "") + stop


def _time(m: Match) -> str:
    hour, minute, second, half, dot = int(m[1]), int(m[2]), m[3], m[4], m[5]
    if hour > 24 or minute > 59 or (second and int(second) > 59):
        return m[0]
    if minute:
        said = f"{n.cardinal(hour)} {'oh ' if minute < 10 else ''}{n.cardinal(minute)}"
    elif half:
        said = n.cardinal(hour)
    else:
        said = f"{n.cardinal(hour)} o'clock" if 1 <= hour <= 12 else f"{n.cardinal(hour)} hundred"
    if second and int(second):
        said += f" and {n.cardinal(int(second))} second{'' if int(second) == 1 else 's'}"
    return said + (f" {half.upper()} M" if half else "") + _stop(m, bool(dot))


def _hour(m: Match) -> str:
    if not 0 <= int(m[1]) <= 24:
        return m[0]
    return f"{n.cardinal(int(m[1]))} {m[2].upper()} M" + _stop(m, m[0].endswith("."))


def _stop(m: Match, dot: bool) -> str:
    """A full stop where an abbreviation's dot also ends a sentence."""
    return "." if dot and re.match(r"\s*$|\s+[A-Z]", m.string[m.end() :][:8]) else ""


def _groups(text: str) -> str:
    """Digits one by one, a comma between groups."""
    plus = "plus " if text.startswith("+") else ""
    return plus + ", ".join(n.digits(group) for group in re.findall(r"\d+", text))


def _money(sign: str, amount: str, scale: str | None) -> str:
    one, many, cent, cents = _CURRENCIES[sign]
    if scale:
        word = scale.strip()
        return f"{n.decimal(amount)} {_SCALES.get(word.lower(), word)} {many}"
    whole, _, rest = amount.partition(".")
    if not rest or (len(rest) == 2 and cent and not int(rest)):
        return f"{n.decimal(whole)} {one if _int(whole) == 1 else many}"
    if len(rest) != 2 or not cent:
        return f"{n.decimal(amount)} {many}"
    small = f"{n.cardinal(int(rest))} {cent if int(rest) == 1 else cents}"
    return f"{n.decimal(whole)} {one if _int(whole) == 1 else many} and {small}" if _int(whole) else small


_ALGEBRA = re.compile(
    r"[=+*^<>]|\b(?i:simplify|solve|expand|factor|evaluate|differentiate|integrate|plot|terms?|what is)\b"
)


def _times(m: Match) -> str:
    """ "3x" at the end is three times, but in "y = 3x" and "Simplify 3x"."""
    return " x" if _ALGEBRA.search(m.string[max(0, m.start() - 20) : m.start()]) else " times"


def _unit(m: Match) -> str:
    one, many = _UNITS[m[2]]
    if m[2] == "s" and re.fullmatch(r"(?:\d{2})?\d0", m[1]) and " " not in m[0]:
        return m[0]  # the 1990s, the 20s
    return f"{_say(m[1])} {one if m[1] == '1' else many}"


def _unit_fraction(m: Match) -> str:
    one, many = _UNITS[m[4]]
    return f"{_fraction(m)} {many if m[1] or int(m[2]) > int(m[3]) else one if m[4] in '%°' else 'of a ' + one}"


def _scaled(m: Match) -> str:
    scale = m[2].strip()
    if scale == "K" and m[1] in ("2", "4", "8"):
        return f"{_say(m[1])} K"  # of pictures
    return f"{n.decimal(m[1])} {_SCALES.get(scale.lower(), scale)}"


def _decade(number: int) -> str:
    return n.year(number) if number >= 1000 else n.cardinal(number)


def _fraction(m: Match) -> str:
    whole, top, bottom = m[1], int(m[2]), int(m[3])
    if whole:
        part = (
            "a half" if (top, bottom) == (1, 2) else "a quarter" if (top, bottom) == (1, 4) else n.fraction(top, bottom)
        )
        return f"{n.cardinal(int(whole))} and {part}"
    return n.fraction(top, bottom)


def _version(text: str) -> str:
    return " point ".join(_say(part) for part in text.split("."))


def _code(token: str) -> str:
    """`mp3`, `H2O`, `B2B`: letters that are no word one by one, digits as a number where it is short."""
    said = []
    for run in re.findall(r"[A-Za-z]+|\d+", token):
        if run.isdigit():
            short = len(run) <= 3 and not run.startswith("0")
            said.append(n.cardinal(int(run)) if short else n.year(int(run)) if _is_year(run) else n.digits(run))
        elif len(run) == 1 or (len(run) <= 4 and (run.isupper() or not re.search(r"[aeiouy]", run.lower()))):
            said.append(" ".join(run.upper()))
        else:
            said.append(run)
    return " ".join(said)


def _is_year(run: str) -> bool:
    return len(run) == 4 and "1100" <= run <= "2099"
