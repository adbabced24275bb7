"""Input that no tokenizer takes: a typed error of one line, before anything is computed or allocated."""

import pytest
import torch

from anyglot_tokenizers import AudioCodec, Codes, CodesError, MediaError
from anyglot_tokenizers.checks import check_audio, check_count, check_ids, check_images, check_lengths, check_media
from anyglot_tokenizers.chunks import decode_chunked, encode_chunked

CODEC = AudioCodec(
    n_fft=64, hop=16, num_mels=12, dim=16, encoder_depth=1, decoder_depth=1, num_quantizers=2, codebook_size=32,
    codebook_dim=8,
).eval()  # fmt: skip
HUGE = 2**40  # items of nothing: such a tensor takes no memory, but what is made of it would


def ids(*shape, value=0):
    return torch.full(shape, value, dtype=torch.int64)


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ([0.0], "type list"),
        (torch.zeros(3, 100), "does not fit"),
        (torch.zeros(1, 3, 100), "2 channels"),
        (torch.zeros(1, 2, 100, dtype=torch.int16), "not floating point"),
        (torch.zeros(1, 2, 100, dtype=torch.complex64), "not floating point"),
        (torch.empty(HUGE, 2, 0), "empty"),
        (torch.empty(HUGE, 0, 2), "2 channels"),
        (torch.full((1, 2, 9), torch.nan), "NaN"),
        (torch.full((1, 2, 9), 1e300, dtype=torch.float64), "infinite"),
    ],
)
def test_media(media, message):
    with pytest.raises(MediaError, match=message) as caught:
        check_media("thing", media, "numbers", 3, 2)
    assert str(caught.value).startswith("thing: ") and "\n" not in str(caught.value)


def test_audio_and_lengths():
    media, lengths = check_audio(torch.ones(2, 1, 9).double(), None, 1)
    assert media.dtype == torch.float32 and lengths.tolist() == [9, 9]
    assert check_lengths("x", torch.tensor([1, 9]), media).tolist() == [1, 9]
    for wrong in (
        torch.tensor([1]),
        torch.tensor([1.0, 2.0]),
        torch.tensor(3),
        [1, 2],
        torch.ones(2, dtype=torch.int32),
    ):
        with pytest.raises(MediaError, match=r"need int64\[2\]"):
            check_lengths("x", wrong, media)
    for wrong in ([0, 9], [1, 10], [-(2**62), 1]):
        with pytest.raises(MediaError, match=r"leave 1\.\.9"):
            check_lengths("x", torch.tensor(wrong), media)


def test_images():
    assert check_images(torch.full((1, 3, 8, 16), 1.05), None, factor=8).shape == (1, 3, 8, 16)
    for wrong, options, message in (
        (torch.ones(1, 3, 8, 12), {"factor": 8}, "8x12 is not divisible by 8"),
        (torch.ones(1, 3, 8, 8), {"size": (8, 16)}, "8x8 is not 8x16"),
        (torch.ones(1, 3, 8, 8) * 255, {}, "scale images"),
        (torch.ones(1, 1, 8, 8), {}, "3 channels"),
    ):
        with pytest.raises(MediaError, match=message):
            check_images(wrong, None, **options)
    with pytest.raises(MediaError, match="no lengths"):
        check_images(torch.ones(1, 3, 8, 8), torch.tensor([1]))


def test_counts():
    assert [check_count(count, 3) for count in (None, 1, 3)] == [3, 1, 3]
    for wrong in (0, -1, 4, 2**62, 1.5, "2"):
        with pytest.raises(CodesError, match=r"outside 1\.\.3"):
            check_count(wrong, 3)


def test_ids():
    sizes, time = (4, 8), ("time",)
    mixed = torch.tensor([[[3, 0], [7, 1]]])
    assert check_ids(mixed, sizes, time) is mixed
    assert check_ids(ids(2, 1, 0), sizes, time, empty=True).shape == (2, 1, 0)
    assert check_ids(ids(2, 1, 3, 4), sizes, None).shape == (2, 1, 3, 4)
    for wrong, message in (
        (mixed.flip(1), r"7 is outside 0\.\.3"),
        (mixed + 1, r"4 is outside 0\.\.3"),
        (mixed - 1, "-1 is outside"),
        (ids(1, 2, 1, value=2**62), "outside"),
        (mixed.int(), "int64"),
        (mixed.float(), "int64"),
        (mixed[0], "do not fit"),
        (mixed[..., None], "do not fit"),
        (ids(1, 3, 2), r"1\.\.2 quantizers"),
        (ids(1, 0, 2), "do not fit"),
        (ids(1, 2, 0), "do not fit"),
        (ids(HUGE, 0, 2), "do not fit"),
        (ids(HUGE, 2, 0), "do not fit"),
        ("codes", "type str"),
    ):
        with pytest.raises(CodesError, match=message):
            check_ids(wrong, sizes, time)


