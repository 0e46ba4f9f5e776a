"""`rskernels.explain()`: what is built here, what serves each operator, and why something is missing."""

import importlib.util
import sys

import torch

from rskernels import __version__, dispatch, tuning

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def explain() -> str:
    """Print, and return, the state of rskernels on this machine."""
    lines = _versions() + _extension() + _table() + _missing() + tuning.describe()
    text = "\n".join(lines)
    print(text)
    return text


def _versions() -> list[str]:
    gpu = "none"
    if torch.cuda.is_available():
        gpu = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    triton = "installed" if importlib.util.find_spec("triton") else "not installed"
    return [
        f"rskernels {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}",
        f"GPU: {gpu}; triton {triton}",
        f"CPU threads: {torch.get_num_threads()}; torch uses {torch.backends.cpu.get_cpu_capability()}",
        f"backend: {dispatch.get_backend()} (set_backend, backend(...), RSKERNELS_BACKEND)",
    ]


def _extension() -> list[str]:
    if "cpp" in dispatch.UNAVAILABLE:
        return [f"extension: {dispatch.UNAVAILABLE['cpp']}"]
    from rskernels import _C

    info = _C.build_info()
    return [
        f"extension: built against torch {info['torch']} with compiler {info['compiler']}, "
        f"instruction set {_C.cpu_capability()} (RSKERNELS_ISA), {_C.parallel_threads()} thread(s) in a loop",
    ]


def _table() -> list[str]:
    """One line per operator and device: what "auto" takes for each dtype."""
    lines = ["operator              device  " + "  ".join(f"{_name(d):<9}" for d in _DTYPES).rstrip()]
    for op in dispatch.TABLE:
        for device in ("cpu", "cuda"):
            cells = "  ".join(f"{_served_by(op, device, dtype):<9}" for dtype in _DTYPES)
            lines.append(f"{op:<22}{device:<8}{cells}".rstrip())
    return lines


def _served_by(op: str, device: str, dtype: torch.dtype) -> str:
    names = dispatch.TABLE[op].get(device, {}).get(dtype, ())
    return next((name for name in names if name not in dispatch.UNAVAILABLE), "reference")


def _missing() -> list[str]:
    lines = [f"{name}: {reason}" for name, reason in dispatch.UNAVAILABLE.items()]
    if not torch.cuda.is_available():
        lines.append("cuda device: torch sees none; the rows above are what such a machine would use")
    return ["not available here:", *(f"  {line}" for line in lines)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
