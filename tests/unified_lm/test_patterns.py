"""Every pattern has an exact inverse, and says which codebook stands where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyglot_lm.patterns import DELAY, FRAME_MAJOR, LAYER_MAJOR, PATTERNS, pattern
from anyglot_tokenizers.errors import CodesError, ManifestError

ABC = np.array([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("first", [1, 2, 3]),
        ("frame_major", [1, 4, 2, 5, 3, 6]),
        ("layer_major", [1, 2, 3, 4, 5, 6]),
        ("delay", [1, 0, 2, 4, 3, 5, 0, 6]),
    ],
)
def test_known_orders(name: str, expected: list[int]) -> None:
    assert pattern(name).flatten(ABC).tolist() == expected


def test_raster_is_row_by_row() -> None:
    image = np.arange(8).reshape(2, 2, 2)
    assert pattern("raster").flatten(image).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@given(st.sampled_from(sorted(PATTERNS)), st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.randoms())
def test_inverse(name: str, quantizers: int, height: int, width: int, random) -> None:  # type: ignore[no-untyped-def]
    order = pattern(name)
    grid = (height, width) if name != "delay" else (height * width,)
    codes = np.array([random.randrange(99) for _ in range(quantizers * height * width)])
    codes = codes.reshape(quantizers, *grid)
    flat = order.flatten(codes)
    kept = codes[: order.num_codebooks(quantizers)]
    assert len(flat) == order.num_flat(height * width, quantizers)
    assert order.num_frames(len(flat), quantizers) == height * width
    assert order.may_end(len(flat), quantizers)
    assert np.array_equal(order.unflatten(flat, quantizers, grid), kept)
    books = order.codebooks(len(flat), quantizers)
    assert books.tolist() == [order.codebook_at(i, quantizers, len(flat)) for i in range(len(flat))]
    assert np.bincount(books, minlength=len(kept)).min() >= height * width


@given(st.sampled_from(sorted(PATTERNS)), st.integers(1, 5), st.integers(0, 60))
def test_only_whole_spans_may_end(name: str, quantizers: int, length: int) -> None:
    order = pattern(name)
    lengths = {order.num_flat(frames, quantizers) for frames in range(1, 70)}
    assert order.may_end(length, quantizers) == (length in lengths)
    if length not in lengths:
        with pytest.raises(CodesError, match="no whole number of frames"):
            order.num_frames(length, quantizers)


@given(st.integers(1, 4), st.integers(1, 6))
def test_delay_ignores_what_stands_in_filler(quantizers: int, frames: int) -> None:
    codes = np.arange(quantizers * frames).reshape(quantizers, frames) + 1
    flat = DELAY.flatten(codes)
    filler = DELAY.is_filler(len(flat), quantizers)
    assert filler.sum() == quantizers * (quantizers - 1)
    assert (flat[filler] == 0).all() and (flat[~filler] > 0).all()
    flat[filler] = 77
    assert np.array_equal(DELAY.unflatten(flat, quantizers), codes)


def test_errors() -> None:
    with pytest.raises(ManifestError, match="unknown pattern 'x'; use one of first"):
        pattern("x")
    with pytest.raises(CodesError, match="quantizer axis"):
        FRAME_MAJOR.flatten(np.arange(3))
    with pytest.raises(CodesError, match="integer"):
        FRAME_MAJOR.flatten(np.ones((1, 2)))
    with pytest.raises(CodesError, match="do not fill the grid"):
        pattern("raster").unflatten(np.arange(6), 1, (2, 2))
    with pytest.raises(CodesError, match="grids of 2 axes"):
        pattern("raster").flatten(ABC)
    with pytest.raises(CodesError, match="length of the span"):
        LAYER_MAJOR.codebook_at(0, 2)
    assert not LAYER_MAJOR.variable
