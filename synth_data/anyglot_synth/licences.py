"""Which licences let a dataset be passed on: a short list of SPDX names, and everything else has to be allowed by hand.

Compares names and knows no law. Whoever publishes data has to look at the licences themselves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from anyglot_synth.dataset import DatasetError, licence_of, media_of, read_items

UNKNOWN = "unknown"
ANY = "any"
"""Among allowed licences: whatever they are."""

OPEN = frozenset(
    """
    0BSD AFL-3.0 Apache-2.0 Artistic-2.0 BSL-1.0 CC-BY-2.0 CC-BY-2.5 CC-BY-3.0 CC-BY-4.0 CC-BY-SA-2.0 CC-BY-SA-3.0
    CC-BY-SA-4.0 CC-PDDC CC0-1.0 CDLA-Permissive-1.0 CDLA-Permissive-2.0 CDLA-Sharing-1.0 Festival ISC MIT MIT-0 MIT-CMU
    ODbL-1.0 ODC-By-1.0 PDDL-1.0 Unlicense Zlib public-domain
    """.lower().split()
)
"""Licences that let anybody copy and sell, perhaps with attribution or under the same licence; in lower case."""


def is_open(licence: str, allowed: Collection[str] = ()) -> bool:
    """Whether data under a licence may be passed on. Of `A AND B` each must be open, of `A OR B` one.

    Args:
        licence: an SPDX name or a simple expression of such.
        allowed: further ones that the user takes, or "any".
    """
    taken = {name.lower() for name in allowed}
    if ANY in taken or licence.lower() in taken:
        return True

    def one(name: str) -> bool:
        name = name.strip(" ()").lower()
        return name in OPEN or name in taken or bool(re.fullmatch(r"bsd-[0-9a-z-]+", name))

    return all(any(map(one, re.split(r"\s+OR\s+", part))) for part in re.split(r"\s+AND\s+", licence))


def check_licences(folder: Path, allowed: Collection[str] = ()) -> Counter[str]:
    """How often each licence occurs among the samples: of their sources and of each file.

    Raises:
        DatasetError: one of them is not open and not allowed.
    """
    found: Counter[str] = Counter()
    for item in read_items(folder):
        found[item.dialogue.licence] += 1
        found.update(licence_of(medium.file, item.dialogue) for medium in media_of(item.dialogue))
    closed = {name: count for name, count in sorted(found.items()) if not is_open(name, allowed)}
    if closed:
        named = ", ".join(f"{name!r} ({count} times)" for name, count in closed.items())
        raise DatasetError(
            f"{folder}: holds data under {named}, which may not be passed on freely; leave it out of the recipe, or "
            f"allow it by name: allow_licences={list(closed)}"
        )
    return found
