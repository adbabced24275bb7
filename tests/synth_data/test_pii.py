"""Personal data: what is found, and what only looks like it."""

from __future__ import annotations

import time

import pytest

from anyglot_synth.pii import KINDS, find, iban_checksum, luhn


def kinds(text: str) -> list[str]:
    return [found.kind for found in find(text)]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "write to jane.doe+news@mail.firm.co.uk."),
        ("email", "<bob@firm.de>"),
        ("phone", "call +49 (0)30 1234-5678 now"),
        ("phone", "+14155552671"),
        ("phone", "my number is (415) 555-2671."),
        ("phone", "1-800-356-9377"),
        ("phone", "415.867.5309"),
        ("card", "pay with 4111 1111 1111 1111"),
        ("card", "5500-0000-0000-0004"),
        ("card", "378282246310005"),
        ("iban", "DE89 3704 0044 0532 0130 00"),
        ("iban", "IBAN: GB29NWBK60161331926819"),
        ("ip", "93.184.216.34"),
        ("ip", "at 2606:4700:4700::1111:"),
        ("ssn", "SSN 536-90-4399"),
    ],
)
def test_is_found_where_it_stands(kind: str, text: str) -> None:
    assert kinds(text) == [kind]
    (found,) = find(text)
    inside = text[found.start : found.end]
    assert inside in text and text.replace(inside, "") != text
    assert kinds(text.replace(inside, "")) == []


@pytest.mark.parametrize(
    ("kind", "inside", "text"),
    [
        ("card", "4111 1111 1111 1111", "Card {} 12/25."),
        ("card", "4111-1111-1111-1111", "Card {} 123"),
        ("card", "4111 1111 1111 1111", "Card {} 12 25 and more"),
        ("card", "4111111111111111", "Call 1 {} 12-25"),
        ("card", "3782 822463 10005", "number 12 {} 1234"),
        ("iban", "DE89 3704 0044 0532 0130 00", "My IBAN is {} I think."),
        ("iban", "DE89 3704 0044 0532 0130 00", "IBAN {} 2024-05-01"),
        ("iban", "DE89 3704 0044 0532 0130 00", "IBAN {} It is mine"),
        ("iban", "GB82 WEST 1234 5698 7654 32", "Send to {} BIC ABCD"),
        ("phone", "212 555 1234", "Call {} now"),
        ("phone", "1 212 555-1234", "text me at {}, please"),
    ],
)
def test_is_found_among_other_digits_and_capitals(kind: str, inside: str, text: str) -> None:
    (found,) = find(text.format(inside))
    assert (found.kind, text.format(inside)[found.start : found.end]) == (kind, inside)
    assert kinds(text.format("").replace("  ", " ")) == []


@pytest.mark.parametrize(
    "text",
    [
        "in 2024-12-25 and 12/25/2024 at 10:30:45",
        "1,234,567.89 and 1234567890123456",  # sixteen digits that no network uses
        "4111 1111 1111 1112",  # Luhn's checksum is wrong
        "ISBN 978-3-16-148410-0, EAN 4006381333931",
        "version 1.2.3.4 and 10.11.12.13, 192.168.0.1, 127.0.0.1, 203.0.113.7",  # private, documentation
        "version 8.8.8.8",  # an address too, but single digits are versions more often
        "999.300.1.12 and 1.2.3.4.5",
        "from 100-200-3000 to 555-0123, (555) 555-0123",
        "000-12-3456, 666-12-3456, 912-12-3456, 536-00-4399, 1536-90-4399",
        "user@localhost, me@example.com, a@mail.example.org, b@host.test",
        "DE88 3704 0044 0532 0130 00",  # checksum
        "DE89 3704 0044 0532 0130 0",  # too short for a German one
        "4111 1111 1111 1112 12/25, 14111-1111-1111-1111, 100 200 3000",
        "the ratio 16:9, the time 12:30:00, std::vector, a::b",
        "https://example.com/@name and @handle",
        "+3 and +12 34, 2+2=4, pi is 3.14159265358979",
        "order 12345-67-8901234, chapter 3.4.5",
        "phone me at 5551234 or dial 911",
        "coordinates 512 768 1024 pixels, dims 768 768 3072, rooms 201 302 4000, call 212 555 0123",
        "Mr. Smith, 12 Main Street, Springfield",  # names and addresses are left alone, by design
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert kinds(text) == []


def test_checksums() -> None:
    assert luhn("79927398713") and not any(luhn(f"7992739871{d}") for d in "012456789")
    assert iban_checksum("FR1420041010050500013M02606") and not iban_checksum("FR1420041010050500013M02607")


def test_only_the_kinds_asked_for() -> None:
    text = "jane@firm.com, 536-90-4399"
    assert [found.kind for found in find(text, ("ssn",))] == ["ssn"]
    assert set(KINDS) == {"email", "phone", "card", "iban", "ip", "ssn"}


HOSTILE = [
    "a" * 20_000, "a@" * 10_000, "a." * 10_000, "a@" + "b." * 9_000, "1" * 20_000, "1 " * 10_000, "1-" * 10_000,
    "+1" * 10_000, "+" + "1 (" * 6_000, "1." * 10_000, "AB12" * 5_000, "AB12 " * 4_000, ":" * 20_000, "a:" * 10_000,
    "(415) " * 3_000, "%+-." * 5_000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:6])
def test_any_text_takes_linear_time(text: str) -> None:
    def seconds(content: str) -> float:
        start = time.perf_counter()
        list(find(content))
        return time.perf_counter() - start

    assert min(seconds(text) for _ in range(3)) < 0.5
