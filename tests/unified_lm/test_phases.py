"""Phases of a plan, extension, repetition caps, budgets and condition dropout: counts, order, fingerprints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.data import IGNORED, PackedDataset, TokenDataModule, collate
from anyglot_lm.files import fingerprint_of, sha256_file
from anyglot_lm.packing import numbers_of
from anyglot_lm.plan import Phase, Plan, PlanError, build_plan, extend_plan
from anyglot_lm.plan_view import plan_to_dict
from anyglot_lm.segments import CHAT, Sample, Segment
from anyglot_lm.shards import ShardWriter
from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import FingerprintError

IMAGE = BlockSpec("image", "i" * 64, 16, pattern="raster", grid=(2, 2))
VOCABULARY = Vocabulary.build(200, IMAGE)
CONTROLS = VOCABULARY.controls


class Bytes:
    """A text tokenizer of ids below 200."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 200 for c in text]

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids))


def sample(rng: np.random.Generator, task: str) -> Sample:
    text = "".join(rng.choice(list("abcdef"), rng.integers(3, 25)))
    image = rng.integers(0, 16, (1, 2, 2))
    if task == "text":  # nothing to drop: the first target is right after the assistant marker
        return Sample([Segment("text", text, "assistant")])
    first, second = (("text", text), ("image", image)) if task == "to image" else (("image", image), ("text", text))
    turns = [Segment(*first, "user"), Segment(*second, "assistant")]
    return Sample(turns * 2 if rng.random() < 0.2 else turns)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for name, tasks in (("a", ["to image", "to text"]), ("b", ["text"])):
        with ShardWriter(folder / name, VOCABULARY, text=Bytes()) as writer:
            for i in range(200):
                writer.add_sample(sample(rng, tasks[i % len(tasks)]), tasks[i % len(tasks)])
    return [folder / "a", folder / "b"]


def _lengths(plan: Plan) -> np.ndarray:
    return np.concatenate([s.lengths for s in plan.shards])


def _counts(plan: Plan, packs: slice = slice(None)) -> np.ndarray:
    packs_ = [plan.pack(i) for i in range(len(plan))[packs]]
    return np.bincount(numbers_of(np.concatenate(packs_)), minlength=400)


A, B = {"to image": 3, "to text": 1, "text": 0}, {"to image": 1, "to text": 1, "text": 2}


def test_every_phase_has_its_mixture_and_epochs_go_on(shards: list[Path]) -> None:
    plan = build_plan(shards, seq_len=64, phases=[Phase(A, 20), Phase(B, 40), Phase(B, 40)], seed=2)
    assert len(plan) == 100 and list(plan.prefixes.values()) == [20, 60, 100]
    for phase, weights in zip(plan.phases, (A, B, B), strict=True):
        total = sum(weights.values())
        for source in phase.sources:
            assert source.drawn_ids / phase.used_ids == pytest.approx(weights[source.name] / total, abs=0.03)
    assert not _counts(plan, slice(0, 20))[200:].any(), "text has weight 0 at first"
    tasks = np.concatenate([np.asarray(s.tasks) + 2 * i for i, s in enumerate(plan.shards)])
    counts = _counts(plan)
    for task in range(3):
        assert np.ptp(counts[tasks == task]) <= 1, "nothing twice before everything once, across phases"
    assert plan.used_ids == _lengths(plan)[plan.docs].sum() == sum(s.drawn_ids for s in plan.sources)
    assert "phase 1, plan so far" in plan.describe()


def test_shares_of_a_curriculum(shards: list[Path]) -> None:
    plan = build_plan(shards, seq_len=64, num_packs=50, phases=[Phase(A, share=1), Phase(B, share=3)])
    assert [phase.num_packs for phase in plan.phases] == [12, 38]
    natural = build_plan(shards, seq_len=64, epochs=1)
    assert len(build_plan(shards, seq_len=64, epochs=1, phases=[Phase(A, share=1), Phase(share=1)])) == len(natural)
    for phases, options, problem in (
        ([Phase(A, 5)], {"num_packs": 5}, "for every phase and nowhere else"),
        ([Phase(A, 5), Phase(B, share=1)], {}, "for every phase and nowhere else"),
        ([Phase(A, share=1), Phase(B)], {"num_packs": 9}, "without num_packs and without share"),
        ([Phase(A, 5)], {"condition_dropout": 0.1}, "belong to every phase"),
        ([Phase(A, share=1), Phase(B, share=1)], {"num_packs": 1}, "one per phase"),
        ([], {"num_packs": 9}, "at least one"),
    ):
        with pytest.raises(PlanError, match=problem):
            build_plan(shards, seq_len=64, phases=phases, **options)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="it is a probability"):
        Phase(condition_dropout=1.5)


