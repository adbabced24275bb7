"""See a nanoworld scene in a picture: a pixel checker that grades pictures, whoever made them.

Steps: the median pixel is the background; every other pixel is explained as background plus some share of one
palette color (so soft edges keep their color); connected patches of one color are cut at the grid lines when
they run together; each patch is compared with the ideal masks of all shapes and sizes; the grid cell of its
centre is its place. Built to bear the blur and noise of an image autoencoder. It knows nothing about the
model that made the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from anyglot_synth.nanoworld.draw import BACKGROUND, CENTERS, PALETTE, SIZE, STEPS, mask
from anyglot_synth.nanoworld.scene import COLORS, COLUMNS, MAX_THINGS, ROWS, SHAPES, SIZES, Scene, Thing

MIN_AREA = 16.0
"""Patches that cover fewer pixels are specks. The smallest shape covers about 50."""

MIN_MATCH = 0.8
"""Least overlap (Dice coefficient) between a patch and the best ideal mask."""

MAX_UNEXPLAINED = 0.35
"""Largest share of the coloured pixels of a picture that may lie outside of the recognised things."""

_MAX_BACKGROUND_DISTANCE = 70.0
_HALF = 13
_BLURS = (0.0, 0.8, 1.2)
_EDGES = ((CENTERS[0] + CENTERS[1]) / 2, (CENTERS[1] + CENTERS[2]) / 2)


@dataclass(frozen=True)
class Sighting:
    """One recognised patch: the thing, its match with the ideal mask (0..1), its centre (x, y) in pixels."""

    thing: Thing
    match: float
    center: tuple[float, float]


@dataclass(frozen=True)
class _Masks:
    """Ideal masks [N, pixels], their squared norms [N], and what each stands for."""

    pixels: NDArray[np.float32]
    norms: NDArray[np.float32]
    labels: list[tuple[str, str]]
    shifts: NDArray[np.float64]  # [N, 2]: offset (x, y) of the shape's centre from the window's centre


@lru_cache(maxsize=1)
def _masks() -> _Masks:
    stack, labels, shifts = [], [], []
    steps = range(-STEPS, STEPS + 1, 2)
    for shape in SHAPES:
        for size in SIZES:
            # A triangle's centroid is not the centre it is drawn around; shift it there.
            whole = mask(shape, size)
            half = whole.shape[0] // 2
            y, x = (c - half + 0.5 for c in ndimage.center_of_mass(whole))
            for step_y in steps:
                for step_x in steps:
                    shifted = mask(shape, size, step_x - round(x * STEPS), step_y - round(y * STEPS))
                    window = np.pad(shifted, max(0, _HALF - half))
                    for blur in _BLURS:
                        stack.append(ndimage.gaussian_filter(window, blur).ravel() if blur else window.ravel())
                        labels.append((shape, size))
                        shifts.append((step_x / STEPS - x, step_y / STEPS - y))
    pixels = np.stack(stack).astype(np.float32)
    return _Masks(pixels, (pixels * pixels).sum(1), labels, np.array(shifts))


def _standard(image: NDArray[np.generic]) -> NDArray[np.float32]:
    """Any picture as float32 [64, 64, 3] in 0..255."""
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < SIZE // 2:
        raise ValueError(
            f"picture has shape {image.shape}; pass [height, width, 3] of at least {SIZE // 2} pixels a side"
        )
    pixels = image.astype(np.float32)
    if not np.issubdtype(image.dtype, np.integer):
        pixels = np.nan_to_num(pixels) * 255
    pixels = np.clip(pixels, 0, 255)
    if image.shape[:2] != (SIZE, SIZE):
        factors = [SIZE / side for side in image.shape[:2]]
        pixels = ndimage.gaussian_filter(pixels, [*(max(0.0, 0.4 / f - 0.4) for f in factors), 0])
        pixels = ndimage.zoom(pixels, [*factors, 1], order=1, grid_mode=True, mode="nearest")
    return pixels


def _explain(pixels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Per pixel: share of the color that explains it best, 0..1 [64, 64], and that color's index [64, 64]."""
    background = np.median(pixels.reshape(-1, 3), axis=0)
    offset = pixels - background  # [64, 64, 3]
    rays = np.array([PALETTE[color] for color in COLORS], np.float32) - background  # [6, 3]
    share = np.clip(offset @ (rays / (rays * rays).sum(1, keepdims=True)).T, 0, 1)  # [64, 64, 6]
    # |offset - share * ray|^2 without the term common to all colors
    error = share * share * (rays * rays).sum(1) - 2 * share * (offset @ rays.T)
    best = error.argmin(-1)
    return np.take_along_axis(share, best[:, :, None], 2)[:, :, 0].astype(np.float32), best


