"""`run`: a source and stages to a dataset folder, on this machine's cores or on a cluster.

Composes: the source's dialogues become items, those that repeat an earlier one end at once, the rest goes through the
stages (`workers.py`, or `ray_run.py`), and the job (`job.py`) notes what became of each. Then counts, a report and a
dataset card are written. Killed at any moment and run again, it goes on where it was.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from anyglot_synth.card import CARD, write_card
from anyglot_synth.dialogue import Dialogue, Json
from anyglot_synth.job import Job
from anyglot_synth.report import REPORT, write_report
from anyglot_synth.sources import BadRow, Source
from anyglot_synth.stages import FAILED, FILTERED, OK, Item, Stage
from anyglot_synth.store import Store, StoreError
from anyglot_synth.workers import START_SECONDS, Workers, here
from anyglot_tokenizers.errors import ManifestError

Progress = Callable[[Mapping[str, int], int, int | None], None]
"""Called with counts by status, how many of them an earlier run had ended, and how many are wanted (or None)."""


@dataclass(frozen=True)
class Summary:
    """What a run left: items by status, and how many of them an earlier run had ended."""

    out: str
    ok: int
    filtered: int
    failed: int
    earlier: int

    def to_dict(self) -> Json:
        """JSON-able form."""
        return asdict(self)


def run(
    source: Source,
    stages: Sequence[Stage],
    out: str | os.PathLike[str],
    *,
    name: str = "",
    num: int | None = None,
    workers: int | None = None,
    on: str = "processes",
    timeout: float = 300.0,
    start_timeout: float = START_SECONDS,
    attempts: int = 3,
    retry: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Makes a dataset, or goes on with one.

    Args:
        source: of dialogues.
        stages: in order. Those with `ordered = True` must come first: they run here, over every item.
        out: folder of the dataset.
        name: of the dataset, for its card.
        num: rows of the source that are taken, or None for all.
        workers: processes, default as many as cores. On "ray" the cluster decides.
        on: "processes" of this machine, or "ray".
        timeout: seconds that an item may take.
        start_timeout: seconds that the stages may take to be set up in a process: models are loaded.
        attempts: tries of an item that hangs, crashes or may succeed another time.
        retry: of a finished dataset, do again what failed so, whatever `num` says. What else there is stays as it is.
        progress: see `Progress`.

    Raises:
        ManifestError: an argument that cannot be, a source without end. JobError: the folder is in use, or another
            recipe made it. StoreError: the disk refuses; run again and it goes on. WorkerError, BackendError: an
            engine is not here. SourceError: there is nothing to read.
    """
    ordered = [stage for stage in stages if getattr(stage, "ordered", False)]
    if ordered != list(stages[: len(ordered)]):
        raise ManifestError(f"stage {ordered[-1].name!r} looks at items in order; put it before the others")
    if workers is not None and workers < 1:
        raise ManifestError(f"workers is {workers}; give 1 or more")
    if on not in ("processes", "ray"):
        raise ManifestError(f"a run is on {on!r}; use processes or ray")
    for word, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
        if not (math.isfinite(seconds) and seconds > 0):
            raise ManifestError(f"{word} is {seconds}; give seconds, more than 0")
    if num is None and getattr(source, "num", 0) is None:  # it has such an option, and was not told
        raise ManifestError(
            f"source {source.name!r} never ends; say how many rows are wanted (num in a recipe, --num N)"
        )
    rest = list(stages[len(ordered) :])
    recipe = {"name": name, "source": source.config(), "stages": [[s.name, s.config()] for s in stages]}
    with ExitStack() as stack:
        job = stack.enter_context(Job(out, recipe, num, retry=retry))
        written = [job.folder / CARD, job.folder / REPORT]
        if not job.finished:
            for path in written:
                path.unlink(missing_ok=True)
            items = filter(lambda item: job.wants(item.index), items_of(source, ordered, Store(out), job.num))
            ended: Generator[Item, None, None]
            options: dict[str, Any] = {"timeout": timeout, "start_timeout": start_timeout, "attempts": attempts}
            if on == "ray":
                from anyglot_synth.ray_run import run_on_ray

                ended = run_on_ray(items, rest, out, **options)
                stack.enter_context(closing(ended))
            else:
                pool = stack.enter_context(Workers(rest, out, workers or os.cpu_count() or 1, **options))
                ended = pool.run(items)
            for item in ended:
                job.append(item)
                if progress is not None:
                    progress(job.counts, job.earlier, job.num)
            job.finish()
        if not all(path.is_file() for path in written):
            try:
                write_card(out, write_report(out))
            except OSError as error:
                raise StoreError(
                    f"{out}: its report cannot be written ({error.strerror}); free some space and run again"
                ) from error
        return Summary(str(out), job.counts[OK], job.counts[FILTERED], job.counts[FAILED], job.earlier)