def test_extension_keeps_what_is_there(shards: list[Path], tmp_path: Path) -> None:
    first = build_plan(shards, A, seq_len=64, num_packs=20, seed=5, path=tmp_path / "first")
    longer = extend_plan(first, B, num_packs=30, path=tmp_path / "longer")
    assert np.array_equal(longer.pack_offsets[:21], first.pack_offsets)
    assert np.array_equal(longer.docs[: len(first.docs)], first.docs) and len(longer) == 50
    assert list(longer.prefixes) == [first.fingerprint, longer.fingerprint]
    assert build_plan(shards, seq_len=64, phases=[Phase(A, 20), Phase(B, 30)], seed=5).fingerprint == longer.fingerprint
    assert extend_plan(first, A, num_packs=30).fingerprint != longer.fingerprint
    for path, plan in (("first", first), ("longer", longer)):
        loaded = Plan.load(tmp_path / path)
        assert loaded.phases == plan.phases and loaded.describe() == plan.describe()
    data = TokenDataModule(longer)
    data.load_state_dict({"samples": 17, "plan": first.fingerprint})
    assert data.samples == 17 and data.state_dict()["plan"] == longer.fingerprint
    with pytest.raises(FingerprintError, match="the checkpoint is of plan"):
        TokenDataModule(first).load_state_dict({"samples": 17, "plan": longer.fingerprint})


@pytest.mark.parametrize("what", ["docs", "pack_offsets", "phases", "num_packs"])
def test_a_changed_chain_is_found(shards: list[Path], tmp_path: Path, what: str) -> None:
    build_plan(shards, seq_len=64, phases=[Phase(A, 20), Phase(B, 30)], path=tmp_path / "p")
    file = tmp_path / "p" / f"{what}.npy"
    if file.exists():
        values = np.load(file)
        values[[3, 4]] = values[[4, 3]]
        np.save(file, values)
    else:
        file = tmp_path / "p" / "plan.json"
        content = json.loads(file.read_text())
        if what == "phases":
            del content["phases"][1]
        else:
            content["phases"][0]["num_packs"] += 1
        file.write_text(json.dumps(content))
    with pytest.raises(FingerprintError, match="its arrays are not those of"):
        Plan.load(tmp_path / "p")


def test_plans_of_version_1_load_and_grow(shards: list[Path], tmp_path: Path) -> None:
    plan = build_plan(shards, B, seq_len=64, num_packs=20, path=tmp_path / "p")
    parameters = {"algorithm": "best-fit-decreasing/1", "seq_len": 64, "num_packs": 20, "weights": B, "seed": 0}
    arrays = {name: sha256_file(tmp_path / "p" / f"{name}.npy") for name in ("pack_offsets", "docs")}
    content = json.loads((tmp_path / "p" / "plan.json").read_text())
    keys = ("name", "documents", "ids", "too_long", "weight", "drawn_documents", "drawn_ids")
    known = [s["fingerprint"] for s in content["shards"]]
    old = fingerprint_of({"parameters": parameters, "shards": known, "arrays": arrays})
    content |= {"version": 1, "fingerprint": old, "parameters": parameters}
    content["sources"] = [{k: s[k] for k in keys} for s in content.pop("phases")[0]["sources"]]
    (tmp_path / "p" / "plan.json").write_text(json.dumps(content))
    loaded = Plan.load(tmp_path / "p")
    assert loaded.fingerprint == old and np.array_equal(loaded.docs, plan.docs)
    longer = extend_plan(loaded, A, num_packs=5, path=tmp_path / "longer")
    assert list(Plan.load(tmp_path / "longer").prefixes) == [old, longer.fingerprint]


