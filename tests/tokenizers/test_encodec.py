from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anyglot_tokenizers import AnyglotError, CheckpointError, Codes, CodesError, FingerprintError, MediaError, load
from anyglot_tokenizers.encodec import Encodec
from anyglot_tokenizers.encodec_package import from_package, import_encodec, load_th
from anyglot_tokenizers.errors import LicenseWarning, UnsupportedError
from anyglot_tokenizers.seanet import Convs, Shape

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'anyglot[lm]'")
pytestmark = pytest.mark.filterwarnings("ignore::anyglot_tokenizers.errors.LicenseWarning")

SMALL = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "upsampling_ratios": [4, 3, 2]}
MODELS = {
    "24": {"target_bandwidths": [5.0, 30.0]},
    "32": {"target_bandwidths": [5.0, 30.0], "use_causal_conv": False, "use_conv_shortcut": False},
    "48": {
        "target_bandwidths": [2.0, 6.0],
        "sampling_rate": 4800,
        "audio_channels": 2,
        "use_causal_conv": False,
        "norm_type": "time_group_norm",
        "normalize": True,
        "chunk_length_s": 0.25,
        "overlap": 0.01,
    },
}  # the structures of the three published models, small; hop 24
HOP, K = 24, 6


def lively(model: Any, channels: int) -> Any:
    """Random weights, with codebooks that all get used: entries are moved samples of what is to be quantized."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.03)
            elif name.endswith("original0"):
                parameter.mul_(1.5)
        rest_ND = model.encoder(0.3 * torch.randn(1, channels, 4000))[0].T
        for layer in model.quantizer.layers:
            embed_CD = layer.codebook.embed
            rows = torch.randperm(len(rest_ND))[: len(embed_CD)]
            embed_CD.copy_(rest_ND[rows] + 0.3 * rest_ND.std(0) * torch.randn(embed_CD.shape))
            rest_ND = rest_ND - layer.codebook.decode(layer.codebook.quantize(rest_ND))
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Encodec]:
    """transformers' model and ours with the same weights."""
    config = transformers.EncodecConfig(**SMALL, **MODELS[request.param])
    torch.manual_seed(3)
    theirs = lively(transformers.EncodecModel(config).eval(), config.audio_channels)
    ours = Encodec(model=config.to_dict()).eval()
    ours.read_tensors(theirs.state_dict(), "transformers")
    return theirs, ours


@pytest.fixture(scope="module")
def causal() -> Encodec:
    return Encodec(model=SMALL | MODELS["24"]).eval()


@pytest.fixture(scope="module")
def stereo() -> Encodec:
    return Encodec(model=SMALL | MODELS["48"]).eval()


def noise(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape)


def reference(theirs: Any, audio: torch.Tensor) -> tuple[torch.Tensor, list[Any], int]:
    """transformers' codes `[B, K, N]` (segments one after the other), scales and padding, at the highest bandwidth."""
    with torch.no_grad():
        codes, scales, padding = theirs.encode(audio, None, theirs.config.target_bandwidths[-1], return_dict=False)
    flat = torch.cat(list(codes), 2)
    return flat[:, :, : flat.shape[2] - padding], scales, padding


@pytest.mark.parametrize("samples", [1, 2, 5, 7, 23, 24, 25, 100, 241, 1200, 1201, 150 * HOP, 151 * HOP + 5, 5000])
def test_codes_and_audio_are_those_of_transformers(pair: tuple[Any, Encodec], samples: int) -> None:
    theirs, ours = pair
    audio = noise(2, ours.spec.channels, samples)
    want, scales, padding = reference(theirs, audio)
    codes = ours.encode(audio)
    assert codes.lengths is not None
    assert codes.lengths.tolist() == [ours.num_codes(samples)] * 2
    assert codes.codes.shape == want.shape
    assert (codes.codes != want).float().mean() < 0.002, "more than a rare tie between two entries"
    if ours.shape.segment:
        torch.testing.assert_close(codes.extras["scale"], torch.cat(scales, 1))
    width = ours.shape.segment_frames if ours.shape.segment else want.shape[2]
    parts = list(torch.nn.functional.pad(codes.codes, (0, padding)).split(width, 2))
    with torch.no_grad():
        decoded = theirs.decode(torch.stack(parts), scales, last_frame_pad_length=padding, return_dict=False)[0]
    torch.testing.assert_close(ours.decode(codes), decoded, rtol=1e-4, atol=1e-5)


