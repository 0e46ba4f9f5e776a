"""`rskernels.explain()`: what is built here, what serves each operator, and why something is missing."""

import sys

import torch

from rskernels import __version__, dispatch, tuning

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def instruction_set() -> str:
    """The instruction set that the C++ kernels use now; "" where the extension is not built."""
    if "cpp" in dispatch.UNAVAILABLE:
        return ""
    from rskernels import _C  # optional: absent from a pure-Python install

    return _C.cpu_capability()


def explain() -> str:
    """Print, and return, the state of rskernels on this machine, for the backend and threads in use now."""
    text = "\n".join([*_versions(), *_extension(), *_table(), *_missing()])
    print(text)
    return text


def _versions() -> list[str]:
    backend = dispatch.get_backend()
    meaning = "takes the best that is there" if dispatch.falls_back() else "chosen by name"
    if dispatch.wanted() not in ("auto", backend):
        meaning = f"takes {dispatch.wanted()} where it can serve, else the best that is there"
    if backend not in dispatch.BACKENDS:
        meaning = f"unknown, expected one of {', '.join(dispatch.BACKENDS)}"
    return [
        f"rskernels {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}",
        f"backend: {backend}, {meaning} (set_backend, backend(...), RSKERNELS_BACKEND)",
        f"CPU threads: {torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS)",
    ]


def _extension() -> list[str]:
    if "cpp" in dispatch.UNAVAILABLE:
        return [
            f"extension: none, {dispatch.UNAVAILABLE['cpp']}",
            f"instruction set: PyTorch's own choice, {torch.backends.cpu.get_cpu_capability()}",
        ]
    from rskernels import _C

    info = _C.build_info()
    used, best = _C.cpu_capability(), _C.cpu_supported()
    lowered = "" if used == best else f", lowered from {best}"
    return [
        f"extension: built against torch {info['torch']} with compiler {info['compiler']}; "
        f"its loops get {_C.parallel_threads()} thread(s)",
        f"instruction set: {used}{lowered} (RSKERNELS_ISA); PyTorch uses "
        f"{torch.backends.cpu.get_cpu_capability()}",
        f"bfloat16 tiles: {_bf16_tiles(_C.has_bf16_tiles(), used)}",
        *tuning.describe(),
    ]


def _bf16_tiles(there: bool, used: str) -> str:
    """Do bfloat16 kernels multiply in bfloat16?"""
    if there:
        return "yes, products of bfloat16 with float32 sums"
    return f"no, they need avx512_bf16, {used} is in use; bfloat16 is converted to float32 tiles"


def _table() -> list[str]:
    """One line per operator and device: what serves each dtype under the backend in use."""
    lines = ["operator              device  " + "  ".join(f"{_name(d):<9}" for d in _DTYPES).rstrip()]
    for op in dispatch.TABLE:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            cells = "  ".join(f"{_served_by(op, device, dtype):<9}" for dtype in _DTYPES)
            lines.append(f"{op:<22}{device:<8}{cells}".rstrip())
    for name, ops in dispatch.ON_REQUEST.items():
        if name not in dispatch.UNAVAILABLE:
            lines.append(f"by name only: {name}, for {', '.join(op for op in dispatch.TABLE if op in ops)}")
    if not dispatch.falls_back() and dispatch.get_backend() != "reference":
        lines.append(f"error: the call raises, as backend {dispatch.get_backend()!r} was asked for by name")
    return lines


def _served_by(op: str, device: str, dtype: torch.dtype) -> str:
    name = dispatch.wanted()
    if name == "reference":
        return name
    names = dispatch.TABLE[op].get(device, {}).get(dtype, ())
    usable = [n for n in names if n not in dispatch.UNAVAILABLE]
    if name in usable:
        return name
    if dispatch.falls_back():
        return next((n for n in usable if op not in dispatch.ON_REQUEST.get(n, ())), "reference")
    return "error"


def _missing() -> list[str]:
    lines = [f"{name}: {reason}" for name, reason in dispatch.UNAVAILABLE.items()]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        gpus = [f"GPU: {', '.join(names)}"]
    else:
        gpus, lines = [], [*lines, "cuda device: PyTorch sees none"]
    return [*gpus, "not available here:", *(f"  {line}" for line in lines)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
