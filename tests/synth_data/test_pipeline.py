"""The pipeline: killed anywhere it loses and doubles nothing; what goes wrong costs one item, or ends with one line."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # spawned workers inherit it
from bad_stages import BadEngine, Marks, NoEngine, Noise, Ordered, SlowEngine

from anyglot_synth.dialogue import Dialogue, Part, Turn
from anyglot_synth.grammar_writer import GrammarWriter
from anyglot_synth.job import Job, JobError
from anyglot_synth.run import Summary, dry_run, run, start_and_pace
from anyglot_synth.sources import BadRow, Source
from anyglot_synth.stages import Item, Stage
from anyglot_synth.store import Store, StoreError
from anyglot_synth.validate import validate
from anyglot_synth.workers import WorkerError, Workers, here
from anyglot_tokenizers.errors import ManifestError


class Texts(Source):
    """Dialogues of one picture each; `None` is a bad row."""

    name = "texts"

    def __init__(self, texts: Sequence[str | None]) -> None:
        self.texts = texts

    def config(self) -> dict[str, Any]:
        return {"texts": "given"}

    def read(self, store: Store) -> Iterator[Dialogue | BadRow]:
        for number, text in enumerate(self.texts, start=1):
            if text is None:
                yield BadRow("texts", number, "is none")
            else:
                parts = (Part("text", text), Part("image", "a picture"))
                yield Dialogue((Turn("user", parts),), "texts", "CC0-1.0")


def numbered(count: int) -> list[str]:
    return [f"number {i}" for i in range(count)]


def files(folder: Path) -> dict[str, str]:
    """Every file and its hash."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def make(out: Path, texts: Sequence[str | None], stage: Stage | None = None, **options: Any) -> Summary:
    """With a stage that looks at all items in order before the one that is given."""
    return run(Texts(texts), [Ordered(), stage or Marks()], out, **{"workers": 2, **options})


def test_every_item_ends_somewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    texts = ["good", None, "unwanted", "good", "defect", "broken", "busy once", "busy always", "die once", "die always"]
    texts += ["hang once", "hang always", "last", "no number", "defect in order"]
    done = make(tmp_path / "out", texts, Marks(remember=str(seen)), timeout=1.5, attempts=2)
    assert (done.ok, done.filtered, done.failed) == (5, 2, 8)
    samples, rejects, errors = (lines(tmp_path / "out", name) for name in ("samples", "rejects", "errors"))
    assert [line["index"] for line in samples] == [0, 6, 8, 10, 12]
    assert [(line["index"], line["reason"]) for line in rejects] == [(2, "unwanted"), (3, "duplicate")]
    assert rejects[0]["facts"] == {"letters": len("goodunwanted"), "share": 0.5} and rejects[0]["stage"] == "marks"
    ended = {line["index"]: (line["reason"], line["retryable"]) for line in errors}
    assert ended == {
        1: ("input", False), 4: ("defect", False), 5: ("backend", False), 7: ("backend", True), 9: ("crash", True),
        11: ("timeout", True), 13: ("defect", False), 14: ("defect", False),
    }  # fmt: skip
    assert {line["index"]: line["facts"]["attempts"] for line in errors if line["retryable"]} == {7: 2, 9: 2, 11: 2}
    assert "nobody foresaw this" in errors[1]["detail"] and "Traceback" in caplog.text
    assert "foresaw this in order" in errors[-1]["detail"] and "foresaw this in order" in caplog.text
    assert validate(tmp_path / "out").exit_code == 0


def test_half_a_character_costs_one_item(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["half in a message", "good", "half in a trace", "half in a fact", "share as detail"]
    for num in (3, None):  # the second run reads what the first has written
        done = make(tmp_path / "out", texts, num=num, workers=1)
    assert (done.ok, done.filtered, done.failed) == (1, 1, 3)
    assert lines(tmp_path / "out", "rejects")[0]["detail"] == "0.5"
    errors = lines(tmp_path / "out", "errors")
    assert [(line["index"], line["reason"]) for line in errors] == [(0, "backend"), (2, "defect"), (3, "defect")]
    assert [line["detail"] for line in errors[:2]] == [r"the engine said \ud800", r"ValueError: the engine said \ud800"]
    assert r"the engine said \ud800" in caplog.text and caplog.text.encode(), "the log is a file of text, too"


def test_workers_and_order_change_nothing(tmp_path: Path) -> None:
    for workers in (1, 3):
        make(tmp_path / str(workers), numbered(60), Marks(seconds=0.005), workers=workers)
    one = files(tmp_path / "1")
    assert one == files(tmp_path / "3")
    assert sum(name.endswith(".png") for name in one) == 60
    assert {"job.json", "samples.jsonl", "report.json", "README.md"} <= one.keys() and "journal.jsonl" not in one
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "1").rglob("*")}
    again = make(tmp_path / "1", numbered(60))
    assert again.earlier == again.ok == 60
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "1").rglob("*")}, "nothing is written again"