def test_codes_are_lively(pair: tuple[Any, Encodec]) -> None:
    """Else the other tests would compare little."""
    codes = pair[1].encode(noise(1, pair[1].spec.channels, 6000)).codes
    assert all(len(codes[0, index].unique()) > 12 for index in range(codes.shape[1]))


def test_an_item_alone_is_the_item_in_a_padded_batch(pair: tuple[Any, Encodec]) -> None:
    ours = pair[1]
    lengths = torch.tensor([1, 30, 5000, 241, 160 * HOP, 150 * HOP, 151 * HOP - 3, 1188])
    audio = noise(len(lengths), ours.spec.channels, 5000)  # noise beyond the ends, too
    codes = ours.encode(audio, lengths)
    decoded = ours.decode(codes)
    for row, length in enumerate(lengths.tolist()):
        alone = ours.encode(audio[row : row + 1, :, :length])
        assert torch.equal(alone.codes[0], codes.item(row)), length
        heard = ours.decode(alone)[0]
        torch.testing.assert_close(decoded[row, :, : heard.shape[1]], heard, rtol=1e-4, atol=1e-6)
        assert not decoded[row, :, heard.shape[1] :].any()


def test_grouped_convolutions_give_the_same(pair: tuple[Any, Encodec], monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of other devices than CPUs: all items of a window together, each padded at its own end."""
    ours = pair[1]
    if ours.shape.segment:
        pytest.skip("segments of equal length only")

    def together(begin: int, end: int, counts_B: torch.Tensor) -> Any:
        yield begin, end, slice(0, int((counts_B > begin).sum()))

    lengths = torch.tensor([1, 30, 2000, 241, 100, 55, 1700])
    audio = noise(len(lengths), 1, 2000)
    want = ours.encode(audio, lengths)
    heard = ours.decode(want)
    monkeypatch.setattr(ours, "_windows", together)
    got = ours.encode(audio, lengths)
    assert (got.codes != want.codes).float().mean() < 0.002
    torch.testing.assert_close(ours.decode(want), heard, rtol=1e-4, atol=1e-6)


def test_long_audio_in_rounds_is_the_audio_at_once(pair: tuple[Any, Encodec], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pair[1]
    lengths = torch.tensor([420 * HOP, 300 * HOP + 7, 299 * HOP])
    audio = noise(3, ours.spec.channels, 420 * HOP)
    whole = ours.encode(audio, lengths)
    heard = ours.decode(whole)
    monkeypatch.setattr("anyglot_tokenizers.encodec.ROUND", 1)  # 150 frames a round
    monkeypatch.setattr("anyglot_tokenizers.encodec.SEGMENTS", 1)
    rounds = ours.encode(audio, lengths)
    assert torch.equal(rounds.codes, whole.codes)
    torch.testing.assert_close(ours.decode(whole), heard, rtol=1e-4, atol=1e-6)


def test_small_tiles_and_groups_change_nothing(pair: tuple[Any, Encodec], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pair[1]
    lengths = torch.tensor([1, 2000, 240, 1201, 37])
    audio = noise(5, ours.spec.channels, 2000)
    whole = ours.encode(audio, lengths)
    heard = ours.decode(whole)
    monkeypatch.setattr("anyglot_tokenizers.encodec.GROUP", 2)
    near, back = ours.encoder.front[0], ours.decoder.back[-1]
    assert isinstance(near, Convs) and isinstance(back, Convs)
    assert (near.tile > 0) == (back.tile > 0) == (not ours.shape.segment), "a norm sees whole segments"
    if near.tile:
        monkeypatch.setattr(near, "tile", 7)
        monkeypatch.setattr(back, "tile", 7)
    tiled = ours.encode(audio, lengths)
    assert (tiled.codes != whole.codes).float().mean() < 0.002, "more than a rare tie between two entries"
    torch.testing.assert_close(ours.decode(whole), heard, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [[7, 13, 100, 1], [500], [150 * HOP + 5, 3]])
def test_a_stream_is_the_audio_at_once(pair: tuple[Any, Encodec], sizes: list[int]) -> None:
    ours = pair[1]
    if ours.shape.segment:
        pytest.skip("no stream")
    audio = noise(2, 1, 7003)
    want = ours.encode(audio).codes
    stream, back = ours.stream(2), ours.stream(2)
    codes, heard, place, turn = [], [], 0, 0
    while place < audio.shape[2]:
        codes.append(stream.encode(audio[:, :, place : place + sizes[turn % len(sizes)]]).codes)
        place, turn = place + sizes[turn % len(sizes)], turn + 1
        if codes[-1].shape[2]:
            heard.append(back.decode(codes[-1]))
    last = stream.flush()
    assert isinstance(last, Codes)
    codes.append(last.codes)
    if last.codes.shape[2]:
        heard.append(back.decode(last))
    heard.append(back.flush())
    got = torch.cat(codes, 2)
    assert got.shape == want.shape
    assert (got != want).float().mean() < 0.002, "more than a rare tie between two entries"
    torch.testing.assert_close(torch.cat(heard, 2), ours.decode(got), rtol=1e-4, atol=1e-6)


def test_a_causal_stream_lags_by_no_more_than_a_hop(causal: Encodec) -> None:
    stream = causal.stream()
    stream.encode(noise(1, 1, 20 * HOP))  # the first codes wait for what the padding mirrors
    given = [stream.encode(noise(1, 1, HOP)).codes.shape[2] for _ in range(5)]
    assert given == [1] * 5


def test_streams_refuse_what_does_not_fit(causal: Encodec, stereo: Encodec) -> None:
    with pytest.raises(UnsupportedError, match="48 kHz"):
        stereo.stream()
    with pytest.raises(CodesError, match="outside 1..6"):
        causal.stream(num_quantizers=7)
    stream = causal.stream()
    stream.decode(torch.zeros(1, 2, 9, dtype=torch.int64))
    with pytest.raises(CodesError, match="2 quantizers"):
        stream.decode(torch.zeros(1, 3, 9, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="other way"):
        stream.encode(noise(1, 1, 100))
    with pytest.raises(MediaError, match="NaN"):
        causal.stream().encode(torch.full((1, 1, 100), float("nan")))


def test_fewer_quantizers_are_the_first_ones(pair: tuple[Any, Encodec]) -> None:
    ours = pair[1]
    audio = noise(1, ours.spec.channels, 2000)
    codes = ours.encode(audio)
    few = ours.encode(audio, num_quantizers=2)
    assert torch.equal(few.codes, codes.codes[:, :2])
    assert ours.decode(few.codes).shape == ours.decode(codes).shape
    with pytest.raises(CodesError, match=r"outside 1\.\.6"):
        ours.encode(audio, num_quantizers=0)


def test_precision_is_the_callers_only_if_asked(causal: Encodec) -> None:
    audio = noise(1, 1, 2000)
    want = causal.encode(audio).codes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal.encode(audio).codes, want)
    assert torch.equal(causal.encode(audio.double()).codes, want)
    causal.train()
    assert torch.equal(causal.encode(audio).codes, want)
    causal.eval()


def test_spec_says_what_holds(causal: Encodec, stereo: Encodec) -> None:
    spec = causal.spec
    assert (spec.modality, spec.num_quantizers, spec.codebook_size, spec.frame_rate) == ("speech", K, 32, 1000.0)
    assert (spec.causal, spec.context, spec.extras, spec.hop_length) == (True, None, (), HOP)
    spec = stereo.spec
    assert (spec.modality, spec.channels, spec.causal, spec.extras) == ("music", 2, False, ("scale",))
    assert stereo.num_codes(1200) == 50 + 1, "the rest of 12 samples beyond the first segment's start is a segment, too"


def test_published_sizes() -> None:
    """Facts of the three published configs."""
    music = {"num_filters": 64, "upsampling_ratios": [8, 5, 4, 4], "codebook_size": 2048, "sampling_rate": 32000}
    music |= {"target_bandwidths": [2.2], "use_causal_conv": False, "torch_dtype": "float32", "chunk_length_s": None}
    stereo = {"audio_channels": 2, "chunk_length_s": 1.0, "norm_type": "time_group_norm", "normalize": True}
    stereo |= {"overlap": 0.01, "sampling_rate": 48000, "target_bandwidths": [3.0, 6.0, 12.0, 24.0]}
    speech, songs, pairs = Shape.read({}), Shape.read(music), Shape.read(stereo | {"use_causal_conv": False})
    assert [(shape.num_quantizers, shape.hop) for shape in (speech, songs, pairs)] == [(32, 320), (4, 640), (16, 320)]
    assert (pairs.segment, pairs.advance, pairs.segment_frames) == (48000, 47520, 150)


def test_segments_without_scale_are_decoded_equally_loud(stereo: Encodec) -> None:
    codes = stereo.encode(noise(2, 2, 2500))
    bare, loud = stereo.decode(codes.codes), stereo.decode(codes)
    assert bare.shape == loud.shape
    again = Codes(codes.codes, codes.lengths, codes.spec, {"scale": torch.full_like(codes.extras["scale"], 0.1)})
    torch.testing.assert_close(stereo.decode(again), bare)
    with pytest.raises(CodesError, match="3 segments"):
        stereo.decode(Codes(codes.codes, None, None, {"scale": torch.ones(2, 1)}))


def test_a_last_segment_within_the_one_before(stereo: Encodec) -> None:
    """1188 + 10 samples: 50 codes and then one that reaches less far than they do (the references fail here)."""
    codes = stereo.encode(noise(1, 2, 1198))
    assert codes.codes.shape[2] == 51
    assert stereo.decode(codes).shape == (1, 2, 1212)
    codes = Codes(codes.codes[:, :, :50], None, None, {"scale": codes.extras["scale"][:, :1]})
    assert stereo.decode(codes).shape == (1, 2, 1200)


def test_silence_and_items_without_codes(causal: Encodec, stereo: Encodec) -> None:
    for ours in (causal, stereo):
        codes = ours.encode(torch.zeros(1, ours.spec.channels, 3000))
        assert torch.isfinite(ours.decode(codes)).all()
        nothing = Codes(codes.codes, torch.zeros(1, dtype=torch.int64))
        assert not ours.decode(nothing).any()


@pytest.mark.parametrize(
    ("audio", "lengths", "message"),
    [
        (noise(1, 2, 100), None, "1 channels"),
        (noise(1, 100), None, "1 channels"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), None, "not floating point"),
        (torch.full((1, 1, 9), torch.inf), None, "NaN or infinite"),
        (noise(1, 1, 0), None, "empty"),
        (noise(0, 1, 10), None, "empty"),
        (noise(2, 1, 10), torch.tensor([1, 11]), "leave 1..10"),
        (noise(2, 1, 10), torch.tensor([0, 5]), "leave 1..10"),
        (noise(2, 1, 10), torch.tensor([5]), "lengths"),
        (noise(2, 1, 10), torch.tensor([5.0, 6.0]), "lengths"),
    ],
)
def test_audio_that_does_not_fit_is_refused(
    causal: Encodec, audio: torch.Tensor, lengths: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(MediaError, match=message):
        causal.encode(audio, lengths)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(1, K + 1, 5, dtype=torch.int64),
        torch.zeros(1, K, 0, dtype=torch.int64),
        torch.zeros(K, 5, dtype=torch.int64),
        torch.zeros(1, K, 5),
        torch.full((1, K, 5), 32),
        torch.full((1, K, 5), -1),
    ],
)
def test_codes_that_do_not_fit_are_refused(causal: Encodec, codes: torch.Tensor) -> None:
    with pytest.raises(CodesError):
        causal.decode(codes)


def test_codes_of_another_model_are_refused(causal: Encodec, stereo: Encodec) -> None:
    with pytest.raises(FingerprintError):
        causal.decode(stereo.encode(noise(1, 2, 100)))


def test_folders_of_transformers_and_ours_load(pair: tuple[Any, Encodec], tmp_path: Path) -> None:
    theirs, ours = pair
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(LicenseWarning, match="not known"):
        loaded = load(tmp_path / "theirs")
    assert isinstance(loaded, Encodec)
    assert loaded.fingerprint == ours.fingerprint
    assert loaded.save_pretrained(tmp_path / "ours") == ours.fingerprint
    audio = noise(1, ours.spec.channels, 3000)
    assert torch.equal(load(tmp_path / "ours").encode(audio).codes, ours.encode(audio).codes)


def old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weight norm as it was called when the published checkpoints were written."""
    for number, letter in ((0, "g"), (1, "v")):
        tensors = {
            name.replace(f"parametrizations.weight.original{number}", f"weight_{letter}"): tensor
            for name, tensor in tensors.items()
        }
    return tensors


def test_weights_by_their_old_names(pair: tuple[Any, Encodec]) -> None:
    theirs, ours = pair
    again = Encodec(model=theirs.config.to_dict())
    again.read_tensors(old_names(theirs.state_dict()), "old")
    assert again.fingerprint == ours.fingerprint


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = transformers.EncodecModel(transformers.EncodecConfig(**SMALL, **MODELS["24"]))
    theirs.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, entries = load_file(weights), json.loads(config.read_text())
    name = "encoder.layers.0.conv.bias"
    for change, message in (
        ({name: None}, "missing"),
        ({name: torch.zeros(5)}, "need"),
        ({name: torch.full((4,), torch.nan)}, "finite"),
        ({"encoder.layers.99.conv.bias": torch.zeros(4)}, "no place"),
    ):
        save_file({key: value for key, value in (tensors | change).items() if value is not None}, weights)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load(tmp_path)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="anyglot tokenizer convert"):
        load(tmp_path)
    for key, value in (
        ("num_filters", 2**40),
        ("num_filters", "4"),
        ("num_filters", 1024),
        ("upsampling_ratios", [10**9]),
        ("upsampling_ratios", 4),
        ("target_bandwidths", []),
        ("target_bandwidths", [1e300]),
        ("codebook_size", 0),
        ("codebook_size", True),
        ("codebook_dim", 7),
        ("norm_type", "none"),
        ("pad_mode", "zero"),
        ("normalize", True),
        ("chunk_length_s", 1.0),
        ("num_lstm_layers", -1),
        ("hidden_size", 2**14),
    ):
        bad = entries | {key: value}
        bad |= {"num_lstm_layers": 8, "upsampling_ratios": [2] * 8} if value == 1024 else {}
        config.write_text(json.dumps(bad))
        with pytest.raises(CheckpointError):
            load(tmp_path)


