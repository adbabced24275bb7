"""Chunked and streamed equal whole, for our own codec; what cannot be chunked refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyglot_tokenizers import AudioCodec, CodesError, ImageVQ, MediaError, UnsupportedError
from anyglot_tokenizers.chunks import Stream, decode_chunked, encode_chunked

CODEC = AudioCodec(
    sample_rate=800, n_fft=64, hop=16, stride=2, num_mels=12, dim=16, encoder_depth=2, decoder_depth=2,
    num_quantizers=3, codebook_size=32, codebook_dim=8,
).eval()  # fmt: skip
HOP = CODEC.spec.hop_length


def sound(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 60 * HOP), min_size=1, max_size=3), st.integers(1, 40), st.sampled_from([None, 1, 2]))
def test_chunked_equals_whole(lengths, chunk_codes, num_quantizers):
    media, lengths = sound(len(lengths), 1, max(lengths)), torch.tensor(lengths)
    whole = CODEC.encode(media, lengths, num_quantizers=num_quantizers)
    chunked = encode_chunked(CODEC, media, lengths, num_quantizers=num_quantizers, chunk_codes=chunk_codes)
    assert torch.equal(whole.codes, chunked.codes)
    assert torch.equal(whole.lengths, chunked.lengths)
    audio = decode_chunked(CODEC, whole, chunk_codes=chunk_codes)
    torch.testing.assert_close(audio, CODEC.decode(whole), atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9 * HOP), min_size=1, max_size=12), st.integers(1, 2))
def test_streamed_equals_whole(pieces, batch):
    if not sum(pieces):
        pieces = [1]
    media = sound(batch, 1, sum(pieces))
    whole = CODEC.encode(media).codes
    stream = CODEC.stream(batch)
    parts = [stream.encode(part).codes for part in media.split(pieces, 2)]
    assert torch.equal(torch.cat([*parts, stream.flush().codes], 2), whole)

    stream = CODEC.stream(batch)
    sizes = [max(size // HOP, 1) for size in pieces]
    sizes = [*sizes, whole.shape[2]]
    audio = [stream.decode(part) for part in whole.split(1 + sizes[0], 2)]
    audio = torch.cat([*audio, stream.flush()], 2)
    torch.testing.assert_close(audio, CODEC.decode(whole), atol=1e-5, rtol=0)


def test_too_little_context_would_show():
    """The equalities above are not empty: with the context cut to nothing, chunked codes differ."""

    class Hasty(AudioCodec):
        def _spec_entries(self):
            return {**super()._spec_entries(), "context": (0, 0)}

    hasty = Hasty(**CODEC.config)
    hasty.load_state_dict(CODEC.state_dict())
    media = sound(1, 1, 60 * HOP)
    assert not torch.equal(encode_chunked(hasty.eval(), media, chunk_codes=5).codes, CODEC.encode(media).codes)


def test_a_stream_keeps_little():
    stream = CODEC.stream()
    for _ in range(30):
        stream.encode(sound(1, 1, 10 * HOP))
    assert stream.buffer.shape[2] <= (sum(CODEC.spec.context) + 11) * HOP


def test_refusals():
    image = ImageVQ(channels=(8, 8), downsample_factor=8, num_quantizers=1, codebook_size=16, codebook_dim=4)
    with pytest.raises(UnsupportedError, match="axes"):
        image.stream()
    with pytest.raises(MediaError):
        encode_chunked(CODEC, torch.zeros(1, 1, 0))
    with pytest.raises(CodesError):
        decode_chunked(CODEC, torch.zeros(1, 1, 0, dtype=torch.int64))
    stream = Stream(CODEC)
    with pytest.raises(UnsupportedError, match="not begun"):
        stream.flush()
    stream = Stream(CODEC)
    with pytest.raises(MediaError):
        stream.encode(sound(2, 1, 64))
    stream.encode(sound(1, 1, 64))
    with pytest.raises(UnsupportedError, match="other way"):
        stream.decode(torch.zeros(1, 1, 1, dtype=torch.int64))
    stream.flush()
    with pytest.raises(UnsupportedError, match="ended"):
        stream.encode(sound(1, 1, 64))


def test_items_of_a_stream_end_together():
    codes = CODEC.encode(sound(2, 1, 9 * HOP), torch.tensor([9 * HOP, 4 * HOP]))
    with pytest.raises(CodesError, match=r"as many codes of each item, got \[9, 4\]"):
        CODEC.stream(2).decode(codes)
