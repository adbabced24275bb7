"""Hostile input: whatever comes in, only an AnyglotError of one line may come out, soon and in bounded memory.

Each test here is also a target of the endless fuzzer, `atheris_harness.py`, which drives it by coverage. The strategies
start from valid files and models, since noise does not get past the first check. Time is what this process spends
computing, not what the clock says, and only far more than any of these calls needs is a failure.
"""

import io
import json
import pickle
import signal
import struct
import warnings
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from anyglot_tokenizers import AnyglotError, AudioCodec, Codes, ImageVQ, load, read_audio, read_image
from anyglot_tokenizers.catalog import MODEL_TYPES
from anyglot_tokenizers.chunks import decode_chunked, encode_chunked
from anyglot_tokenizers.clock import peak_bytes, reset_peak

CPU = torch.device("cpu")
SECONDS, MEBIBYTES = 60, 700  # that the largest of these calls stays far below
BIG = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


@contextmanager
def tame():
    """Lets an AnyglotError of one line pass; fails on any other exception, on long work and on much memory."""

    def late(number, frame):
        raise AssertionError(f"still busy after {SECONDS} s of computing")

    before = reset_peak(CPU)
    previous = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except AnyglotError as error:
        assert str(error).strip() and "\n" not in str(error), repr(str(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    grown = (peak_bytes(CPU) - before) / 2**20
    assert grown < MEBIBYTES, f"{grown:.0f} MiB"


@contextmanager
def file_of(content, name):
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


# Files


@cache
def pictures():
    """Small valid pictures of many kinds."""
    pixels = (np.arange(8 * 9 * 4).reshape(8, 9, 4) * 7 % 256).astype(np.uint8)
    found = []
    for mode, kinds in {
        "RGB": ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"),
        "RGBA": ("PNG", "WEBP", "TIFF"),
        "L": ("PNG", "JPEG", "PPM", "TIFF"),
        "P": ("PNG", "GIF", "BMP"),
        "1": ("PNG", "TIFF", "PPM"),
        "I;16": ("PNG", "TIFF"),
        "CMYK": ("JPEG", "TIFF"),
        "F": ("TIFF",),
    }.items():
        base = Image.fromarray(pixels).convert("RGBA")
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else base.convert(mode)
        for kind in kinds:
            file = io.BytesIO()
            image.save(file, kind)
            found.append(file.getvalue())
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).convert("RGB").save(file, "JPEG", exif=exif)
    moving = io.BytesIO()
    frames = [Image.fromarray(np.roll(pixels, step, 0)).convert("RGB") for step in range(3)]
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    return [*found, file.getvalue(), moving.getvalue()]


@cache
def sounds():
    """Short valid sounds of many kinds."""
    samples = (0.3 * np.sin(np.arange(300)[:, None] * np.array([[0.1, 0.13]]))).astype(np.float32)
    found = []
    for kind, subtype, channels in (
        *(("WAV", subtype, 1) for subtype in ("PCM_16", "PCM_24", "FLOAT", "ULAW", "MS_ADPCM", "GSM610")),
        *(("WAV", "PCM_16", 2), ("WAVEX", "PCM_16", 2), ("RF64", "PCM_16", 1), ("FLAC", "PCM_16", 2)),
        *(("OGG", "VORBIS", 1), ("OGG", "OPUS", 1), ("MP3", "MPEG_LAYER_III", 1), ("AIFF", "PCM_16", 1)),
        *(("AU", "PCM_16", 1), ("W64", "PCM_16", 1), ("CAF", "PCM_16", 1), ("VOC", "PCM_16", 1)),
    ):
        if soundfile.check_format(kind, subtype):
            file = io.BytesIO()
            soundfile.write(file, samples[:, :channels], 48000 if subtype == "OPUS" else 8000, subtype, format=kind)
            found.append(file.getvalue())
    return found


@st.composite
def damaged(draw, valid):
    """One of the valid files with up to six wounds: flipped, cut, filled, repeated or absurd numbers."""
    data = bytearray(draw(st.sampled_from(valid())))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["byte", "cut", "insert", "number", "repeat", "drop"]))
        if kind == "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif kind == "number":
            size, order = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from(["little", "big"]))
            data[at : at + size] = (draw(st.sampled_from(BIG)) % 2 ** (8 * size)).to_bytes(size, order)
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


