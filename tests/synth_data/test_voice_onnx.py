"""Piper and Kokoro as they are installed, with tiny models of their signature instead of a user's voices.

Both packages are GPL or bring what is, so no extra of ours has them: these tests run where somebody installed them
(`pip install piper-tts kokoro-onnx onnx`).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from anyglot_synth.backends import BackendError
from anyglot_synth.voices.kokoro import KokoroVoice
from anyglot_synth.voices.piper import PiperVoice

TEXT = "a large red circle"


def has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


needs_piper = pytest.mark.skipif(not has("piper", "onnx"), reason="piper-tts or onnx is not installed")
needs_kokoro = pytest.mark.skipif(not has("kokoro_onnx", "onnx"), reason="kokoro-onnx or onnx is not installed")


def save_model(
    path: Path, inputs: dict[str, tuple[str, list[int | str]]], ids: str, pace: list[tuple[str, ...]]
) -> None:
    """A model that hums each id at a height of its own; `pace` are nodes that make `samples`, a float: per id."""
    from onnx import TensorProto, checker, helper, save

    def constant(name: str, kind: int, dims: list[int], values: list[float]):
        return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, dims, values))

    float_, int_ = TensorProto.FLOAT, TensorProto.INT64
    nodes = [
        constant("zero", float_, [], [0.0]),
        constant("one", float_, [], [1.0]),
        constant("long", float_, [], [400.0]),
        constant("step", float_, [], [0.01]),
        constant("axis", int_, [1], [2]),
        constant("first", int_, [], [1]),
        constant("flat", int_, [4], [1, 1, 1, -1]),
        *(helper.make_node(kind, list(names[:-1]), [names[-1]]) for kind, *names in pace),
        helper.make_node("Range", ["zero", "samples", "one"], ["ramp"]),
        helper.make_node("Cast", [ids], ["numbers"], to=float_),
        helper.make_node("Unsqueeze", ["numbers", "axis"], ["column"]),
        helper.make_node("Mul", ["column", "ramp"], ["grid"]),
        helper.make_node("Mul", ["grid", "step"], ["phase"]),
        helper.make_node("Sin", ["phase"], ["waves"]),
        helper.make_node("Reshape", ["waves", "flat"], ["output"]),
    ]
    kinds = {"int": int_, "float": float_}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, kinds[kind], dims) for name, (kind, dims) in inputs.items()],
        [helper.make_tensor_value_info("output", float_, [1, 1, 1, "n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    save(model, str(path))


@pytest.fixture(scope="module")
def piper_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("piper") / "tiny.onnx"
    inputs = {"input": ("int", [1, "t"]), "input_lengths": ("int", [1]), "scales": ("float", [3]), "sid": ("int", [1])}
    # 400 samples times the length scale.
    pace = [
        ("Gather", "scales", "first", "length"),
        ("Mul", "length", "long", "samples"),
    ]
    save_model(path, inputs, "input", pace)
    letters = " _^$.,abcdefghijklmnopqrstuvwxyzæðŋɐɑɔəɚɛɜɝɡɪɫɹɾʃʊʌʒʔˈˌːθᵻ"
    config = {
        "audio": {"sample_rate": 16000}, "espeak": {"voice": "en-us"}, "phoneme_type": "espeak", "num_speakers": 2,
        "num_symbols": len(letters), "speaker_id_map": {"anna": 0, "bert": 1}, "language": {"code": "en_US"},
        "phoneme_id_map": {letter: [number] for number, letter in enumerate(letters)},
        "inference": {"noise_scale": 0.667, "length_scale": 1, "noise_w": 0.8},
    }  # fmt: skip
    Path(f"{path}.json").write_text(json.dumps(config))
    return path


@needs_piper
def test_piper_as_a_program(piper_model: Path) -> None:
    voices = PiperVoice(str(piper_model), command=[sys.executable, "-m", "piper"], licence="CC0-1.0")
    voices.setup()
    assert voices.styles() == [{"voice": "anna", "language": "en-US"}, {"voice": "bert", "language": "en-US"}]
    assert voices.deterministic and voices.identity()["version"][0].isdigit()
    first = voices.make(TEXT, {"voice": "anna"}, 0)
    assert first.sample_rate == 16_000 and len(first.array) > 8_000
    assert np.array_equal(first.array, voices.make(TEXT, {"voice": "anna"}, 1).array)
    slow = voices.make(TEXT, {"voice": "anna", "rate": 0.5}, 0)
    assert len(slow.array) == 2 * len(first.array)


@needs_piper
def test_piper_with_a_broken_voice(piper_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(piper_model.read_bytes()[:200])
    Path(f"{path}.json").write_bytes(Path(f"{piper_model}.json").read_bytes())
    voices = PiperVoice(str(path), command=[sys.executable, "-m", "piper"])
    with pytest.raises(BackendError, match=r"failed speaking .*broken\.onnx") as caught:
        voices.make(TEXT, {"voice": "anna"}, 0)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def kokoro_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("kokoro")
    inputs = {"tokens": ("int", [1, "t"]), "style": ("float", [1, 256]), "speed": ("float", [1])}
    pace = [("ReduceSum", "speed", "speed_0"), ("Div", "long", "speed_0", "samples")]
    save_model(folder / "tiny.onnx", inputs, "tokens", pace)
    rng = np.random.default_rng(0)
    styles = {name: rng.standard_normal((510, 1, 256)).astype(np.float32) for name in ("af_anna", "bm_bert")}
    with open(folder / "voices.bin", "wb") as file:
        np.savez(file, **styles)
    return str(folder / "tiny.onnx"), str(folder / "voices.bin")


@needs_kokoro
def test_kokoro(kokoro_files: tuple[str, str]) -> None:
    voices = KokoroVoice(*kokoro_files)
    voices.setup()
    assert voices.styles() == [
        {"voice": "af_anna", "language": "en-US", "gender": "female", "accent": "American"},
        {"voice": "bm_bert", "language": "en-GB", "gender": "male", "accent": "British"},
    ]
    first = voices.make(TEXT, {"voice": "af_anna"}, 0)
    assert first.sample_rate == 24_000 and first.array.dtype == np.float32 and len(first.array) > 3_000
    assert np.array_equal(first.array, voices.make(TEXT, {"voice": "af_anna"}, 1).array)
    fast = voices.make(TEXT, {"voice": "af_anna", "rate": 2}, 0)
    assert len(fast.array) == pytest.approx(len(first.array) / 2, rel=0.1)
    longest = "extraordinary circumstances " * 10
    assert len(longest) <= voices.max_characters and len(voices.make(longest, {"voice": "bm_bert"}, 0).array) > 50_000
    with pytest.raises(BackendError, match="has no voice 'zz'; it has: af_anna, bm_bert"):
        voices.make(TEXT, {"voice": "zz"}, 0)
    identity = voices.identity()
    assert identity["engine"] == "kokoro" and len(identity["weights"]) == 64


@needs_kokoro
def test_kokoro_with_a_broken_model(kokoro_files: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(Path(kokoro_files[0]).read_bytes()[:100])
    with pytest.raises(BackendError, match=r"broken\.onnx: cannot be loaded as kokoro") as caught:
        KokoroVoice(str(tmp_path / "broken.onnx"), kokoro_files[1]).setup()
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot be read as voices"):
        KokoroVoice(str(tmp_path / "no.onnx"), str(tmp_path / "no.bin")).styles()
    (tmp_path / "voices.bin").write_bytes(b"PK\3\4 nonsense")
    with pytest.raises(BackendError, match="cannot be read as voices"):
        KokoroVoice(str(tmp_path / "no.onnx"), str(tmp_path / "voices.bin")).styles()
    with open(tmp_path / "voices.bin", "wb") as file:
        np.savez(file, af_x=np.zeros((1, 1, 256), np.float32))
    with pytest.raises(BackendError, match=r"kokoro-onnx is not installed|no\.onnx: cannot be read"):
        KokoroVoice(str(tmp_path / "no.onnx"), str(tmp_path / "voices.bin")).setup()
