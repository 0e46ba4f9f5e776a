"""What `benchmarks/gpu_check.py` runs in processes of their own: `python -m benchmarks.gpu_parts PART`.

machine     name and description of what is measured on, as JSON
pass        every operator once, forward and backward, small: what compute-sanitizer watches
tune        the Triton configurations of this GPU
benchmark   the operators' suites, the targets' cases first, as far as the time goes
models      whole models: images per second, share of the measured matrix peak

Each prints one line of JSON last. On the CPU (`--device cpu`) they do the same in small.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rskernels
from benchmarks import SUITES, measure, models, report
from benchmarks.measure import Case
from rskernels.triton.launch import capability_of, nearest_chip
from rsmodels.files import read_json, write_json

WHOLE = ("models", "crossearth", "ktda")
OPERATORS = tuple(suite for suite in SUITES if suite not in WHOLE)
# How the names of the targets' cases begin, pass and shape; the first of a suite come first.
TARGETS = {
    "rel_pos_attention": ("forward, 8x64x64 global", "both, 8x64x64 global", "forward, 8x64x64 windows",
                          "both, 8x64x64 windows"),
    "cross_attention": ("both, SAM image on tokens, 4096x7", "both, Mask2Former, 100x16384"),
    "lora": ("forward, 8x4096x768", "both, 8x4096x768"),
    "distillation_loss": ("both, 32x768x32x32, channels-last, channel",),
    "dilated_aspp": ("forward, head", "forward, ASPP 2048"),
    "deformable_attention": ("both, pixel decoder",),
}  # fmt: skip


def machine() -> dict[str, Any]:
    capability = capability_of(measure.device())
    return {
        "name": measure.name_of_machine(),
        "machine": measure.machine(),
        "capability": capability,
        "chip": nearest_chip(capability),
    }


def one_pass() -> dict[str, Any]:
    """Every operator, in float32 and in half precision; sizes that divide no tile."""
    done = []
    half = torch.bfloat16
    for dtype in (torch.float32, half):
        for name, call in _calls(dtype):
            outputs = call()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(output.float().sum() for output in outputs).backward()
            done.append(f"{name} {str(dtype)[6:]}")
    if measure.on_gpu():
        torch.cuda.synchronize()
    return {"calls": len(done)}


def _calls(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    def some(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size).to(measure.device(), kind).requires_grad_()

    attention = partial(rskernels.rel_pos_attention, num_heads=2)
    yield "global", lambda: attention(some(1, 9, 7, 192), some(17, 32), some(13, 32))
    windowed = partial(attention, window_size=4, pad_qkv=some(192))
    yield "windows", lambda: windowed(some(1, 9, 7, 192), some(7, 32), some(7, 32))
    yield "plain", lambda: attention(some(2, 37, 1, 192), None, None)
    mask = torch.rand(2, 5, 67, device=measure.device()) > 0.5
    yield (
        "masked",
        lambda: rskernels.cross_attention(
            some(2, 2, 5, 32), some(2, 2, 67, 32), some(2, 2, 67, 32), mask=mask
        ),
    )
    yield "cross", lambda: rskernels.cross_attention(some(2, 2, 67, 16), some(2, 2, 7, 16), some(2, 2, 7, 16))
    factors = some(4, 48), some(48, 4)
    plain = some(2, 9, 48), some(144, 48).detach(), some(144).detach()
    yield "lora_qkv", lambda: rskernels.lora_qkv(*plain, *factors, *factors, scale=0.5)
    single = some(2, 9, 48), some(48, 48).detach(), some(48).detach()
    yield "lora_linear", lambda: rskernels.lora_linear(*single, *factors, scale=0.5)
    yield "distillation", lambda: rskernels.distillation_loss(some(2, 33, 5, 7), some(2, 33, 5, 7).detach())
    # One loss alone: backward gets no gradient of the other.
    maps = some(2, 33, 5, 7), some(2, 33, 5, 7).detach()
    yield "distillation, KL", lambda: rskernels.distillation_loss(*maps)[0]
    yield "distillation, MSE", lambda: rskernels.distillation_loss(*maps)[1]
    branches = [some(24, 20, 3, 3) for _ in range(4)], [some(24) for _ in range(4)]
    yield "aspp", lambda: rskernels.dilated_aspp(some(1, 20, 13, 11), *branches, activation="relu")
    shapes = ((5, 7), (3, 3))
    weights = some(2, 11, 2, 2, 4, kind=torch.float32)
    yield (
        "deformable",
        lambda: rskernels.deformable_attention(
            some(2, 44, 2, 16), shapes, some(2, 11, 2, 2, 4, 2, kind=torch.float32), weights
        ),
    )
    yield "linear", lambda: rskernels.linear(some(2, 9, 48), some(24, 48), some(24), activation="gelu")
    yield "layer_norm", lambda: rskernels.layer_norm(some(9, 48), some(48), some(48))


def tune(seconds: float) -> dict[str, Any]:
    """On the CPU nothing is measured: what would be tried is counted."""
    tuner = importlib.import_module("rskernels.triton.tune")  # needs Triton
    if measure.on_gpu():
        rows = [vars(row) for row in tuner.tune(measure.device(), seconds=seconds)]
        return {"classes": len(rows), "faster": sum(row["share_of_time"] < 1 for row in rows), "found": rows}
    classes = candidates = 0
    for operator in tuner.aot.OPERATORS:
        module = importlib.import_module(f"rskernels.triton.{operator}")
        for kernel, shape_class in tuner.classes_of(module.examples(), tuner.launch.TESTED_ON):
            classes += 1
            candidates += len(module.candidates(kernel.partition(".")[2], shape_class))
    return {"classes": classes, "candidates": candidates}


def operators_cases() -> list[tuple[str, Case]]:
    """All cases of the operators' suites: the targets' first, half precision before float32. On the CPU a
    suite's smallest."""
    if not measure.on_gpu():
        smallest = {
            suite: min(_float32(suite), key=lambda case: case.flops or case.bytes) for suite in OPERATORS
        }
        return list(smallest.items())
    cases = [(suite, case) for suite in OPERATORS for case in SUITES[suite].cases()]
    order = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}

    def rank(item: tuple[str, Case]) -> tuple[bool, int]:
        suite, case = item
        return not case.name.startswith(TARGETS.get(suite, ("nothing",))), order[case.dtype]

    return sorted(cases, key=rank)