package_names = (
    ("encoder.layers.", "encoder.model."),
    ("decoder.layers.", "decoder.model."),
    (".conv.", ".conv.conv."),
    ("norm.weight", "conv.norm.weight"),
    ("norm.bias", "conv.norm.bias"),
    ("quantizer.layers.", "quantizer.vq.layers."),
    (".codebook.", "._codebook."),
)


def th_file(theirs: Any, folder: Path) -> Path:
    """The checkpoint that the package would have written."""
    renamed = {}
    for name, tensor in old_names(theirs.state_dict()).items():
        for old, new in package_names:
            name = name.replace(old, new)
        for index in (3, 6, 9):
            name = name.replace(f"decoder.model.{index}.conv.conv", f"decoder.model.{index}.convtr.convtr")
            name = name.replace(f"decoder.model.{index}.conv.norm", f"decoder.model.{index}.convtr.norm")
        renamed[name] = tensor
    torch.save(renamed, folder / "model.th")
    return folder / "model.th"


def test_checkpoints_of_the_package_load(pair: tuple[Any, Encodec], tmp_path: Path) -> None:
    theirs, ours = pair
    path = th_file(theirs, tmp_path)
    if not ours.shape.use_conv_shortcut:
        with pytest.raises(CheckpointError, match="missing"):
            load_th(path)
        return
    known = {key: ours.config["model"][key] for key in ("sampling_rate", "chunk_length_s", "target_bandwidths")}
    loaded = load_th(path, **known)
    assert loaded.fingerprint == ours.fingerprint
    assert load_th(path).spec.sample_rate == (48000 if ours.shape.segment else 24000)


