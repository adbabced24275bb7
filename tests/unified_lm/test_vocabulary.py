"""The id space: layout, exact spans, slices, manifests and what differs between two of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.vocabulary import BlockSpec, Vocabulary
from anyglot_tokenizers.errors import CodesError, FingerprintError, ManifestError
from anyglot_tokenizers.spec import CodeSpec

IMAGE = BlockSpec("image", "im" * 32, 16, pattern="raster", grid=(2, 3))
SPEECH = BlockSpec("speech", "sp" * 32, 8, 2, input_pattern="first", max_frames=20)
MUSIC = BlockSpec("music", "mu" * 32, 5, 3, pattern="delay")
VOCABULARY = Vocabulary.build(300, IMAGE, SPEECH, MUSIC, text_fingerprint="t" * 64)


def test_layout() -> None:
    v = VOCABULARY
    assert list(v.controls.items()) == [
        ("pad", 300), ("bos", 301), ("eos", 302), ("user", 303), ("assistant", 304)
    ]  # fmt: skip
    assert [b.start_id for b in v.blocks] == [305, 306, 307]
    assert v.open_size == 308
    assert [(b.end_id, b.first_id, b.stop_id) for b in v.blocks] == [
        (308, 309, 325), (325, 326, 342), (342, 343, 358)
    ]  # fmt: skip
    assert v.size == 384
    assert v.block("image").length == 6 and v.block("image").max_length == 6
    assert v.block("speech").length is None and v.block("speech").max_length == 40
    assert v.modalities == ("image", "speech", "music")
    assert v.block_of_start(306) is v.block("speech") and v.block_of_start(0) is None


def test_every_label_has_one_slice_that_holds_it() -> None:
    lo, hi, class_of_id = VOCABULARY.slice_table()
    names = VOCABULARY.slice_names()
    assert names == ["open", "image", "speech/0", "speech/1", "music/0", "music/1", "music/2"]
    assert len(lo) == len(hi) == len(names)
    for label in range(358):
        c = class_of_id[label]
        assert lo[c] <= label < hi[c]
    assert (class_of_id[358:] == -1).all() and len(class_of_id) == VOCABULARY.size
    speech = VOCABULARY.block("speech")
    assert class_of_id[speech.end_id] == names.index("speech/0") == class_of_id[speech.first_id]
    assert sum(hi - lo) == 358


@given(st.sampled_from(["image", "speech", "music"]), st.sampled_from(["input", "output"]), st.data())
def test_span_inverse(modality: str, direction, data) -> None:  # type: ignore[no-untyped-def]
    block = VOCABULARY.block(modality)
    grid = block.grid or (data.draw(st.integers(1, 12)),)
    seed = data.draw(st.integers(0, 1000))
    extra = data.draw(st.integers(0, 2))
    codes = np.random.default_rng(seed).integers(0, block.codebook_size, (block.num_quantizers + extra, *grid))
    ids = VOCABULARY.span(modality, codes, direction)
    assert ids[0] == block.start_id and ids[-1] == block.end_id
    assert ids[1:-1].min() >= block.first_id and ids[1:-1].max() < block.stop_id
    kept = block.pattern_of(direction).num_codebooks(block.num_quantizers)
    assert np.array_equal(VOCABULARY.codes(modality, ids[1:-1], direction), codes[:kept])
    runs = VOCABULARY.split([5, 6, 301, *ids, 7])
    assert [(r.name, r.start, r.stop) for r in runs] == [
        ("text", 0, 2), ("bos", 2, 3), (modality, 3, 3 + len(ids)), ("text", 3 + len(ids), 4 + len(ids))
    ]  # fmt: skip


@given(st.lists(st.integers(290, 384), max_size=20))
def test_codes_of_anything_is_codes_or_a_typed_error(ids: list[int]) -> None:
    for modality in VOCABULARY.modalities:
        try:
            codes = VOCABULARY.codes(modality, ids)
        except CodesError:
            continue
        assert VOCABULARY.codes(modality, VOCABULARY.span(modality, codes)[1:-1]).tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("modality", "codes", "problem"),
    [
        ("image", np.zeros((1, 3, 2), int), "fixes"),
        ("image", np.full((1, 2, 3), 16), r"code 16 is outside the codebook \[0, 16\)"),
        ("image", np.full((1, 2, 3), -1), "code -1"),
        ("image", np.zeros((2, 3), int), "grid"),
        ("image", np.zeros((1, 2, 3)), "integer"),
        ("speech", np.zeros((1, 4), int), "1 quantizers but output spans need 2"),
        ("speech", np.zeros((2, 21), int), "longer than the block's max_length 40"),
        ("speech", np.zeros((2, 0), int), "non-empty"),
    ],
)
def test_bad_codes(modality: str, codes: np.ndarray, problem: str) -> None:
    with pytest.raises(CodesError, match=problem):
        VOCABULARY.span(modality, codes)


def test_bad_ids() -> None:
    with pytest.raises(CodesError, match="holds 6 ids, got 5"):
        VOCABULARY.codes("image", [309] * 5)
    with pytest.raises(CodesError, match=r"id 326 at position 1 is outside \[334, 342\) of codebook 1"):
        VOCABULARY.codes("speech", [326, 326])
    with pytest.raises(CodesError, match="outside any span"):
        VOCABULARY.split([1, 309])
    with pytest.raises(CodesError, match="has no end"):
        VOCABULARY.split([305, 309])
    with pytest.raises(ManifestError, match="no modality 'video'; it has: image, speech, music"):
        VOCABULARY.block("video")


def test_manifest_roundtrip(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    VOCABULARY.save(path)
    loaded = Vocabulary.load(path)
    assert loaded == VOCABULARY and loaded.fingerprint == VOCABULARY.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["vocabulary.json"]
    manifest = json.loads(path.read_text())
    manifest["blocks"][0]["first_id"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="edited by hand"):
        Vocabulary.load(path)
    manifest["blocks"][1]["num_quantizers"] = 0
    path.write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="num_quantizers=0; both must be at least 1"):
        Vocabulary.load(path)
    path.write_text("{")
    with pytest.raises(ManifestError, match="is no JSON"):
        Vocabulary.load(path)
    with pytest.raises(ManifestError, match="cannot be read"):
        Vocabulary.load(tmp_path / "nowhere.json")


@given(
    st.integers(1, 100_000),
    st.lists(
        st.tuples(
            st.sampled_from(["frame_major", "delay", "layer_major", "raster"]),
            st.integers(1, 4096),
            st.integers(1, 8),
            st.integers(1, 32),
        ),
        max_size=4,
    ),
)
def test_any_manifest_roundtrips(text_size: int, blocks: list[tuple[str, int, int, int]]) -> None:
    specs = []
    for i, (order, size, quantizers, side) in enumerate(blocks):
        grid = {"raster": (side, side), "layer_major": (side,)}.get(order)
        most = side if grid is None else None
        specs.append(BlockSpec(f"m{i}", str(i), size, quantizers, order, grid=grid, max_frames=most))
    vocabulary = Vocabulary.build(text_size, *specs)
    again = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary and again.fingerprint == vocabulary.fingerprint
    assert vocabulary.size % 128 == 0


def test_other_tokenizers_keep_all_ids() -> None:
    other = VOCABULARY.with_fingerprints({"image": "f" * 64})
    assert other.block("image").fingerprint == "f" * 64 and other.block("speech") == VOCABULARY.block("speech")
    assert other.fingerprint != VOCABULARY.fingerprint
    image = VOCABULARY.block("image")
    assert other.with_fingerprints({"image": image.fingerprint}) == VOCABULARY
    with pytest.raises(ManifestError, match="smell"):
        VOCABULARY.with_fingerprints({"smell": "f" * 64})


def test_difference_is_named() -> None:
    def other(**changes: object) -> Vocabulary:
        speech = BlockSpec(**{**vars(SPEECH), **changes})  # type: ignore[arg-type]
        return Vocabulary.build(300, IMAGE, speech, MUSIC, text_fingerprint="t" * 64)

    VOCABULARY.check_same(other())
    with pytest.raises(
        FingerprintError, match="a and b differ: block 'speech' is of tokenizer spspspspspsp against xxx"
    ):
        VOCABULARY.check_same(other(fingerprint="x" * 64), "a", "b")
    with pytest.raises(FingerprintError, match="block 'speech' has codebook_size=8 against 9"):
        VOCABULARY.check_same(other(codebook_size=9))
    with pytest.raises(FingerprintError, match="input_pattern=first against frame_major"):
        VOCABULARY.check_same(other(input_pattern=None))
    with pytest.raises(FingerprintError, match="modalities"):
        VOCABULARY.check_same(Vocabulary.build(300, IMAGE, text_fingerprint="t" * 64))
    with pytest.raises(FingerprintError, match="text tokenizer"):
        VOCABULARY.check_same(Vocabulary.build(300, IMAGE, SPEECH, MUSIC))
    with pytest.raises(FingerprintError, match="300 text ids against 301"):
        VOCABULARY.check_same(Vocabulary.build(301, IMAGE, SPEECH, MUSIC))


def test_build_from_code_specs() -> None:
    spec = CodeSpec("speech", (8, 8, 8, 8), ("time",), (320,), sample_rate=16000, fingerprint="f")
    assert BlockSpec.from_code_spec(spec).num_quantizers == 4
    assert BlockSpec.from_code_spec(spec, num_quantizers=2, input_pattern="first").num_quantizers == 2
    assert BlockSpec.from_code_spec(spec, pattern="first").num_quantizers == 1
    with pytest.raises(ManifestError, match="the tokenizer has 4"):
        BlockSpec.from_code_spec(spec, num_quantizers=5)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (BlockSpec("image", "", 8, pattern="spiral"), "unknown pattern"),
        (BlockSpec("image", "", 8, 2, "layer_major"), "unknown length"),
        (BlockSpec("image", "", 8, 2, "first"), "holds 1 codebook"),
        (BlockSpec("image", "", 0), "at least 1"),
        (BlockSpec("image", "", 8, grid=(0, 4)), "every axis"),
        (BlockSpec("text", "", 8), "reserved"),
        (BlockSpec("speech", "", 8, max_frames=0), "max_frames"),
    ],
)
def test_bad_requests(spec: BlockSpec, problem: str) -> None:
    with pytest.raises(ManifestError, match=problem):
        Vocabulary.build(300, spec)


def test_package_import_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, anyglot_lm; from anyglot_lm import Vocabulary, build_plan, Sample, TextTokenizer; "
        "print([m for m in ('torch', 'transformers', 'lightning', 'sentencepiece') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
