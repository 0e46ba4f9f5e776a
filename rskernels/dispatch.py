"""Which backend serves which operator: one table, and the switch that overrides it.

`choose` is plain Python over constants of a call (operator, device, dtype), so torch.compile traces it
away (fullgraph=True) and recompiles when `set_backend` changes the answer.

The switch is one value for the whole process, not one per thread: a forward pass and the threads that
autograd or a data loader run beside it see the same backend. Reading it needs no lock. Set it from one
thread: two threads inside `backend(...)` at once would overwrite each other's choice (a result then
comes from another backend, it is not wrong). A backward pass uses the backend its forward used.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

# "auto+NAME": NAME where it can serve, the best that there is elsewhere.
AUTO = ("auto", "auto+triton", "auto+xformers", "auto+sdpa")
BACKENDS = (*AUTO, "reference", "cpp", "triton", "cuda", "xformers", "sdpa")

_Rows = dict[str, dict[torch.dtype, tuple[str, ...]]]
_CPP: _Rows = {"cpu": {torch.float32: ("cpp",), torch.bfloat16: ("cpp",)}}
_CPP_TRITON: _Rows = {
    **_CPP,
    "cuda": {dtype: ("triton",) for dtype in (torch.float32, torch.float16, torch.bfloat16)},
}

# operator -> device -> dtype -> accelerated backends, best first. Whatever is not listed (float64, fp16
# on the CPU, mixed dtypes, other devices) is served by the reference.
TABLE: dict[str, _Rows] = {
    "rel_pos_attention": _CPP_TRITON,
    "linear": _CPP,
    "layer_norm": _CPP,
    "lora_linear": _CPP_TRITON,
    "lora_qkv": _CPP_TRITON,
    "cross_attention": _CPP_TRITON,
    "distillation_loss": _CPP_TRITON,
    "dilated_aspp": _CPP_TRITON,
    "deformable_attention": _CPP_TRITON,
}

# Attention of other libraries, composed into these operators (rskernels/sdpa.py, rskernels/xformers.py).
_ATTENTION = ("rel_pos_attention", "cross_attention")
_COMPOSED = {"sdpa": ("cpu", "cuda"), "xformers": ("cuda",)}


def _with_composed(rows: _Rows) -> _Rows:
    """`rows`, and behind them what _COMPOSED serves."""
    rows = {device: dict(dtypes) for device, dtypes in rows.items()}
    for name, devices in _COMPOSED.items():
        for device in devices:
            row = rows.setdefault(device, {})
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                row[dtype] = (*row.get(dtype, ()), name)
    return rows


TABLE |= {op: _with_composed(TABLE[op]) for op in _ATTENTION}

# backend -> operators that it serves when asked for by name, and that "auto" leaves alone. Triton's: no GPU
# has passed `make gpu-check` with them yet. The others': they are there to compare with.
ON_REQUEST: dict[str, frozenset[str]] = {
    "triton": frozenset(TABLE),
    "sdpa": frozenset(_ATTENTION),
    "xformers": frozenset(_ATTENTION),
}


def _load_extension() -> str:
    """Import rskernels._C; '' when it is usable, else the reason why not."""
    if os.environ.get("RSKERNELS_DISABLE_EXT", "").lower() not in ("", "0", "false", "no", "off"):
        return "is switched off by RSKERNELS_DISABLE_EXT"
    try:
        _C = importlib.import_module("rskernels._C")
    except ModuleNotFoundError:
        return (
            "is not built (no C++ compiler at install time?); pip install --no-build-isolation -e . builds it"
        )
    except ImportError as error:
        return f"does not load ({str(error).splitlines()[0]}); rebuild it against the installed torch"
    built, running = _C.build_info()["torch"], torch.__version__
    if built.split("+")[0] != running.split("+")[0]:
        return f"was built against torch {built}, this is torch {running}; rebuild it"
    return ""


def _triton_problem() -> str:
    """'' when Triton kernels may be launched for CUDA tensors here, else the reason why not. No device is
    asked for its properties: that would initialise CUDA in every process that imports this."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (PyTorch's CUDA wheels for Linux bring it)"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs, this PyTorch is built for AMD's"
    return "" if torch.cuda.is_available() else "PyTorch sees no CUDA device"


LEAST_CAPABILITY = (8, 0)
LEAST_SHARED_MEMORY = 166_912  # bytes a block may have: what the smallest chip with configurations has


@functools.cache
def device_problem(device: torch.device) -> str:
    """'' when the Triton kernels fit this CUDA device, else the reason why not."""
    chip = torch.cuda.get_device_properties(device)
    if (chip.major, chip.minor) < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0 or more, {chip.name} has {chip.major}.{chip.minor}"
    shared = getattr(chip, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY)
    if shared < LEAST_SHARED_MEMORY:
        return (
            f"its tiles take up to {LEAST_SHARED_MEMORY:,} bytes of shared memory, a block of {chip.name} "
            f"has {shared:,}"
        )
    return ""