def test_capped_sources_leave_the_rest_to_the_others(shards: list[Path]) -> None:
    weights = {"to image": 8, "to text": 1, "text": 1}
    with pytest.raises(PlanError, match="source 'to image' would be gone through"):
        build_plan(shards, weights, seq_len=64, num_packs=200, max_repetition={"to image": 2})
    plan = build_plan(shards, weights, seq_len=64, num_packs=200, max_repetition={"to image": 2}, limit="cap")
    image, text, other = plan.sources
    assert image.capped and not text.capped and "held there by max_repetition" in plan.describe()
    assert 0.97 * 2 * image.documents <= image.drawn_documents <= 2 * image.documents, "the limit and no more"
    assert _counts(plan)[:200:2].max() == 2
    assert text.drawn_ids == pytest.approx(other.drawn_ids, rel=0.05), "the others keep their proportions"
    counts = _counts(build_plan(shards, seq_len=64, num_packs=120, max_repetition=1, limit="cap"))
    assert counts.max() == 1
    with pytest.raises(PlanError, match="all sources together give"):
        build_plan(shards, seq_len=64, num_packs=600, max_repetition=2, limit="cap")
    with pytest.raises(PlanError, match=r"max_repetition for nobody; the sources are"):
        build_plan(shards, seq_len=64, num_packs=6, max_repetition={"nobody": 2})


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_limits_are_of_documents_whether_or_not_they_keep_their_prompts(shards: list[Path], dropout: float) -> None:
    only, capped = {"to image": 1, "to text": 0, "text": 0}, {"to image": 8, "to text": 1, "text": 1}
    plan = build_plan(shards, only, seq_len=64, num_packs=60, condition_dropout=dropout)
    times = plan.sources[0].repetition
    build_plan(shards, only, seq_len=64, num_packs=60, condition_dropout=dropout, max_repetition=1.1 * times)
    with pytest.raises(PlanError, match="source 'to image' would be gone through"):
        build_plan(shards, only, seq_len=64, num_packs=60, condition_dropout=dropout, max_repetition=0.9 * times)
    plan = build_plan(
        shards,
        capped,
        seq_len=64,
        num_packs=200,
        condition_dropout=dropout,
        max_repetition={"to image": 2},
        limit="cap",
    )
    image = plan.sources[0]
    assert image.capped and 1.8 < image.repetition <= 2
    assert image.drawn_ids / plan.used_ids == pytest.approx(image.weight, abs=0.01)


def test_limits_count_the_phases_before(shards: list[Path]) -> None:
    only = {"to image": 1, "to text": 0, "text": 0}
    first = build_plan(shards, only, seq_len=64, num_packs=20)
    extend_plan(first, only, num_packs=10, max_repetition=2)
    with pytest.raises(PlanError, match="source 'to image' would be gone through"):
        extend_plan(first, only, num_packs=70, max_repetition=2)


def image_share(plan: Plan) -> float:
    """Share of the images in the ids of a plan, counted in its rows."""
    rows = PackedDataset(plan).__getitems__(range(len(plan))).batch["input_ids"].numpy()
    block = VOCABULARY.block("image")
    inside = (rows == block.start_id) | ((rows >= block.end_id) & (rows < block.stop_id))
    return float(inside.sum() / (rows != CONTROLS["pad"]).sum())


def test_modality_budgets(shards: list[Path]) -> None:
    natural = image_share(build_plan(shards, seq_len=64, num_packs=300))
    for wanted in (0.1, 0.25):
        assert abs(natural - wanted) > 0.03
        plan = build_plan(shards, seq_len=64, num_packs=300, modality_budgets={"image": wanted})
        assert image_share(plan) == pytest.approx(wanted, abs=0.015)
        assert f"(wanted image {wanted:.1%})" in plan.describe()
    with pytest.raises(PlanError, match=r"cannot be met by these sources; in reach: image 0\.0% to \d"):
        build_plan(shards, seq_len=64, num_packs=30, modality_budgets={"image": 0.9})
    with pytest.raises(PlanError, match="modality_budgets for music; the modalities are text, image"):
        build_plan(shards, seq_len=64, num_packs=30, modality_budgets={"music": 0.1})


@pytest.mark.parametrize(("dropout", "long"), [(0.0, True), (0.5, False), (0.9, False), (0.9, True)])
def test_budgets_are_of_what_is_drawn(tmp_path: Path, dropout: float, long: bool) -> None:
    """Prompts that are dropped and documents longer than a row count for nothing, and the tree says what is there."""
    with ShardWriter(tmp_path / "a", VOCABULARY, text=Bytes()) as writer:
        for i in range(200):
            images, text = (
                [Segment("image", np.full((1, 2, 2), i % 16), "user")] * 3,
                "x" * (200 if i % 2 and long else 12),
            )
            writer.add_sample(Sample([*images, Segment("text", text, "assistant")]), "to text")
            image = Segment("image", np.full((1, 2, 2), i % 16), "assistant")
            writer.add_sample(Sample([Segment("text", text, "user"), image]), "to image")
            writer.add_sample(Sample([Segment("text", text, "assistant")]), "text")
    budgets = {"image": 0.3}
    plan = build_plan([tmp_path / "a"], seq_len=96, num_packs=400, condition_dropout=dropout, modality_budgets=budgets)
    assert image_share(plan) == pytest.approx(0.3, abs=0.02)
    assert f"image {image_share(plan):.1%} (wanted image 30.0%)" in plan.describe()
    longer = extend_plan(plan, A, num_packs=50, path=tmp_path / "longer")
    counted = plan_to_dict(Plan.load(tmp_path / "longer"))["ids_by_modality"]["image"] / longer.used_ids
    assert counted == pytest.approx(image_share(longer), abs=1e-4 if long else 0.01)


