"""`python -m benchmarks.report [SUITE ...] [--device cuda]`: the figures of README and docs.

One table per operator. Per case: median time of ours, ratio to the best peer and to each (their median /
ours, interleaved rounds of one process), share of the roofline, peak memory of one call. The roofline is the
larger of the case's arithmetic at the matrix peak and its least memory traffic at the copy bandwidth, both
measured in the same process, before and after each suite. A peer that is missing, fails or gives another
answer than the reference is named with the reason, without times; a case where that is ours is not reported.

Everything goes to `benchmarks/results/NAME.json` with machine, versions and date, and into charts beside it,
after every suite: Ctrl-C keeps what is done. Progress is on stderr.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import SUITES
from benchmarks.measure import (
    Call,
    Case,
    arithmetic,
    copy_bandwidth,
    dtypes,
    first_calls,
    machine,
    matrix_peak,
    name_of_machine,
    on,
    on_gpu,
    peak_bytes,
    seconds,
)
from rsmodels.files import read_json, write_json

try:
    from benchmarks import charts
except ModuleNotFoundError as error:  # figures without pictures
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise
    charts = None  # type: ignore[assignment]

RESULTS = Path(__file__).parent / "results"
FIGURES = 6  # significant ones of every number that is written: timings repeat to two or three


def run_case(case: Case, memory: bool = True, budget: float = 2.0) -> dict[str, object]:
    """Everything that is published about one case but its share of the roofline. Whatever it raises is why
    the case is not reported: faults of a GPU show anywhere behind the call that made them."""
    torch.compiler.reset()  # else the shapes of earlier cases make a compiled peer a dynamic one
    row: dict[str, object] = {"case": case.name}
    try:
        calls = case.build()
    except Exception as error:
        return row | {"not_reported": f"does not build: {in_one_line(error)}"}
    try:
        return row | _figures(case, calls, memory, budget)
    except Exception as error:
        return row | {"not_reported": in_one_line(error)}


def _figures(case: Case, calls: Mapping[str, Call], memory: bool, budget: float) -> dict[str, object]:
    errors, missing = first_calls(case, calls)
    row: dict[str, object] = {"errors": errors} | ({"not_available": missing} if missing else {})
    for name in (case.reference, case.ours):
        if name in missing:
            return row | {"not_reported": f"{name}: {missing[name]}"}
    calls = {name: calls[name] for name in calls if name not in missing}
    times = seconds(calls, warm=True, budget=budget)
    ours = times[case.ours]
    ratios = {name: value / ours for name, value in times.items() if name != case.ours}
    row |= {"milliseconds": {name: 1e3 * value for name, value in times.items()}, "ratio": ratios}
    peers = [name for name in ratios if name not in case.beside]
    if case.images:
        row["images_per_second"] = {name: case.images / value for name, value in times.items()}
    if on_gpu() and case.counted in calls:
        row["counted_flops"] = arithmetic(calls[case.counted])
    row |= {"ours": case.ours} | ({"best_peer": min(peers, key=ratios.__getitem__)} if peers else {})
    if memory:
        taken = {name: peak_bytes(call) for name, call in calls.items()}
        row["peak_mib"] = {name: value / 2**20 for name, value in taken.items() if value is not None}
    return row


def in_one_line(error: Exception) -> str:
    """Its type and its first line: what follows in CUDA's errors is the same for all."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200].rstrip(": ")


def limits() -> dict[str, float]:
    """What this machine reaches now: FLOP/s of each dtype, bytes/s."""
    return {str(dtype)[6:]: matrix_peak(dtype) for dtype in dtypes()} | {"copy": copy_bandwidth()}


def roofline(case: Case, row: Mapping, reached: Mapping[str, float]) -> dict[str, object]:
    """The share of the roofline that ours takes in a row of `run_case`; nothing where there is none."""
    case = replace(case, flops=case.flops or row.get("counted_flops", 0.0))
    if "not_reported" in row or not (case.flops or case.bytes):
        return {}
    peak, bandwidth = reached[str(case.dtype)[6:]], reached["copy"]
    seconds = row["milliseconds"][case.ours] / 1e3
    by_memory = case.bytes / bandwidth > case.flops / peak
    return {
        "share_of_roofline": case.floor(peak, bandwidth) / seconds,
        "bound_by": "memory" if by_memory else "arithmetic",
    }


