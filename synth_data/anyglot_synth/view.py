"""`write_view`: pages to look and listen through a dataset, `view/index.html`: plain files, no server, no network.

Dialogues as chats with players and pictures, what was said beside what was written, what stages measured, and the
rejected and failed ones with their reasons, in the order of the source. Filters and search are a few lines of plain
JavaScript and reach over all pages. Media are shown where they lie. All texts are untrusted and escaped.
"""

from __future__ import annotations

import heapq
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from anyglot_synth.dataset import (
    ERRORS,
    REJECTS,
    SAMPLES,
    DatasetError,
    engine_of,
    is_inside,
    licence_of,
    read_items,
    read_job,
    score_of,
    title_of,
    voice_of,
)
from anyglot_synth.dialogue import IMAGE, SPEECH, TEXT, Dialogue, MediaFile, Part, Turn
from anyglot_synth.stages import OK, STATUSES, Item
from anyglot_tokenizers.files import atomic_write

VIEW = "view"
INDEX = "items.js"
MAX_SEARCHED = 2000
"""Characters of an item that the search over all pages knows."""
SIDE = 224
"""Pixels that a small picture is enlarged to, about."""
TEMPLATE = Path(__file__).with_suffix(".html")


def write_view(folder: str | os.PathLike[str], num: int | None = None, per_page: int = 50) -> Path:
    """Writes `view/` of a dataset folder; returns the path of the first page.

    Args:
        folder: of the dataset.
        num: how many items at most, from the first of the source on; None for all.
        per_page: items of a page.

    Raises:
        DatasetError: no dataset, lists that cannot be read, or numbers below 1.
    """
    if per_page < 1 or (num is not None and num < 1):
        raise DatasetError(f"num is {num} and per_page {per_page}; both must be at least 1")
    folder = Path(folder)
    read_job(folder)
    next(read_items(folder), None)  # what is no dataset is refused before anything is written there
    out = folder / VIEW
    out.mkdir(exist_ok=True)
    counts: Counter[str] = Counter()
    tasks: set[str] = set()
    with atomic_write(out / INDEX) as path, path.open("w", encoding="utf-8") as file:
        file.write("window.anyglotItems = [\n")
        for number, item in enumerate(_items(folder, num)):
            counts[item.status] += 1
            tasks.add(item.dialogue.task)
            entry = [number // per_page + 1, item.status, item.dialogue.task, _searched(item)[:MAX_SEARCHED]]
            file.write(json.dumps(entry) + ",\n")
        file.write("];\n")
    pages = max(-(-counts.total() // per_page), 1)
    items = _items(folder, num)
    for page in range(1, pages + 1):
        content = _page(folder, islice(items, per_page), page, pages, counts, sorted(tasks))
        with atomic_write(out / _name(page)) as path:
            path.write_text(content, encoding="utf-8")
    for stale in out.glob("page-*.html"):
        if int(stale.stem.removeprefix("page-")) > pages:
            stale.unlink()
    return out / _name(1)


def _name(page: int) -> str:
    return "index.html" if page == 1 else f"page-{page}.html"


def _items(folder: Path, num: int | None) -> Iterator[Item]:
    """All items in the order of the source."""
    lists = (read_items(folder, name) for name in (SAMPLES, REJECTS, ERRORS))
    return islice(heapq.merge(*lists, key=lambda item: item.index), num)


def _searched(item: Item) -> str:
    texts = [part.spoken_text or part.text for turn in item.dialogue.turns for part in turn.parts]
    facts = [value for _, value in _facts(item.facts)]
    return " ".join([str(item.index), item.reason, item.detail, item.dialogue.source, *texts, *facts])


def _page(
    folder: Path, items: Iterable[Item], page: int, pages: int, counts: Counter[str], tasks: Iterable[str]
) -> str:
    total = " · ".join(f"<span class='{status}'>{counts[status]:,} {status}</span>" for status in STATUSES)
    links = [f"<b>{p}</b>" if p == page else f"<a href='{_name(p)}'>{p}</a>" for p in _near(page, pages)]
    values = {
        "title": escape(title_of(read_job(folder))),
        "page": str(page),
        "pages": str(pages),
        "total": total,
        "statuses": "".join(f"<option>{status}</option>" for status in STATUSES),
        "tasks": "".join(f"<option value='{escape(task)}'>{escape(task)}</option>" for task in tasks),
        "nav": f"<nav>{''.join(links)}</nav>" if pages > 1 else "",
        "items": "".join(_article(folder, item) for item in items),
    }
    return re.sub(r"{{(\w+)}}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _near(page: int, pages: int) -> list[int]:
    """Pages to link: the first, the last, those around, and in steps of a tenth."""
    step = max(pages // 10, 1)
    around = range(max(page - 2, 1), min(page + 2, pages) + 1)
    return sorted({1, pages, *around, *range(step, pages, step)})


def _article(folder: Path, item: Item) -> str:
    dialogue = item.dialogue
    about = [dialogue.source, dialogue.licence, dialogue.language, dialogue.id[:8] if dialogue.turns else ""]
    head = f"<a href='#i{item.index}'>#{item.index}</a><span class='{item.status}'>{item.status}</span>"
    head += "".join(f"<span>{escape(text)}</span>" for text in (dialogue.task, *about) if text)
    end = ""
    if item.status != OK:
        again = " (may be tried again)" if item.retryable else ""
        end = (
            f"<p class='end {item.status}'><b>{escape(item.reason)}</b> at {escape(item.stage or 'the source')}"
            f"{again}: {escape(item.detail)}</p>"
        )
    facts = "".join(f"<li>{escape(key)} {escape(value)}</li>" for key, value in _facts(item.facts))
    return (
        f"<article id='i{item.index}' data-status='{item.status}' data-task='{escape(dialogue.task)}'>"
        f"<header>{head}</header>{end}{''.join(_turn(folder, dialogue, turn) for turn in dialogue.turns)}"
        f"{f'<ul class=facts>{facts}</ul>' if facts else ''}</article>\n"
    )


def _turn(folder: Path, dialogue: Dialogue, turn: Turn) -> str:
    parts = "".join(_part(folder, dialogue, part) for part in turn.parts)
    return f"<div class='turn {escape(turn.role)}'><h3>{escape(turn.role)}</h3>{parts}</div>"


def _part(folder: Path, dialogue: Dialogue, part: Part) -> str:
    said = part.spoken_text if part.modality == SPEECH and part.spoken_text is not None else part.text
    text = f"<p dir='auto' class='{part.modality}'>{escape(said)}</p>" if said.strip() else ""
    if said != part.text:
        text += f"<small class='differs' dir='auto'>written: {escape(part.text)}</small>"
    if part.modality == TEXT:
        return text
    if part.media is None:
        return f"<figure>{text}<small>{escape(part.modality)}, not made</small></figure>"
    shown = (
        _picture(part)
        if part.modality == IMAGE
        else f"<audio controls preload='none' src='{_url(part.media)}'></audio>"
    )
    return f"<figure>{shown}{text}<small>{_about(folder, dialogue, part)}</small></figure>"


def _picture(part: Part) -> str:
    assert part.media is not None
    width, height = part.media.size or (SIDE, SIDE)
    factor = max(SIDE // max(width, height, 1), 1)
    tiny = " class='tiny'" if factor > 1 else ""
    url = _url(part.media)
    size = f"width='{width * factor}' height='{height * factor}'"
    return f"<a href='{url}'><img{tiny} loading='lazy' src='{url}' {size} alt='{escape(part.text)}'></a>"


def _about(folder: Path, dialogue: Dialogue, part: Part) -> str:
    """Voice or engine, length or size, licence, and the MIDI file."""
    media = part.media
    assert media is not None
    facts = [part.modality, voice_of(media) or engine_of(media)]
    if media.seconds is not None:
        facts.append(f"{media.seconds:.1f} s")
    if media.size is not None:
        facts.append("{} × {}".format(*media.size))
    about = escape(" · ".join([*facts, licence_of(media, dialogue)]))
    if is_inside(media.file) and (score := score_of(folder / media.file)):
        about += f" · <a href='../{quote(score.relative_to(folder).as_posix())}'>MIDI</a>"
    return about


def _url(media: MediaFile) -> str:
    """A file of the dataset seen from a page; nothing for a name that leads elsewhere."""
    return f"../{quote(media.file)}" if is_inside(media.file) else ""


def _facts(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, short text) of what stages measured."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{prefix}{key}.")
        elif value != []:
            yield f"{prefix}{key}", ", ".join(map(_short, value if isinstance(value, list) else [value]))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
