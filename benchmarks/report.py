"""`python -m benchmarks.report [SUITE ...]`: the figures of README and docs, one table per suite.

Per case: median time of ours, ratio to every peer (their median / ours, interleaved rounds of one process),
share of the machine's measured matrix peak, peak memory of one call in a fresh process. A case whose
outputs disagree with its reference is shown as such, without times. Everything goes to
`benchmarks/results/NAME.json` with the machine and versions, and a chart beside it.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import SUITES
from benchmarks.measure import Case, copy_bandwidth, disagreement, machine, matrix_peak, peak_bytes, seconds
from rsmodels.files import atomic_path, read_json, write_json

RESULTS = Path(__file__).parent / "results"


def run_case(case: Case, peaks: dict[str, float], bandwidth: float, memory: bool) -> dict[str, object]:
    """Everything that is published about one case."""
    calls = case.build()
    errors = disagreement(case, calls)
    row: dict[str, object] = {"case": case.name, "errors": errors}
    wrong = {name: error for name, error in errors.items() if not error <= case.allowed_error()}
    if wrong:
        return row | {"disagrees": wrong}
    times = seconds(calls)
    ours = times[case.ours]
    row |= {
        "milliseconds": {name: 1e3 * value for name, value in times.items()},
        "ratio": {name: value / ours for name, value in times.items() if name != case.ours},
    }
    if case.flops or case.bytes:
        row["share_of_roofline"] = case.floor(peaks[str(case.dtype)[6:]], bandwidth) / ours
    del calls
    if memory:
        peaks_of = {name: peak_bytes(case, name) for name in times}
        row["peak_mib"] = {name: value / 2**20 for name, value in peaks_of.items() if value is not None}
    return row


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| case | ours | ratio to peers | share of roofline | peak memory, ours / peers |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        if "disagrees" in row:
            lines.append(f"| {row['case']} | outputs disagree: {row['disagrees']} | | | |")
            continue
        ratios = ", ".join(f"{value:.2f}x {name}" for name, value in row["ratio"].items())
        share = f"{row['share_of_roofline']:.0%}" if "share_of_roofline" in row else ""
        peaks = " / ".join(f"{value:.0f} MiB" for value in row.get("peak_mib", {}).values())
        ours = row["milliseconds"]["rskernels"]
        lines.append(f"| {row['case']} | {ours:.1f} ms | {ratios} | {share} | {peaks} |")
    return "\n".join(lines)


def chart(results: dict, path: Path) -> None:
    """Bars of every ratio; the line at 1 is where ours and the peer are equal."""
    labels, values = [], []
    for suite, rows in results["suites"].items():
        for row in rows:
            for peer, ratio in row.get("ratio", {}).items():
                labels.append(f"{suite}: {row['case']}  vs {peer}")
                values.append(ratio)
    figure = Figure(figsize=(11, 1 + 0.24 * len(values)))
    axes = figure.subplots()
    axes.barh(labels, values, color=["#2a7f62" if value >= 1 else "#b5402a" for value in values])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the peer (median of interleaved rounds)")
    axes.tick_params(axis="y", labelsize=7)
    on = results["machine"]
    axes.set_title(f"{on['processor']}, {on['threads']} threads, torch {on['torch']}", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=70, bbox_inches="tight")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="*", help=f"which suites to run: {', '.join(SUITES)} (default: all)")
    parser.add_argument("--name", default="cpu", help="the result files are results/NAME.json and NAME.png")
    parser.add_argument(
        "--match", default="", help="only cases whose name contains this text (prints, writes nothing)"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.suite) - set(SUITES))
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")

    path = RESULTS / f"{options.name}.json"
    peaks = {"float32": matrix_peak(torch.float32), "bfloat16": matrix_peak(torch.bfloat16)}
    bandwidth = copy_bandwidth()
    results: dict = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "matrix_peak_gflops": {name: value / 1e9 for name, value in peaks.items()},
        "copy_gbytes_per_second": bandwidth / 1e9,
        # Suites that are not run again keep their figures, if the machine and versions are the same.
        "suites": {},
    }
    if path.exists() and (kept := read_json(path))["machine"] == results["machine"]:
        results["suites"] = kept["suites"]
    for suite in options.suite or SUITES:
        rows = []
        for case in SUITES[suite].cases():
            if options.match in case.name:
                print(f"{suite}: {case.name}", file=sys.stderr, flush=True)
                rows.append(run_case(case, peaks, bandwidth, options.memory))
        print(f"\n## {suite}\n\n{table(rows)}\n", flush=True)
        results["suites"][suite] = rows
        if not options.match:  # after every suite: what took minutes survives a later crash
            write_json(path, results)
            chart(results, path.with_suffix(".png"))
    if not options.match:
        print(f"written: {path} and {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