def check_picture(content, size=None):
    with file_of(content, "a.png") as path, tame():
        image = read_image(path, size=size)
        assert image.dtype == torch.float32 and image.ndim == 3 and image.shape[0] == 3
        assert 0 <= image.min() <= image.max() <= 1


def check_sound(content, channels=1, sample_rate=16000):
    with file_of(content, "a.wav") as path, tame():
        audio = read_audio(path, sample_rate=sample_rate, channels=channels, max_seconds=30)
        assert audio.dtype == torch.float32 and audio.shape[0] == channels and audio.shape[1] > 0
        assert torch.isfinite(audio).all()


@given(damaged(pictures), st.sampled_from([None, 1, 16]))
def test_pictures(content, size):
    check_picture(content, size)


@given(damaged(sounds), st.sampled_from([1, 2]), st.sampled_from([8000, 16000, 44100]))
def test_sounds(content, channels, sample_rate):
    check_sound(content, channels, sample_rate)


# Code files

JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from(BIG) | st.integers(-3, 40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@cache
def code_files():
    """Valid files of codes."""
    found = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "codes.safetensors"
        for codes in (
            speech().encode(torch.zeros(2, 1, 100), torch.tensor([100, 40])),
            pictures_model().encode(torch.rand(1, 3, 32, 32)),
            Codes(torch.full((1, 2, 3), 70000), extras={"scale": torch.ones(1, 2)}),
        ):
            codes.save(path)
            found.append(path.read_bytes())
    return found


def check_code_file(content):
    codes = None
    with file_of(content, "codes.safetensors") as path, tame():
        codes = Codes.load(path)
        assert codes.codes.dtype == torch.int64 and codes.codes.ndim >= 3
        assert codes.codes.numel() == 0 or codes.codes.min() >= 0
        again = path.with_name("again.safetensors")
        codes.save(again)
        assert torch.equal(Codes.load(again).codes, codes.codes)
    for tokenizer in (speech(), pictures_model()) if codes is not None else ():
        with tame():
            tokenizer.decode(codes)


@given(damaged(code_files))
def test_code_files(content):
    check_code_file(content)


@given(
    st.sampled_from(["codes", "lengths", "extras.scale", "spec", "codebook_sizes", "axes", "strides", "format"]),
    st.sampled_from(["U8", "U16", "U32", "I64", "F32", "F64", "BF16", "BOOL", "U64", "F8_E4M3"]),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 2**20, 2**40, 2**63]), max_size=5),
    st.binary(max_size=64),
    JSON,
)
def test_code_file_headers(what, dtype, shape, content, value):
    """Headers that say something else than `Codes.save` would."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}
    spec = {"modality": "speech", "codebook_sizes": [32, 32], "axes": ["time"], "strides": [32], "sample_rate": 16000}
    metadata = {"format": "anyglot.codes", "version": "1"}
    header = {"codes": {"dtype": "U16", "shape": [1, 2, 1], "data_offsets": [len(content), len(content) + 4]}}
    if what in ("codes", "lengths", "extras.scale"):
        header[what] = entry
        tail = b"" if what == "codes" else b"\x01\x00\x02\x00"
    else:
        header["codes"]["data_offsets"], content, tail = [0, 4], b"", b"\x01\x00\x02\x00"
        metadata["spec"] = json.dumps(value if what == "spec" else spec | {what: value})
        if what == "format":
            metadata[what] = value
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    check_code_file(struct.pack("<Q", len(text)) + text + content + tail)


# Models


@cache
def speech():
    return AudioCodec(
        n_fft=64,
        hop=16,
        num_mels=12,
        dim=16,
        encoder_depth=1,
        decoder_depth=1,
        num_quantizers=2,
        codebook_size=32,
        codebook_dim=8,
    ).eval()


@cache
def pictures_model():
    return ImageVQ(channels=(8, 16), patch=4, downsample_factor=8, codebook_size=32, codebook_dim=8).eval()


SEANET = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "upsampling_ratios": [4, 3, 2]}
DAC = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [2, 5, 3], "n_codebooks": 4}
SNAC = {"encoder_dim": 8, "encoder_rates": [2, 3], "decoder_dim": 16, "decoder_rates": [3, 2], "noise": True}
NETWORK = {"ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "z_channels": 8}
PUBLISHED = {  # module:class -> small random models in the publishers' own words
    "encodec:Encodec": {"model": SEANET | {"target_bandwidths": [5.0, 30.0]}},
    "encodec:Encodec, two channels": {
        "model": SEANET
        | {"target_bandwidths": [2.0, 6.0], "sampling_rate": 4800, "audio_channels": 2, "use_causal_conv": False}
        | {"norm_type": "time_group_norm", "normalize": True, "chunk_length_s": 0.25, "overlap": 0.01}
    },
    "dac:Dac": {"model": DAC | {"codebook_size": 32, "codebook_dim": 4, "sampling_rate": 900}},
    "mimi:Mimi": {
        "model": {"hidden_size": 32, "num_filters": 4, "upsampling_ratios": [4, 3, 2], "codebook_size": 32}
        | {"codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 4, "upsample_groups": 32}
        | {"num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"sliding_window": 7}
    },
    "snac:Snac": {
        "model": SNAC
        | {"sampling_rate": 24000, "attn_window_size": None, "codebook_size": 32, "codebook_dim": 4}
        | {"vq_strides": [4, 2, 1], "depthwise": True}
    },
    "speechtokenizer:SpeechTokenizer": {
        "model": {"sample_rate": 16000, "strides": [5, 4, 2], "n_filters": 4, "dimension": 16, "n_q": 4}
        | {"semantic_dimension": 12, "bidirectional": True, "dilation_base": 2, "residual_kernel_size": 3}
        | {"n_residual_layers": 1, "lstm_layers": 2, "activation": "ELU", "codebook_size": 32}
    },
    "vqgan:VQGAN": {
        "model": {"n_embed": 64, "embed_dim": 12}
        | {"ddconfig": NETWORK | {"dropout": 0.0, "in_channels": 3, "resolution": 32, "double_z": False}}
    },
    "query:QueryImageVQ": {"image_size": (16, 32), "patch": 8, "width": 32, "heads": 2, "num_queries": 6}
    | {"encoder_depth": 1, "decoder_depth": 1, "num_quantizers": 2, "codebook_size": 32, "codebook_dim": 8},
    "series:SeriesVQ": {"codebook_size": 32},
}


@cache
def published(name):
    module, _, kind = name.partition(",")[0].partition(":")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return getattr(import_module(f"anyglot_tokenizers.{module}"), kind)(**PUBLISHED[name]).eval()


# Folders

KINDS = st.deferred(lambda: st.sampled_from(sorted(folders())))


@cache
def folders():
    """Per class: config.json as a dictionary, and the bytes of the weights."""
    found = {}
    for tokenizer in (speech(), pictures_model(), *map(published, PUBLISHED)):
        with TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            found[type(tokenizer).__name__] = (config, (Path(folder) / "model.safetensors").read_bytes())
    return found


def check_folder(config, weights, name="model.safetensors"):
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(config)
        (Path(folder) / name).write_bytes(weights)
        with tame():
            tokenizer = load(folder)
            assert not tokenizer.training and tokenizer.spec.fingerprint


@given(KINDS, st.data())
def test_damaged_weights(kind, data):
    config, weights = folders()[kind]
    check_folder(json.dumps(config).encode(), data.draw(damaged(lambda: [weights])))


def change_entry(data, entries):
    """Take one entry away, or put something else in its place."""
    name = data.draw(st.sampled_from([*sorted(entries), "model_type", "new"]))
    if name in entries and data.draw(st.booleans()):
        del entries[name]
    else:
        entries[name] = data.draw(
            JSON | st.sampled_from(sorted(MODEL_TYPES)) | st.lists(st.sampled_from(BIG), max_size=3)
        )


@given(KINDS, st.data())
def test_damaged_configs(kind, data):
    """Text that is not JSON any more, and JSON with an entry that is missing, new or absurd."""
    config, weights = folders()[kind]
    if data.draw(st.booleans()):
        content = data.draw(damaged(lambda: [json.dumps(config).encode()]))
    else:
        changed = json.loads(json.dumps(config))
        places = [changed, changed["config"], changed["spec"], changed["config"].get("model", changed["config"])]
        change_entry(data, data.draw(st.sampled_from(places)))
        content = json.dumps(changed).encode()
    check_folder(content, weights)


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@given(st.sampled_from(["pytorch_model.bin", "model.safetensors", "model.pt", "config.json"]), st.booleans())
def test_pickles_are_never_run(name, native):
    with TemporaryDirectory() as place:
        sprung = Path(place) / "sprung"
        config = folders()["AudioCodec"][0] if native else {"model_type": "encodec"}
        check_folder(json.dumps(config).encode(), pickle.dumps(Trap(sprung)), name)
        assert not sprung.exists()


@given(
    st.sampled_from(sorted(MODEL_TYPES)), st.dictionaries(st.text(max_size=8), JSON, max_size=3), st.binary(max_size=40)
)
def test_unknown_folders(kind, entries, weights):
    check_folder(json.dumps(entries | {"model_type": kind}).encode(), weights)


@given(st.sampled_from(["encodec", "dac", "mimi", "snac", "speechtokenizer", "vqgan"]), st.data())
def test_published_folders(kind, data):
    """As publishers lay them out, with an entry of the config changed and a tensor missing, new or misshapen."""
    name = next(name for name in PUBLISHED if name.startswith(kind))
    config = json.loads(json.dumps(PUBLISHED[name]["model"])) | ({"model_type": kind} if kind in MODEL_TYPES else {})
    tensors = dict(published(name).state_dict())
    if data.draw(st.booleans()):
        change_entry(data, config)
    for _ in range(data.draw(st.integers(0, 2))):
        where = data.draw(st.sampled_from(sorted(tensors)))
        parts = data.draw(st.sampled_from([[""], ["_g"], ["_v"], ["_g", "_v"]]))  # halves of a weight norm
        tensors |= {f"{where}{part}": data.draw(tensors_of(DTYPES)) for part in parts}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    check_folder(json.dumps(config).encode(), save(tensors))


# Calls

SIZES = st.sampled_from([0, 1, 2, 3, 7, 16, 31, 32, 33, 64, 100])
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool]
FILLS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 255.0, 1e30, -1e30, float("nan"), float("inf"), -float("inf")])


@st.composite
def tensors_of(draw, dtypes, shape=None):
    """Of any shape, if none is given, and of any content."""
    shape = draw(st.lists(SIZES, max_size=4)) if shape is None else shape
    if int(np.prod(shape)) > 2**18:
        shape = shape[:2]
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if draw(st.booleans()) and tensor.numel():
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(FILLS)
    dtype = draw(st.sampled_from(dtypes))
    return tensor.to(dtype) if dtype != torch.bool else tensor > 0.5


@st.composite
def tensors(draw, channels):
    """Nearly right, anything, or nothing that claims to be much."""
    kind = draw(st.sampled_from(["near", "near", "near", "any", "any", "empty"]))
    if kind == "empty":
        return torch.empty(
            draw(st.permutations([2**40, 0, channels])), dtype=draw(st.sampled_from([*FLOATS, torch.int64]))
        )
    if kind == "any":
        return draw(tensors_of([*DTYPES, torch.complex64]))
    shape = [draw(st.integers(1, 3)), channels, *draw(st.lists(SIZES, min_size=1, max_size=2))]
    return draw(tensors_of([*FLOATS, torch.float32, torch.int64], shape))


LENGTHS = st.none() | st.lists(st.integers(-2, 70), max_size=4).map(torch.tensor) | tensors(1)
COUNTS = st.none() | st.integers(-2, 5) | st.sampled_from([2**31, -(2**40)])


def check_encode(tokenizer, media, lengths, count):
    with tame():
        codes = tokenizer.encode(media, lengths, num_quantizers=count)
        sizes = tokenizer.spec.codebook_sizes[: count or None]
        assert codes.codes.shape[:2] == (len(media), len(sizes)) and codes.codes.min() >= 0
        assert codes.codes.max() < max(sizes)
        assert torch.isfinite(tokenizer.decode(codes)).all()


@given(tensors(1), LENGTHS, COUNTS)
def test_encode_sound(media, lengths, count):
    check_encode(speech(), media, lengths, count)


@given(tensors(1), LENGTHS, COUNTS, st.integers(-1, 9))
def test_encode_in_chunks(media, lengths, count, chunk_codes):
    with tame():
        encode_chunked(speech(), media, lengths, num_quantizers=count, chunk_codes=chunk_codes)


@given(tensors(3), LENGTHS, COUNTS)
def test_encode_picture(media, lengths, count):
    check_encode(pictures_model(), media, lengths, count)


def ids(codes, top):
    """Codes in range, but for the last, if they are integers at all."""
    if codes.dtype == torch.int64 and codes.numel():
        codes = (torch.arange(codes.numel()) % 32).reshape(codes.shape)
        codes.view(-1)[-1] = top
    return codes


@given(st.sampled_from(["speech", "image"]), tensors(2), st.sampled_from([0, 31, 32, -1, 2**31, 2**62]), LENGTHS)
def test_decode(kind, codes, top, lengths):
    """Bare ids and `Codes`, of any shape and dtype, ids in range and far out of it."""
    tokenizer = speech() if kind == "speech" else pictures_model()
    codes = ids(codes, top)
    with tame():
        assert torch.isfinite(tokenizer.decode(codes)).all()
    with tame():
        assert torch.isfinite(tokenizer.decode(Codes(codes, lengths))).all()
    with tame():
        decode_chunked(tokenizer, codes, chunk_codes=2)
    with tame():
        tokenizer.decode(Codes(codes, lengths, (pictures_model() if kind == "speech" else speech()).spec))
        raise AssertionError("codes of another tokenizer were decoded")


@given(st.sampled_from(sorted(PUBLISHED)), st.data(), LENGTHS, COUNTS)
def test_encode_published(name, data, lengths, count):
    tokenizer = published(name)
    check_encode(tokenizer, data.draw(tensors(tokenizer.spec.channels)), lengths, count)


@given(st.sampled_from(sorted(PUBLISHED)), st.data(), st.sampled_from([0, 31, 32, -1, 2**31, 2**62]), LENGTHS)
def test_decode_published(name, data, top, lengths):
    tokenizer = published(name)
    codes = ids(data.draw(tensors(tokenizer.spec.num_quantizers)), top)
    for given_codes in (lambda: codes, lambda: Codes(codes, lengths), lambda: Codes(codes, lengths, tokenizer.spec)):
        with tame():
            assert torch.isfinite(tokenizer.decode(given_codes())).all()


PIECES = st.sampled_from(["speech", "encodec:Encodec", "mimi:Mimi", "dac:Dac", "snac:Snac", "series:SeriesVQ"])


@given(PIECES, st.data(), st.booleans(), st.integers(0, 3) | st.just(2**40), COUNTS)
def test_streams(name, data, encodes, batch_size, count):
    """Either way, pieces of any kind; what a stream refuses must not harm it."""
    tokenizer = speech() if name == "speech" else published(name)
    stream = None
    with tame():
        stream = tokenizer.stream(batch_size, num_quantizers=count)
    channels = tokenizer.spec.channels if encodes else tokenizer.spec.num_quantizers
    for piece in data.draw(st.lists(tensors(channels), min_size=1, max_size=4)) if stream is not None else ():
        with tame():
            found = stream.encode(piece) if encodes else stream.decode(ids(piece, 0))
            assert len(found) == batch_size
    if stream is not None:
        with tame():
            stream.flush()


def test_a_quarter_of_an_hour_is_encoded_in_bounded_memory():
    """The one long input: the length alone must not decide how much memory is needed."""
    with tame():
        codes = encode_chunked(speech(), torch.zeros(1, 1, 900 * 16000), chunk_codes=2000)
        assert codes.codes.shape[2] == 900 * 16000 // 32