def test_budgets_that_caps_would_break_are_refused(shards: list[Path]) -> None:
    budgets, limits = {"image": 0.25}, {"to image": 1, "to text": 1}
    with pytest.raises(PlanError, match=r"leaves too little for the modality_budgets: image \d+\.\d%, not 25\.0%"):
        build_plan(shards, seq_len=64, num_packs=200, modality_budgets=budgets, max_repetition=limits, limit="cap")
    free = build_plan(shards, seq_len=64, num_packs=200, modality_budgets=budgets)
    roomy = build_plan(shards, seq_len=64, num_packs=200, modality_budgets=budgets, max_repetition=90, limit="cap")
    assert roomy.sources == free.sources


@given(st.floats(0.05, 1.0), st.integers(0, 3))
def test_condition_dropout(shards: list[Path], probability: float, seed: int) -> None:
    plan = build_plan(shards, B, seq_len=64, num_packs=40, seed=seed, condition_dropout=probability)
    docs = np.asarray(plan.docs)
    dropped = docs < 0
    numbers = numbers_of(docs)
    assert not dropped[numbers >= 200].any(), "a document without prompt stays as it is"
    assert dropped[numbers < 200].mean() == pytest.approx(probability, abs=0.25 if probability < 1 else 0)
    prompt = CHAT.prompt(Sample([]), VOCABULARY, None)
    for number in docs[dropped][:5].tolist():
        whole, loss = plan.doc(~number)
        ids, flags = plan.doc(number)
        cut = int(np.flatnonzero(loss)[0])
        assert np.array_equal(ids, np.concatenate([prompt, whole[cut:]]))
        assert np.array_equal(flags, np.concatenate([[False] * 3, loss[cut:]]))
        CHAT.parse(ids, VOCABULARY, Bytes(), flags)
    loads = [sum(len(plan.doc(d)[0]) for d in plan.pack(i)) for i in range(len(plan))]
    assert max(loads) <= 64 and sum(loads) == plan.used_ids and plan.utilisation > 0.9
    assert sum(s.unconditional for s in plan.sources) == dropped.sum()


def test_dropout_is_part_of_the_plan(shards: list[Path]) -> None:
    plans = [build_plan(shards, seq_len=64, num_packs=40, condition_dropout=p) for p in (0.0, 0.3, 0.3, 0.31)]
    assert plans[1].fingerprint == plans[2].fingerprint
    assert len({plan.fingerprint for plan in plans}) == 3


def test_rows_are_those_made_document_by_document(shards: list[Path]) -> None:
    plan = build_plan(shards, seq_len=96, num_packs=60, condition_dropout=0.4, seed=1)
    order = np.random.default_rng(0).permutation(60).tolist()
    batch = collate(PackedDataset(plan).__getitems__(order))
    for row, index in enumerate(order):
        ids, labels, positions = (np.full(96, v) for v in (CONTROLS["pad"], IGNORED, 0))
        at = 0
        for number in plan.pack(index):
            doc, loss = plan.doc(number)
            stop = at + len(doc)
            ids[at:stop], positions[at:stop] = doc, np.arange(len(doc))
            labels[at : stop - 1] = np.where(loss[1:], doc[1:], IGNORED)
            at = stop
        positions[at:] = np.arange(96 - at)
        for name, values in (("input_ids", ids), ("labels", labels), ("position_ids", positions)):
            assert batch[name][row].tolist() == values.tolist()
            assert PackedDataset(plan)[index][name].tolist() == values.tolist()
    with pytest.raises(IndexError):
        PackedDataset(plan)[60]


def test_the_constant_of_the_loss_is_of_all_phases(shards: list[Path], tmp_path: Path) -> None:
    plan = build_plan(
        shards,
        seq_len=64,
        seed=0,
        phases=[
            Phase({"to text": 1.0, "to image": 0, "text": 0}, 300),
            Phase({"to text": 0, "to image": 1.0, "text": 0}, 300),
        ],
        path=tmp_path / "plan",
    )
    rows = PackedDataset(plan)
    counts = [int((rows[i]["labels"] != IGNORED).sum()) for i in range(len(rows))]
    assert abs(np.mean(counts[:300]) - np.mean(counts[300:])) > 2
    found = TokenDataModule(plan, batch_size=1).targets_per_pack
    assert abs(found - np.mean(counts)) < 0.2 * abs(np.mean(counts[:300]) - np.mean(counts[300:]))