def items_of(source: Source, ordered: Sequence[Stage], store: Store, num: int | None = None) -> Iterator[Item]:
    """Items of a source in its order: bad rows have failed, repetitions and what `ordered` stages end are filtered."""
    for stage in ordered:
        stage.setup()
    seen: set[bytes] = set()
    for index, found in enumerate(islice(source.read(store), num)):
        if isinstance(found, BadRow):
            detail = f"{found.source}, row {found.row}: {found.error}"
            yield Item(index, Dialogue((), found.source), FAILED, "source", "input", detail)
            continue
        item = Item(index, found)
        digest = bytes.fromhex(found.id)
        if digest in seen:
            item = replace(
                item, status=FILTERED, stage="source", reason="duplicate", detail="said before, word by word"
            )
        seen.add(digest)
        yield here(ordered, item, store) if ordered else item


WAVES = 4
"""Items of a dry run per worker, at least."""


@dataclass(frozen=True)
class Estimate:
    """What a whole run would cost, from its first items.

    Args:
        tried: items that were made.
        ok, filtered, failed: shares of them, 0 to 1.
        start_seconds: until engines and models are loaded.
        seconds_per_item: of the machine, with all its workers busy, after that.
        bytes_per_item: on the disk.
        sound_seconds_per_item: of speech and music in samples.
        num: items of the whole, None where that is not known; those that were tried, where the source ended with them.
    """

    tried: int
    ok: float
    filtered: float
    failed: float
    start_seconds: float
    seconds_per_item: float
    bytes_per_item: float
    sound_seconds_per_item: float
    num: int | None

    def to_dict(self) -> Json:
        """JSON-able form, with totals where the number of items is known."""
        found: Json = asdict(self)
        if self.num is not None:
            found |= {
                "hours": _short((self.start_seconds + self.num * self.seconds_per_item) / 3600),
                "samples": round(self.num * self.ok),
                "gigabytes": _short(self.num * self.bytes_per_item / 1e9),
                "hours_of_sound": _short(self.num * self.sound_seconds_per_item / 3600),
            }
        return found


def _short(value: float) -> float:
    """Three digits of it, however small it is."""
    return float(f"{value:.3g}")


def dry_run(
    source: Source, stages: Sequence[Stage], *, num: int | None = None, tries: int = 20, **options: Any
) -> Estimate:
    """Makes the first items in a temporary folder and says what all would cost. Nothing stays.

    Args:
        source, stages, num: as for `run`.
        tries: items that are made, or four per worker if that is more.
        options: of `run`.

    Raises:
        ManifestError: on a cluster, whose pace this machine does not know. Others as `run`.
    """
    from anyglot_synth.dataset import media_of, read_items

    if options.get("on", "processes") != "processes":
        raise ManifestError("a dry run is on this machine's processes and says nothing of a cluster; leave out --on")
    options["workers"] = workers = options.get("workers") or os.cpu_count() or 1
    tries = max(tries, WAVES * workers)
    tries = tries if num is None else min(tries, num)
    with tempfile.TemporaryDirectory(prefix="anyglot-dry-run-") as folder:
        out = Path(folder) / "data"
        began, ended = time.perf_counter(), []
        done = run(source, stages, out, num=tries, progress=lambda *_: ended.append(time.perf_counter()), **options)
        total = max(1, done.ok + done.filtered + done.failed)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        sound = sum(m.file.seconds or 0.0 for item in read_items(out) for m in media_of(item.dialogue))
    if done.ok + done.filtered + done.failed < tries:  # the source has no more
        num = done.ok + done.filtered + done.failed
    ok, filtered, failed = (round(count / total, 4) for count in (done.ok, done.filtered, done.failed))
    start, pace = start_and_pace([at - began for at in ended], workers)
    return Estimate(total, ok, filtered, failed, start, pace, size / total, sound / total, num)


def start_and_pace(ended: Sequence[float], workers: int) -> tuple[float, float]:
    """(seconds until workers are ready, seconds per item with all of them busy), from when items ended.

    The first item of each worker tells nothing of the pace: they end together, however long they take. Where there are
    no others, all time counts as theirs, which is right if that was the whole source.
    """
    if len(ended) <= workers:
        return 0.0, ended[-1] / len(ended) if ended else 0.0
    first = ended[workers - 1]
    pace = (ended[-1] - first) / (len(ended) - workers)
    return max(0.0, first - workers * pace), pace
