"""Evaluation end to end on small real tokenizers: scores, skips, costs, miss rates, probes, plug-ins and the report."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from anyglot_tokenizers import (
    AnyglotError,
    AudioCodec,
    Codes,
    ImageVQ,
    MediaError,
    evaluate,
    evaluation,
    read_audio,
    read_image,
    write_audio,
    write_image,
)
from anyglot_tokenizers.misses import Bfloat16Layers, miss_rates
from anyglot_tokenizers.report import markdown, write_report
from anyglot_tokenizers.tokenizer import Tokenizer

RATE = 8000
CODEC = AudioCodec(
    sample_rate=RATE,
    n_fft=256,
    hop=64,
    num_mels=12,
    dim=16,
    encoder_depth=1,
    decoder_depth=1,
    num_quantizers=2,
    codebook_size=32,
    codebook_dim=8,
).eval()
PICTURES = ImageVQ(channels=(8, 16, 16), codebook_size=32, codebook_dim=8).eval()


class Stairs(Tokenizer):
    """Every sample rounded to one of `levels` values: a codec whose quality is known."""

    def __init__(self, levels=256, sample_rate=RATE, modality="speech", decodes=True, normalise=False, noise=0.0):
        super().__init__({key: value for key, value in locals().items() if key not in ("self", "__class__")})
        self.levels, self.normalise, self.noise = levels, normalise, noise
        self.weight = torch.nn.Parameter(torch.ones(1))

    def _spec_entries(self):
        c = self.config
        entries = {"codebook_sizes": (self.levels,), "axes": ("time",), "strides": (1,), "context": (0, 0)}
        return entries | {key: c[key] for key in ("sample_rate", "modality", "decodes")}

    @torch.no_grad()
    def encode(self, media, lengths=None, *, num_quantizers=None):
        if not torch.isfinite(media).all():
            raise MediaError("stairs", "holds NaN", "clean it")
        if self.normalise:  # by the deviation of the padded row: padding leaks into every code
            media = media / media.std(dim=2, keepdim=True).clamp(min=1e-3) / 4
        media = media + self.noise * torch.randn_like(media)
        codes = ((media[:, :1].clamp(-1, 1) + 1) / 2 * (self.levels - 1)).round().long()
        return Codes(codes, lengths, self.spec)

    def decode(self, codes):
        codes = codes.codes if isinstance(codes, Codes) else codes
        return codes.float() / (self.levels - 1) * 2 - 1


def voice(seconds=0.8, pitch=140.0):
    time = torch.arange(int(seconds * RATE)) / RATE
    phase = 2 * torch.pi * torch.cumsum(pitch * (1 + 0.3 * torch.sin(2 * torch.pi * 1.5 * time)), 0) / RATE
    buzz = sum(torch.sin(k * phase) / k for k in range(1, 12))
    return (0.2 * buzz * (0.55 - 0.45 * torch.cos(2 * torch.pi * 4 * time)))[None]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Result and report of real (if untrained) codes of three voices and a second of silence."""
    folder = tmp_path_factory.mktemp("spoken")
    media = [voice(0.8), voice(1.0, 170.0), voice(0.9, 110.0), torch.zeros(1, RATE)]
    return evaluate(CODEC, media, out=folder, shown=3), folder


def test_scores_and_skips(spoken):
    result, _ = spoken
    assert set(result["metrics"]) == {
        *("si_sdr", "mel", "mel_audiotools", "pesq_nb", "stoi", "visqol", "f0_correlation"),
        *("wer", "speaker_similarity"),
    }, "no wide-band PESQ at 8 kHz"
    for name in ("si_sdr", "pesq_nb", "stoi", "visqol"):
        row = result["metrics"][name]
        if any("not installed" in reason for reason in row["reasons"]):
            continue
        assert (row["n"], row["skipped"]) == (3, 1), name
        assert row["low"] <= row["mean"] <= row["high"]
        assert any(word in reason for reason in row["reasons"] for word in ("silent", "silence", "utterances"))
    assert result["metrics"]["mel"]["n"] == 4, "silence has a spectrum"
    wer = result["metrics"]["wer"]
    assert wer["mean"] is None and wer["reasons"] == {"no recogniser was given": 4}
    assert result["failures"] == [] and len(result["items"]) == 4
    assert json.loads(json.dumps(result)) == result


