"""Masks of eqs. (3) and (4)."""

import pytest
import torch

from rsmodels.style import draw_mask


def test_a_patch_is_one_draw_and_the_two_readings_are_opposite() -> None:
    def draw(mode: str) -> torch.Tensor:
        return draw_mask(3, (8, 12), 4, 0.7, mode, generator=torch.Generator().manual_seed(5))

    eq4, ratio = draw("eq4"), draw("ratio")
    uniform = torch.rand(3, 1, 2, 3, generator=torch.Generator().manual_seed(5))
    expected = (uniform > 0.7).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert eq4.dtype == torch.float32
    assert torch.equal(eq4, expected)
    assert torch.equal(ratio, 1 - expected)


@pytest.mark.parametrize(("height", "width", "patch"), [(37, 50, 16), (7, 9, 16), (64, 64, 1), (5, 100, 3)])
def test_any_size_from_the_grid_of_ceil(height: int, width: int, patch: int) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = draw_mask(2, (height, width), patch, 0.5, generator=generator)
    rows, columns = -(-height // patch), -(-width // patch)
    grid = torch.rand(2, 1, rows, columns, generator=torch.Generator().manual_seed(1)) > 0.5
    # Nearest: pixel y looks at the draw floor(y · rows / height).
    y, x = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    assert torch.equal(mask, grid[:, :, y][..., x].float())


@pytest.mark.parametrize(("mode", "share"), [("eq4", 0.9), ("ratio", 0.1)])
def test_share(mode: str, share: float) -> None:
    mask = draw_mask(4, (512, 512), 4, 0.1, mode, generator=torch.Generator().manual_seed(0))
    assert mask.mean().item() == pytest.approx(share, abs=0.005)


def test_the_global_generator_serves_by_default_and_moves_on() -> None:
    torch.manual_seed(3)
    first, second = (draw_mask(1, (64, 64), 8, 0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(draw_mask(1, (64, 64), 8, 0.5), first)
    assert not torch.equal(first, second)


def test_thresholds_at_the_ends() -> None:
    assert draw_mask(1, (32, 32), 1, 1.0, "ratio").min() == 1
    assert draw_mask(1, (32, 32), 1, 0.0, "ratio").max() == 0
    assert draw_mask(1, (32, 32), 1, 1.0, "eq4").max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": 0}, "patch=0"),
        ({"patch": 2.5}, r"patch=2\.5"),
        ({"ratio": 1.2}, r"ratio=1\.2"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"mode": "share"}, "mode='share': expected one of eq4, ratio"),
    ],
)
def test_what_is_no_mask(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_mask(1, (8, 8), **{"patch": 4, "ratio": 0.5, **arguments})
