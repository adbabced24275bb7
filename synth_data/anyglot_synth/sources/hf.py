"""Datasets that the package `datasets` loads: local folders and files of any kind it knows, or names of its hub.

Rows are read as a stream and understood as one of the other sources does (`rows: alpaca`). Parquet and arrow files need
none of this: give them to that source itself. Columns of pictures and sounds (features `Image` and `Audio`, whose files
may lie anywhere) are taken as their bytes; files that other columns name must be in the data's folder, as ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from anyglot_synth.dialogue import Dialogue, escaped
from anyglot_synth.sources.base import BadRow, RowSource, Source, SourceError, card_of, file_mark
from anyglot_synth.sources.media import file_bytes
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import MediaError


class HfDatasets(Source):
    """What `datasets.load_dataset` (or `load_from_disk`) gives.

    Args:
        data: a folder, a file, or a name of the hub (which needs the network).
        rows: the source that understands a row: "alpaca", "sharegpt", "llava", "dialogues", "examples".
        split: of the dataset.
        config_name: of a dataset with several.
        revision: of a dataset of the hub: a commit, so that a run can be done again.
        seed: of that source, where its options have none.
        options: further options of that source (`form`, `columns`, `licence`, ...).
    """

    name: ClassVar[str] = "datasets"

    def __init__(
        self,
        data: str,
        rows: str,
        *,
        split: str = "train",
        config_name: str = "",
        revision: str = "",
        seed: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        from anyglot_synth.sources import SOURCES

        if not issubclass(SOURCES[rows], RowSource):
            raise SourceError(f"source datasets: rows is {rows!r}, which reads no rows; use one such as 'alpaca'")
        inner = SOURCES.build(rows, **{"data": data, "seed": seed, **(options or {})})
        assert isinstance(inner, RowSource)
        self.inner, self.rows = inner, rows
        self.data, self.split, self.config_name, self.revision = data, split, config_name, revision

    def config(self) -> dict[str, Any]:
        """See `Source`; local files by name, size and a hash of their ends."""
        path = Path(self.data)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
        return {
            "kind": self.name,
            "data": escaped(path.name),
            "split": self.split,
            "config_name": self.config_name,
            "revision": self.revision,
            "rows": self.inner.settings(),
            "licence": self._licence(),
            "files": [[escaped(file.name), *file_mark(file)] for file in files],
        }

    def read(self, store: Store) -> Iterator[Dialogue | BadRow]:
        """See `Source`. Raises `SourceError` where the package, the data or the split is not there."""
        table, media = self._load()
        licence = self._licence() or str(getattr(table.info, "license", "") or "") or "unknown"
        path = Path(self.data)
        folder = path if path.is_dir() else path.parent
        self.inner.begin()
        place = f"{path.name}/{self.split}"
        for number, row in self._rows(table, place):
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                row = row | {column: _plain(row[column]) for column in media if column in row}
            except MediaError as error:
                yield BadRow(place, number, str(error))
            else:
                yield from self.inner.dialogues(row, store, place, number, folder, licence)

    def _rows(self, table: Any, place: str) -> Iterator[tuple[int, Any]]:
        """(number from 1, row); of local files that are damaged from somewhere on, a `BadRow` there.

        Raises:
            SourceError: the network or the disk refuses; another run goes on there.
        """
        number = 0
        try:
            for number, row in enumerate(table, start=1):
                yield number, row
        except Exception as error:  # `datasets` and what it reads with raise errors of all kinds
            first = (str(error).strip().splitlines() or [repr(error)])[0][:200]
            what = f"datasets cannot read on after row {number} ({type(error).__name__}: {first})"
            if isinstance(error, OSError) or not os.path.exists(self.data):
                raise SourceError(f"{escaped(self.data)}, split {self.split!r}: {what}; run again") from error
            yield number + 1, BadRow(place, number + 1, what)

    def _licence(self) -> str:
        """As given, or as the card beside local data says."""
        path = Path(self.data)
        card = card_of(path if path.is_dir() else path.parent)["licence"] if path.exists() else ""
        return self.inner.licence or card

    def _load(self) -> tuple[Any, list[str]]:
        """The table, and its columns of pictures and sounds."""
        try:
            import datasets
        except ImportError:
            raise SourceError("source datasets: needs the package datasets; pip install datasets") from None
        try:
            if (Path(self.data) / "dataset_dict.json").is_file() or (Path(self.data) / "state.json").is_file():
                table = datasets.load_from_disk(self.data)
                table = table[self.split] if isinstance(table, datasets.DatasetDict) else table
            else:
                named = {"name": self.config_name or None, "revision": self.revision or None}
                path = Path(self.data)
                kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
                if path.is_file() and kind:
                    table = datasets.load_dataset(kind, data_files=self.data, split=self.split, streaming=True)
                else:
                    table = datasets.load_dataset(self.data, split=self.split, streaming=True, **named)
        except (OSError, ValueError, KeyError) as error:
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            raise SourceError(f"{self.data}: datasets cannot load split {self.split!r} of it: {first}") from None
        media = []
        for column, kind in (table.features or {}).items():
            if isinstance(kind, datasets.Image | datasets.Audio):
                table = table.cast_column(column, type(kind)(decode=False))
                media.append(column)
        return table, media


def _plain(value: Any) -> Any:
    """A picture or sound that is in a file as bytes; others as they are. Raises `MediaError`."""
    if isinstance(value, dict) and value["bytes"] is None and os.path.isfile(value["path"] or ""):
        return file_bytes(Path(value["path"]), Path(value["path"]).name)
    return value
