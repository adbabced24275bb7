"""Plans: whole documents, exact counts, wanted shares, one order for one set of inputs."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.files import new_folder
from anyglot_lm.packing import assign, count_packs
from anyglot_lm.plan import Phase, Plan, PlanError, build_plan, extend_plan
from anyglot_lm.shards import ShardWriter
from anyglot_lm.vocabulary import Vocabulary
from anyglot_tokenizers.errors import FingerprintError, ManifestError

VOCABULARY = Vocabulary.build(200)
CONTROLS = VOCABULARY.controls


def write(path: Path, documents: list[tuple[str, int]]) -> Path:
    """Documents (task, length); the second text id of each is its number, modulo 100."""
    with ShardWriter(path, VOCABULARY) as writer:
        for number, (task, length) in enumerate(documents):
            ids = np.full(length, 100 + number % 100)
            ids[:2] = CONTROLS["bos"], CONTROLS["user"]
            ids[-1] = CONTROLS["eos"]
            writer.add(ids, np.arange(length) >= 2, task)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    first = [("image", 20)] * 100 + [("text", int(n)) for n in rng.integers(4, 30, 200)]
    second = [("speech", int(n)) for n in rng.integers(10, 70, 150)]
    return [write(folder / "a", first), write(folder / "b", second)]


def contents(plan: Plan) -> list[list[int]]:
    return [plan.pack(i) for i in range(len(plan))]


def test_packs_hold_whole_documents_that_fit(shards: list[Path]) -> None:
    plan = build_plan(shards, seq_len=64, num_packs=150, seed=3)
    assert len(plan) == 150
    lengths = np.concatenate([s.lengths for s in plan.shards])
    for pack in contents(plan):
        assert pack and sum(lengths[pack]) <= 64
    assert plan.utilisation > 0.97
    ids, loss = plan.doc(301)
    assert np.array_equal(ids, plan.shards[1].doc(1)[0]) and np.array_equal(loss, plan.shards[1].doc(1)[1])
    assert "too_long" not in plan.describe() and "longer than a row left out" in plan.describe()


def test_natural_mixture_goes_through_everything_evenly(shards: list[Path]) -> None:
    plan = build_plan(shards, seq_len=128, num_packs=400, seed=0)
    counts = np.bincount(plan.docs, minlength=450)
    assert counts.max() - counts.min() <= 2
    assert {round(s.repetition) for s in plan.sources} == {round(plan.sources[0].repetition)}
    for source in plan.sources:
        assert source.drawn_ids / plan.used_ids == pytest.approx(source.weight, abs=0.01)


@pytest.mark.parametrize(
    "weights", [{"image": 1, "text": 3, "speech": 4}, {"a": 1, "b": 1}, {"image": 0, "text": 1, "b": 1}]
)
def test_weights_are_shares_of_ids(shards: list[Path], weights: dict[str, float]) -> None:
    plan = build_plan(shards, weights, seq_len=128, num_packs=200)
    total = sum(weights.values())
    for source in plan.sources:
        assert source.drawn_ids / plan.used_ids == pytest.approx(weights[source.name] / total, abs=0.015)
        assert (source.drawn_documents == 0) == (weights[source.name] == 0)


def test_epochs(shards: list[Path]) -> None:
    one = build_plan(shards, seq_len=128, epochs=1)
    assert 0.95 < one.sources[0].repetition <= 1.05
    assert len(build_plan(shards, seq_len=128, epochs=2.5)) == round(len(one) * 2.5)


def test_repetition_limit(shards: list[Path]) -> None:
    weights = {"image": 1, "text": 1, "speech": 1}
    build_plan(shards, weights, seq_len=128, num_packs=30, max_repetition=2)
    with pytest.raises(PlanError, match=r"source 'image' would be gone through 12\.8 times, max_repetition is 4"):
        build_plan(shards, weights, seq_len=128, num_packs=600, max_repetition=4)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (
            {"image": 1, "text": 1, "speech": 1, "video": 1},
            "no task or shard folder has that name; there are the tasks image",
        ),
        ({"image": 1, "text": 1}, "task 'speech' of .*b has no weight"),
        ({"a": 1, "b": 1, "image": 1}, "task 'image' of .*a has the weights of 'a' and 'image'"),
        ({"a": 0, "b": 0}, "one above 0"),
        ({"a": -1, "b": 2}, "0 or more"),
    ],
)
def test_bad_weights(shards: list[Path], weights: dict[str, float], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        build_plan(shards, weights, seq_len=64, num_packs=10)


def test_bad_sizes(shards: list[Path]) -> None:
    with pytest.raises(PlanError, match="either num_packs or epochs"):
        build_plan(shards, seq_len=64)
    with pytest.raises(PlanError, match="at least one pack"):
        build_plan(shards, seq_len=64, num_packs=0)
    for wrong, message in (
        ({"seed": -1}, "seed=-1; give 0 or more"),
        ({"max_repetition": float("inf")}, "leave out what has no limit"),
        ({"max_repetition": {"text": float("inf")}}, "leave out what has no limit"),
        ({"num_packs": None, "epochs": float("inf")}, "epochs=inf; give a finite number"),
        ({"weights": ["text"]}, r"weights=\['text'\]; give a number for every name"),
    ):
        with pytest.raises(PlanError, match=message):
            build_plan(shards, **{"seq_len": 64, "num_packs": 3, **wrong})  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"num_packs=3\.5; .*whole ones"):
        Phase(num_packs=3.5)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="larger seq_len"):
        build_plan(shards, seq_len=2, num_packs=1)
    with pytest.raises(PlanError, match="source 'image' has weight 1 but no document that fits"):
        build_plan(shards, {"image": 1, "text": 1, "speech": 1}, seq_len=12, num_packs=1)


def test_one_order_per_input(shards: list[Path]) -> None:
    def plan(**changes: object) -> Plan:
        return build_plan(shards, **{"seq_len": 64, "num_packs": 50, "seed": 1, **changes})  # type: ignore[arg-type]

    assert plan().fingerprint == plan().fingerprint and contents(plan()) == contents(plan())
    prints = {
        plan(**c).fingerprint
        for c in ({}, {"seed": 2}, {"num_packs": 51}, {"seq_len": 65}, {"weights": {"a": 1, "b": 1}})
    }
    assert len(prints) == 5
    assert contents(plan(seed=2)) != contents(plan())


def test_save_load(shards: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "plan"
    plan = build_plan(shards, seq_len=64, num_packs=50, path=path)
    assert isinstance(plan.docs, np.memmap)
    before = (path / "plan.json").stat().st_mtime_ns
    again = build_plan(shards, seq_len=64, num_packs=50, path=path)
    assert (path / "plan.json").stat().st_mtime_ns == before, "an equal plan is kept"
    loaded = Plan.load(path)
    assert contents(loaded) == contents(plan) == contents(again) and loaded.fingerprint == plan.fingerprint
    assert loaded.sources == plan.sources and loaded.describe() == again.describe()
    other = build_plan(shards, seq_len=64, num_packs=51, path=path)
    assert len(Plan.load(path)) == 51 == len(other)
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]


def test_several_processes_may_save_one_plan(shards: list[Path], tmp_path: Path) -> None:
    plan = build_plan(shards, seq_len=64, num_packs=50)
    with ThreadPoolExecutor(8) as pool:
        saved = list(pool.map(plan.save, [tmp_path / "plan"] * 8))
    assert {p.fingerprint for p in saved} == {plan.fingerprint}
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]


def test_what_comes_between_two_looks_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "plan"
    place.mkdir()
    (place / "theirs").write_text("whole")
    looks = iter([False, True, True])
    with new_folder(place, keep=lambda path: next(looks)) as folder:
        (folder / "ours").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["plan", "theirs"]
    with pytest.raises(ManifestError, match="exists already"), new_folder(place, keep=lambda path: False):
        pytest.fail("another folder is in the way")


def test_what_came_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def meanwhile(place: Path) -> None:
        place.mkdir()
        (place / "theirs").write_text("whole")

    with pytest.raises(ManifestError, match="folder: exists already"), new_folder(tmp_path / "folder") as folder:
        (folder / "ours").write_text("whole")
        meanwhile(tmp_path / "folder")
    ids = np.asarray([CONTROLS["bos"], CONTROLS["user"], CONTROLS["eos"]])
    with (
        pytest.raises(ManifestError, match="shards: exists already"),
        ShardWriter(tmp_path / "shards", VOCABULARY) as writer,
    ):
        writer.add(ids, np.asarray([False, False, True]), "t")
        meanwhile(tmp_path / "shards")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["folder", "theirs", "shards", "theirs"]
    with new_folder(tmp_path / "folder", overwrite=True) as folder:
        (folder / "ours").write_text("whole")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["ours"]


def test_plan_finds_moved_shards_and_refuses_others(tmp_path: Path) -> None:
    first = write(tmp_path / "x" / "shards", [("t", 10)] * 5)
    build_plan([first], seq_len=32, num_packs=3, path=tmp_path / "x" / "plan")
    shutil.move(tmp_path / "x", tmp_path / "y")
    assert len(Plan.load(tmp_path / "y" / "plan")) == 3
    other = write(tmp_path / "other", [("t", 10)] * 6)
    with pytest.raises(FingerprintError, match=r"other shards than .*other"):
        Plan.load(tmp_path / "y" / "plan", shards=[other])
    docs = np.load(tmp_path / "y" / "plan" / "docs.npy")
    np.save(tmp_path / "y" / "plan" / "docs.npy", docs[::-1])
    with pytest.raises(FingerprintError, match="its arrays are not those"):
        Plan.load(tmp_path / "y" / "plan")


def test_a_plan_is_told_where_its_shards_lie_now(tmp_path: Path) -> None:
    first = write(tmp_path / "x" / "shards", [("t", 10)] * 5)
    plan = build_plan([first], seq_len=32, num_packs=3, path=tmp_path / "plan")
    shutil.move(tmp_path / "x", tmp_path / "y")
    moved = build_plan([tmp_path / "y" / "shards"], seq_len=32, num_packs=3, path=tmp_path / "plan")
    assert moved.fingerprint == plan.fingerprint == Plan.load(tmp_path / "plan").fingerprint
    assert moved.shards[0].path == tmp_path / "y" / "shards"


@pytest.mark.parametrize(
    ("name", "harm"),
    [("docs.npy", "cut"), ("docs.npy", "changed"), ("pack_offsets.npy", "changed"), ("plan.json", "cut")],
)
def test_a_damaged_plan_is_built_again(shards: list[Path], tmp_path: Path, name: str, harm: str) -> None:
    plan = build_plan(shards, seq_len=64, num_packs=50, path=tmp_path / "plan")
    whole, known = (tmp_path / "plan" / name).read_bytes(), contents(plan)
    (tmp_path / "plan" / name).write_bytes(b"" if harm == "cut" else whole[:-9] + whole[-9:][::-1])
    with pytest.raises((FingerprintError, ManifestError), match=r"build the plan again|write it again"):
        Plan.load(tmp_path / "plan")
    again = build_plan(shards, seq_len=64, num_packs=50, path=tmp_path / "plan")
    assert again.fingerprint == plan.fingerprint and contents(Plan.load(tmp_path / "plan")) == known


def test_pickle(shards: list[Path], tmp_path: Path) -> None:
    plan = build_plan(shards, seq_len=64, num_packs=50)
    assert contents(pickle.loads(pickle.dumps(plan))) == contents(plan)
    saved = plan.save(tmp_path / "plan")
    assert len(pickle.dumps(saved)) < 1000
    assert contents(pickle.loads(pickle.dumps(saved))) == contents(plan)


def test_json_is_plain(shards: list[Path], tmp_path: Path) -> None:
    build_plan(shards, seq_len=64, num_packs=50, path=tmp_path / "plan")
    content = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert content["num_packs"] == 50 and not Path(content["shards"][0]["path"]).is_absolute()


@given(st.integers(4, 40), st.data())
def test_count_is_that_of_assign(seq_len: int, data: st.DataObject) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=80)))
    packs, pack_of = assign(np.arange(len(lengths)), lengths, seq_len)
    assert packs == count_packs(np.bincount(lengths), seq_len)
    loads = np.bincount(pack_of, lengths, minlength=packs)
    assert loads.max() <= seq_len and loads.min() > 0 and len(loads) == packs
    assert np.sort(loads)[:2].sum() > seq_len or packs == 1, "two packs would have fit one"


def test_100k_documents_are_packed_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "a", [("t", 10)])
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.7, 100_000), 8, 2000).astype(np.int64)
    monkeypatch.setattr("anyglot_lm.shards.ShardReader.lengths", property(lambda self: lengths))
    monkeypatch.setattr("anyglot_lm.shards.ShardReader.tasks", property(lambda self: np.zeros(100_000, np.uint16)))
    start = time.perf_counter()
    plan = build_plan([path], seq_len=2048, num_packs=int(lengths.sum()) // 2048)
    assert time.perf_counter() - start < 3
    assert plan.utilisation > 0.999


@pytest.fixture(scope="module")
def twos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of pairs of uneven documents."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("twos")
    first = [(task, int(n)) for task in ("image", "text") for n in rng.integers(4, 30, 60)]
    return [write(folder / "a", first), write(folder / "b", [("speech", int(n)) for n in rng.integers(4, 60, 40)])]


def test_units_stay_together(twos: list[Path], tmp_path: Path) -> None:
    plan = build_plan(twos, seq_len=64, num_packs=80, together=2, path=tmp_path / "plan")
    assert len(plan) == 80
    lengths = np.concatenate([s.lengths for s in plan.shards])
    for pack in contents(plan):
        assert pack and sum(lengths[pack]) <= 64
        assert all(a % 2 == 0 and b == a + 1 for a, b in zip(pack[::2], pack[1::2], strict=True))
    fits = lengths.reshape(-1, 2).sum(1) <= 64
    drawn = np.bincount(plan.docs[::2] // 2, minlength=len(fits))
    assert not drawn[~fits].any() and (~fits).any()
    assert drawn[fits].max() - drawn[fits].min() <= 2
    speech = next(s for s in plan.sources if s.name == "speech")
    assert speech.too_long == 2 * (~fits[60:]).sum() and speech.documents == 2 * fits[60:].sum()
    assert speech.drawn_documents == (plan.docs >= 120).sum()
    assert speech.drawn_ids == lengths[plan.docs[plan.docs >= 120]].sum()
    assert Plan.load(tmp_path / "plan").fingerprint == plan.fingerprint, "the parameters are in the fingerprint"
    longer = extend_plan(plan, {"speech": 1, "image": 0, "text": 0}, num_packs=20)
    assert contents(longer)[:80] == contents(plan) and plan.fingerprint in longer.prefixes
    added = contents(longer)[80:]
    assert all(a >= 120 and a % 2 == 0 and b == a + 1 for p in added for a, b in zip(p[::2], p[1::2], strict=True))


def test_one_document_is_no_unit(shards: list[Path]) -> None:
    """Fingerprints of plans without units are those from before there were any."""
    plan = build_plan(shards, seq_len=64, num_packs=5, together=1)
    assert plan.fingerprint == build_plan(shards, seq_len=64, num_packs=5).fingerprint
    assert "together" not in plan.phases[0].parameters
    pairs = build_plan(shards, seq_len=64, num_packs=5, together=2)
    assert pairs.phases[0].parameters["together"] == 2 and pairs.fingerprint != plan.fingerprint


def test_shards_that_are_not_made_of_units(twos: list[Path], tmp_path: Path) -> None:
    odd = write(tmp_path / "odd", [("t", 9)] * 5)
    mixed = write(tmp_path / "mixed", [("t", 9), ("t", 9), ("t", 9), ("u", 9)])
    with pytest.raises(PlanError, match=r"odd: 5 documents are no multiple of 2"):
        build_plan([*twos, odd], seq_len=64, num_packs=2, together=2)
    with pytest.raises(PlanError, match=r"mixed: documents 2 to 3 belong together but are of several tasks"):
        build_plan([mixed], seq_len=64, num_packs=1, together=2)
    with pytest.raises(PlanError, match=r"condition_dropout=0\.1 with together=2"):
        build_plan(twos, seq_len=64, num_packs=2, together=2, condition_dropout=0.1)
    with pytest.raises(PlanError, match="together=0"):
        build_plan(twos, seq_len=64, num_packs=2, together=0)


def test_a_plan_below_a_link_finds_its_shards(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "scratch" / "deep" / "runs").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "runs").symlink_to(tmp_path / "scratch" / "deep" / "runs")
    plan = build_plan(shards, seq_len=64, num_packs=3, seed=0, path=tmp_path / "home" / "runs" / "plan")
    assert Plan.load(tmp_path / "home" / "runs" / "plan").fingerprint == plan.fingerprint
