"""Codes and CodeSpec: exact inverses of their file and JSON forms, and typed errors."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anyglot_tokenizers import Codes, CodesError, CodeSpec, ManifestError, MediaError

AUDIO = CodeSpec("speech", (512,) * 4, ("time",), (640,), 16000, 1, False, (8, 8), "mit", "ab")
IMAGE = CodeSpec("image", (512, 256), ("height", "width"), (16, 16), channels=3)

specs = st.builds(
    CodeSpec,
    modality=st.text(max_size=8),
    codebook_sizes=st.lists(st.integers(1, 70000), min_size=1, max_size=4).map(tuple),
    axes=st.just(("time",)),
    strides=st.tuples(st.integers(1, 4096)),
    sample_rate=st.none() | st.integers(1, 96000),
    channels=st.integers(1, 8),
    causal=st.booleans(),
    context=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    license=st.text(max_size=8),
    fingerprint=st.text(max_size=8),
)


@st.composite
def code_batches(draw):
    shape = [
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        *draw(st.lists(st.integers(0, 5), min_size=1, max_size=2)),
    ]
    top = draw(st.sampled_from([2, 2**16 - 1, 2**16, 2**31 - 1]))
    codes = torch.randint(0, top + 1, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    lengths = None
    if draw(st.booleans()):
        lengths = torch.tensor([draw(st.integers(0, shape[2])) for _ in range(shape[0])])
    return Codes(codes, lengths, draw(st.none() | specs))


@settings(max_examples=40, deadline=None)
@given(specs)
def test_spec_round_trip(spec):
    assert CodeSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@settings(max_examples=40, deadline=None)
@given(code_batches())
def test_codes_round_trip(codes):
    with tempfile.TemporaryDirectory() as folder:
        codes.save(Path(folder) / "c.safetensors")
        again = Codes.load(Path(folder) / "c.safetensors")
        assert [path.name for path in Path(folder).iterdir()] == ["c.safetensors"]
    assert torch.equal(again.codes, codes.codes) and again.codes.dtype == torch.int64
    assert (again.lengths is None) == (codes.lengths is None)
    assert codes.lengths is None or torch.equal(again.lengths, codes.lengths)
    assert again.spec == codes.spec


def test_spec_numbers():
    assert AUDIO.frame_rate == 25.0 and AUDIO.hop_length == 640 and AUDIO.bitrate == 25 * 4 * 9
    assert AUDIO.num_codes(1) == 1 and AUDIO.num_codes(640) == 1 and AUDIO.num_codes(641) == 2
    assert IMAGE.downsample_factor == 16 and IMAGE.grid(64, 32) == (4, 2) and IMAGE.num_quantizers == 2
    assert CodeSpec("speech", (4,), ("time",), (3,), 16000).frame_rate == 16000 / 3
    for wrong in ("codebook_size", "hop_length", "frame_rate"):
        with pytest.raises(ManifestError):
            getattr(IMAGE, wrong)
    with pytest.raises(ManifestError):
        _ = AUDIO.downsample_factor


@pytest.mark.parametrize(
    "entries", [{}, {"modality": "x"}, {**AUDIO.to_dict(), "colour": 1}, {**AUDIO.to_dict(), "strides": [0]}]
)
def test_spec_refuses(entries):
    with pytest.raises(ManifestError):
        CodeSpec.from_dict(entries)


def test_items_are_cropped():
    codes = Codes(torch.arange(24).reshape(2, 2, 6), torch.tensor([2, 6]))
    assert codes.item(0).tolist() == [[0, 1], [6, 7]]
    assert [item.shape[1] for item in codes] == [2, 6] and len(codes) == 2


def test_codes_refuse(tmp_path):
    for bad in (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, 2, 3)):
        with pytest.raises(CodesError):
            Codes(bad)
    for lengths in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([1, 1]), torch.tensor([1.0])):
        with pytest.raises(CodesError):
            Codes(torch.zeros(1, 1, 3, dtype=torch.int64), lengths)
    with pytest.raises(CodesError):
        Codes(torch.full((1, 1, 1), -1)).save(tmp_path / "x")


def test_load_refuses(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(MediaError, match="no such file"):
        Codes.load(path)
    Codes(torch.zeros(1, 1, 300, dtype=torch.int64)).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(MediaError, match="safetensors"):
        Codes.load(path)
    path.write_text("hello")
    with pytest.raises(MediaError, match=r"c\.safetensors"):
        Codes.load(path)
    save_file({"codes": torch.zeros(2)}, path)
    with pytest.raises(MediaError, match="format"):
        Codes.load(path)


def test_ids_are_saved_in_their_order_whatever_that_of_memory(tmp_path):
    ids = torch.arange(24).reshape(1, 6, 4).transpose(1, 2)  # frames of a language model as [B, K, T]
    extra = torch.arange(6.0).reshape(2, 3).T[None]
    Codes(ids, extras={"scale": extra}).save(tmp_path / "x")
    found = Codes.load(tmp_path / "x")
    assert torch.equal(found.codes, ids) and torch.equal(found.extras["scale"], extra)
