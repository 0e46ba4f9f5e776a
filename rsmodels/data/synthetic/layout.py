"""The map behind a synthetic scene: which thing is at each pixel.

Everything hangs on one frame of coordinates (u, v): turned by a random angle and bent by smooth noise, so
that a regular grid in (u, v) is a network of curving roads on the ground. The grid has three levels: cells
between through roads, blocks or fields within them, and lots within town blocks. Each pixel finds its cell by
table look-up; roads, houses and hedges are distances to the borders of that cell. Rivers, lakes, the sea and
woods are level sets of smooth noise.

The result is one integer per pixel, the *paint*, a row of a table that gives the class, the colour and the
texture alike. That is why the label is exact: image and label are two columns of one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from rsmodels.data.synthetic.domains import Climate, Region
from rsmodels.data.synthetic.grid import Grid
from rsmodels.data.synthetic.noise import level_of_share, noise_at, ragged_noise, smooth_noise
from rsmodels.data.synthetic.paint import (
    BEACH,
    BUILDING,
    FIXED_CLASSES,
    KIND_BARE,
    KIND_CLASS,
    KIND_CROP,
    KIND_GRASS,
    KIND_TOWN,
    KIND_WOOD,
    KIND_WORKS,
    MAIN_HALF,
    MAIN_ROAD,
    MARKING,
    POOL,
    ROOF_SHADES,
    SEA,
    STREET,
    STREET_HALF,
    TRACK,
    TRACK_HALF,
    TREE,
    TREE_HEIGHT,
    WOOD_A,
    WOOD_B,
)
from rsmodels.data.synthetic.town import paint_town

BEND_WAVELENGTH = 150.0  # metres, of the bends of the grid
HEDGE_WIDTH = 4.0
FAR = 1e9  # metres; farther than any scene

Array = np.ndarray


@dataclass(frozen=True)
class Layout:
    """paint: (H, W) row of the paint table; classes: class of each row; u, v: bent coordinates in metres;
    parcels: how many parcel rows; kind: (parcels,) KIND_* of each; height: (H, W) metres above ground."""

    paint: Array
    classes: Array
    u: Array
    v: Array
    parcels: int
    kind: Array
    height: Array


def build_layout(rng: np.random.Generator, size: int, gsd: float, region: Region, climate: Climate) -> Layout:
    """Draw a scene's map. size: pixels; gsd: metres per pixel."""
    axis = ((np.arange(size) + 0.5 - size / 2) * gsd).astype(np.float32)
    x, y = axis[None, :], axis[:, None]
    angle = rng.uniform(0, np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = x * cos + y * sin + np.float32(region.warp) * smooth_noise(rng, size, BEND_WAVELENGTH / gsd)
    v = y * cos - x * sin + np.float32(region.warp) * smooth_noise(rng, size, BEND_WAVELENGTH / gsd)

    grid = Grid(rng, float(min(u.min(), v.min())) - 1, float(max(u.max(), v.max())) + 1, 0.5 * gsd, region)
    ui, vi = grid.index(u), grid.index(v)
    parcel = grid.parcel_of[grid.column_of[ui], vi]
    main_gap = np.minimum(grid.main_gap_u[ui], grid.main_gap_v[vi])
    kind = _parcel_kinds(rng, grid, region, climate)
    town_parcel = (kind == KIND_TOWN) | (kind == KIND_WORKS)
    town = town_parcel[parcel]

    water, sea, beach = _water(rng, x, y, size, gsd, region)
    wood = ragged_noise(rng, size, 70 / gsd) > level_of_share(min(0.9, region.forest * climate.lushness))
    wood = (wood & ~town) | (kind == KIND_WOOD)[parcel]

    lined = rng.random((4, grid.parcels)) < np.array([[region.tracks]] * 2 + [[region.hedges]] * 2)
    lined &= ~town_parcel
    none = np.zeros_like(town_parcel)
    main = (main_gap < 0) & ~sea
    dry = ~(main | water)
    street = dry & _along_borders(u, v, parcel, grid, STREET_HALF, [town_parcel] * 4)
    track = dry & _along_borders(u, v, parcel, grid, 2 * TRACK_HALF, [lined[0], none, lined[1], none])
    track &= ~wood  # under trees nobody could see it
    road = _keep_connected(main | street | track)
    main, street, track = main & road, street & road, track & road
    hedge = _along_borders(u, v, parcel, grid, HEDGE_WIDTH, [none, lined[2], none, lined[3]])

    first_parcel = len(FIXED_CLASSES)
    first_roof = first_parcel + grid.parcels
    paint = parcel + np.int32(first_parcel)
    height = np.zeros((size, size), np.float32)
    height[wood | hedge] = TREE_HEIGHT
    stand = smooth_noise(rng, size, 40 / gsd) > 0
    np.copyto(paint, np.where(stand, WOOD_A, WOOD_B), where=wood, casting="same_kind")
    paint[hedge] = TREE
    paint[beach] = BEACH
    paint_town(
        rng, paint, height, town, road | water | beach, parcel, u, v, grid, kind, region, climate, first_roof
    )
    paint[water] = POOL
    paint[sea] = SEA
    paint[main] = MAIN_ROAD
    paint[main & (main_gap < max(0.35, 0.5 * gsd) - MAIN_HALF)] = MARKING
    paint[street] = STREET
    paint[track] = TRACK
    height[road | water | beach] = 0

    roofs = np.full(len(region.roofs) * ROOF_SHADES * 2, BUILDING)
    classes = np.concatenate([FIXED_CLASSES, np.array(KIND_CLASS)[kind], roofs]).astype(np.uint8)
    return Layout(paint, classes, u, v, grid.parcels, kind, height)


def _along_borders(
    u: Array, v: Array, parcel: Array, grid: Grid, width: float, sides: Sequence[Array]
) -> Array:
    """Pixels within `width` metres of their parcel's west, east, south, north border.

    sides: per side, the parcels that have the strip.
    """
    strip = np.zeros(u.shape, bool)
    for side, (line, chosen) in enumerate(zip(grid.bounds, sides, strict=True)):
        if not chosen.any():
            continue
        coordinate, inward = (u, v)[side // 2], (1, -1)[side % 2]
        limit = np.where(chosen, inward * line + width, -FAR).astype(np.float32)[parcel]
        strip |= (coordinate if inward > 0 else -coordinate) < limit
    return strip


def _parcel_kinds(rng: np.random.Generator, grid: Grid, region: Region, climate: Climate) -> Array:
    """Towns are clusters of parcels; farmland is drawn parcel by parcel."""
    centre = grid.bounds[0:2].mean(0), grid.bounds[2:4].mean(0)
    urban = noise_at(rng, centre, 280)
    draw = rng.random(grid.parcels)
    kind = np.where(
        draw < climate.bare, KIND_BARE, np.where(draw < climate.bare + 0.2, KIND_GRASS, KIND_CROP)
    )
    kind[draw > 1 - 0.3 * region.forest * climate.lushness] = KIND_WOOD
    town = urban > level_of_share(region.town)
    kind[town] = KIND_TOWN
    use = rng.random(grid.parcels)
    kind[town & (use < 0.12)] = KIND_WORKS
    kind[town & (use > 0.93)] = KIND_GRASS  # a park
    return kind.astype(np.int32)


def _water(
    rng: np.random.Generator, x: Array, y: Array, size: int, gsd: float, region: Region
) -> tuple[Array, Array, Array]:
    """Masks of all water, of the sea within it, and of beaches."""
    lake_level = ragged_noise(rng, size, 110 / gsd) - np.float32(level_of_share(region.lake))
    period, angle = 260.0, rng.uniform(0, 2 * np.pi)
    across = (
        x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) + np.float32(rng.uniform(0, period))
    )
    across = across + 26 * smooth_noise(rng, size, 110 / gsd)
    strand = np.rint(across / np.float32(period))
    count = int(np.abs(strand).max()) + 1
    draws = rng.random((2, 2 * count + 1))
    half_width = np.where(draws[0] < region.river, 4 + 9 * draws[1], -1).astype(np.float32)
    river = np.abs(across - strand * np.float32(period)) < half_width[strand.astype(np.int32) + count]
    extent = float(size) * gsd
    shore = (
        x * np.float32(np.sin(angle))
        - y * np.float32(np.cos(angle))
        + 18 * smooth_noise(rng, size, 120 / gsd)
    )
    sea_draw, sea_offset = rng.random(), rng.uniform(-0.1, 0.5) * extent
    sea_level = shore - np.float32(sea_offset if sea_draw < region.sea else 1e6)
    sea = sea_level > 0
    water = (lake_level > 0) | river | sea
    beach = (sea_level > -np.float32(rng.uniform(5, 14))) & ~water
    beach |= (lake_level > -0.07) & ~water
    return water, sea, beach


def _keep_connected(road: Array) -> Array:
    """Drop stretches of road that neither reach the scene's edge nor belong to the largest network."""
    labels, count = ndimage.label(road, structure=np.ones((3, 3)))
    if count <= 1:
        return road
    keep = np.zeros(count + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        keep[edge] = True
    keep[np.bincount(labels.ravel())[1:].argmax() + 1] = True
    keep[0] = False
    return keep[labels]