def test_codes_cost_and_speed(spoken):
    result, _ = spoken
    positions = sum(-(-int(seconds * RATE) // 128) for seconds in (0.8, 1.0, 0.9, 1.0))
    assert [row["positions"] for row in result["codes"]] == [positions] * 2
    cost, speed = result["cost"], result["speed"]
    samples = int(3.7 * RATE)
    assert cost["bitrate"] == pytest.approx(10 * positions / samples * RATE)
    entropy = sum(row["entropy"] for row in result["codes"])
    assert cost["entropy_coded_bitrate"] == pytest.approx(entropy * positions / samples * RATE)
    assert cost["entropy_coded_bitrate"] < cost["bitrate"]
    assert cost["tokens_per_second"] == pytest.approx(2 * positions / samples * RATE)
    assert speed["encode_tokens_per_second"] == pytest.approx(2 * positions / speed["encode_seconds"])
    assert speed["decode_real_time_factor"] == pytest.approx(speed["decode_seconds"] / 3.7)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href")]


def test_pages_load_their_files(spoken):
    result, folder = spoken
    links = Links()
    text = (folder / "index.html").read_text(encoding="utf-8")
    links.feed(text)
    assert len(links.sources) == 3 * 4, "a player and a picture of three originals and three reconstructions"
    for source in links.sources:
        path = folder / source
        media = read_audio(path, sample_rate=RATE) if path.suffix == ".wav" else read_image(path)
        assert media.numel() > 1000
        assert f"({source})" in (folder / "report.md").read_text(encoding="utf-8")
    assert "http" not in text.replace("https://www.w3.org", ""), "nothing from the network"
    assert json.loads((folder / "report.json").read_text()) == result
    assert "1 × the original is silent" in text
    original = read_audio(folder / result["samples"][0]["original"]["audio"], sample_rate=RATE)
    assert torch.allclose(original, voice(0.8), atol=1e-3)


def test_reports_escape_what_files_are_called(tmp_path):
    name = "<script>alert(1)</script>|.wav"
    (tmp_path / "in").mkdir()
    write_audio(tmp_path / "in" / "ok.wav", voice(0.3), RATE)
    result = evaluate(Stairs(), tmp_path / "in", out=tmp_path / "out")
    result["samples"][0]["item"] = result["items"][0]["item"] = name
    result["failures"] = [{"item": name, "reason": name}]
    write_report(result, tmp_path / "out")
    assert "<script>" not in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    table = [line for line in markdown(result).splitlines() if line.startswith("| \\<script")]
    assert len(table) == 1 and table[0].count(" | ") == 1


@pytest.mark.parametrize("measure", ["si_sdr", "mel", "mel_audiotools", "pesq_nb", "stoi", "visqol", "f0_correlation"])
def test_coarser_codes_score_worse(measure, coarse_and_fine):
    fine, coarse = (result["metrics"][measure] for result in coarse_and_fine)
    if fine["n"] == 0:
        pytest.skip(str(fine["reasons"]))
    sign = 1 if fine["better"] == "higher" else -1
    assert sign * fine["mean"] > sign * coarse["mean"]


@pytest.fixture(scope="module")
def coarse_and_fine():
    media = [voice(0.8), voice(0.9, 170.0)]
    return [evaluate(Stairs(levels), media) for levels in (512, 8)]


def test_known_codec_has_known_scores(coarse_and_fine):
    fine, coarse = coarse_and_fine
    assert 30 < fine["metrics"]["si_sdr"]["mean"] < 50
    assert coarse["codes"][0]["codebook_size"] == 8 and coarse["codes"][0]["usage"] >= 0.5
    assert coarse["cost"]["bitrate"] == 3 * RATE


def test_failures_are_counted_with_their_reason(tmp_path):
    write_audio(tmp_path / "b.wav", voice(0.3), RATE)
    (tmp_path / "a.wav").write_text("not a sound")
    (tmp_path / "notes.txt").write_text("not a medium")
    result = evaluate(Stairs(), [tmp_path, torch.full((1, 500), float("nan"))], out=tmp_path / "out")
    assert len(result["items"]) == 1
    failed = {failure["item"]: failure["reason"] for failure in result["failures"]}
    assert set(failed) == {f"{tmp_path.name}/a.wav", "item 2"}
    assert "not a readable sound" in failed[f"{tmp_path.name}/a.wav"] and "NaN" in failed["item 2"]
    assert "not a readable sound" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    with pytest.raises(MediaError, match="none of 1 items"):
        evaluate(Stairs(), [tmp_path / "a.wav"])


def test_wrong_use_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for media, options, reason in (
        (tmp_path / "empty", {}, "no media"),
        ([], {}, "no media"),
        ([voice(0.1)], {"limit": 0}, "at least 1"),
        ([voice(0.1)], {"texts": ["a", "b"]}, "2 texts for 1"),
        ([voice(0.1)], {"labels": "("}, "not a regular expression"),
        ([voice(0.1)], {"labels": "(.)"}, "label"),
        ([voice(0.1)], {"num_quantizers": 3}, "num_quantizers 3"),
    ):
        with pytest.raises(AnyglotError, match=reason):
            evaluate(CODEC, media, **options)


def test_limit_spreads_over_the_list():
    media = [voice(0.05, 100.0 + index) for index in range(9)]
    result = evaluate(Stairs(), media, limit=3)
    assert [item["item"] for item in result["items"]] == ["item 0", "item 3", "item 6"]
    assert (result["settings"]["items"], result["settings"]["of"]) == (3, 9)


def test_encode_only_gives_code_statistics_only(tmp_path):
    result = evaluate(Stairs(decodes=False), [voice(0.2)], out=tmp_path)
    assert result["metrics"] == {} and result["samples"] == [] and result["codes"][0]["positions"] == 1600
    assert "decode_seconds" not in result["speed"]
    assert "only encodes" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_series_and_music(tmp_path):
    series = evaluate(Stairs(sample_rate=None, modality="series"), [voice(0.1)], out=tmp_path)
    assert set(series["metrics"]) == {"snr"} and series["metrics"]["snr"]["mean"] > 30
    assert series["cost"]["bits_per_sample"] == 8 and (tmp_path / "media" / "00-original.png").is_file()
    music = evaluate(Stairs(modality="music"), [voice(0.8)])
    assert set(music["metrics"]) == {"si_sdr", "mel", "mel_audiotools", "visqol"}
    assert music["metrics"]["visqol"]["note"] == "audio mode, 48 kHz"


def test_images(tmp_path):
    for index in range(3):
        write_image(tmp_path / f"{index}.png", torch.rand(3, 40, 52))
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 5, stride=3), torch.nn.ReLU())
    result = evaluate(PICTURES, tmp_path, out=tmp_path / "out", feature=network)
    assert set(result["metrics"]) == {"psnr", "ssim", "lpips", "frechet"}
    assert all(row["n"] == 3 and row["skipped"] == 0 for row in result["metrics"].values())
    assert result["metrics"]["frechet"]["low"] is None
    assert result["codes"][0]["positions"] == 3 * 2 * 3, "cropped to 32 x 48"
    assert result["cost"]["bits_per_pixel"] == pytest.approx(2 * 5 / 256)
    assert read_image(tmp_path / "out" / result["samples"][0]["original"]["picture"]).shape == (3, 32, 48)
    assert "padded batch" not in result["misses"] and result["misses"]["batch shape"]["rate"] == 0
    bare = evaluate(PICTURES, [torch.rand(3, 32, 32)])
    for name in ("lpips", "frechet"):
        assert bare["metrics"][name]["reasons"] == {"no feature network was given": 1}