PROGRAM = """
import sys; sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_pipeline import Marks, make, numbered
if __name__ == "__main__":
    make(Path({out!r}), numbered({count}), Marks(seconds=0.004))
"""


@pytest.mark.slow
def test_killed_anywhere_it_ends_the_same(tmp_path: Path) -> None:
    """`ANYGLOT_KILLS=20 ANYGLOT_ITEMS=1000` for more."""
    kills, count = int(os.environ.get("ANYGLOT_KILLS", "4")), int(os.environ.get("ANYGLOT_ITEMS", "200"))
    make(tmp_path / "whole", numbered(count), Marks(seconds=0.0))
    rng, out = random.Random(0), tmp_path / "killed"
    text = PROGRAM.format(tests=str(Path(__file__).parent), out=str(out), count=count)
    program = tmp_path / "program.py"
    program.write_text(text)
    killed = 0
    while killed < kills:
        process = subprocess.Popen([sys.executable, str(program)])
        deadline, start = time.monotonic() + 60, journal_size(out)
        while journal_size(out) == start and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # until it makes something
        time.sleep(rng.random() * 0.3 * min(1, 400 / count + 0.3))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed >= min(kills, 2), "it was too fast to be killed"
    subprocess.run([sys.executable, str(program)], check=True)
    print(f"\nkilled {killed} times while making {count} items")
    assert files(out) == files(tmp_path / "whole")


def journal_size(out: Path) -> int:
    return (out / "journal.jsonl").stat().st_size if (out / "journal.jsonl").is_file() else 0


def test_torn_lines_and_leftovers(tmp_path: Path) -> None:
    make(tmp_path / "whole", numbered(20))
    out = tmp_path / "out"
    with pytest.raises(StoreError, match="cannot be written .*free some space"):
        make(out, [*numbered(9), "full", *numbered(20)[9:]], workers=1)
    with pytest.raises(StoreError, match="cannot be written .*free some space"):
        make(out, [*numbered(9), "full in order", *numbered(20)[9:]], workers=1)
    assert not list(out.rglob("*.tmp*")) and (out / "journal.jsonl").is_file()
    (out / "journal.jsonl").write_bytes((out / "journal.jsonl").read_bytes()[:-20])
    left = out / "objects" / "ab" / ".abc.0123456789ab.tmp.png"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    make(out, numbered(20))
    left.parent.rmdir() if not any(left.parent.iterdir()) else None
    assert files(out) == files(tmp_path / "whole")


def test_more_of_a_finished_job(tmp_path: Path) -> None:
    make(tmp_path / "whole", numbered(30))
    make(tmp_path / "out", numbered(30), num=12)
    assert make(tmp_path / "out", numbered(30), num=12).earlier == 12

    def stop(counts: Mapping[str, int], *_: object) -> None:
        if sum(counts.values()) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", numbered(30), progress=stop)
    with pytest.raises(JobError, match="is not finished.*run without --retry"):
        make(tmp_path / "out", numbered(30), retry=True)
    done = make(tmp_path / "out", numbered(30))
    assert (done.earlier, done.ok) == (20, 30)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert make(tmp_path / "out", numbered(30), num=50).earlier == 30


def test_retry_does_again_what_failed(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    texts = [*numbered(5), "busy once", *numbered(9)[5:], "busy once too", "last"]
    stage = Marks(remember=str(seen))
    assert make(tmp_path / "out", texts, stage, attempts=1).failed == 2
    assert make(tmp_path / "out", texts, stage, attempts=1).failed == 2
    other = tmp_path / "out" / lines(tmp_path / "out", "samples")[-1]["turns"][0]["parts"][1]["media"]["file"]
    picture = other.read_bytes()
    other.unlink()  # to see that only what failed is done again

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", texts, stage, attempts=1, retry=True, progress=stop)
    done = make(tmp_path / "out", texts, stage, attempts=1)  # goes on with it
    assert (done.failed, done.ok, done.earlier) == (0, 12, 11)
    assert not other.exists()
    other.write_bytes(picture)
    make(tmp_path / "whole", texts, Marks(remember=str(seen)))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_retry_that_fails_again_changes_nothing(tmp_path: Path) -> None:
    texts = [*numbered(3), "busy always", "unwanted", *numbered(6)[3:]]
    make(tmp_path / "out", texts, attempts=1)
    before = files(tmp_path / "out")
    for num in (None, 8, 5):
        assert make(tmp_path / "out", texts, attempts=1, retry=True, num=num).failed == 1
        assert files(tmp_path / "out") == before
    with pytest.raises(JobError, match="has no item 4, and had 8"):
        make(tmp_path / "out", texts[:3], attempts=1, retry=True)


class Here:
    """`Workers` in this process."""

    def __init__(self, stages: Sequence[Stage], out: Path, *_: object, **__: object) -> None:
        self.stages, self.store = stages, Store(out)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, items: Iterator[Item]) -> Iterator[Item]:
        return (here(self.stages, item, self.store) for item in items)


