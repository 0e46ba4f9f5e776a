"""How a figure is taken: interleaved rounds in one process, medians, ratios to a peer in the same rounds.

A shared machine drifts by tens of per cent within minutes, so absolute times of two runs say little.
Candidates therefore take turns (A B C, A B C, ...) and what is published is the ratio of their medians.

Everything is measured on the CPU, or `on` a GPU: the suites make their tensors on `device()`, the clock and
the memory are that device's.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rskernels
from rskernels import dispatch, tuning

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux

# What is compared with, where installed; its versions are part of a result.
PEERS = ("timm", "openvino", "zentorch", "liger-kernel", "xformers", "mmcv", "natten")
GPU_PEERS = ("triton", "timm", "liger-kernel", "xformers", "peft")

Call = Callable[[], Tensor | tuple[Tensor, ...]]

PASSES = ("forward", "backward", "both")

_device = torch.device("cpu")


def device() -> torch.device:
    """Where the suites make their tensors, and whose time and memory are taken."""
    return _device


def on_gpu() -> bool:
    return _device.type == "cuda"


@contextmanager
def on(where: str | torch.device) -> Iterator[None]:
    """Measure on device `where` meanwhile. On a GPU the Triton kernels serve wherever they can, which "auto"
    leaves alone until a device passed: they are what is asked about. cuDNN may try its algorithms, but not
    round float32 to TF32, as ours do not."""
    global _device
    cudnn = torch.backends.cudnn
    before, backend = _device, rskernels.get_backend()
    algorithms, tf32 = cudnn.benchmark, cudnn.allow_tf32
    _device = torch.device(where)
    if on_gpu():
        rskernels.set_backend("auto+triton")
        cudnn.benchmark, cudnn.allow_tf32 = True, False
    try:
        yield
    finally:
        _device, cudnn.benchmark, cudnn.allow_tf32 = before, algorithms, tf32
        rskernels.set_backend(backend)


def dtypes() -> tuple[torch.dtype, ...]:
    """Those that the operators' suites measure on `device()`."""
    return (torch.float32, torch.bfloat16, torch.float16) if on_gpu() else (torch.float32, torch.bfloat16)


def batches() -> int:
    """How many of a suite's batches, which fill a CPU, a case has: a GPU has more to fill."""
    return 8 if on_gpu() else 1


def sized(name: str) -> str:
    """A case's name, which says so where it has several batches."""
    return name if batches() == 1 else f"{name}, {batches()} batches"


def call_of(which: str, form: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor],
            grads: Tensor | tuple[Tensor, ...]) -> Call:  # fmt: skip
    """One of PASSES over `form(*inputs)`: "forward" without autograd, "backward" of a graph that is kept (the
    gradients of those inputs that require one, given `grads` of the outputs), "both" in one call."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def forward() -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            return form(*inputs)

    if which == "forward":
        return forward
    if which == "both":
        return lambda: torch.autograd.grad(form(*inputs), wanted, grads)
    outputs: list = []

    def backward() -> tuple[Tensor, ...]:
        if not outputs:
            outputs.append(form(*inputs))
        return torch.autograd.grad(outputs[0], wanted, grads, retain_graph=True)

    return backward


@dataclass(frozen=True)
class Case:
    """One line of a report: the same work done by several candidates.

    `build` returns the candidates by name, any number of them; the one called `ours` is ours, the one called
    `reference` defines the right answer. One that raises at its first call is reported as not available, with
    what it raised (see `lazily`), and so is one that disagrees with the reference. `flops` is the arithmetic
    of one call (multiply and add counted apart), `bytes` the least memory traffic of a call whose tensors no
    cache holds: inputs read once, outputs written once. Their floor on this machine is the roofline that a
    report compares with.
    """

    name: str
    build: Callable[[], Mapping[str, Call]]
    dtype: torch.dtype
    flops: float = 0.0
    reference: str = "eager"
    bytes: float = 0.0
    ours: str = "rskernels"
    # Timed and shown, but no peers: ours in another layout, or a floor that does less.
    beside: tuple[str, ...] = ()
    # Relative error against the reference above which a candidate is not reported, and without ours no case.
    tolerance: float = field(default=0.0)
    # Of one call: images per second are published.
    images: int = 0
    # Whose products `arithmetic` counts on a GPU, where `flops` is 0.
    counted: str = ""

    def allowed_error(self) -> float:
        return self.tolerance or (2e-5 if self.dtype == torch.float32 else 3e-2)

    def floor(self, peak: float, bandwidth: float) -> float:
        """Seconds that no implementation beats at `peak` FLOP/s and `bandwidth` bytes/s."""
        return max(self.flops / peak, self.bytes / bandwidth)


def lazily(make: Callable[[], Call]) -> Call:
    """A candidate that is built at its first call, which is never timed, and kept: for what takes long to
    compile or convert, or may be missing here. What `make` raises is reported as the reason."""
    made: list[Call] = []

    def call() -> Tensor | tuple[Tensor, ...]:
        if not made:
            made.append(make())
        return made[0]()

    return call


def floor(less: Call, whole: Call) -> Call:
    """A candidate that does `less` than the case asks for and hands on what `whole` gave: for `beside`."""
    given: list[Tensor | tuple[Tensor, ...]] = []

    def call() -> Tensor | tuple[Tensor, ...]:
        if not given:
            given.append(whole())
        less()
        return given[0]

    return call


def arithmetic(call: Call) -> float:
    """FLOP of the matrix products, convolutions and attentions of a call on the reference backend."""
    with rskernels.backend("reference"), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def first_calls(case: Case, calls: Mapping[str, Call]) -> tuple[dict[str, float], dict[str, str]]:
    """The first call of every candidate: relative errors ‖out − ref‖/‖ref‖ against the case's reference, the
    worst output's, and why a candidate is not available: what it raised, or that its answer is another."""
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    expected: list[Tensor] = []
    for name in sorted(calls, key=lambda name: name != case.reference):  # the reference first
        try:
            result = calls[name]()
        except Exception as error:  # whatever a peer's stack raises is a finding, not a crash
            missing[name] = _in_one_line(error)
            if name == case.reference:
                break
            continue
        outputs = [tensor.double() for tensor in (result if isinstance(result, tuple) else (result,))]
        expected = expected or outputs
        if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in expected]:
            missing[name] = f"outputs of other shapes: {[tuple(tensor.shape) for tensor in outputs]}"
            continue
        pairs = zip(outputs, expected, strict=True)
        found = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs]
        errors[name] = max(found, key=lambda error: (math.isnan(error), error))
        if not errors[name] <= case.allowed_error():
            missing[name] = f"outputs disagree, relative error {errors[name]:.1e}"
    return errors, missing


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160].rstrip(": ")