def test_damaged_checkpoints_of_the_package_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "model-01234567.th")
    with pytest.raises(CheckpointError, match="sha256"):
        load_th(tmp_path / "model-01234567.th")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.th")
    with pytest.raises(CheckpointError, match="not a checkpoint of the encodec package"):
        load_th(tmp_path / "other.th")
    torch.save([1, 2], tmp_path / "list.th")
    with pytest.raises(CheckpointError, match="table of tensors"):
        load_th(tmp_path / "list.th")

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "hostile.th").write_bytes(pickle.dumps(Hostile()))
    torch.save({"a": Hostile()}, tmp_path / "hostile2.th")
    content = (tmp_path / "other.th").read_bytes()
    (tmp_path / "short.th").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.th").write_bytes(b"")
    for name in ("hostile", "hostile2", "short", "empty", "missing"):
        with pytest.raises(CheckpointError):
            load_th(tmp_path / f"{name}.th")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def package() -> Any:
    try:
        return import_encodec()
    except AnyglotError as error:
        pytest.skip(str(error))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", ["24", "48"])
def test_codes_and_audio_are_those_of_the_package(package: Any, name: str) -> None:
    import encodec.modules as modules  # works once the package is there
    import encodec.quantization as quantization

    stereo = name == "48"
    norm = "time_group_norm" if stereo else "weight_norm"
    sizes = {"channels": 1 + stereo, "dimension": 16, "n_filters": 4, "ratios": [4, 3, 2], "norm": norm}
    theirs = package.EncodecModel(
        modules.SEANetEncoder(**sizes, causal=not stereo),
        modules.SEANetDecoder(**sizes, causal=not stereo),
        quantization.ResidualVectorQuantizer(dimension=16, n_q=K, bins=32),
        [6.0] if stereo else [30.0],
        4800 if stereo else 24000,
        1 + stereo,
        normalize=stereo,
        segment=0.25 if stereo else None,
    ).eval()
    with torch.no_grad():
        for layer in theirs.quantizer.vq.layers:
            layer._codebook.embed.normal_(std=0.3)
    ours = from_package(theirs)
    for samples in (1, 30, 1201, 3000):
        audio = noise(2, 1 + stereo, samples)
        with torch.no_grad():
            frames = theirs.encode(audio)
            heard = theirs.decode(frames)
        codes = ours.encode(audio)
        assert torch.equal(codes.codes, torch.cat([part for part, _ in frames], 2))
        torch.testing.assert_close(ours.decode(codes), heard, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"not an encodec\.EncodecModel"):
        from_package(torch.nn.Linear(1, 1))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_package_works_without_torchaudio(package: Any) -> None:
    from encodec.msstftd import DiscriminatorSTFT
    from encodec.utils import convert_audio

    assert "torchaudio" not in sys.modules
    assert convert_audio(noise(2, 4800), 48000, 24000, 1).shape == (1, 2400)
    scores, _ = DiscriminatorSTFT(filters=2, n_fft=64, hop_length=16, win_length=64)(noise(1, 1, 1000))
    assert scores.isfinite().all()