@pytest.mark.parametrize("shape", [(HUGE, 0, 2), (HUGE, 2, 0), (0, 2, HUGE), (2, HUGE, 0)])
def test_tensors_of_nothing_that_claim_much(shape):
    codes = torch.empty(shape, dtype=torch.int64)
    for call in (CODEC.decode, CODEC.quantizer.decode, lambda x: decode_chunked(CODEC, x), CODEC.stream(2).decode):
        if call == CODEC.quantizer.decode and 0 < shape[1] < 3:
            continue  # no positions give no latents
        with pytest.raises(CodesError):
            call(codes)
    for call in (CODEC.encode, lambda x: encode_chunked(CODEC, x), CODEC.stream(2).encode):
        with pytest.raises(MediaError):
            call(codes.float())


def test_codes():
    with pytest.raises(CodesError, match="got list"):
        Codes([[0]])
    with pytest.raises(CodesError):
        Codes(ids(HUGE, 0, 2))


def test_chunks():
    media = torch.zeros(2, 1, 320)
    short = encode_chunked(CODEC, media, torch.tensor([33, 1]), chunk_codes=1)  # chunks beyond all items
    assert torch.equal(short.codes, CODEC.encode(media, torch.tensor([33, 1])).codes)
    assert short.codes.shape == (2, 2, 10) and short.lengths.tolist() == [2, 1]
    torch.testing.assert_close(decode_chunked(CODEC, short, chunk_codes=1), CODEC.decode(short), atol=1e-5, rtol=0)
    assert not decode_chunked(CODEC, Codes(short.codes, torch.tensor([0, 0]))).any()
    for lengths in (torch.tensor([3]), torch.tensor([0, 3]), torch.tensor([3, 321]), torch.zeros(2, 1)):
        with pytest.raises(MediaError, match="lengths"):
            encode_chunked(CODEC, media, lengths)
    for chunk_codes in (0, -1, 1.5):
        with pytest.raises(CodesError, match="chunk_codes"):
            encode_chunked(CODEC, media, chunk_codes=chunk_codes)
        with pytest.raises(CodesError, match="chunk_codes"):
            decode_chunked(CODEC, short, chunk_codes=chunk_codes)
    for count in (0, 3):
        with pytest.raises(CodesError, match=r"outside 1\.\.2"):
            encode_chunked(CODEC, media, num_quantizers=count)


def test_streams():
    for batch_size in (0, -1, HUGE, 1.5):
        with pytest.raises(MediaError, match="batch_size"):
            CODEC.stream(batch_size)
    for count in (0, 3):
        with pytest.raises(CodesError, match=r"outside 1\.\.2"):
            CODEC.stream(num_quantizers=count)
    stream, media = CODEC.stream(), torch.randn(1, 1, 999) * 0.1
    parts = [stream.encode(media[:, :, :0])]
    for wrong in (media.repeat(1, 2, 1), media[0], media.long(), media * torch.nan, media.repeat(2, 1, 1)):
        with pytest.raises(MediaError):
            stream.encode(wrong)
    parts += [stream.encode(media), stream.flush()]  # what was refused left nothing behind
    whole = CODEC.encode(media).codes
    assert torch.equal(torch.cat([part.codes for part in parts], 2), whole)
    stream = CODEC.stream()
    assert stream.decode(whole[:, :1, :0]).shape == (1, 1, 0)
    for wrong in (whole, whole[:, :1] + 32, whole[:, :1].float(), whole[:, :0], whole[:, :1].repeat(2, 1, 1)):
        with pytest.raises(CodesError):
            stream.decode(wrong)
    torch.testing.assert_close(
        torch.cat([stream.decode(whole[:, :1]), stream.flush()], 2), CODEC.decode(whole[:, :1]), atol=1e-5, rtol=0
    )
