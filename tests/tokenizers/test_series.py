"""Time series: trained in seconds, exact in chunks, of any scale; digits and their inverse; the choice between them."""

import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyglot_tokenizers import CodesError, FingerprintError, ManifestError, MediaError, fit_tokenizer, load
from anyglot_tokenizers import series as series_module
from anyglot_tokenizers.chunks import decode_chunked, encode_chunked
from anyglot_tokenizers.series import SeriesLoss, SeriesVQ
from anyglot_tokenizers.series_text import SeriesText, choose_series_form

LENGTH = 128


def waves_and_walks(count, seed, length=LENGTH, channels=1):
    """Sums of sinusoids and a random walk, at levels and scales from 1e-3 to 1e3; float `[channels, length]` each."""
    random = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        frequency, height, phase = torch.rand(3, channels, 3, 1, generator=random)
        angle = 2 * math.pi * (frequency * torch.arange(length) * 0.08 + phase)
        walk = 0.1 * torch.randn(channels, length, generator=random).cumsum(1)
        level, scale = torch.randn(channels, 1, generator=random) * 3, 10 ** (torch.rand(1, generator=random) * 6 - 3)
        drawn.append(((height * angle.sin()).sum(1) + walk + level) * scale)
    return drawn


def error(tokenizer, drawn):
    """Relative error, as `SeriesLoss` has it."""
    batch = torch.stack(drawn)
    return float(SeriesLoss()(tokenizer.decode(tokenizer.encode(batch))[..., : batch.shape[2]], batch)[0].sqrt())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tokenizer = SeriesVQ(patch=16, shapes=3, codebook_size=128, stage_steps=10)
    folder = tmp_path_factory.mktemp("run")
    options = {"max_steps": 120, "batch_size": 32, "crop": LENGTH, "precision": "32-true"}
    return fit_tokenizer(tokenizer, waves_and_walks(300, seed=0), run_dir=folder, loss=SeriesLoss(), **options)


def test_a_modality_in_one_short_file():
    assert len(inspect.getsource(series_module).splitlines()) < 150


def test_held_out_error(trained):
    held_out = waves_and_walks(64, seed=1)
    means = [x.unflatten(1, (-1, 16)).mean(2).repeat_interleave(16, 1) for x in held_out]
    baseline = float(SeriesLoss()(torch.stack(means), torch.stack(held_out))[0].sqrt())
    assert error(trained, held_out) < 0.25 * baseline
    assert error(SeriesVQ(codebook_size=128).eval(), held_out) > 0.6 * baseline  # it is the training that does it
    codes = trained.encode(torch.stack(held_out)).codes
    batch, errors = torch.stack(held_out), []
    for count in range(1, 7):
        errors.append(float(SeriesLoss()(trained.decode(codes[:, :count]), batch)[0].sqrt()))
    assert errors[0] > errors[1] > errors[3] > errors[4] > errors[5]  # more codes say more
    assert trained.codebooks is None  # not every code is an entry
    assert all(codes[:, k].unique().numel() > 64 for k in (3, 4, 5))  # of 128