def test_importing_is_cheap() -> None:
    heavy = "{'transformers', 'encodec', 'lightning', 'torchaudio'}"
    code = f"import sys, anyglot_tokenizers.encodec_package; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("rest", [1, 24, 25, 40, 400])
def test_no_segment_is_lost_where_the_last_is_short(rest: int) -> None:
    """The segment before may then not reach into its last frame; codes are those of the segments one by one."""
    stereo = Encodec(model=SMALL | MODELS["48"] | {"overlap": 0.04}).eval()
    shape = stereo.shape
    media = noise(2, 2, 2 * shape.advance + rest + 50)
    length = 2 * shape.advance + rest
    found = stereo.encode(media, torch.tensor([length, media.shape[2]]))
    frames = shape.segment_frames
    assert int(found.lengths[0]) == 2 * frames + -(-rest // shape.hop) == stereo.num_codes(length)
    for number in range(3):
        start = number * shape.advance
        piece = media[:1, :, start : min(start + shape.segment, length)]
        if number < 2:
            least = (frames - 1) * shape.hop + 1
            piece = torch.nn.functional.pad(piece, (0, max(least - piece.shape[2], 0)))
        alone, at = stereo.encode(piece), number * frames
        codes = alone.codes[0, :, :frames]  # a whole segment by itself has a further one, of its overlap
        assert torch.equal(found.codes[0, :, at : at + codes.shape[1]], codes)
        torch.testing.assert_close(found.extras["scale"][0, number], alone.extras["scale"][0, 0])
    assert stereo.decode(found).shape[2] >= length
