"""WebDataset tars: a sample is its JSON and its media, `KEY.json` beside `KEY.0-1.speech.flac`.

`KEY` is the index and the id, `0-1` the second part of the first turn. In the JSON `file` of a medium is the name that
the `webdataset` package gives it: `sample[part["media"]["file"]]` are its bytes. Members are sorted within a sample and
have no times or owners, so the same samples give the same tars.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

from anyglot_synth.dataset import DatasetError, media_of, place, read_items, score_of
from anyglot_synth.dialogue import Part, Turn
from anyglot_synth.export.files import content_of
from anyglot_synth.stages import Item


def export_tars(folder: Path, out: Path, *, max_samples: int = 1000, max_bytes: int = 1_000_000_000) -> int:
    """Writes `out/data-000000.tar` and so on. Returns the number of samples.

    Args:
        max_samples: of one tar.
        max_bytes: of one tar, about; one sample may be larger.
    """
    if max_samples < 1 or max_bytes < 1:
        raise DatasetError(f"max_samples is {max_samples} and max_bytes {max_bytes}; both must be at least 1")
    tar: tarfile.TarFile | None = None
    shards = samples = held = total = 0
    try:
        for item in read_items(folder):
            members = _members(folder, item)
            size = sum(map(len, members.values()))
            if tar is None or held == max_samples or total + size > max_bytes:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(out / f"data-{shards:06d}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
                shards, held, total = shards + 1, 0, 0
            for name, content in sorted(members.items()):
                member = tarfile.TarInfo(name)  # of time 0 and nobody
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            samples, held, total = samples + 1, held + 1, total + size
    finally:
        if tar is not None:
            tar.close()
    return samples


def _members(folder: Path, item: Item) -> dict[str, bytes]:
    """Name -> content of all members of a sample."""
    key = f"{item.index:08d}-{item.dialogue.id}"
    members: dict[str, bytes] = {}
    names: dict[tuple[int, int], str] = {}
    for medium in media_of(item.dialogue):
        stem = f"{medium.turn_number}-{medium.part_number}.{medium.part.modality}"
        names[medium.turn_number, medium.part_number] = name = stem + Path(medium.file.file).suffix
        members[f"{key}.{name}"] = content_of(folder, medium.file)
        if score := score_of(place(folder, medium.file)):
            members[f"{key}.{stem}{score.suffix}"] = score.read_bytes()

    def named(i: int, j: int, turn: Turn, part: Part) -> Part:
        return part if part.media is None else replace(part, media=replace(part.media, file=names[i, j]))

    content = {"index": item.index, **item.dialogue.map_parts(named).to_dict(), "facts": dict(item.facts)}
    members[f"{key}.json"] = json.dumps(content, ensure_ascii=False).encode()
    return members
