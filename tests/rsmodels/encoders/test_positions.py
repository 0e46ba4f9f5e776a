"""Positions of another image size: the numbers, and where the grid is known from."""

import pytest
import torch
import torch.nn.functional as F

from rsmodels.encoders.positions import (
    resize_position_embedding,
    resize_relative_table,
    resize_relative_tables,
    saved_grid,
)


@pytest.mark.parametrize("rows, length", [(3, 9), (15, 7), (27, 63), (27, 5)])
def test_tables_are_resized_along_their_rows(rows: int, length: int) -> None:
    """As SAM does at run time (one dimension), and as MTP does before fine-tuning (an image of rows x d)."""
    torch.manual_seed(0)
    table = torch.randn(rows, 6, dtype=torch.float64)
    linear = F.interpolate(table.T[None], size=length, mode="linear", align_corners=False)[0].T
    bicubic = F.interpolate(table[None, None], size=(length, 6), mode="bicubic", align_corners=False)[0, 0]
    assert (linear - bicubic).abs().max() > 0.01
    for mode, expected in (("linear", linear), ("bicubic", bicubic)):
        resized = resize_relative_table(table, length, mode)
        assert resized.dtype == torch.float64 and resized.is_contiguous()
        torch.testing.assert_close(resized, expected, rtol=1e-5, atol=1e-5)


def test_only_tables_of_another_length_change() -> None:
    state = {"a": torch.ones(7, 2), "b": torch.ones(5, 2), "c": torch.ones(5, 2, 2), "d": torch.ones(5, 2)}
    before = dict(state)
    tables = {"a": 7, "b": 3, "c": 3, "absent": 3}
    assert resize_relative_tables(state, tables, "linear") == {"b": "5 → 3 rows, linear"}
    assert state["b"].shape == (3, 2)
    assert all(state[key] is before[key] for key in "acd")  # of another rank: for loading to refuse


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
def test_position_embeddings(antialias: bool, class_token: bool) -> None:
    torch.manual_seed(0)
    saved, size = (6, 8), (3, 5)
    grid = torch.randn(1, 4, *saved, dtype=torch.float64)
    first = torch.randn(1, int(class_token), 4, dtype=torch.float64)
    resized = resize_position_embedding(
        torch.cat([first, grid.flatten(2).mT], dim=1),
        saved,
        size,
        antialias=antialias,
        class_token=class_token,
    )
    expected = F.interpolate(grid, size=size, mode="bicubic", antialias=antialias, align_corners=False)
    assert torch.equal(resized[:, : int(class_token)], first)
    torch.testing.assert_close(resized[:, int(class_token) :], expected.flatten(2).mT, rtol=1e-5, atol=1e-5)


def test_tables_go_before_the_image_size() -> None:
    positions = torch.zeros(1, 16, 4)
    told = {"patch_size": 16, "saved_size": (64, 64)}
    assert saved_grid("pos", positions, **told) == (4, 4)
    assert saved_grid("pos", positions, **told, tables=(2, 8)) == (2, 8)
    assert saved_grid("pos", positions, patch_size=16, saved_size=(20, 120)) == (2, 8)  # a rest counts as one
    assert saved_grid("pos", torch.zeros(1, 17, 4), patch_size=16, saved_size=None, class_token=True) == (
        4,
        4,
    )
    with pytest.raises(
        ValueError, match=r"pos has 16 positions; expected 3x8, as this state's relative tables"
    ):
        saved_grid("pos", positions, **told, tables=(3, 8))
    with pytest.raises(
        ValueError, match=r"pos has 15 positions after the class token's; expected 4x4, as images"
    ):
        saved_grid("pos", positions, **told, class_token=True)