def test_images_of_a_fixed_size(tmp_path):
    """A file is cut to the aspect and resized; a tensor must have the size already."""
    from anyglot_tokenizers.query import QueryImageVQ

    options = {"image_size": (16, 24), "patch": 8, "width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1}
    tokenizer = QueryImageVQ(**options, num_queries=6, codebook_size=16, codebook_dim=8).eval()
    image = torch.zeros(3, 40, 90)
    image[:, :, 15:75] = 1.0  # what is left of it in the aspect of 3 to 2
    write_image(tmp_path / "a.png", image)
    result = evaluate(tokenizer, [tmp_path / "a.png", torch.rand(3, 16, 24), torch.rand(3, 16, 16)], out=tmp_path)
    assert len(result["items"]) == 2 and [failure["item"] for failure in result["failures"]] == ["item 2"]
    assert result["cost"]["tokens_per_item"] == 6 * len(result["codes"])
    assert (read_image(tmp_path / result["samples"][0]["original"]["picture"]) == 1).all()


def test_frechet_row_is_the_distance_of_pooled_features():
    from anyglot_tokenizers.metrics import frechet_distance

    network = torch.nn.Conv2d(3, 4, 3)
    media = [torch.rand(3, 32, 32) for _ in range(5)]
    result = evaluate(PICTURES, media, feature=network)
    again = [PICTURES.decode(PICTURES.encode(image[None]))[0] for image in media]
    with torch.no_grad():
        outputs, targets = (network(torch.stack(images)).mean((2, 3)) for images in (again, media))
    assert result["metrics"]["frechet"]["mean"] == pytest.approx(frechet_distance(outputs, targets), rel=1e-4)


# Plug-ins


def test_recogniser_and_speaker():
    heard = []

    def recogniser(audio, rate):
        heard.append(rate)
        assert audio.shape[0] == 1
        return "one two three" if len(heard) % 2 else "one two four five"

    def speaker(audio, rate):
        if audio.shape[1] < 2000:
            raise RuntimeError("kernel larger than input")
        return torch.tensor([1.0, 2.0])

    result = evaluate(
        Stairs(), [voice(0.3), voice(0.2)], recogniser=recogniser, speaker=speaker, texts=["one two three", "six"]
    )
    wer = result["metrics"]["wer"]
    assert heard == [RATE] * 2
    assert wer["mean"] == pytest.approx((0 + 4) / 4), "errors over words of the set"
    voices = result["metrics"]["speaker_similarity"]
    assert voices["mean"] == pytest.approx(1) and voices["n"] == 1
    assert voices["reasons"] == {"the speaker encoder failed: RuntimeError: kernel larger than input": 1}
    own = evaluate(Stairs(), [voice(0.3)], recogniser=lambda audio, rate: "same words")
    assert own["metrics"]["wer"]["mean"] == 0


def test_missing_packages_are_reported_as_skipped(monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)
    result = evaluate(Stairs(), [voice(0.5), voice(0.6)])
    row = result["metrics"]["pesq_nb"]
    assert (row["n"], row["mean"], row["skipped"]) == (0, None, 2)
    assert row["reasons"] == {"pesq is not installed; pip install 'anyglot[eval]'": 2}


def test_named_plugs_load_published_folders(tmp_path):
    """Tiny random models in the publishers' layouts, by folder."""
    transformers = pytest.importorskip("transformers")
    from anyglot_tokenizers import plugs

    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    transformers.ResNetModel(resnet).save_pretrained(tmp_path / "resnet")
    network = plugs.feature_network(str(tmp_path / "resnet"))
    assert [maps.shape[1] for maps in network(torch.rand(1, 3, 32, 32))] == [8, 12]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    tails = {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 6}
    small = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_buckets": 8}
    config = transformers.WavLMConfig(**sizes, **convolutions, **tails, **small)
    transformers.WavLMForXVector(config).save_pretrained(tmp_path / "wavlm")
    speaker = plugs.speaker_encoder(str(tmp_path / "wavlm"))
    assert speaker(voice(0.3), RATE).shape == (6,)
    assert torch.equal(speaker(voice(0.3), RATE), speaker(voice(0.3), RATE))
    transformers.WavLMModel(config).save_pretrained(tmp_path / "headless")
    with pytest.raises(AnyglotError, match="no weights of an x-vector head"):
        plugs.speaker_encoder(str(tmp_path / "headless"))
    for plug in (plugs.recogniser, plugs.speaker_encoder, plugs.feature_network):
        with pytest.raises(AnyglotError, match="cannot be loaded"):
            plug(str(tmp_path / "nowhere"))


def test_sphinx_hears():
    pytest.importorskip("pocketsphinx")
    from anyglot_tokenizers import plugs

    hear = plugs.recogniser("sphinx")
    assert hear(torch.zeros(1, RATE), RATE) == ""
    assert isinstance(hear(voice(1.0), RATE), str)


# Miss rates


def test_padding_sensitive_tokenizer_misses():
    items = [voice(0.3), voice(0.5), voice(0.9)]
    sensitive, sound = (miss_rates(Stairs(normalise=normalise), items) for normalise in (True, False))
    assert sensitive["padded batch"]["rate"] > 0.2 and sensitive["chunked"]["rate"] > 0.2
    assert sensitive["again"]["rate"] == 0
    assert all(row["rate"] == 0 for row in sound.values())
    assert miss_rates(Stairs(noise=0.1), items)["again"]["rate"] > 0.2


def test_our_codec_does_not_miss():
    rates = miss_rates(CODEC, [voice(0.3), voice(0.5), voice(0.9), torch.zeros(1, 100)])
    assert rates.pop("bf16 layers")["rate"] < 0.5
    assert set(rates) == {"again", "padded batch", "chunked", "streamed", "batch shape"}
    assert all(row["rate"] == 0 and row["changed"] == 0 and row["codes"] > 0 for row in rates.values())


def test_items_of_one_length_are_cut_for_the_padded_batch():
    rates = miss_rates(Stairs(normalise=True), [voice(0.3), voice(0.3, 170.0)])
    assert rates["padded batch"]["rate"] > 0


def test_miss_rates_take_little_of_long_items():
    seen = []

    class Counting(Stairs):
        def encode(self, media, lengths=None, *, num_quantizers=None):
            seen.append(tuple(media.shape))
            return super().encode(media, lengths, num_quantizers=num_quantizers)

    lines, items = [], [voice(11.0), voice(0.3)]
    evaluate(Counting(decodes=False), items, progress=lines.append)
    assert lines == ["miss rates of 2 items"]
    whole = [shape for shape in seen if shape[2] > 10 * RATE]
    assert whole == [(1, 1, 11 * RATE)] * 2  # once to warm up, and once to be measured
    seen.clear()
    miss_rates(Counting(), [voice(0.3), voice(0.5)])
    long = [shape for shape in seen if shape == (1, 1, RATE // 2)]
    assert len(long) == 3  # the reference, again, and with bfloat16 layers


def test_a_way_that_does_not_exist_says_why():
    class Recurrent(Stairs):
        def _spec_entries(self):
            return super()._spec_entries() | {"context": None}

    rates = miss_rates(Recurrent(), [voice(0.1)])
    assert "unbounded context" in rates["chunked"]["skipped"] and "unbounded" in rates["streamed"]["skipped"]
    assert rates["padded batch"]["rate"] == 0


def test_bfloat16_layers_are_those_of_autocast():
    layer = torch.nn.Sequential(torch.nn.Conv1d(3, 8, 3), torch.nn.GELU(), torch.nn.Conv1d(8, 4, 1))
    x = torch.randn(2, 3, 20)
    with torch.no_grad(), Bfloat16Layers(), torch.autocast("cpu", enabled=False):
        got = layer(x)
        product = x[0] @ x[1].T
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first = layer[0](x).float()  # ours gives float32 back, so the GELU between is in float32
        want = layer[2](torch.nn.functional.gelu(first)).float()
    assert got.dtype == torch.float32 and torch.equal(got, want)
    assert torch.equal(product, (x[0].bfloat16() @ x[1].T.bfloat16()).float())
    assert not torch.equal(got, layer(x))


# Probe, memory, command


def test_probe_reads_labels_off_file_names(tmp_path):
    """High against low voices, by two speakers who are held out in turn."""
    for speaker, shift in (("ann", 1.0), ("bob", 1.06)):
        for take in range(6):
            for label, pitch in (("low", 110.0), ("high", 300.0)):
                path = tmp_path / f"{label}_{speaker}_{take}.wav"
                write_audio(path, voice(0.25, pitch * shift + take), RATE)
    (tmp_path / "unlabelled.wav").write_bytes((tmp_path / "low_ann_0.wav").read_bytes())
    result = evaluate(CODEC, tmp_path, out=tmp_path / "out", limit=2, labels=r"(?P<label>low|high)_(?P<group>[a-z]+)_")
    probe = result["probe"]
    assert set(probe["rows"]) == {"first codebook", "all codebooks"} and probe["skipped"] == 1
    row = probe["rows"]["first codebook"]
    assert (row["n"], row["classes"], row["groups"], row["folds"]) == (24, 2, 2, 2)
    assert row["accuracy"] > 0.8 > row["chance"], "untrained codes tell an octave and a half"
    assert "Semantic probe" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_probe_that_cannot_be_made_says_why(tmp_path):
    write_audio(tmp_path / "low_1.wav", voice(0.25, 110.0), RATE)
    result = evaluate(CODEC, tmp_path, labels=r"(?P<label>[a-z]+)_")
    assert result["metrics"] and not result["probe"]["rows"]
    assert any("two classes" in reason for reason in result["probe"]["reasons"])
    for labels in ("(bad", "no group"):
        with pytest.raises(AnyglotError, match="labels"):
            evaluate(CODEC, tmp_path, labels=labels)


def test_clock_sees_memory():
    """In a process of its own: one that ran other tests may have 64 MiB free already."""
    code = """
import torch
from anyglot_tokenizers.clock import Clock
clock = Clock(torch.device("cpu"))
with clock("encode"):
    block = torch.ones(16 * 2**20)
with clock("decode"):
    pass
print(clock.peak_mib["encode"], clock.peak_mib["decode"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    encode, decode = map(float, done.stdout.split())
    assert 40 < encode < 200
    if sys.platform == "linux":
        assert decode < 20


def test_command(tmp_path, capsys):
    from argparse import Namespace

    write_audio(tmp_path / "a.wav", voice(0.3), RATE)
    arguments = Namespace(
        media=[str(tmp_path)],
        out=str(tmp_path / "out"),
        num_quantizers=1,
        limit=None,
        labels=None,
        recogniser=None,
        speaker=None,
        feature=None,
        json=True,
    )
    assert evaluation.evaluate_command(arguments, CODEC) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["num_quantizers"] == 1 and len(result["codes"]) == 1
    arguments.json, arguments.out = False, None
    assert evaluation.evaluate_command(arguments, CODEC) == 0
    assert capsys.readouterr().out.startswith("# AudioCodec: speech at 8,000 Hz\n")