def test_retry_does_again_all_that_failed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyglot_synth.run.Workers", Here)
    texts = [*numbered(3), "busy once", *numbered(9)[4:], "busy once too", *numbered(30)[10:]]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for num in (None, 20, 5):
        seen, out = tmp_path / f"seen {num}", tmp_path / f"out {num}"
        seen.mkdir()
        stage = Marks(remember=str(seen))
        assert make(out, texts, stage, num=10).failed == 2
        with pytest.raises(KeyboardInterrupt):
            make(out, texts, stage, num=num, retry=True, progress=stop)
        done = make(out, texts, stage, num=num)  # goes on with it
        assert (done.failed, done.ok, done.earlier) == (0, 10, 9)
        make(tmp_path / f"whole {num}", texts, stage, num=10)
        assert files(out) == files(tmp_path / f"whole {num}")
        assert make(out, texts, stage, num=num, retry=True).ok == 10, "nothing failed: nothing is done"
        assert make(out, texts, stage, num=20).ok == 20


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """The system itself refuses: no file may be larger than this."""
    run(Texts(numbered(6)), [Noise()], tmp_path / "whole", workers=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(StoreError, match="cannot be written .*free some space"):
            run(Texts(numbered(6)), [Noise()], tmp_path / "out", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        with pytest.raises(StoreError, match="journal.jsonl: cannot be written .*free some space"):
            run(Texts(numbered(60)), [], tmp_path / "lines", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run(Texts(numbered(60)), [], tmp_path / "whole lines", workers=1)
    run(Texts(numbered(60)), [], tmp_path / "lines", workers=1)
    assert files(tmp_path / "lines") == files(tmp_path / "whole lines")
    assert not list((tmp_path / "out").rglob("*.flac")) and not (tmp_path / "out" / "errors.jsonl").exists()
    run(Texts(numbered(6)), [Noise()], tmp_path / "out", workers=1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def alive(pid: int) -> bool:
    """Whether a process runs (one that ended and is not yet reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_a_program_that_hangs_is_ended_too(tmp_path: Path) -> None:
    texts = ["a", "program", "b", "hang in the middle"]
    done = make(tmp_path / "out", texts, Marks(remember=str(tmp_path)), timeout=1.0, attempts=1)
    assert (done.ok, done.failed) == (2, 2)
    assert [line["reason"] for line in lines(tmp_path / "out", "errors")] == ["timeout"] * 2
    assert not list((tmp_path / "out").rglob("*.tmp*")), "half an object is left"
    assert ended(int((tmp_path / "program").read_text()))


PARENT = """
import signal, sys; sys.path[:0] = [{tests!r}]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
from pathlib import Path
from test_pipeline import Marks, make
if __name__ == "__main__":
    make(Path({out!r}), ["program"], Marks(remember={seen!r}), workers=1)
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_parent(sign: signal.Signals, tmp_path: Path) -> None:
    program, started = tmp_path / "parent.py", tmp_path / "program"
    names = {"tests": str(Path(__file__).parent), "out": str(tmp_path / "out"), "seen": str(tmp_path)}
    program.write_text(PARENT.format(**names))
    parent = subprocess.Popen([sys.executable, str(program)], stderr=subprocess.PIPE, text=True, process_group=0)
    deadline = time.monotonic() + 60
    while not (started.is_file() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = [int(started.read_text())]
    children.append(int(Path(f"/proc/{children[0]}/stat").read_text().rpartition(")")[2].split()[1]))  # the worker
    began = time.monotonic()
    os.killpg(parent.pid, sign)  # as a terminal does
    error = parent.communicate(timeout=20)[1]
    assert time.monotonic() - began < 5
    assert all(map(ended, children))
    if sign == signal.SIGINT:
        assert error.count("Traceback") == 1 and "KeyboardInterrupt" in error, "of the parent only"


def test_refusals(tmp_path: Path) -> None:
    with Job(tmp_path / "held", {"a": 1}), pytest.raises(JobError, match="another run is writing there"):
        Job(tmp_path / "held", {"a": 1}).__enter__()
    with Job(tmp_path / "b", {"b": [1, 2]}), pytest.raises(JobError, match="another run"):
        Job(tmp_path / "b", {"b": [1, 3]}).__enter__()
    with Job(tmp_path / "b", {"b": [1, 3]}) as job:  # nothing was made by the first
        job.append(Item(0, Dialogue((), "none"), "failed"))
    with pytest.raises(JobError, match=r"made by another recipe \(b.1 was 3, now 4\)"):
        Job(tmp_path / "b", {"b": [1, 4]}).__enter__()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(JobError, match=r"holds other files \(thesis.tex\)"):
        make(tmp_path / "full", numbered(1))
    with pytest.raises(WorkerError, match="not here; install it"):
        make(tmp_path / "no", numbered(1), NoEngine())
    with pytest.raises(WorkerError, match="stage 'bad-engine' was not set up: KeyError: 'engine'; see the log"):
        make(tmp_path / "bad", numbered(1), BadEngine())
    with pytest.raises(ManifestError, match="use processes or ray"):
        make(tmp_path / "on", numbered(1), on="fire")
    for count in (0, -1):
        with pytest.raises(ManifestError, match=f"workers is {count}; give 1 or more"):
            make(tmp_path / "on", numbered(1), workers=count)
        with pytest.raises(ManifestError, match=f"count is {count}"):
            Workers([], tmp_path, count)
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ManifestError, match="timeout is .*give seconds"):
            make(tmp_path / "on", numbered(1), timeout=seconds)
    with pytest.raises(ManifestError, match="never ends; say how many"):
        run(GrammarWriter(), [], tmp_path / "endless", workers=1)
    with pytest.raises(WorkerError, match=r"not set up within 0.2 s.*--start-timeout"):
        make(tmp_path / "slow", numbered(1), SlowEngine(), start_timeout=0.2)
    left = [child for child in multiprocessing.active_children() if child.is_alive()]
    with pytest.raises(AttributeError, match="local object|lambda"):
        make(tmp_path / "pickle", numbered(1), Marks(remember=lambda: ""))  # type: ignore[arg-type]
    assert multiprocessing.active_children() == left, "a worker is left"


def test_a_folder_of_others_is_left_as_it_was(tmp_path: Path) -> None:
    for name in (".draft.tmp.odt", ".notes.tmp1", "thesis.tex"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(JobError, match=r"holds other files \(.draft.tmp.odt\)"):
        make(tmp_path, numbered(1))
    assert sorted(files(tmp_path)) == [".draft.tmp.odt", ".notes.tmp1", "thesis.tex"], "and there is no lock"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".job.0123456789ab.tmp.json").write_text("{")  # all that a run left that was killed
    with Job(tmp_path / "out", {"a": 1}):
        (tmp_path / "out" / ".draft.tmp.odt").write_text("mine")
    with Job(tmp_path / "out", {"a": 1}):
        assert sorted(files(tmp_path / "out")) == [".draft.tmp.odt", ".lock", "job.json", "journal.jsonl"]


def test_dry_run_leaves_nothing(tmp_path: Path) -> None:
    estimate = dry_run(Texts(numbered(50)), [Marks()], num=50, tries=5, workers=1).to_dict()
    assert (estimate["tried"], estimate["ok"], estimate["filtered"], estimate["samples"]) == (5, 1.0, 0.0, 50)
    assert estimate["hours"] > 0 and estimate["start_seconds"] > 0 and estimate["bytes_per_item"] > 100
    half = dry_run(Texts(["a", "unwanted", "b", "broken"]), [Marks()], workers=1)
    assert (half.ok, half.filtered, half.failed) == (0.5, 0.25, 0.25)
    assert half.num == 4 and half.to_dict()["samples"] == 2, "the source ended before"
    assert dry_run(Texts(["a", "b"]), [], num=1000, workers=1).to_dict()["samples"] == 2
    assert not list(tmp_path.iterdir())
    with pytest.raises(ManifestError, match="says nothing of a cluster"):
        dry_run(Texts(["a"]), [Marks()], on="ray")


def test_the_pace_of_many_workers() -> None:
    """64 workers that load for ten seconds and take two for an item: 32 a second, though 64 come at once."""
    ended = [10.0 + 2 * (1 + number // 64) for number in range(256)]
    assert start_and_pace(ended, 64) == pytest.approx((10.0, 2 / 64))
    assert start_and_pace([12.0] * 20, 64) == (0.0, 0.6), "less than one wave: all of the time counts"
    assert start_and_pace([3.0, 4.0, 5.0], 1) == (2.0, 1.0)
    assert start_and_pace([], 2) == (0.0, 0.0)
