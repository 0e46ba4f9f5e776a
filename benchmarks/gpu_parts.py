"""What `benchmarks/gpu_check.py` runs in processes of their own: `python -m benchmarks.gpu_parts PART`.

machine     name and description of what is measured on
pass        every operator once, forward and backward, small (benchmarks.gpu_pass)
tune        the Triton configurations of this GPU
benchmark   the operators' suites, the targets' cases first, as far as the time goes
models      whole models: images per second, share of the measured matrix peak
charts      of the results, where matplotlib is installed

Each tells what it begins and what came of it in `--told FILE`. On the CPU (`--device cpu`) they do the same
in small. Exit code 70: the device answers no more, another process may go on.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import gc
import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import SUITES, gpu_pass, measure, models, report
from benchmarks.gpu_processes import END, FAULT, answers, tell, told
from benchmarks.measure import Case
from rskernels.triton.launch import capability_of, nearest_chip
from rsmodels.files import read_json, write_json

WHOLE = ("models", "crossearth", "ktda")
GRACE = 15 + END  # seconds left for a case of which nothing is known
HANGS = 150  # seconds after which a case is given up
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
    capability, described = capability_of(measure.device()), measure.machine()
    return {
        "name": measure.name_of_machine(),
        "machine": described,
        "identity": identity(described),
        "capability": capability,
        "chip": nearest_chip(capability),
    }


def identity(described: dict[str, Any]) -> dict[str, str]:
    """What figures of two machines have to share to stand in one table: not the host, nor the driver."""
    return {
        "processor": described["processor"],
        "capability": described["capability"],
        "torch": described["torch"],
        "triton": described["peers"].get("triton", ""),
    }


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


def run(cases: Sequence[tuple[str, Case]], figures: Figures, until: float, file: Path | None) -> bool:
    """Measure those cases that no process of this run began, in `Figures.order`, each where the time is
    likely to suffice. False where the device answers no more."""
    before = {line.get("begun") for line in told(file)}
    limits, left, longest = figures.limits, 0, dict[str, float]()
    tell(file, limits=limits)
    for suite, case in figures.order(cases):
        name = f"{suite}: {case.name}"
        needed = figures.seconds(suite, case.name) or longest.get(suite, 0.0)
        seconds = until - time.monotonic()
        if name in before:
            continue
        if seconds < max(GRACE, needed + END):
            left += 1
            continue
        tell(file, begun=name)
        figures.keep(suite, {"case": case.name, "not_reported": "was begun and did not end"}, first=True)
        faulthandler.dump_traceback_later(min(HANGS, seconds), exit=True)
        begun = time.monotonic()
        row = report.run_case(case, memory=measure.on_gpu(), budget=0.5 if measure.on_gpu() else 0.0)
        row |= report.roofline(case, row, limits)
        gc.collect()
        faulthandler.cancel_dump_traceback_later()
        longest[suite] = max(longest.get(suite, 0.0), taken := time.monotonic() - begun)
        figures.keep(suite, row | {"took_seconds": taken})
        problem, said = row.get("not_reported", ""), _said(row)
        print(f"{name}: {said}", flush=True)
        tell(file, ended=name, **({"problem": problem} if problem else {"said": said}))
        if problem and not answers():
            return False
        if measure.on_gpu():
            torch.cuda.empty_cache()
    tell(file, left=left)
    return True


def _said(row: dict[str, Any]) -> str:
    if "not_reported" in row:
        return f"not reported: {row['not_reported']}"
    best = row.get("best_peer")
    words = [f"{row['milliseconds'][row['ours']]:.3g} ms"]
    words += [f"{row['ratio'][best]:.2f}x {best}"] if best else []
    words += [f"{row['images_per_second'][row['ours']]:.3g} images/s"] if "images_per_second" in row else []
    words += [f"{row['share_of_roofline']:.0%} of the roofline"] if "share_of_roofline" in row else []
    return ", ".join(words)


@dataclass
class Figures:
    """The results in `path`, as `benchmarks.report` has them, and the rows of `sources` in them."""

    path: Path
    sources: str
    limits: dict[str, float]

    def __post_init__(self) -> None:
        """Results of another chip, or of other versions, are set aside, and `note` says so."""
        self.results: dict[str, Any] = {"machine": measure.machine(), "suites": {}}
        self.note = ""
        if not self.path.exists():
            return
        try:
            kept = read_json(self.path)
            if identity(kept["machine"]) != identity(self.results["machine"]):
                raise ValueError("of another chip or other versions")
            self.results["suites"] = dict(kept["suites"])
            self._rows()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            aside = self.path.with_name(f"{self.path.name}.old")
            self.path.replace(aside)
            self.results["suites"] = {}
            self.note = f"{self.path} is set aside as {aside.name}: {error}"

    def _rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        suites = self.results["suites"].items()
        return {(suite, row["case"]): row for suite, found in suites for row in found["cases"]}

    def order(self, cases: Sequence[tuple[str, Case]]) -> list[tuple[str, Case]]:
        """Cases without a row first, then those of other sources, then the oldest."""
        rows = self._rows()

        def age(item: tuple[str, Case]) -> tuple[bool, bool, str]:
            row = rows.get((item[0], item[1].name))
            if row is None:
                return False, False, ""
            return True, row.get("sources") == self.sources, row.get("measured", "")

        return sorted(cases, key=age)

    def seconds(self, suite: str, case: str) -> float:
        """That a case took the last time; 0 where nothing is known."""
        return self._rows().get((suite, case), {}).get("took_seconds", 0.0)

    def keep(self, suite: str, row: dict[str, Any], first: bool = False) -> None:
        """Put a row into the file, in place of that of the same case; `first`: only where there is none."""
        rows = self.results["suites"].get(suite, {"cases": []})["cases"]
        by_name = {one["case"]: one for one in rows}
        if first and row["case"] in by_name:
            return
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        by_name[row["case"]] = row | {"measured": now, "sources": self.sources}
        self.results["suites"][suite] = {
            "date": datetime.date.today().isoformat(),
            "matrix_peak_gflops": {name: self.limits[name] / 1e9 for name in self.limits if name != "copy"},
            "copy_gbytes_per_second": self.limits["copy"] / 1e9,
            "cases": list(by_name.values()),
        }
        write_json(self.path, report.rounded(self.results))


def limits(file: Path | None) -> dict[str, float]:
    """What this machine reaches, measured once a run: `file` hands it on to later processes."""
    if file is not None and file.exists():
        return read_json(file)
    found = report.limits()
    if file is not None:
        write_json(file, found)
    return found


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
    parts = ("machine", "pass", "tune", "benchmark", "models", "charts")
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="of time.monotonic(): the caller ends it then"
    )
    parser.add_argument("--told", type=Path, help="the file in which it tells what it does")
    parser.add_argument("--results", type=Path, help="the JSON file that benchmark and models write")
    parser.add_argument("--sources", default="", help="digest of the code that is measured, for its rows")
    parser.add_argument("--limits", type=Path, help="the file with the machine's limits, once they are known")
    options = parser.parse_args(argv)
    if options.part in ("benchmark", "models", "charts") and options.results is None:
        parser.error(f"{options.part} needs --results FILE")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch sees no CUDA device", file=sys.stderr)
        return 1
    if options.part == "charts":
        draw(options.results)
        return 0
    with measure.on(options.device):
        return 0 if _run_part(options) else FAULT


def _run_part(options: argparse.Namespace) -> bool:
    """False where the device answers no more."""
    if options.part == "pass":
        return gpu_pass.run(options.told)
    if options.part in ("benchmark", "models"):
        figures = Figures(options.results, options.sources, limits(options.limits))
        if figures.note:
            tell(options.told, note=figures.note)
        cases = operators_cases() if options.part == "benchmark" else models_cases()
        if options.part == "models":
            cases = [(suite, without_compiled(case)) for suite, case in cases]
        return run(cases, figures, options.until, options.told)
    found = machine() if options.part == "machine" else tune(options.until - time.monotonic() - GRACE)
    tell(options.told, **{"machine" if options.part == "machine" else "found": found})
    return True


if __name__ == "__main__":
    sys.exit(main())