def _xformers_problem() -> str:
    """'' when xFormers may serve CUDA tensors here, else the reason why not. It is imported, which takes
    seconds, by the first call that asks for it; a reason found then is that call's."""
    if importlib.util.find_spec("xformers") is None:
        return "xFormers is not installed"
    return "" if torch.cuda.is_available() else "PyTorch sees no CUDA device"


# backend -> why it serves nothing on this machine; a backend that works is not in here.
UNAVAILABLE: dict[str, str] = {"cuda": "no CUDA kernels in this version"}

_no_xformers = _xformers_problem()
if _no_xformers:
    UNAVAILABLE["xformers"] = _no_xformers

_no_triton = _triton_problem()
if _no_triton:
    UNAVAILABLE["triton"] = _no_triton

_extension_problem = _load_extension()
if _extension_problem:
    UNAVAILABLE["cpp"] = f"the extension rskernels._C {_extension_problem}"
    warnings.warn(
        f"rskernels: {UNAVAILABLE['cpp']}; the slower plain-PyTorch reference serves",
        RuntimeWarning,
        stacklevel=2,
    )


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


# Checked where it is used: an import that raises would deny the command line its one clear line.
_requested = os.environ.get("RSKERNELS_BACKEND") or "auto"


def check_requested() -> None:
    """Raise ValueError where RSKERNELS_BACKEND names no backend."""
    _checked(_requested, "RSKERNELS_BACKEND")


def set_backend(name: str) -> None:
    """Serve operators by `name` from now on: "auto" takes the best there is and falls back to the reference,
    "auto+triton" (or xformers, sdpa) takes that one first wherever it can serve; any other name raises
    ValueError at the call that it cannot serve."""
    global _requested
    _requested = _checked(name, "set_backend")


def get_backend() -> str:
    """The name that set_backend, backend(...) or RSKERNELS_BACKEND chose; "auto" unless one did."""
    return _requested


def falls_back() -> bool:
    """Does a call that the backend in use cannot serve go to another?"""
    return _requested in AUTO


def wanted() -> str:
    """The backend that was asked for by name, alone or beside "auto"; "auto" where none was."""
    return _requested.removeprefix("auto+")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """`with rskernels.backend("reference"): ...` sets the backend and restores the previous one."""
    previous = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def choose(op: str, *tensors: Tensor | None, without: Mapping[str, str] | None = None) -> str:
    """The backend that serves this call of `op`.

    Args:
        op: a key of TABLE.
        tensors: the call's tensor arguments, after autocast and casts; None is skipped.
        without: backends that this call's other arguments rule out, each with the reason.
    Raises:
        ValueError: a backend was asked for by name and cannot serve this call.
    """
    if _requested == "reference":
        return "reference"
    if forward_ad._current_level >= 0:
        # A registered operator has no forward-mode formula, and PyTorch would drop the tangent in silence.
        if falls_back():
            return "reference"
        raise ValueError(
            f"backend {_requested!r} cannot serve {op} in forward-mode differentiation; "
            "use set_backend('auto') or set_backend('reference')"
        )
    device, dtype = _common(tensors)
    candidates = TABLE[op].get(device, {}).get(dtype, ()) if dtype is not None else ()
    usable = [n for n in candidates if n not in UNAVAILABLE and (without is None or n not in without)]
    name = wanted()
    if name in usable:
        return name
    if falls_back():
        return next((n for n in usable if op not in ON_REQUEST.get(n, ())), "reference")
    check_requested()
    raise ValueError(_refusal(op, device, dtype, without))


def _common(tensors: tuple[Tensor | None, ...]) -> tuple[str, torch.dtype | None]:
    """The device type and dtype that all tensors share; dtype None where they do not."""
    device, dtype = "", None
    for tensor in tensors:
        if tensor is None:
            continue
        if device == "":
            device, dtype = tensor.device.type, tensor.dtype
        elif tensor.device.type != device or tensor.dtype != dtype:
            return device, None
    return device, dtype


def _refusal(op: str, device: str, dtype: torch.dtype | None, without: Mapping[str, str] | None) -> str:
    if without is not None and _requested in without:
        why = without[_requested]
    elif _requested in UNAVAILABLE:
        why = UNAVAILABLE[_requested]
    else:
        rows = [
            f"{row_device} {str(row_dtype).removeprefix('torch.')}"
            for row_device, dtypes in TABLE[op].items()
            for row_dtype, names in dtypes.items()
            if _requested in names
        ]
        why = f"it serves {op} for {', '.join(rows)} only" if rows else f"it has no {op}"
    what = "mixed dtypes" if dtype is None else str(dtype).removeprefix("torch.")
    return (
        f"backend {_requested!r} cannot serve {op} for {what} on {device or 'no device'}: {why}; "
        "use set_backend('auto') or set_backend('reference')"
    )
