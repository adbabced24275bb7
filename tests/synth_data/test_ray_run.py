"""The pipeline on Ray clusters, also of nodes that are killed: the same files as on processes."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bad_stages import EndsItsCopy, Later, Marks, NoEngine, Ordered
from test_pipeline import Texts, files, lines, numbered

from anyglot_synth.ray_plan import groups_of, plan, room_for
from anyglot_synth.ray_run import read_item, write_item
from anyglot_synth.run import run
from anyglot_synth.sources import BadRow
from anyglot_synth.stages import Stage
from anyglot_synth.store import Store
from anyglot_synth.workers import WorkerError
from anyglot_tokenizers.errors import AnyglotError


def test_items_travel_as_one_line(tmp_path: Path) -> None:
    from anyglot_synth.run import items_of

    texts = ["a\u2028b\nc", "naïve 漢字", None]
    for item in items_of(Texts(texts), [], Store(tmp_path)):
        line = write_item(item)
        assert len(line.splitlines()) == 1 and read_item(line) == item
    assert isinstance(next(iter(Texts([None]).read(Store(tmp_path)))), BadRow)


STORE = {"object_store_memory": 80 * 2**20}
TROUBLE = ["unwanted", "defect", "die always", "broken", None, "number 3", "defect in order", "late trouble in b"]
TROUBLE += ["late trouble in c", "late death in b", "late end in b", "late end in c"]


def several(marks: Marks) -> list[Stage]:
    """Four groups: two stages of one core, one of a half, one of one, one of a quarter; and one that runs in order."""
    return [Ordered(), marks, Later("a"), Later("b", cpus=0.5), Later("c"), Later("d", cpus=0.25)]


def cluster_of(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The modules of Ray, with an environment in which its processes find the stages of these tests."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'anyglot[cluster]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # of a busy machine they get their part
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    return ray, Cluster


def test_neighbours_that_ask_for_the_same_are_one_group() -> None:
    names = [[stage.name for stage in group] for group in groups_of(several(Marks())[1:])]
    assert names == [["marks", "a"], ["b"], ["c"], ["d"]]


def test_groups_fit_at_once_or_are_fewer() -> None:
    """A copy that waits for room which another group holds would hang the run."""
    stages = several(Marks())[1:]
    groups = groups_of(stages)  # of 1, 0.5, 1 and 0.25 cores
    two, gpu = {"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}
    assert plan(groups, [two, two]) == (groups, [2, 3, 2, 6])
    assert plan(groups, [two]) == ([stages], [2]), "2.75 cores are wanted"
    assert room_for(groups, [{"CPU": 0.75}] * 4) is None, "room in pieces is no room"
    speak = Later("speak")
    speak.gpus = 1.0
    groups = [[Later("a")], [speak], [Later("b")], [Later("c", cpus=0.5)]]
    assert plan(groups, [two, gpu, two]) == (groups, [2, 1, 2, 4])
    assert plan(groups, [gpu, two]) == ([*groups[:2], [*groups[2], *groups[3]]], [1, 1, 1])
    with pytest.raises(WorkerError, match=r"one copy each of a .*; speak \(cpus: 1, gpus: 1\); b, c \(cpus: 1"):
        plan(groups, [two, two])


@pytest.mark.slow
def test_fewer_cores_than_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One core for four groups: they become one, and nothing hangs."""
    ray, Cluster = cluster_of(monkeypatch)
    texts = [*numbered(30), *TROUBLE]
    run(Texts(texts), several(Marks()), tmp_path / "processes", workers=1, attempts=2)
    cluster = Cluster(initialize_head=True, head_node_args=STORE | {"num_cpus": 1, "num_gpus": 1})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        run(Texts(texts), several(Marks()), tmp_path / "ray", on="ray", attempts=2)
        assert files(tmp_path / "ray") == files(tmp_path / "processes"), lines(tmp_path / "ray", "errors")
        with pytest.raises(
            AnyglotError,
            match=r"copy each of wide \(cpus: 2, gpus: 0\); its nodes have cpus: 1",
        ):
            run(Texts(texts), [Later("wide", cpus=2)], tmp_path / "wide", on="ray")
        speak = Later("speak", cpus=0.5)
        speak.gpus = 1
        done = run(Texts(numbered(30)), [Later("a", cpus=0.5), speak], tmp_path / "gpu", on="ray")
        assert done.ok == 30, "two groups that just fit, of which one has the accelerator"
        with pytest.raises(WorkerError, match="the engine is not here; install it"):
            run(Texts(["a"]), [NoEngine()], tmp_path / "none", on="ray")
        run(Texts(["a", "worse", "b"]), [EndsItsCopy()], tmp_path / "ends", on="ray")
        assert [line["index"] for line in lines(tmp_path / "ends", "samples")] == [0, 2]
        assert [line["reason"] for line in lines(tmp_path / "ends", "errors")] == ["crash"]
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_killed_nodes_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of three nodes one is lost, and the groups still fit; then another, and they do not."""
    ray, Cluster = cluster_of(monkeypatch)
    texts = [*numbered(160), *TROUBLE]
    run(Texts(texts), several(Marks()), tmp_path / "processes", workers=1, attempts=2)
    cluster = Cluster(initialize_head=True, head_node_args=STORE | {"num_cpus": 2})
    try:
        others = [cluster.add_node(num_cpus=1, **STORE) for _ in range(2)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        killed: list[int] = []

        def made() -> int:
            return len(list((tmp_path / "ray" / "objects").rglob("*.png")))

        def kill() -> None:
            for node, count in zip(others, (20, 50), strict=True):
                while made() < count:
                    time.sleep(0.05)
                cluster.remove_node(node, allow_graceful=False)
                killed.append(made())

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        done = run(Texts(texts), several(Marks(seconds=0.05)), tmp_path / "ray", on="ray", attempts=2)
        killer.join(20)
        assert len(killed) == 2 and killed[0] < 160, "it was over before the nodes were killed"
        assert "do not fit as they were" in caplog.text
        assert (done.ok, done.filtered, done.failed) == (160, 4, 8)
        assert "foresaw this later" in caplog.text and "Traceback" in caplog.text, "of a defect on a node"
        assert files(tmp_path / "ray") == files(tmp_path / "processes"), lines(tmp_path / "ray", "errors")
        with pytest.raises(AnyglotError, match="cannot be written"):
            run(Texts(["full"]), [Marks()], tmp_path / "full", on="ray")
    finally:
        ray.shutdown()
        cluster.shutdown()
