"""Pictures: what is drawn is seen, also through blur and noise; nothing is seen where nothing is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from anyglot_synth.nanoworld.draw import BACKGROUND, PALETTE, draw
from anyglot_synth.nanoworld.scene import SHAPES, SIZES, Scene, Thing, sample_scene, score
from anyglot_synth.nanoworld.see import analyse, see

seeds = st.integers(0, 2**32 - 1)
CROWDED = Scene(
    (
        Thing("square", "red", "large", "top", "left"),
        Thing("circle", "red", "large", "top", "center"),
        Thing("triangle", "blue", "large", "middle", "left"),
    )
)


@settings(max_examples=40)
@given(seeds)
def test_see_inverts_draw(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, "test" if seed % 2 else "train")
    assert see(draw(scene)) == scene
    assert see(draw(scene, rng)) == scene


def test_pictures_are_what_they_promise() -> None:
    rng = np.random.default_rng(3)
    picture = draw(CROWDED, rng)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, draw(CROWDED, np.random.default_rng(3)))
    np.testing.assert_array_equal(picture[63, 63], BACKGROUND)
    np.testing.assert_array_equal(picture[11, 11], PALETTE["red"])


@pytest.mark.parametrize("size", [32, 48, 96, 128])
def test_other_picture_sizes(size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(15):
        scene = sample_scene(rng)
        assert see(draw(scene, rng, size)) == scene


def test_float_pictures_are_read_as_0_to_1() -> None:
    picture = draw(CROWDED)
    assert see(picture.astype(np.float32) / 255) == CROWDED
    assert see(picture.astype(np.float64) / 255) == CROWDED


def test_blur_and_noise_are_borne() -> None:
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(150):
        scene = sample_scene(rng)
        blurred = ndimage.gaussian_filter(draw(scene, rng).astype(float), (1, 1, 0))
        noisy = np.clip(blurred + rng.normal(0, 12, blurred.shape), 0, 255).astype(np.uint8)
        scores.append(score(scene, see(noisy)))
    assert np.mean(scores) >= 0.95


def test_touching_things_are_told_apart() -> None:
    smeared = ndimage.grey_dilation(draw(CROWDED), size=(3, 3, 1))
    seen = see(smeared)
    assert seen is not None and len(seen) == 3
    assert [(thing.color, thing.place) for thing in seen.things] == [
        (thing.color, thing.place) for thing in CROWDED.things
    ]


def test_specks_are_ignored() -> None:
    picture = draw(CROWDED)
    picture[50:53, 50:53] = 250
    assert see(picture) == CROWDED


def test_nothing_is_seen_in_blank_pictures_and_noise() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert see(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)) is None
        assert see(np.full((64, 64, 3), rng.integers(0, 256), np.uint8)) is None
        dark = np.clip(rng.normal(28, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
        assert see(dark) is None
    assert see(np.full((64, 64, 3), np.nan, np.float32)) is None


def test_more_than_three_things_are_no_scene() -> None:
    four = draw(CROWDED)
    four[32:] = draw(Scene((Thing("cross", "white", "small", "bottom", "right"),)))[32:]
    sightings, _ = analyse(four)
    assert len(sightings) >= 3
    four[:22] = np.concatenate([draw(CROWDED)[:22, :43], draw(CROWDED)[:22, :21]], axis=1)
    assert see(four) is None


def test_shapes_of_one_color_differ_in_every_pair() -> None:
    pictures = [draw(Scene((Thing(shape, "white", size, "top", "left"),))) for shape in SHAPES for size in SIZES]
    for index, picture in enumerate(pictures):
        for other in pictures[:index]:
            assert np.abs(picture.astype(int) - other).sum() > 3 * 216 * 15


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="picture has shape"):
        see(np.zeros((3, 64, 64), np.uint8))
    with pytest.raises(ValueError, match="picture size is 8"):
        draw(CROWDED, size=8)