def _float32(suite: str) -> list[Case]:
    return [case for case in SUITES[suite].cases() if case.dtype == torch.float32]


def models_cases() -> list[tuple[str, Case]]:
    """Whole models, half precision first; on the CPU the tiny ones."""
    if measure.on_gpu():
        cases = [(suite, case) for suite in WHOLE for case in SUITES[suite].cases()]
        return sorted(cases, key=lambda item: item[1].dtype != torch.bfloat16)
    tiny = partial(Case, dtype=torch.float32, reference="reference backend", images=1, tolerance=1e-2)
    predictions = [
        tiny(name=f"forward, {name}", build=partial(models.build_prediction, name, 64, 1, torch.float32))
        for name in ("rs_sam_tiny", "ktda_tiny", "crossearth_tiny")
    ]
    step = partial(models.build_training_step, "rs_sam_tiny", 64, 1, torch.float32)
    return [("models", case) for case in [*predictions, tiny(name="both, rs_sam_tiny", build=step)]]


def without_compiled(case: Case) -> Case:
    """Compiling a whole model takes longer than all else: `python -m benchmarks.report` has those peers."""
    build = case.build
    return replace(case, build=lambda: {name: c for name, c in build().items() if "compile" not in name})


def run(cases: Sequence[tuple[str, Case]], path: Path, seconds: float) -> dict[str, Any]:
    """Measure the cases in their order until the time is over; after every case, `path` has it."""
    stop = time.monotonic() + seconds
    limits = report.limits()
    done, problems = 0, []
    for suite, case in cases:
        if time.monotonic() > stop:
            break
        row = report.run_case(case, memory=measure.on_gpu(), budget=0.5 if measure.on_gpu() else 0.0)
        row |= report.roofline(case, row, limits)
        keep(path, suite, row, limits)
        done += 1
        if "not_reported" in row:
            problems.append(f"{suite}, {case.name}: {row['not_reported']}")
        print(f"{suite}: {case.name}: {_said(row)}", flush=True)
    return {"cases": done, "left": len(cases) - done, "not_reported": problems, "limits": limits}


def _said(row: dict[str, Any]) -> str:
    if "not_reported" in row:
        return f"not reported: {row['not_reported']}"
    best = row.get("best_peer")
    words = [f"{row['milliseconds'][row['ours']]:.3g} ms"]
    words += [f"{row['ratio'][best]:.2f}x {best}"] if best else []
    words += [f"{row['images_per_second'][row['ours']]:.3g} images/s"] if "images_per_second" in row else []
    words += [f"{row['share_of_roofline']:.0%} of the roofline"] if "share_of_roofline" in row else []
    return ", ".join(words)


def keep(path: Path, suite: str, row: dict[str, Any], limits: dict[str, float]) -> None:
    """Put a row into the results, as `benchmarks.report` has them: in place of that of the same case. Results
    of another machine, or of other versions, go."""
    results: dict[str, Any] = {"machine": measure.machine(), "suites": {}}
    if path.exists():
        kept = read_json(path)
        if kept["machine"] == results["machine"]:
            results = kept
    rows = results["suites"].get(suite, {"cases": []})["cases"]
    by_name = {one["case"]: one for one in rows} | {row["case"]: row}
    results["suites"][suite] = {
        "date": datetime.date.today().isoformat(),
        "matrix_peak_gflops": {name: limits[name] / 1e9 for name in limits if name != "copy"},
        "copy_gbytes_per_second": limits["copy"] / 1e9,
        "cases": list(by_name.values()),
    }
    write_json(path, results)


def draw(path: Path) -> None:
    """Charts beside the results, where matplotlib is installed."""
    if report.charts is None or not path.exists():
        return
    results = read_json(path)
    for suite in results["suites"]:
        report.charts.suite_chart(results, suite, path.with_name(f"{path.stem}-{suite}.png"))
    report.charts.overview_chart(results, path.with_suffix(".png"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("machine", "pass", "tune", "benchmark", "models"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="nothing new is begun after that")
    parser.add_argument("--results", type=Path, help="the JSON file that benchmark and models write")
    options = parser.parse_args(argv)
    if options.part in ("benchmark", "models") and options.results is None:
        parser.error(f"{options.part} needs --results FILE")
    with measure.on(options.device):
        if options.part == "machine":
            found = machine()
        elif options.part == "pass":
            found = one_pass()
        elif options.part == "tune":
            found = tune(options.seconds)
        else:
            cases = operators_cases() if options.part == "benchmark" else models_cases()
            if options.part == "models":
                cases = [(suite, without_compiled(case)) for suite, case in cases]
            found = run(cases, options.results, options.seconds)
            draw(options.results)
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
