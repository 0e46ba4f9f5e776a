"""Town blocks: lots with houses, gardens and trees.

Everything about a lot is drawn once per lot; a pixel only finds its lot and compares its coordinates with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsmodels.data.synthetic.domains import Climate, Region
from rsmodels.data.synthetic.grid import Grid
from rsmodels.data.synthetic.paint import GARDEN, KIND_TOWN, KIND_WORKS, ROOF_SHADES, TREE, TREE_HEIGHT, YARD

PAVEMENT = 1.0  # metres between a street and the first lot
WORKS_LOTS = 2.4  # lots of works and warehouses are so much larger than those of houses
SMALLEST_HOUSE = 4.0

Array = np.ndarray


def paint_town(
    rng: np.random.Generator,
    paint: Array,
    height: Array,
    town: Array,
    blocked: Array,
    parcel: Array,
    u: Array,
    v: Array,
    grid: Grid,
    kind: Array,
    region: Region,
    climate: Climate,
    first_roof: int,
) -> None:
    """Write gardens, trees and buildings into `paint` and `height`, in place, where `town` and not `blocked`.

    A building that would touch `blocked` (a road, a river) at any pixel is not built.
    """
    lots, per_parcel = _draw_lots(rng, grid, kind, region, climate, first_roof)
    at = np.flatnonzero(town)
    free = ~blocked.ravel()[at]
    owner, u, v = parcel.ravel()[at], u.ravel()[at], v.ravel()[at]
    lot = per_parcel.first[owner]
    lot += (
        _lot_number(u, owner, per_parcel.start_u, per_parcel.cell_u, per_parcel.count_u)
        * per_parcel.count_v[owner]
    )
    lot += _lot_number(v, owner, per_parcel.start_v, per_parcel.cell_v, per_parcel.count_v)

    du, dv = u - lots.house_u[lot], v - lots.house_v[lot]
    half_u, half_v = lots.half_u[lot], lots.half_v[lot]
    built = (np.abs(du) < half_u) & (np.abs(dv) < half_v)
    built &= (du < lots.notch_u[lot]) | (dv < lots.notch_v[lot])
    refused = np.zeros(len(lots.ground), bool)
    refused[lot[built & ~free]] = True
    built &= ~refused[lot]
    tree_u, tree_v = u - lots.tree_u[lot], v - lots.tree_v[lot]
    tree = (tree_u * tree_u + tree_v * tree_v < lots.tree_square[lot]) & ~built

    slope = np.where(half_u > half_v, dv, du) > 0  # the ridge follows the longer side
    values = np.where(tree, TREE, lots.ground[lot])
    values[built] = (lots.roof[lot] + slope)[built]
    heights = np.where(built, lots.storeys[lot], tree * np.float32(0.7 * TREE_HEIGHT))
    at = at[free]
    paint.reshape(-1)[at] = values[free]
    height.reshape(-1)[at] = heights[free]


@dataclass(frozen=True)
class _Blocks:
    """Per parcel: number of its first lot, lots along u and v, size of a lot, where the first one begins."""

    first: Array
    count_u: Array
    count_v: Array
    cell_u: Array
    cell_v: Array
    start_u: Array
    start_v: Array


@dataclass(frozen=True)
class _Lots:
    """Per lot, in metres of (u, v): centre and half size of the house (negative: none), the corner cut out of
    it, the tree's place and squared radius; paints of roof and ground; height of the house."""

    house_u: Array
    house_v: Array
    half_u: Array
    half_v: Array
    notch_u: Array
    notch_v: Array
    tree_u: Array
    tree_v: Array
    tree_square: Array
    roof: Array
    ground: Array
    storeys: Array


def _draw_lots(
    rng: np.random.Generator, grid: Grid, kind: Array, region: Region, climate: Climate, first_roof: int
) -> tuple[_Lots, _Blocks]:
    lot_size = np.where(kind == KIND_WORKS, WORKS_LOTS * region.lot, region.lot)
    start_u, cell_u, count_u = _cut(grid.bounds[0:2], grid.edges[0:2], lot_size)
    start_v, cell_v, count_v = _cut(grid.bounds[2:4], grid.edges[2:4], lot_size)
    counts = count_u * count_v
    first = (np.cumsum(counts) - counts).astype(np.int32)
    owner = np.repeat(np.arange(len(kind)), counts)
    number = np.arange(len(owner)) - first[owner]
    low_u = start_u[owner] + (number // count_v[owner]) * cell_u[owner]
    low_v = start_v[owner] + (number % count_v[owner]) * cell_v[owner]
    size_u, size_v = cell_u[owner], cell_v[owner]

    draw = rng.random((13, len(owner)), dtype=np.float32)
    width, depth = size_u * (0.48 + 0.36 * draw[0]), size_v * (0.48 + 0.36 * draw[1])
    built = (draw[5] < climate.density) & (np.minimum(width, depth) > SMALLEST_HOUSE)
    cut = draw[4] < 0.35
    garden = (draw[6] < region.garden * min(1.0, climate.lushness)) & (kind[owner] == KIND_TOWN)
    radius = np.where(draw[10] < 0.8 * climate.lushness, 1.6 + 2.0 * draw[9], 0)
    roof = (draw[11] * (len(region.roofs) * ROOF_SHADES)).astype(np.int32)
    lots = _Lots(
        house_u=low_u + size_u / 2 + (draw[2] - 0.5) * 0.8 * (size_u - width),
        house_v=low_v + size_v / 2 + (draw[3] - 0.5) * 0.8 * (size_v - depth),
        half_u=np.where(built, width / 2, np.float32(-1)),
        half_v=np.where(built, depth / 2, np.float32(-1)),
        notch_u=np.where(cut, 0.12 * width, width),
        notch_v=np.where(cut, 0.08 * depth, depth),
        tree_u=low_u + size_u * np.where(draw[7] < 0.5, np.float32(0.12), np.float32(0.88)),
        tree_v=low_v + size_v * draw[8],
        tree_square=(radius * radius).astype(np.float32),
        roof=first_roof + 2 * roof,
        ground=np.where(garden, GARDEN, YARD).astype(np.int32),
        storeys=region.heights[0] + (region.heights[1] - region.heights[0]) * draw[12],
    )
    return lots, _Blocks(first, count_u, count_v, cell_u, cell_v, start_u, start_v)


def _cut(bounds: Array, edges: Array, lot_size: Array) -> tuple[Array, Array, Array]:
    """Along one axis of every block: where the first lot begins, the size of a lot, how many there are."""
    start = bounds[0] + edges[0] + PAVEMENT
    extent = np.maximum(bounds[1] - edges[1] - PAVEMENT - start, 1.0)
    count = np.maximum(np.rint(extent / lot_size), 1).astype(np.int32)
    return start.astype(np.float32), (extent / count).astype(np.float32), count


def _lot_number(coordinate: Array, owner: Array, start: Array, cell: Array, count: Array) -> Array:
    number = np.floor((coordinate - start[owner]) / cell[owner])
    return np.clip(number, 0, count[owner] - 1).astype(np.int32)
