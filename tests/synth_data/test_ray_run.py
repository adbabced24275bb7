"""The pipeline on a Ray cluster of two nodes, of which one is killed: the same files as on processes."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bad_stages import Marks
from test_pipeline import Texts, files, lines, numbered

from anyglot_synth.ray_run import read_item, write_item
from anyglot_synth.run import run
from anyglot_synth.sources import BadRow
from anyglot_synth.store import Store
from anyglot_tokenizers.errors import AnyglotError


def test_items_travel_as_one_line(tmp_path: Path) -> None:
    from anyglot_synth.run import items_of

    texts = ["a\u2028b\nc", "naïve 漢字", None]
    for item in items_of(Texts(texts), [], Store(tmp_path)):
        line = write_item(item)
        assert len(line.splitlines()) == 1 and read_item(line) == item
    assert isinstance(next(iter(Texts([None]).read(Store(tmp_path)))), BadRow)


@pytest.mark.slow
def test_a_killed_node_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'anyglot[cluster]'")
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    texts = [*numbered(160), "unwanted", "defect", "die always", "broken", None, "number 3"]
    run(Texts(texts), [Marks()], tmp_path / "processes", workers=1, attempts=2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80 * 2**20})
    try:
        second = cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        killed: list[int] = []

        def kill() -> None:
            while len(list((tmp_path / "ray" / "objects").rglob("*.png"))) < 40:
                time.sleep(0.05)
            cluster.remove_node(second, allow_graceful=False)
            killed.append(len(list((tmp_path / "ray" / "objects").rglob("*.png"))))

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        done = run(Texts(texts), [Marks(seconds=0.05)], tmp_path / "ray", on="ray", attempts=2)
        killer.join(20)
        assert killed and killed[0] < 160, "it was over before the node was killed"
        assert (done.ok, done.filtered, done.failed) == (160, 2, 4)
        assert files(tmp_path / "ray") == files(tmp_path / "processes"), lines(tmp_path / "ray", "errors")
        with pytest.raises(AnyglotError, match="cannot be written"):
            run(Texts(["full"]), [Marks()], tmp_path / "full", on="ray")
    finally:
        ray.shutdown()
        cluster.shutdown()