def run_suite(suite: str, match: str, memory: bool) -> dict[str, object]:
    """The figures of the cases of a suite whose names contain `match`."""
    before = limits()
    chosen = [case for case in SUITES[suite].cases() if match in case.name]
    rows = []
    for number, case in enumerate(chosen, 1):
        print(f"{suite} {number}/{len(chosen)}: {case.name} ... ", end="", file=sys.stderr, flush=True)
        started = time.perf_counter()
        row = run_case(case, memory)
        rows.append(row)
        found = row.get("not_reported") or _against_best(row)
        print(f"{found} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    after = limits()
    reached = {name: max(value, after[name]) for name, value in before.items()}
    rows = [row | roofline(case, row, reached) for case, row in zip(chosen, rows, strict=True)]
    return {
        "date": datetime.date.today().isoformat(),
        "matrix_peak_gflops": {name: reached[name] / 1e9 for name in reached if name != "copy"},
        "copy_gbytes_per_second": reached["copy"] / 1e9,
        "cases": rows,
    }


def _against_best(row: Mapping) -> str:
    best = row.get("best_peer")
    return f"{row['ratio'][best]:.2f}x {best}" if best else "no peer"


def rounded(value: Any) -> Any:
    """Results with every float in them at FIGURES significant figures."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{FIGURES}g}") if isinstance(value, float) else value


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, and under it why candidates are missing from it."""
    lines = ["| case | ours | best peer | each peer | share of roofline | peak MiB, ours / peers |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    absent: dict[str, int] = {}
    for row in rows:
        for name, reason in row.get("not_available", {}).items():
            line = f"{name} not available: {reason}"
            absent[line] = absent.get(line, 0) + 1
        if "not_reported" in row:
            lines.append(f"| {row['case']} | not reported: {row['not_reported'].replace('|', '/')} | | | | |")
            continue
        ours = row.get("ours", "rskernels")
        each = ", ".join(f"{value:.2f}x {name}" for name, value in row["ratio"].items())
        share = f"{row['share_of_roofline']:.0%} {row['bound_by']}" if "bound_by" in row else ""
        memory = dict(row.get("peak_mib", {}))
        peak = f"{memory.pop(ours):.0f} / " if ours in memory else ""
        peak += ", ".join(f"{value:.0f}" for value in memory.values())
        cells = (row["case"], _milliseconds(row["milliseconds"][ours]), _against_best(row), each, share, peak)
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {line}" + (f" ({count} cases)" if count > 1 else "") for line, count in absent.items()]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value >= 10 else f"{value:.3g} ms"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="*", help=f"which suites to run: {', '.join(SUITES)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument(
        "--name", help="results/NAME.json, NAME.png and NAME-SUITE.png (default: cpu, or the GPU's, as h200)"
    )
    parser.add_argument(
        "--match", default="", help="only cases whose name contains this text (prints, writes nothing)"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.suite) - set(SUITES))
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")
    with on(options.device):
        return _report(parser, options)


def _report(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    chosen = options.suite or list(SUITES)
    if not any(options.match in case.name for suite in chosen for case in SUITES[suite].cases()):
        parser.error(f"--match {options.match!r}: no case of {', '.join(chosen)} has it in its name")

    started = time.perf_counter()
    path = RESULTS / f"{options.name or name_of_machine()}.json"
    results: dict = {"machine": machine(), "suites": {}}
    # Suites that are not run again keep their figures, if machine and versions are the same.
    if path.exists() and not options.match:
        kept = read_json(path)
        if kept["machine"] == results["machine"]:
            results["suites"] = {name: kept["suites"][name] for name in SUITES if name in kept["suites"]}
        else:
            print(f"{path}: of another machine or other versions, replaced", file=sys.stderr)
    try:
        for suite in chosen:
            figures = run_suite(suite, options.match, options.memory)
            print(f"\n## {suite}\n\n{table(figures['cases'])}\n", flush=True)
            if not options.match:  # after every suite: what took minutes survives a later crash
                results["suites"][suite] = figures
                write_json(path, rounded(results))
                if charts is not None:
                    charts.suite_chart(results, suite, path.with_name(f"{path.stem}-{suite}.png"))
                    charts.overview_chart(results, path.with_suffix(".png"))
    except KeyboardInterrupt:
        print("\ninterrupted: the suites that were finished are kept", file=sys.stderr)
        return 130
    if not options.match:
        pictures = "charts beside it" if charts is not None else "no charts: matplotlib is not installed"
        print(f"written: {path} and {pictures}", file=sys.stderr)
    print(f"{time.perf_counter() - started:.0f} s in all", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