def test_scale_is_in_the_codes(trained):
    """Bare ids give back level and size, far beyond what was trained on."""
    x = torch.stack(waves_and_walks(16, seed=2))
    for scale in (1.0, -1e3, 1e6):
        again = trained.decode(trained.encode(x * scale).codes)
        assert float(SeriesLoss()(again, x * scale)[0].sqrt()) < 0.3
    constant = torch.full((1, 1, 40), -7.0)
    assert torch.allclose(trained.decode(trained.encode(constant))[..., :40], constant, rtol=2e-2)
    assert trained.decode(trained.encode(constant * 0)).abs().max() < 1e-2


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=2, max_size=4), st.integers(0, 99), st.integers(1, 6))
def test_alone_padded_chunked_streamed(trained, lengths, seed, chunk):
    drawn = [x[:, :length] for x, length in zip(waves_and_walks(4, seed, 150), lengths, strict=False)]
    batch = torch.full((len(lengths), 1, max(lengths)), 9e9)  # garbage in the padding
    for row, x in enumerate(drawn):
        batch[row, :, : x.shape[1]] = x
    together = trained.encode(batch, torch.tensor(lengths))
    decoded = trained.decode(together)
    bound = 1e-5 * float(decoded.abs().max())
    assert torch.equal(encode_chunked(trained, batch, torch.tensor(lengths), chunk_codes=chunk).codes, together.codes)
    assert torch.allclose(decode_chunked(trained, together, chunk_codes=chunk), decoded, atol=bound)
    for row, x in enumerate(drawn):
        alone = trained.encode(x[None])
        assert torch.equal(alone.codes[0], together.item(row))
        assert alone.codes.shape[2] == trained.spec.num_codes(x.shape[1])
        assert torch.allclose(trained.decode(alone)[0], decoded[row, :, : alone.codes.shape[2] * 16], atol=bound)
        assert (decoded[row, :, alone.codes.shape[2] * 16 :] == 0).all()
        stream = trained.stream()
        parts = [stream.encode(piece[None]).codes for piece in x.split(7, 1)] + [stream.flush().codes]
        assert torch.equal(torch.cat(parts, 2), alone.codes)


def test_the_unit_of_a_trained_tokenizer_stays(trained):
    new, louder = SeriesVQ(), torch.full((4, 1, LENGTH), 1e5)
    new.fit_statistics(louder)
    assert float(new.unit_C1) == 1e5
    before = trained.unit_C1.clone()
    trained.fit_statistics(louder)
    assert torch.equal(trained.unit_C1, before)


def test_save_and_load_in_a_new_process(trained, tmp_path):
    fingerprint = trained.save_pretrained(tmp_path)
    x = torch.stack(waves_and_walks(2, seed=3))
    assert torch.equal(load(tmp_path).encode(x).codes, trained.encode(x).codes)
    code = f"from anyglot_tokenizers import load; print(load({str(tmp_path)!r}).fingerprint)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == fingerprint == trained.fingerprint, done.stderr


def test_far_levels_need_digits():
    """A level 30,000 times the deviation: one more code of the mean tells it exactly enough."""
    x = 1e4 + torch.sin(torch.arange(64) * 0.3)[None, None] / 3
    for digits, worst in ((2, 20.0), (3, 0.3)):
        tokenizer = SeriesVQ(digits=digits, codebook_size=128).eval()
        means = tokenizer.decode(tokenizer.encode(x).codes[:, :digits])
        assert worst / 100 < (means - x).abs().mean() < worst
        assert tokenizer.spec.num_quantizers == digits + 4


def test_channels(tmp_path):
    tokenizer = SeriesVQ(channels=2, patch=8, shapes=2, codebook_size=64, sample_rate=50, stage_steps=5)
    factors = torch.tensor([[1.0], [1e4]])
    drawn, held_out = ([x * factors for x in waves_and_walks(count, count, channels=2)] for count in (100, 16))
    options = {"max_steps": 60, "batch_size": 16, "crop": LENGTH, "precision": "32-true"}
    fit_tokenizer(tokenizer, drawn, run_dir=tmp_path, loss=SeriesLoss(), **options)
    assert tokenizer.spec.num_quantizers == 8 and tokenizer.spec.frame_rate == 50 / 8
    assert tokenizer.encode(drawn[0][None]).codes.shape == (1, 8, LENGTH // 8)
    assert error(tokenizer, held_out) < 0.35
    lone = torch.stack(drawn[:1])
    lone[:, 1] = 0  # a channel's mean and scale say nothing of the other
    heads = [tokenizer.encode(x).codes[:, :6:2] for x in (torch.stack(drawn[:1]), lone)]
    assert torch.equal(*heads)


def test_wrong_input(trained):
    x = torch.randn(2, 1, 40)
    far = torch.full((1, 1, 16), 1e30)
    for bad in (x[0], x.repeat(1, 2, 1), x.long(), x * torch.nan, x[..., :0], far):
        with pytest.raises(MediaError):
            trained.encode(bad)
    for lengths in ([40], [0, 40], [41, 40], [[40, 40]], [4.0, 4.0]):
        with pytest.raises(MediaError):
            trained.encode(x, torch.tensor(lengths))
    for count in (0, 7, -1):
        with pytest.raises(CodesError):
            trained.encode(x, num_quantizers=count)
    ids = torch.zeros(1, 6, 4, dtype=torch.int64)
    for bad in (ids[0], ids.repeat(1, 2, 1), ids + 128, ids - 1, ids.float(), ids[..., :0]):
        with pytest.raises(CodesError):
            trained.decode(bad)
    with pytest.raises(FingerprintError):
        trained.decode(SeriesVQ(codebook_size=128).eval().encode(x))
    for extreme in (ids, ids + 127):
        assert torch.isfinite(trained.decode(extreme)).all()


numbers = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(numbers, min_size=7, max_size=7), min_size=1, max_size=3), st.integers(1, 6))
def test_digits_are_exact_to_their_precision(rows, digits):
    x, form = torch.tensor(rows), SeriesText(digits)
    text = form.write(x)
    units = torch.tensor([float(line.split(":")[0].split()[1]) for line in text.splitlines()])[:, None]
    assert set(text) <= set("0123456789.,:e+- \n")
    assert form.read(text).shape == x.shape
    assert ((form.read(text) - x).abs() <= units / 2 * 1.001 + 1e-6 * x.abs()).all()
    spread = (x - x.median(1, keepdim=True).values).abs().amax(1, keepdim=True)
    assert (units <= torch.where(spread > 0, spread * 1.01 / 10**digits + 1e-6, 1.0)).all()  # so many digits


