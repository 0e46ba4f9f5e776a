"""The three-level grid of a scene, as look-up tables from coordinates to cells."""

from __future__ import annotations

import itertools

import numpy as np

from rsmodels.data.synthetic.domains import Region
from rsmodels.data.synthetic.paint import MAIN_HALF, STREET_HALF

Array = np.ndarray


class Grid:
    """Look-up tables of the bent grid, along u and v, in steps of half a pixel."""

    def __init__(
        self, rng: np.random.Generator, low: float, high: float, step: float, region: Region
    ) -> None:
        self.low, self.scale = np.float32(low), np.float32(1 / step)
        self.length = int((high - low) / step) + 2
        positions = low + (np.arange(self.length) + 0.5) * step
        main_u, main_v = (_breaks(rng, low, high, region.main_spacing) for _ in range(2))
        half_u, half_v = (rng.choice((MAIN_HALF, MAIN_HALF, 3.0), len(lines)) for lines in (main_u, main_v))
        self.main_gap_u = _gap(positions, main_u, half_u)
        self.main_gap_v = _gap(positions, main_v, half_v)

        lines = _subdivide(rng, main_u, region.block)
        self.column_of = np.searchsorted(lines[1:-1], positions).astype(np.int32)
        edge_u = _half_width_of(lines, main_u, half_u)
        tables, bounds, edges, first = [], [], [], 0
        for column in range(len(lines) - 1):
            rows = _subdivide(rng, main_v, region.block)  # each column its own: T junctions
            tables.append(np.searchsorted(rows[1:-1], positions).astype(np.int32) + first)
            edge_v = _half_width_of(rows, main_v, half_v)
            count = len(rows) - 1
            bounds.append(
                np.stack(
                    [np.full(count, lines[column]), np.full(count, lines[column + 1]), rows[:-1], rows[1:]]
                )
            )
            edges.append(
                np.stack(
                    [
                        np.full(count, edge_u[column]),
                        np.full(count, edge_u[column + 1]),
                        edge_v[:-1],
                        edge_v[1:],
                    ]
                )
            )
            first += count
        self.parcel_of = np.stack(tables)
        self.bounds = np.concatenate(bounds, axis=1).astype(np.float32)  # west, east, south, north line
        self.edges = np.concatenate(edges, axis=1).astype(np.float32)  # half width of the road on each
        self.parcels = first

    def index(self, coordinate: Array) -> Array:
        return ((coordinate - self.low) * self.scale).astype(np.int32)


def _breaks(rng: np.random.Generator, low: float, high: float, spacing: tuple[float, float]) -> Array:
    """Lines from below `low` to above `high`, `spacing` apart."""
    start = low - rng.uniform(0, spacing[1])
    gaps = rng.uniform(*spacing, int((high - start) / spacing[0]) + 2)
    lines = start + np.concatenate([[0.0], np.cumsum(gaps)])
    return lines[: np.searchsorted(lines, high) + 1]


def _subdivide(rng: np.random.Generator, lines: Array, block: tuple[float, float]) -> Array:
    """Cut every cell between `lines` into blocks of about the given size, unevenly."""
    pieces: list[Array] = [lines[:1]]
    for low, high in itertools.pairwise(lines):
        count = max(1, round((high - low) / rng.uniform(*block)))
        jitter = rng.uniform(-0.22, 0.22, count - 1)
        pieces += [low + (high - low) * (np.arange(1, count) + jitter) / count, np.array([high])]
    return np.concatenate(pieces)


def _gap(positions: Array, lines: Array, half: Array) -> Array:
    """Distance from each position to the edge of the nearest through road; negative on the road."""
    return (np.abs(positions[:, None] - lines) - half).min(1).astype(np.float32)


def _half_width_of(lines: Array, main: Array, half: Array) -> Array:
    """Half width of the road along each line of a town block: a through road's, or a street's."""
    nearest = np.abs(lines[:, None] - main).argmin(1)
    return np.where(np.isin(lines, main), half[nearest], STREET_HALF)
