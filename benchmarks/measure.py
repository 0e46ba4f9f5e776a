"""How a figure is taken: interleaved rounds in one process, medians, ratios to a peer in the same rounds.

A shared machine drifts by tens of per cent within minutes, so absolute times of two runs say little.
Candidates therefore take turns (A B C, A B C, ...) and what is published is the ratio of their medians.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux

Call = Callable[[], Tensor | tuple[Tensor, ...]]


PASSES = ("forward", "backward", "both")


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

    `build` returns the candidates by name; the one called "rskernels" is ours, the one called `reference`
    defines the right answer. `flops` is the arithmetic of one call (multiply and add counted apart), `bytes`
    the least memory traffic of a call whose tensors no cache holds: inputs read once, outputs written once.
    Their floor on this machine is the roofline that a report compares with.
    """

    name: str
    build: Callable[[], Mapping[str, Call]]
    dtype: torch.dtype
    flops: float = 0.0
    reference: str = "eager"
    bytes: float = 0.0
    ours: str = "rskernels"
    # Relative error against the reference candidate above which the case is not reported.
    tolerance: float = field(default=0.0)

    def allowed_error(self) -> float:
        return self.tolerance or (2e-5 if self.dtype == torch.float32 else 3e-2)

    def floor(self, peak: float, bandwidth: float) -> float:
        """Seconds that no implementation beats at `peak` FLOP/s and `bandwidth` bytes/s."""
        return max(self.flops / peak, self.bytes / bandwidth)


def seconds(calls: Mapping[str, Call], *, rounds: int = 7, budget: float = 20.0) -> dict[str, float]:
    """Median seconds of each call over interleaved rounds; at least 3 of them when `budget` runs out."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - started > budget:
            break
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def disagreement(case: Case, calls: Mapping[str, Call]) -> dict[str, float]:
    """Relative error ‖out − ref‖/‖ref‖ of every candidate against the case's reference, worst output each."""

    def outputs(call: Call) -> tuple[Tensor, ...]:
        result = call()
        return result if isinstance(result, tuple) else (result,)

    expected = [tensor.double() for tensor in outputs(calls[case.reference])]
    errors = {}
    for name, call in calls.items():
        pairs = zip(outputs(call), expected, strict=True)
        errors[name] = max(float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    return errors


def _peak_of(build: Callable[[], Mapping[str, Call]], name: str, threads: int, queue) -> None:
    torch.set_num_threads(threads)
    call = build()[name]
    call()  # what is loaded or compiled once is not what a call costs
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")  # the peak starts anew from here
    before = _resident_peak()
    call()
    queue.put(_resident_peak() - before)


def _resident_peak() -> int:
    """Peak resident bytes of this process. (getrusage would do, but for inheriting the parent's peak.)"""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_bytes(case: Case, name: str) -> int | None:
    """Bytes by which one call, warmed up, raises the peak memory of a fresh process; None outside Linux."""
    if not CLEAR_REFS.exists():
        return None
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_of, args=(case.build, name, torch.get_num_threads(), queue))
    process.start()
    value = queue.get()
    process.join()
    return value


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a well-fed convolution: what this machine's matrix units reach in practice."""
    x = torch.randn(8, 256, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)

    def convolve() -> Tensor:
        return torch.nn.functional.conv2d(x, w, padding=1)

    with torch.no_grad():
        median = seconds({"conv": convolve}, rounds=9)["conv"]
    return 2 * 8 * 256 * 256 * 9 * 64 * 64 / median


def copy_bandwidth() -> float:
    """Bytes/s of a copy that no cache holds (read and write counted)."""
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds({"copy": lambda: target.copy_(source)}, rounds=9)["copy"]


def machine() -> dict[str, object]:
    """What a figure is worth nothing without."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
