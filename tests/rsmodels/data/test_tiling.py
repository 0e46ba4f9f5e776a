"""Tile geometry and blending: full cover, weights that add up to one, no seams, bounded memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsmodels.data.tiling import TileAxis, TileGrid, blend_rows, reflect_to

lengths = st.integers(1, 60)
overlaps = st.floats(0, 0.9)


@given(lengths, lengths, overlaps)
def test_tiles_cover_the_axis_and_overlap_as_asked(length: int, tile: int, overlap: float) -> None:
    axis = TileAxis(length, tile, overlap)
    assert axis.starts[0] == 0
    assert axis.starts[-1] == max(length - tile, 0)
    steps = [b - a for a, b in zip(axis.starts, axis.starts[1:], strict=False)]
    # One pixel at least, and never more than the tile less the overlap.
    assert all(1 <= step <= max(1, tile * (1 - overlap)) for step in steps)


@given(lengths, lengths, overlaps)
def test_weights_add_up_to_one(length: int, tile: int, overlap: float) -> None:
    axis = TileAxis(length, tile, overlap)
    total = torch.zeros(length, dtype=torch.float64)
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        assert (weights > 0).all()
        total[start : start + len(weights)] += weights
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


def test_a_tile_counts_less_towards_its_border() -> None:
    axis = TileAxis(100, 40, 0.5)
    inner = axis.weights[1]
    assert inner.argmax() in range(10, 30)
    assert inner[0] < 0.01 and inner[-1] < 0.01


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "message"),
    [
        (0, 8, 0.25, "0 pixels"),
        (8, 0, 0.25, "by 0"),
        (8, 8, 1.0, "overlap 1.0"),
        (8, 8, -0.1, "overlap -0.1"),
    ],
)
def test_impossible_tilings_are_refused(length: int, tile: int, overlap: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileAxis(length, tile, overlap)


def cut(image: Tensor, grid: TileGrid) -> list:
    return [(t, image[:, t.top : t.top + t.height, t.left : t.left + t.width]) for t in grid]


@settings(max_examples=60)
@given(
    st.tuples(lengths, lengths),
    st.tuples(st.integers(1, 25), st.integers(1, 25)),
    overlaps,
    st.integers(1, 20),
)
def test_equal_tiles_blend_into_the_image(
    size: tuple[int, int], tile: tuple[int, int], overlap: float, align: int
) -> None:
    grid = TileGrid(size, tile, overlap)
    image = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    out = torch.full_like(image, torch.nan)
    expected_top = 0
    for top, band in blend_rows(grid, cut(image, grid), channels=2, align=align):
        assert top == expected_top and top % align == 0
        out[:, top : top + band.shape[1]] = band
        expected_top += band.shape[1]
    assert expected_top == size[0]
    torch.testing.assert_close(out, image, atol=1e-5, rtol=0)


def test_one_tile_is_passed_on_bit_for_bit() -> None:
    grid = TileGrid((9, 7), (16, 16), 0.25)
    image = torch.randn(3, 9, 7)
    ((top, band),) = blend_rows(grid, cut(image, grid), channels=3)
    assert top == 0 and torch.equal(band, image)


def test_no_scores_count_as_zeros() -> None:
    grid = TileGrid((8, 20), (8, 8), 0.0)
    tiles = [(tile, torch.ones(1, 8, 8) if tile.left == 0 else None) for tile in grid]
    ((_, band),) = blend_rows(grid, tiles, channels=1)
    assert (band[:, :, :6] == 1).all() and (band[:, :, 8:] == 0).all()


@pytest.mark.parametrize("height", [100, 1000])
def test_bands_never_hold_more_than_a_row_of_tiles(height: int) -> None:
    grid = TileGrid((height, 30), (16, 16), 0.25)
    zeros = torch.zeros(1, 16, 16)
    rows = [
        band.shape[1] for _, band in blend_rows(grid, ((tile, zeros) for tile in grid), channels=1, align=8)
    ]
    assert sum(rows) == height
    assert max(rows) <= 16 + 8 - 1


def test_bands_come_before_the_next_row_is_read() -> None:
    """What is final is handed out at once, so that a consumer can write it while the rest is predicted."""
    grid = TileGrid((64, 16), (16, 16), 0.0)
    read: list[int] = []

    def tiles():  # type: ignore[no-untyped-def]
        for tile in grid:
            read.append(tile.row)
            yield tile, torch.zeros(1, 16, 16)

    bands = blend_rows(grid, tiles(), channels=1)
    assert next(bands)[0] == 0
    assert read == [0, 1]


@given(st.integers(1, 9), st.integers(1, 40))
def test_reflection_mirrors_without_repeating_the_border(length: int, target: int) -> None:
    row = torch.arange(length, dtype=torch.float32)
    out = reflect_to(row.reshape(1, 1, length), (1, target))[0, 0]
    assert len(out) == max(length, target)
    expected = [abs((i + length - 1) % max(2 * (length - 1), 1) - (length - 1)) for i in range(len(out))]
    assert out.tolist() == expected