def _patches(solid: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected patches, cut along the grid lines when wider or taller than a cell."""
    labels, _ = ndimage.label(solid)
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        patch = labels == index
        if patch[box].sum() < MIN_AREA:
            continue
        if max(side.stop - side.start for side in box) <= CENTERS[1] - CENTERS[0] + 3:
            found.append(patch)
            continue
        cells = np.digitize(np.arange(SIZE) + 0.5, _EDGES)
        for row in range(len(ROWS)):
            for column in range(len(COLUMNS)):
                part = patch & (cells[:, None] == row) & (cells[None, :] == column)
                if part.sum() >= MIN_AREA:
                    found.append(part)
    return found


def _recognise(share: NDArray[np.float32], patch: NDArray[np.bool_], color: str) -> Sighting | None:
    soft = np.where(ndimage.binary_dilation(patch, iterations=2), share, 0)
    # Level of the patch's inside, so that a pale shape is compared with the masks at full strength.
    level = float(np.quantile(share[patch], 0.8))
    soft = np.clip(soft / max(level, 0.3), 0, 1)
    soft[soft < 0.15] = 0
    y, x = (coordinate + 0.5 for coordinate in ndimage.center_of_mass(soft))
    left, top = round(x) - _HALF, round(y) - _HALF
    window = np.pad(soft, _HALF)[top + _HALF : top + 3 * _HALF, left + _HALF : left + 3 * _HALF].ravel()
    masks = _masks()
    dice = 2 * (masks.pixels @ window) / (masks.norms + window @ window)
    best = int(dice.argmax())
    if dice[best] < MIN_MATCH:
        return None
    shape, size = masks.labels[best]
    center_x, center_y = masks.shifts[best] + (round(x), round(y))
    row, column = (int(np.digitize(value, _EDGES)) for value in (center_y, center_x))
    thing = Thing(shape, color, size, ROWS[row], COLUMNS[column])
    return Sighting(thing, float(dice[best]), (float(center_x), float(center_y)))


def analyse(image: NDArray[np.generic]) -> tuple[list[Sighting], float]:
    """Everything recognised in a picture, one sighting per grid cell at most.

    Args:
        image: [height, width, 3]; integers count as 0..255, floats as 0..1.

    Returns:
        The sightings, best match first, and the share (0..1) of coloured pixels that belong to none of them.

    Raises:
        ValueError: the array is not a picture.
    """
    pixels = _standard(image)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    if np.linalg.norm(background - BACKGROUND) > _MAX_BACKGROUND_DISTANCE:
        return [], 1.0
    share, nearest = _explain(pixels)
    solid = share > 0.45
    total = float(solid.sum())
    sightings: dict[int, Sighting] = {}
    explained: dict[int, float] = {}
    for index, color in enumerate(COLORS):
        for patch in _patches(solid & (nearest == index)):
            sighting = _recognise(share, patch, color)
            if sighting is None:
                continue
            position = sighting.thing.position
            area = float(patch.sum())
            if area > explained.get(position, 0.0):
                sightings[position], explained[position] = sighting, area
    ordered = sorted(sightings.values(), key=lambda sighting: -sighting.match)
    return ordered, 1.0 - sum(explained.values()) / total if total else 0.0


def see(image: NDArray[np.generic]) -> Scene | None:
    """The scene in a picture, or ``None`` when there is none (blank, noise, too many things, something else).

    Args:
        image: [height, width, 3] of any size from 32 pixels a side; integers count as 0..255, floats as 0..1.

    Raises:
        ValueError: the array is not a picture.
    """
    sightings, unexplained = analyse(image)
    if not 1 <= len(sightings) <= MAX_THINGS or unexplained > MAX_UNEXPLAINED:
        return None
    return Scene(tuple(sighting.thing for sighting in sightings))