def seconds(
    calls: Mapping[str, Call], *, rounds: int = 7, budget: float = 2.0, warm: bool = False
) -> dict[str, float]:
    """Median seconds of each call over interleaved rounds: `rounds` of them, more while they take less than
    half a second in all, fewer, but at least 3, when `budget` seconds are over. `warm`: they ran before."""
    for call in () if warm else calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    done, started = 0, time.perf_counter()
    while True:
        for name, call in calls.items():
            taken[name].append(_time(call))
        done, elapsed = done + 1, time.perf_counter() - started
        if done >= 3 and (elapsed > budget or (done >= rounds and elapsed > 0.5)):
            return {name: statistics.median(values) for name, values in taken.items()}


def _time(call: Call) -> float:
    """Seconds of one call. A GPU's are its own, between two events, behind a fill of more memory than its
    caches hold: they are cold, and launches queue up meanwhile: the host counts where it cannot keep up."""
    if not on_gpu():
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _larger_than_caches(_device).zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _larger_than_caches(where: torch.device) -> Tensor:
    return torch.empty(2**29, dtype=torch.uint8, device=where)


def peak_bytes(call: Call) -> int | None:
    """Bytes by which a call, warmed up, raises this process's peak memory, on a GPU its allocator's; None
    outside Linux. What a library keeps between calls (weights, packed or compiled ones, scratch memory) is
    not in it."""
    if on_gpu():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - allocated
    if not CLEAR_REFS.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # memory that was freed but not given back would hide what the call takes
    CLEAR_REFS.write_text("5")  # the peak starts anew from here
    before = _resident_peak()
    call()
    return _resident_peak() - before


def _resident_peak() -> int:
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a well-fed convolution, on a GPU of a product (float32 as torch.set_float32_matmul_precision
    says): what the matrix units reach in practice."""
    if on_gpu():
        n = 8192
        a, b = (torch.randn(n, n, device=_device, dtype=dtype) for _ in range(2))
        return 2 * n**3 / _best_seconds(lambda: a @ b)
    x = torch.randn(8, 256, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)

    def convolve() -> Tensor:
        return torch.nn.functional.conv2d(x, w, padding=1)

    with torch.no_grad():
        return 2 * 8 * 256 * 256 * 9 * 64 * 64 / _best_seconds(convolve)


def copy_bandwidth() -> float:
    """Bytes/s of a copy that no cache holds (read and write counted)."""
    source = torch.randn(64 * 2**20 * (8 if on_gpu() else 1), device=_device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source))


def _best_seconds(call: Call, rounds: int = 12) -> float:
    """The fastest of some calls: a limit of the machine is what it reaches undisturbed, not its median."""
    call()
    return min(_time(call) for _ in range(rounds))


def name_of_machine() -> str:
    """What its results are called: "cpu", or the chip's name ("h200" of "NVIDIA H200")."""
    if not on_gpu():
        return "cpu"
    name = torch.cuda.get_device_name(_device)
    found = re.search(r"\b[A-Z]{0,3}\d{2,4}[A-Za-z]*\b", name)
    return (found.group() if found else name.replace(" ", "-")).lower()


def machine() -> dict[str, object]:
    """What a figure is worth nothing without."""
    if on_gpu():
        return _gpu_machine()
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "rskernels": {
            "instruction_set": rskernels.instruction_set(),
            "backend": rskernels.get_backend(),
            "products": tuning.record()["source"],
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "peers": {name: version for name in PEERS if (version := _version(name))},
    }


def _gpu_machine() -> dict[str, object]:
    """The GPU's part of `machine`: "processor" is the chip, "threads" the host's."""
    properties = torch.cuda.get_device_properties(_device)
    some = torch.empty(0, device=_device, dtype=torch.bfloat16)
    return {
        "processor": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "rskernels": {
            "backend": rskernels.get_backend(),
            "served_by": {op: dispatch.choose(op, some) for op in dispatch.TABLE},
            "float32_products": torch.get_float32_matmul_precision(),
        },
        "host": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "peers": {name: version for name in GPU_PEERS if (version := _version(name))},
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip().partition("\n")[0]


def _processor() -> str:
    """Name, family and model number: virtual machines cut names down to what two generations share."""
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor()
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        entries = dict(map(str.strip, line.split(":", 1)) for line in info if ":" in line)
    name = entries.get("model name", platform.processor())
    if "cpu family" not in entries:
        return name
    return f"{name}, family {entries['cpu family']}, model {entries['model']}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