def test_digits_of_blocks():
    x = torch.linspace(-1, 1, 50)[None]
    form = SeriesText(digits=3, step=4)
    again = form.read(form.write(x))
    assert again.shape == (1, 52) and len(form.write(x)) < 0.4 * len(SeriesText(digits=3).write(x))
    assert (again[:, 2:46] - x[:, 2:46]).abs().max() < 2e-3  # a line is a line


def test_damaged_text():
    form = SeriesText()
    for bad in (
        "",
        "x",
        "1 2",
        "1 2:",
        "1:3",
        "1 2 3:4",
        "1 2:3;4",
        "1 2:3\n1 2:3,4",
        "nan 1:3",
        "1 1e999:3",
        "1 2:3:4",
    ):
        with pytest.raises(CodesError, match="no series in digits"):
            form.read(bad)
    with pytest.raises(CodesError):
        form.read("1 2:" + "9" * 5000)
    for bad in (torch.zeros(3), torch.zeros(1, 0), torch.full((1, 3), torch.nan), torch.zeros(1, 3).long()):
        with pytest.raises(MediaError):
            form.write(bad)


def test_the_better_form_is_chosen(tmp_path):
    options = {"max_steps": 60, "codebook_size": 128, "stage_steps": 5, "batch_size": 16, "tokens_per_sample": 0.5}
    rough = waves_and_walks(120, seed=0), waves_and_walks(20, seed=1)
    form, errors = choose_series_form(*rough, run_dir=tmp_path / "rough", **options)
    assert isinstance(form, SeriesVQ) and form.patch == 12 and errors["codes"] < 0.7 * errors["text"]
    options["tokens_per_sample"] = 5.0  # enough to write every sample
    form, errors = choose_series_form(*rough, run_dir=tmp_path / "rich", **options)
    assert isinstance(form, SeriesText) and form.step == 1 and errors["text"] < 0.5 * errors["codes"]
    assert sum(len(form.write(x)) for x in rough[0]) <= 5 * 120 * LENGTH
    with pytest.raises(ManifestError, match="tokens per sample"):
        choose_series_form(*rough, run_dir=tmp_path / "none", tokens_per_sample=0.01)


def test_the_code_of_the_guide_runs(tmp_path, monkeypatch):
    pytest.importorskip("anyglot_lm.vocabulary")
    guide = Path(__file__).parents[2] / "docs/add-a-modality.md"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.S):
        exec(block, names)
    assert names["codes"].codes.shape == (4, 6, 16) and len(names["ids"]) == 2 + 16 * 6
    assert float(SeriesLoss()(names["again"], torch.stack(names["series"][:4]))[1]["nrmse"]) < 0.2
