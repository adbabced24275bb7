"""AudioCodec beyond the basics: causal, stereo, other quantizers, long audio, streams, shipped checkpoints."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from anyglot_tokenizers import AudioCodec, MediaError, load
from anyglot_tokenizers.audio import left_right, low_delay_windows, mid_side, overlap_add

SMALL = {"n_fft": 64, "hop": 16, "num_mels": 12, "dim": 16, "encoder_depth": 2, "decoder_depth": 2}
SMALL |= {"num_quantizers": 3, "codebook_size": 32, "codebook_dim": 8}
SHIPPED = Path(__file__).parents[2] / "recipes/anyglot_recipes/weights/nano/tokenizers"
KINDS = {
    "plain": {},
    "causal": {"causal": True},
    "causal, stride 1": {"causal": True, "stride": 1, "encoder_depth": 3},
    "stereo": {"channels": 2, "modality": "music"},
    "causal stereo": {"channels": 2, "causal": True},
    "fsq": {"quantizer": "fsq"},
    "simvq, causal": {"quantizer": "simvq", "causal": True},
    "32 kHz": {"sample_rate": 32000, "n_fft": 2048, "hop": 512, "num_mels": 64, "channels": 2},
}


def codec(**options):
    return AudioCodec(**{**SMALL, **options}).eval()


def sound(samples, channels=1, seed=0, batch=1):
    return torch.randn(batch, channels, samples, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.fixture(scope="module", params=KINDS)
def built(request):
    return codec(**KINDS[request.param])


def test_alone_padded_chunked_streamed(built):
    """The same codes and audio each way; the padding of the batch is noise."""
    hop, channels = built.hop_length, built.channels
    lengths = torch.tensor([60 * hop - 5, 3 * hop, 17 * hop + 1, 1])
    batch = sound(int(lengths.max()), channels, batch=4)
    together = built.encode(batch, lengths)
    decoded = built.decode(together)
    assert decoded.shape == (4, channels, 60 * hop)
    for row, length in enumerate(lengths.tolist()):
        alone = built.encode(batch[row : row + 1, :, :length])
        assert torch.equal(alone.codes[0], together.item(row)), row
        audio = built.decode(alone)[0]
        assert torch.allclose(audio, decoded[row, :, : audio.shape[1]], atol=1e-5)
        assert not decoded[row, :, audio.shape[1] :].any()

    item = batch[:1, :, : int(lengths[0])]
    alone = built.encode(item)
    whole = built.decode(alone)
    stream, parts, start = built.stream(), [], 0
    for size in (1, hop - 1, 7 * hop, hop // 2, 30 * hop, 10**6):
        parts.append(stream.encode(item[..., start : start + size]).codes)
        start += size
    parts.append(stream.flush().codes)
    assert torch.equal(torch.cat(parts, 2), alone.codes)
    stream, pieces = built.stream(), []
    for piece in alone.codes.split(7, 2):
        pieces.append(stream.decode(piece))
    pieces.append(stream.flush())
    assert torch.allclose(torch.cat(pieces, 2), whole, atol=1e-5)


def test_long_audio_goes_in_chunks(built, monkeypatch):
    """Beyond `max_samples` encode and decode work in chunks, with lengths, to the same codes and audio."""
    count = 20 * sum(built.spec.context)
    lengths = torch.tensor([count * built.hop_length, built.hop_length // 2 + 1])
    batch = sound(count * built.hop_length, built.channels, batch=2)
    codes = built.encode(batch, lengths)
    audio = built.decode(codes)
    sizes = []
    monkeypatch.setattr(built, "max_samples", 1)
    monkeypatch.setattr(built, "_encode", lambda *a: sizes.append(a[0].shape[2]) or AudioCodec._encode(built, *a))
    monkeypatch.setattr(built, "_decode", lambda *a: sizes.append(a[0].shape[1]) or AudioCodec._decode(built, *a))
    chunked = built.encode(batch, lengths)
    assert torch.equal(chunked.codes, codes.codes) and torch.equal(chunked.lengths, codes.lengths)
    assert torch.equal(built.encode(batch, lengths, num_quantizers=2).codes, codes.codes[:, :2])
    assert torch.allclose(built.decode(chunked), audio, atol=1e-5)
    assert len(sizes) > 6 and max(sizes) < count * built.hop_length / 2


@pytest.mark.parametrize("channels", [1, 2])
def test_causal_means_no_later_input(channels):
    built = codec(causal=True, channels=channels)
    hop = built.hop_length
    assert built.spec.causal and built.spec.context[1] == 0
    x, y = sound(40 * hop, channels), sound(40 * hop, channels, seed=1)
    changed = torch.cat([x[..., : 25 * hop], y[..., 25 * hop :]], 2)
    codes, other = built.encode(x).codes, built.encode(changed).codes
    assert torch.equal(codes[..., :25], other[..., :25]) and not torch.equal(codes[..., 25], other[..., 25])
    audio = built.decode(codes)
    mixed = codes.clone()
    mixed[..., 25:] = (mixed[..., 25:] + 7) % 32
    again = built.decode(mixed)
    assert torch.allclose(audio[..., : 25 * hop], again[..., : 25 * hop], atol=1e-6)
    assert not torch.allclose(audio[..., 25 * hop : 26 * hop], again[..., 25 * hop : 26 * hop], atol=1e-3)
    stream = built.stream()
    for start in range(4):  # a code for every full hop, at once
        assert stream.encode(x[..., start * hop : (start + 1) * hop]).codes.shape[2] == 1


def test_plain_codec_looks_ahead():
    """The counterpart: without `causal` the spec says so, and codes do depend on later input."""
    built = codec()
    hop = built.hop_length
    x = sound(40 * hop)
    changed = x.clone()
    changed[..., 25 * hop :] = 0
    assert not built.spec.causal and built.spec.context[1] > 0
    assert not torch.equal(built.encode(x).codes[..., :25], built.encode(changed).codes[..., :25])


def test_low_delay_windows_add_up():
    analysis, synthesis = low_delay_windows(64, 16)
    assert analysis.shape == (64,) and synthesis.shape == (24,) and analysis[-12:-8].min() > 0.9
    assert torch.allclose(overlap_add(synthesis.repeat(1, 1, 5, 1), 16)[..., 16:80], torch.ones(64))


@pytest.mark.parametrize(("size", "hop"), [(64, 16), (40, 16), (48, 48), (10, 4)])
def test_overlap_add_is_fold(size, hop):
    frames = sound(9 * size).reshape(1, 1, 9, size)
    expected = F.fold(frames[0].transpose(1, 2), (1, 8 * hop + size), (1, size), stride=(1, hop))[:, 0, 0]
    found = overlap_add(frames, hop)
    assert torch.equal(found[0, :, : expected.shape[1]], expected) and not found[0, :, expected.shape[1] :].any()


def test_stereo_is_joint():
    """Codes tell left from right and alike from opposite sides; the decoder can make them differ."""
    x = sound(500, 2)
    assert torch.allclose(left_right(mid_side(x)), x, atol=1e-6)
    built = codec(channels=2)
    spectra = built._log_mel(x).unflatten(2, (4, -1))
    swapped = built._log_mel(x.flip(1)).unflatten(2, (4, -1))
    assert torch.allclose(swapped, spectra[:, :, [1, 0, 2, 3]], atol=1e-4)
    opposite = built._log_mel(x * torch.tensor([1.0, -1.0])[:, None]).unflatten(2, (4, -1))
    assert torch.allclose(opposite, spectra[:, :, [0, 1, 3, 2]], atol=1e-4)
    codes = built.encode(x).codes
    for other in (x.flip(1), x[:, :1].repeat(1, 2, 1)):
        assert not torch.equal(built.encode(other).codes, codes)
    decoded = built.decode(codes)
    assert decoded.shape[1] == 2 and not torch.allclose(decoded[:, 0], decoded[:, 1], atol=1e-3)
    for bad in (sound(100), sound(100, 3)):
        with pytest.raises(MediaError, match="2 channels"):
            built.encode(bad)
    with pytest.raises(MediaError, match="1 channels"):
        codec().encode(x)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"channels": 2}, {"channels": 2, "causal": True}])
def test_learns_in_a_few_steps(options):
    """Gradients reach every parameter, and a tone is learnt better than at the start."""
    torch.manual_seed(0)
    built = codec(**options, stage_steps=2, dropout=0.0, dim=32).train()
    times = torch.arange(1600) / 16000
    tones = torch.stack([torch.sin(2 * torch.pi * times * hz) for hz in (500, 900)])[: built.channels] * 0.3
    optimizer = torch.optim.Adam(built.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        output = built(tones[None])
        magnitudes = [
            torch.stft(x[0, :, :1600], 128, window=torch.hann_window(128), return_complex=True).abs()
            for x in (output.media, tones[None])
        ]
        loss = F.l1_loss(*magnitudes) + output.commit_loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in built.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.75 * losses[0]


@pytest.mark.parametrize("name", ["causal", "stereo", "fsq"])
def test_new_options_survive_the_folder(name, tmp_path):
    tokenizer = codec(**KINDS[name])
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config == tokenizer.config and again.spec == tokenizer.spec
    x = sound(700, tokenizer.channels)
    assert torch.equal(again.encode(x).codes, tokenizer.encode(x).codes)


def test_new_options_leave_old_configurations_alone():
    assert not {"causal", "channels", "quantizer", "semantic_dim"} & codec().config.keys()
    assert codec(causal=False, channels=1).fingerprint == codec().fingerprint
    assert codec(causal=True).config["causal"] is True and codec(causal=True).fingerprint != codec().fingerprint


@pytest.mark.parametrize("modality", ["speech", "music"])
def test_shipped_checkpoints_load(modality):
    """The shipped weights: same fingerprint, and codes and audio as they always were (sums, rounded)."""
    tokenizer = load(SHIPPED / modality)
    assert tokenizer.fingerprint == json.loads((SHIPPED / modality / "config.json").read_text())["fingerprint"]
    x = 0.3 * torch.sin(torch.arange(16000) ** 1.3 / 40)[None, None]
    codes = tokenizer.encode(x)
    audio = tokenizer.decode(codes)
    assert [int(codes.codes.sum()), int(codes.codes[0, :, -1].sum())] == EXPECTED[modality][:2]
    assert float(audio.abs().sum()) == pytest.approx(EXPECTED[modality][2], rel=1e-4)


EXPECTED: dict[str, list[float]] = {"speech": [16444, 595, 432.697], "music": [5015, 577, 856.263]}


@pytest.mark.parametrize(
    "options", [{"channels": 3}, {"n_fft": 63, "hop": 15}, {"semantic_dim": -1}, {"quantizer": "magic"}, {"n_fft": 16}]
)
def test_impossible_options(options):
    with pytest.raises(ValueError, match=r"need|quantizer"):
        codec(**options)
