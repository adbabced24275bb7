"""Draw a nanoworld scene as a small picture.

Antialiased shapes on a dark background, one per grid cell. Shapes are drawn by supersampling once per shape,
size and quarter-pixel offset and cached, so a picture is a few array additions. This file does not recognise
anything; ``see.py`` does, and shares the ideal masks defined here.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from anyglot_synth.nanoworld.scene import COLUMNS, ROWS, Scene

SIZE = 64
"""Side of the standard picture in pixels."""

BACKGROUND = (24, 24, 32)
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 190, 70),
    "blue": (50, 90, 240),
    "yellow": (245, 215, 40),
    "purple": (170, 60, 210),
    "white": (240, 240, 240),
}
"""RGB of each color, 0..255."""

CENTERS = (12.0, 32.0, 52.0)
"""Pixel coordinates of the grid's rows and columns at the standard size (pixel i covers i..i+1)."""

RADII = {"small": 5.5, "large": 8.5}
STEPS = 4
"""Sub-pixel positions per pixel."""

_SUPERSAMPLING = 8


def _inside(shape: str, radius: float, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points (relative to the shape's centre, y down) are inside a shape of about that radius."""
    if shape == "circle":
        return x * x + y * y <= radius * radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9 * radius
    if shape == "triangle":
        depth = (y + radius) / (1.9 * radius)  # 0 at the tip, 1 at the base
        return (depth <= 1) & (abs(x) <= depth * 1.08 * radius)
    if shape == "cross":
        near, far = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
        return (near <= 0.32 * radius) & (far <= radius)
    raise ValueError(f"shape is {shape!r}; see scene.SHAPES")


@lru_cache(maxsize=4096)
def mask(shape: str, size: str, step_x: int = 0, step_y: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    """Ideal coverage of a shape, float32 [2h, 2h] in 0..1, read-only.

    Args:
        shape: one of ``scene.SHAPES``.
        size: ``small`` or ``large``.
        step_x: offset to the right of the shape's centre from the array's centre, in quarter pixels.
        step_y: the same downwards.
        scale: size of the picture relative to 64 pixels.
    """
    half = int(np.ceil(1.1 * RADII["large"] * scale)) + 2
    points = (np.arange(2 * half * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - half
    inside = _inside(shape, RADII[size] * scale, points[None, :] - step_x / STEPS, points[:, None] - step_y / STEPS)
    blocks = inside.reshape(2 * half, _SUPERSAMPLING, 2 * half, _SUPERSAMPLING)
    coverage: NDArray[np.float32] = blocks.mean(axis=(1, 3), dtype=np.float32)
    coverage.setflags(write=False)
    return coverage


def draw(
    scene: Scene,
    rng: np.random.Generator | None = None,
    size: int = SIZE,
    *,
    background: tuple[int, int, int] = BACKGROUND,
    offset: tuple[float, float] = (0.0, 0.0),
) -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: what to draw.
        rng: moves every thing by -1, 0 or 1 pixels (of the standard size) each way; ``None`` puts it dead centre.
        size: side of the picture in pixels.
        background: RGB, 0..255.
        offset: (right, down) by which everything is moved, in pixels of the standard size; quarters are kept.

    Returns:
        uint8 array [size, size, 3].

    Raises:
        ValueError: ``size`` is too small to tell the shapes apart.
    """
    if size < SIZE // 2:
        raise ValueError(f"picture size is {size}; use at least {SIZE // 2}")
    scale = size / SIZE
    pad = int(np.ceil(6 * scale)) + 3
    canvas = np.empty((size + 2 * pad, size + 2 * pad, 3), np.float32)
    canvas[:] = background
    for thing in scene.things:
        jitter = rng.integers(-1, 2, 2) if rng is not None else np.zeros(2)
        center = (
            np.array([CENTERS[COLUMNS.index(thing.column)], CENTERS[ROWS.index(thing.row)]]) + jitter + offset
        ) * scale
        whole = np.floor(center).astype(int)
        step_x, step_y = np.floor((center - whole) * STEPS).astype(int).tolist()
        coverage = mask(thing.shape, thing.size, step_x, step_y, scale)
        half = coverage.shape[0] // 2
        left, top = (whole + pad - half).tolist()
        region = canvas[top : top + 2 * half, left : left + 2 * half]
        region += coverage[:, :, None] * (np.array(PALETTE[thing.color], np.float32) - region)
    return np.rint(canvas[pad : pad + size, pad : pad + size]).astype(np.uint8)
