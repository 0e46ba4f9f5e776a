"""How every kernel is launched, and what it is launched with.

`launch` is the one place that knows devices, and that can note launches down instead of doing them: the
ahead-of-time compiler needs no list of signatures of its own. `config` gives the tuned constants of a kernel.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIGS = Path(__file__).parent / "configs"
CHIPS = (80, 90, 100)  # compute capabilities that have a file of configurations
TESTED_ON = 90  # whose configurations serve where there is no GPU: the interpreter


@dataclass(frozen=True)
class Launch:
    """One noted launch: `constants` are the kernel's constexpr arguments and options such as num_warps."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]


_noted: list[Launch] | None = None
_chip: int | None = None


@contextmanager
def noting(chip: int) -> Iterator[list[Launch]]:
    """Launches meanwhile are noted, configured for compute capability `chip`, and not done."""
    global _noted, _chip
    _noted, _chip = [], chip
    try:
        yield _noted
    finally:
        _noted = _chip = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its first tensor; an empty grid is no launch.

    arguments: what varies from call to call (tensors, sizes, strides), in the kernel's order.
    constants: its constexpr arguments, and num_warps and num_stages.
    """
    if 0 in grid:
        return
    if _noted is not None:
        _noted.append(Launch(kernel, grid, arguments, constants))
        return
    lead = next(a for a in arguments if isinstance(a, Tensor))
    if lead.is_cuda:
        with torch.cuda.device(lead.device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def config(kernel: str, shape_class: str, device: torch.device) -> dict[str, int]:
    """The tuned constants of `kernel` ("operator.kernel") for `shape_class`, on the chip of `device`.

    A chip without a file takes the nearest one's; a class that the file does not have takes its "default".
    """
    rows = _configs(_chip_of(device))[kernel]
    return dict(rows.get(shape_class, rows["default"]))


def _chip_of(device: torch.device) -> int:
    if _chip is not None:
        return _chip
    if device.type != "cuda":
        return TESTED_ON
    major, minor = torch.cuda.get_device_capability(device)
    return nearest_chip(10 * major + minor)


def nearest_chip(capability: int) -> int:
    """The chip of CHIPS whose configurations serve compute capability `capability` (80 for 8.0)."""
    return min(CHIPS, key=lambda chip: abs(chip - capability))


@functools.cache
def _configs(chip: int) -> dict[str, dict[str, dict[str, int]]]:
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for file in sorted(CONFIGS.glob(f"*.sm{chip}.json")):
        rows |= json.loads(file.read_text())
    return rows


def dot_precision(dtype: torch.dtype) -> str:
    """How a product of float32 numbers is done: three TF32 products keep float32's digits; where the user
    allows TF32 (torch.set_float32_matmul_precision) it is one. Half precision is exact either way."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "tf32x3"
    return "tf32"


def dtype_class(dtype: torch.dtype) -> str:
    """The part of a shape class that the dtype decides: float16 and bfloat16 take the same tiles."""
    return "float" if dtype == torch.float32 else "half"


def power_of_2(n: int, at_least: int = 16) -> int:
    """The next power of two: block sides are powers of two, those of a product at least 16."""
    return max(at_least, 1 << math.ceil(math.log2(max(n, 1))))


def cdiv(n: int, block: int) -> int:
    """Blocks that cover n."""
    return -(-n // block)
