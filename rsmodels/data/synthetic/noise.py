"""Smooth noise, the stuff that woods, lakes and bends are made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Array = np.ndarray


@lru_cache(maxsize=64)
def _spline(size: int, cells: int) -> Array:
    """Cubic B-spline weights that stretch `cells + 3` control points over `size` pixels."""
    position = (np.arange(size) + 0.5) / size * cells
    first = np.minimum(position.astype(int), cells - 1)
    t = position - first
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    matrix = np.zeros((size, cells + 3), np.float32)
    for tap in range(4):
        matrix[np.arange(size), first + tap] = weights[tap]
    return matrix


def smooth_noise(rng: np.random.Generator, size: int, wavelength: float) -> Array:
    """(size, size) smooth noise of mean 0 and deviation near 1; `wavelength` in pixels."""
    cells = max(1, round(size / wavelength))
    grid = rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    spline = _spline(size, cells)
    return (spline @ grid @ spline.T) * np.float32(1 / 0.479)  # what the spline leaves of the deviation


def ragged_noise(rng: np.random.Generator, size: int, wavelength: float) -> Array:
    """Noise whose level sets have uneven edges: a second octave at a sixth of the wavelength."""
    return np.float32(0.98) * smooth_noise(rng, size, wavelength) + np.float32(0.2) * smooth_noise(
        rng, size, wavelength / 6
    )


def noise_at(rng: np.random.Generator, points: Sequence[Array], wavelength: float) -> Array:
    """Smooth noise of mean 0 and deviation 1 at arbitrary points: a sum of six plane waves."""
    direction = rng.uniform(0, 2 * np.pi, 6)
    length = 2 * np.pi / (wavelength * rng.uniform(0.7, 1.5, 6))
    phase = rng.uniform(0, 2 * np.pi, 6)
    along = points[0][:, None] * np.cos(direction) + points[1][:, None] * np.sin(direction)
    return np.sin(along * length + phase).sum(1) / np.sqrt(3)


def level_of_share(share: float) -> float:
    """Level that standard normal noise exceeds on `share` of the area (Tukey's lambda approximation)."""
    share = min(max(share, 1e-4), 1 - 1e-4)
    return (((1 - share) ** 0.135) - share**0.135) / 0.1975
