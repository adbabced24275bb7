"""`Job`: one dataset folder while it is made: who may write to it, how far it is, and its lists at the end.

    job.json        the recipe, resolved, and its fingerprint
    .lock           held by the one run that writes
    journal.jsonl   every item that has ended, in the order of the source; only while the job runs
    samples.jsonl, rejects.jsonl, errors.jsonl   the journal by status; only when it is finished

All state is the number of lines in the journal. Nothing written depends on when, where or how often a run was
interrupted: a job that was killed and finished equals one that was not, byte for byte. Makes no items and no media.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from anyglot_synth.dialogue import Json, address, canonical, escaped
from anyglot_synth.stages import FAILED, FILTERED, OK, Item
from anyglot_synth.store import OBJECTS, StoreError
from anyglot_tokenizers.errors import AnyglotError
from anyglot_tokenizers.files import atomic_write, is_temporary

FORMAT = "anyglot.dialogues"
JOB, LOCK, JOURNAL = "job.json", ".lock", "journal.jsonl"
RETRY = ".retry"
"""There while a run does again what failed, so that one without `retry` goes on with it: the number of items."""
LISTS = {OK: "samples.jsonl", FILTERED: "rejects.jsonl", FAILED: "errors.jsonl"}


class JobError(AnyglotError):
    """A dataset folder that another run holds, that another recipe made, or that is damaged."""


class Job:
    """Opens (or makes) a dataset folder for one run; a context manager that holds its lock.

    Args:
        folder: of the dataset.
        recipe: JSON of everything that decides what the items are.
        num: items of the source that are wanted, or None for all. A finished job goes on if more are wanted.
        retry: of a finished job, do again the items that failed and may succeed another time, whatever `num` says.

    Attributes:
        num: as given; while what failed is done again, how many items the job has.
        done: how many items of the source are in the journal.
        earlier: how many items ended in an earlier run and are not done again.
        finished: whether nothing is left to do.
        counts: ended items by status.

    Raises:
        JobError: the folder is in use, or was made by another recipe; `retry` of one that is not finished.
    """

    def __init__(
        self, folder: str | os.PathLike[str], recipe: Mapping[str, Any], num: int | None = None, *, retry: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.recipe: Json = json.loads(canonical(recipe))
        self.num, self.retry = num, retry
        self.done, self.earlier, self.finished = 0, 0, False
        self.counts: Counter[str] = Counter()
        self._known = 0  # items of the lists of an earlier run, which are copied, but for
        self._again: set[int] = set()  # these
        self._old: Iterator[tuple[int, Json]] = iter(())
        self._num_source: int | None = None
        self._lock: IO[str] | None = None
        self._journal: IO[bytes] | None = None

    def __enter__(self) -> Job:
        try:
            self._check_folder()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK, "a", encoding="utf-8")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise JobError(
                f"{self.folder}: another run is writing there; wait for it, or give another folder"
            ) from None
        except OSError as error:
            self._close()
            raise JobError(f"{self.folder}: cannot be written ({error.strerror}); give another folder") from None
        try:
            self._open()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise StoreError(f"{error.filename or self.folder}: {error.strerror}; make it writable") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def wants(self, index: int) -> bool:
        """Whether an item is to be done; the others have ended in an earlier run."""
        return index >= self.done and (index >= self._known or index in self._again)

    def append(self, item: Item) -> None:
        """Notes the next wanted item, which has ended. Raises `StoreError` where the disk refuses."""
        self._copy(item.index)
        assert item.index == self.done, f"item {item.index} after {self.done} others"
        self._note(_line(item))

    def _copy(self, until: int) -> None:
        """Notes what ended in an earlier run, up to an item."""
        while self.done < min(until, self._known) and self.done not in self._again:
            index, line = next(self._old)
            assert index == self.done, f"item {index} after {self.done} others"
            self._note(line)

    def _note(self, line: Json) -> None:
        assert self._journal is not None
        try:
            self._journal.write(_bytes(line))
            self._journal.flush()
        except OSError as error:
            raise StoreError(
                f"{self.folder / JOURNAL}: cannot be written ({error.strerror}); free some space and run again"
            ) from error
        self.done += 1
        self.counts[line["status"]] += 1

    def finish(self) -> None:
        """Writes the three lists and drops the journal, when the source has given all that is wanted.

        Raises:
            StoreError: the disk refuses. JobError: the source has fewer items than before.
        """
        assert self._journal is not None
        self._copy(self._known)
        if self.done < self._known:
            raise JobError(
                f"{self.folder}: the source has no item {self.done + 1}, and had {self._known}; give it as it was"
            )
        if self.num is None or self.done < self.num:
            self._num_source = self.done
        elif self.done != self._num_source:
            self._num_source = None
        self._journal.close()
        self._journal = None
        try:
            self._sweep(objects=True)  # of workers that were killed while they wrote
            self._write_job()
            self._write_lists()
            (self.folder / RETRY).unlink(missing_ok=True)
            (self.folder / JOURNAL).unlink()
        except OSError as error:
            raise StoreError(
                f"{self.folder}: cannot be written ({error.strerror}); free some space and run again"
            ) from error
        self.finished = True

    # opening ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        journal, marker = self.folder / JOURNAL, self.folder / RETRY
        begun = journal.is_file()
        self._check_recipe()
        self._sweep(objects=begun)
        if self.retry and begun and journal.stat().st_size and not marker.is_file():
            raise JobError(
                f"{self.folder}: is not finished, so there is nothing to do again yet; run without --retry to its end "
                "first"
            )
        again = marker.is_file() or (self.retry and not begun)
        self._read_lists(again=again)
        if again and (self.folder / LISTS[OK]).is_file():
            said = marker.read_text(encoding="utf-8") if marker.is_file() else ""
            self.num = int(said) if said.isdecimal() else self._known
        if not begun and (self.folder / LISTS[OK]).is_file():
            more = self.num is None or self._known < self.num
            if not self._again and not (more and self._known != self._num_source):
                marker.unlink(missing_ok=True)
                self.finished, self.done, self.earlier = True, self._known, self._known
                return
            if self._again:
                marker.write_text(str(self._known), encoding="utf-8")
            self.counts.clear()
        self._read_journal()
        self.earlier = max(self.done, self._known) - sum(index >= self.done for index in self._again)
        self._old = (entry for entry in self._lines() if entry[0] >= self.done and entry[0] not in self._again)
        self._write_job()
        self._journal = open(journal, "ab")  # noqa: SIM115 (open while the run lasts)

    def _check_folder(self) -> None:
        """Raises `JobError` for a folder that holds files and no job; nothing is written there before."""
        found = list(self.folder.iterdir()) if self.folder.is_dir() else []
        others = sorted(entry.name for entry in found if entry.name != LOCK and not is_temporary(entry))
        if others and JOB not in others:
            raise JobError(f"{self.folder}: holds other files ({others[0]}); give a new folder")

    def _check_recipe(self) -> None:
        path = self.folder / JOB
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            was = found["recipe"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JobError(f"{path}: cannot be read ({error!r}); give a new folder") from None
        journal = self.folder / JOURNAL
        begun = (self.folder / LISTS[OK]).is_file() or (journal.is_file() and journal.stat().st_size > 0)
        if was != self.recipe and begun:
            raise JobError(f"{path}: made by another recipe ({_difference(was, self.recipe)}); give a new folder")
        self._num_source = found.get("num_source")

    def _write_job(self) -> None:
        job: Json = {"format": FORMAT, "recipe": self.recipe, "fingerprint": address(self.recipe)}
        if self._num_source is not None:
            job["num_source"] = self._num_source
        text = json.dumps(job, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        path = self.folder / JOB
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _sweep(self, *, objects: bool) -> None:
        """Removes what killed processes were writing: temporary names only."""
        for path in (*self.folder.glob(".*.tmp*"), *((self.folder / OBJECTS).rglob(".*.tmp*") if objects else ())):
            if is_temporary(path):
                path.unlink(missing_ok=True)

    def _read_journal(self) -> None:
        """Counts the journal's lines, and cuts off one that is not whole."""
        self.counts, self.done, good = Counter(), 0, 0
        path = self.folder / JOURNAL
        if not path.is_file():
            return
        with open(path, "rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                found = _read(line, path, self.done + 1)
                if found["index"] != self.done:
                    raise JobError(f"{path}, line {self.done + 1}: is item {found['index']}; give a new folder")
                self.counts[found["status"]] += 1
                self.done += 1
                good += len(line)
            file.truncate(good)

    # lists ------------------------------------------------------------------------------------------------------

    def _write_lists(self) -> None:
        with atomic_write(self.folder / LISTS[OK]) as ok, atomic_write(self.folder / LISTS[FILTERED]) as filtered:
            with atomic_write(self.folder / LISTS[FAILED]) as failed:
                with open(ok, "wb") as a, open(filtered, "wb") as b, open(failed, "wb") as c:
                    into = {OK: a, FILTERED: b, FAILED: c}
                    with open(self.folder / JOURNAL, "rb") as journal:
                        for number, line in enumerate(journal, start=1):
                            found = _read(line, self.folder / JOURNAL, number)
                            status = found.pop("status")
                            into[status].write(_bytes(found))

    def _lines(self) -> Iterator[tuple[int, Json]]:
        """(index, line of a journal) of the three lists, in the order of the source."""

        def of(status: str) -> Iterator[tuple[int, Json]]:
            path = self.folder / LISTS[status]
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    found = _read(line, path, number)
                    yield found["index"], {"status": status, **found}

        there = [status for status, name in LISTS.items() if (self.folder / name).is_file()]
        return heapq.merge(*map(of, there), key=lambda entry: entry[0])

    def _read_lists(self, *, again: bool) -> None:
        """Counts the lists of an earlier run; with `again`, notes which of its items are to be done again.

        While a journal is there the lists may be partly new: then each item that they miss is in the journal.
        """
        for status, name in LISTS.items():
            path = self.folder / name
            if not path.is_file():
                continue
            last = b""
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    self.counts[status] += 1
                    last = line
                    if status == FAILED and again:
                        found = _read(line, path, number)
                        if found.get("retryable"):
                            self._again.add(found["index"])
            if last:
                self._known = max(self._known, _read(last, path, self.counts[status])["index"] + 1)

    def _close(self) -> None:
        if self._journal is not None:
            with suppress(OSError):  # the disk that refused a line refuses it again
                self._journal.close()
            self._journal = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _bytes(line: Json) -> bytes:
    return canonical(line).encode() + b"\n"


def _line(item: Item) -> Json:
    """An ended item as a line of the journal. What is no Unicode in how it ended is written as escapes."""
    found: Json = {"status": item.status, "index": item.index}
    if item.dialogue.turns:
        found |= item.dialogue.to_dict()
    if item.status != OK:
        said = {"stage": item.stage, "reason": item.reason, "detail": item.detail}
        found |= {key: escaped(str(value)) for key, value in said.items()}
    if item.status == FAILED:
        found["retryable"] = item.retryable
    return found | ({"facts": dict(item.facts)} if item.facts else {})


def _read(line: bytes, path: Path, number: int) -> Json:
    try:
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found["index"], int):
            return found
    except (ValueError, KeyError):
        pass
    raise JobError(f"{path}, line {number}: is damaged; give a new folder")


def _difference(was: Any, now: Any, where: str = "") -> str:
    """The first place where two JSON values differ, in words."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                return _difference(was.get(key), now.get(key), f"{where}.{key}" if where else key)
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for number, (a, b) in enumerate(zip(was, now, strict=True)):
            if a != b:
                return _difference(a, b, f"{where}.{number}")
    return f"{where or 'it'} was {canonical(was)[:80]}, now {canonical(now)[:80]}"
