"""Position embeddings and relative position tables of another image size, fitted to this one.

Shapes: h/w tokens, P 1 with a class token and 0 without, D embedding, L rows of a table, d head dim.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def saved_grid(
    key: str,
    pos_embed: Tensor,
    *,
    patch_size: int,
    saved_size: Sequence[int] | None,
    tables: tuple[int, int] | None = None,
    class_token: bool = False,
) -> tuple[int, int]:
    """The grid (h, w) of the position embeddings `key`, (1, P + h·w, D); ValueError where they have another
    number of positions, or nothing says their grid for certain.

    Args:
        patch_size, saved_size: of the images that the state is for; a rest of a patch counts as one.
        tables: the grid that relative tables of the same state are for, which goes before the images'. With
            neither the grid has to be a square.
        class_token: whether the first row is a class token's.
    """
    rows = pos_embed.shape[1] - class_token
    found = f"{key} has {rows} positions" + (" after the class token's" if class_token else "")
    if tables is not None:
        grid, reason = tables, "as this state's relative tables say; keep tensors of one save together"
    elif saved_size is not None:
        height, width = saved_size
        grid = -(-height // patch_size), -(-width // patch_size)
        reason = (
            f"as images of {height}x{width} pixels have {grid[0]}x{grid[1]} patches of {patch_size}; keep "
            "model.json and model.safetensors of one save together"
        )
    else:
        side = math.isqrt(rows)
        if side * side != rows:
            raise ValueError(
                f"{found}; expected a square grid, as nothing says the grid of this state; load a saved "
                "model by its folder, with rsmodels.load_model"
            )
        return side, side
    if grid[0] * grid[1] != rows:
        raise ValueError(f"{found}; expected {grid[0]}x{grid[1]}, {reason}")
    return grid


def resize_position_embedding(
    pos_embed: Tensor,
    saved: tuple[int, int],
    size: tuple[int, int],
    *,
    antialias: bool = False,
    class_token: bool = False,
) -> Tensor:
    """(1, P + saved h·w, D) → (1, P + h·w, D), bicubic; a class token's row stays as it is.

    antialias: with a low-pass filter, so that shrinking averages.
    """
    first, rows = pos_embed.tensor_split((int(class_token),), dim=1)
    grid = rows.float().unflatten(1, saved).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=size, mode="bicubic", antialias=antialias, align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def global_tables(prefix: str, blocks: Sequence[int], grid_size: tuple[int, int]) -> dict[str, int]:
    """The keys of the relative tables of `blocks`, which attend over the whole grid, height before width,
    each with its number of rows L. Tables of windows do not depend on the image size."""
    return {
        f"{prefix}blocks.{i}.attn.rel_pos_{axis}": 2 * side - 1
        for i in blocks
        for axis, side in zip("hw", grid_size, strict=True)
    }


def resize_relative_tables(state: dict[str, Tensor], tables: Mapping[str, int], mode: str) -> dict[str, str]:
    """Fit those of the `tables` that are in `state` to their number of rows, in place; the changed keys, each
    with how.

    mode: see resize_relative_table.
    """
    changed = {}
    for key, length in tables.items():
        if key in state and state[key].ndim == 2 and len(state[key]) != length:
            changed[key] = f"{len(state[key])} → {length} rows, {mode}"
            state[key] = resize_relative_table(state[key], length, mode)
    return changed


def resize_relative_table(table: Tensor, length: int, mode: str) -> Tensor:
    """(L, d) → (length, d), "linear" or "bicubic" along the rows."""
    rows = table.float().T[None, :, :, None]  # an image of one column, with a channel for each of the d
    mode = {"linear": "bilinear"}.get(mode, mode)
    resized = F.interpolate(rows, size=(length, 1), mode=mode, align_corners=False)
    return resized[0, :, :, 0].T.contiguous().to(table.dtype)
