"""How every kernel is launched, and what it is launched with.

`launch` is the one place that knows devices, and that can note launches down instead of doing them: the
ahead-of-time compiler and the tuner need no list of signatures of their own. `config` gives the tuned
constants of a kernel: this machine's where `python -m rskernels tune` measured them, else the package's.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rskernels import __version__, tuning

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


Configs = dict[str, dict[str, dict[str, int]]]  # kernel -> shape class -> constants

_noted: list[Launch] | None = None
_chip: int | None = None
_tried: Mapping[tuple[str, str], Mapping[str, int]] = {}
_asked: set[tuple[str, str]] | None = None
_meaningful: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()


@contextmanager
def noting(chip: int) -> Iterator[list[Launch]]:
    """Launches meanwhile are noted, configured for compute capability `chip`, and not done."""
    global _noted, _chip
    _noted, _chip = [], chip
    try:
        yield _noted
    finally:
        _noted = _chip = None


@contextmanager
def trying(choices: Mapping[tuple[str, str], Mapping[str, int]]) -> Iterator[set[tuple[str, str]]]:
    """`config` gives `choices` meanwhile where it has a (kernel, shape class); yields what was asked for."""
    global _tried, _asked
    _tried, _asked = choices, set()
    try:
        yield _asked
    finally:
        _tried, _asked = {}, None


def is_noting() -> bool:
    """Are launches noted down instead of done?"""
    return _noted is not None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its first tensor; an empty grid is no launch.

    arguments: what varies from call to call (tensors, sizes, strides, tuples of them), in the kernel's order.
    constants: its constexpr arguments, and num_warps and num_stages.
    """
    if 0 in grid:
        return
    if _noted is not None:
        _noted.append(Launch(kernel, grid, arguments, constants))
        return
    lead = next(a for a in flat(arguments) if isinstance(a, Tensor))
    if lead.is_cuda:
        with torch.cuda.device(lead.device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def meaningful(x: Tensor) -> Tensor:
    """x, whose numbers the tuner keeps: in an example where any others would be a call that nobody makes."""
    _meaningful[x] = True
    return x


def is_meaningful(x: Tensor) -> bool:
    return x in _meaningful


def flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    """The arguments of a launch, those in tuples too."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from flat(argument)
        else:
            yield argument


def config(kernel: str, shape_class: str, device: torch.device) -> dict[str, int]:
    """The tuned constants of `kernel` ("operator.kernel") for `shape_class`, on the chip of `device`.

    What was tuned on this machine comes first. A chip without a file takes the nearest one's; a class that
    the file does not have takes its "default".
    """
    if _asked is not None:
        _asked.add((kernel, shape_class))
    if (kernel, shape_class) in _tried:
        return dict(_tried[kernel, shape_class])
    if _chip is not None:
        return _shipped(_chip, kernel, shape_class)
    capability = capability_of(device)
    tuned = _tuned(capability).get(kernel, {}) if device.type == "cuda" else {}
    if shape_class in tuned:
        return dict(tuned[shape_class])
    return _shipped(nearest_chip(capability), kernel, shape_class)


def _shipped(chip: int, kernel: str, shape_class: str) -> dict[str, int]:
    rows = shipped(chip)[kernel]
    return dict(rows.get(shape_class, rows["default"]))


def capability_of(device: torch.device) -> int:
    """Compute capability of `device` (80 for 8.0); the interpreter's, where there is no GPU."""
    if device.type != "cuda":
        return TESTED_ON
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def nearest_chip(capability: int) -> int:
    """The chip of CHIPS whose configurations serve compute capability `capability` (80 for 8.0): the last one
    before it, for later chips of another kind may have less shared memory."""
    return max((chip for chip in CHIPS if chip <= capability), default=CHIPS[0])


@functools.cache
def shipped(chip: int) -> Configs:
    """The configurations that the package has for `chip`."""
    rows: Configs = {}
    for file in sorted(CONFIGS.glob(f"*.sm{chip}.json")):
        rows |= json.loads(file.read_text())
    return rows


def _tuned(capability: int) -> Configs:
    """What was tuned on this machine or restored from a record; nothing where there is none, or, with one
    warning, a bad one."""
    if capability not in tuning.triton_configs:
        tuning.triton_configs[capability] = _read_tuned(capability)
    configs: Configs = tuning.triton_configs[capability]
    return configs


def _read_tuned(capability: int) -> Configs:
    try:
        saved = tuning.triton_table(capability)
        return {} if saved is None else checked(saved, capability)
    except ValueError as error:  # json.JSONDecodeError is one
        warnings.warn(
            f"rskernels: ignoring the tuned configurations in {tuning.triton_place(capability)}: {error}; "
            "`python -m rskernels tune` measures them anew",
            RuntimeWarning,
            stacklevel=2,
        )
    except (OSError, RuntimeError):  # containers: a home of another user's, or none
        pass
    return {}


def checked(saved: Any, capability: int) -> Configs:
    """The configurations of a file that the tuner wrote; ValueError where it is not one of this version for
    `capability`, or has another kernel or constants than the package."""
    expected = {"version": __version__, "capability": capability, "triton": triton_version()}
    if not isinstance(saved, Mapping):
        raise ValueError("not a table of configurations")
    for name, value in expected.items():
        if saved.get(name) != value:
            raise ValueError(f"its {name} is {saved.get(name)!r}, expected {value!r}")
    rows, known = saved.get("configs"), shipped(nearest_chip(capability))
    if not isinstance(rows, Mapping):
        raise ValueError("it has no 'configs'")
    for kernel, classes in rows.items():
        if kernel not in known:
            raise ValueError(f"there is no kernel {kernel!r}")
        for shape_class, constants in classes.items() if isinstance(classes, Mapping) else [("?", None)]:
            where = f"{kernel}, {shape_class}"
            names = set(known[kernel].get(shape_class, known[kernel]["default"]))
            if not isinstance(constants, Mapping) or set(constants) != names:
                raise ValueError(f"{where}: expected the constants {', '.join(sorted(names))}")
            for name, value in constants.items():
                if type(value) is not int or not _possible(name, value):
                    raise ValueError(f"{where}: {name} is {value!r}, which is no such constant")
    return {kernel: {name: dict(row) for name, row in classes.items()} for kernel, classes in rows.items()}


def _possible(name: str, value: int) -> bool:
    if name.startswith("BLOCK") or name == "num_warps":
        return value in (1 << bit for bit in range(11 if name != "num_warps" else 6))
    return 0 <= value <= 16


@functools.cache
def triton_version() -> str:
    """As Triton says it: nightly wheels have other names, or a suffix. Importing it takes seconds."""
    return str(importlib.import_module("triton").__version__)


def with_channels_together(x: Tensor) -> Tensor:
    """x where its last dimension's values are neighbours in memory, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def expect(
    where: str, x: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """ValueError unless x has `shape`, `dtype` (else that of `like`) and its device; where: "operator: name".
    Public functions have refused what does not fit; an exported graph calls the operators themselves."""
    if x.shape != torch.Size(shape):
        raise ValueError(f"{where} has shape {tuple(x.shape)}; expected {tuple(shape)}")
    dtype = dtype or like.dtype
    if (x.dtype, x.device) != (dtype, like.device):
        raise ValueError(f"{where} is {x.dtype} on {x.device}; expected {dtype} on {like.device}")


def dot_precision(dtype: torch.dtype, *, convolution: bool = False) -> str:
    """How a product of float32 numbers is done: three TF32 products keep float32's digits; where TF32 is
    allowed for cuBLAS's products, or cuDNN's convolutions, it is one. Half precision is exact either way."""
    if dtype != torch.float32:
        return "tf32x3"
    switch: Any = getattr(torch.backends.cudnn, "conv", None) if convolution else torch.backends.cuda.matmul
    # PyTorch has two switches each, and reading the old one raises where the new one was set.
    if hasattr(switch, "fp32_precision"):
        return "tf32" if switch.fp32_precision == "tf32" else "tf32x3"
    if convolution:
        return "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def dtype_class(dtype: torch.dtype) -> str:
    """The part of a shape class that the dtype decides: float16 and bfloat16 take the same tiles."""
    return "float" if dtype == torch.float32 else "half"


def power_of_2(n: int, at_least: int = 16) -> int:
    """The next power of two: block sides are powers of two, those of a product at least 16."""
    return max(at_least, 1 << math.ceil(math.log2(max(n, 1))))


def cdiv(n: int, block: int) -> int:
    """Blocks that cover n."""
    return -(-n // block)
