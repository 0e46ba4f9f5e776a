"""`python -m benchmarks.tables`: write the operators' tables of docs/kernels/ anew, from results/cpu.json.

A page's table is the one whose header has a column "forward, ms"; a row is a case and a dtype, its forward
pass and its training step. A test holds the pages against the same function.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsmodels.files import read_json, write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
STEPS = ("both", "training step")  # what suites call a forward and a backward pass
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
# Where the first two columns are not these.
COLUMNS = {"layer_norm": ("rows x D", "x to result")}
# What is shown beside the best peer.
BESIDE = {"lora": "without LoRA"}
TABLE = re.compile(r"^\|[^\n]*\| forward, ms \|[^\n]*\n(?:\|[^\n]*\n)+", re.MULTILINE)


def table(suite: str, cases: list[dict[str, Any]]) -> str:
    """The table of one suite, Markdown."""
    beside = BESIDE.get(suite)
    figures = ["× the best peer", *([f"× {beside}"] if beside else []), "of the roofline"]
    header = [*COLUMNS.get(suite, ("case", "dtype")), "forward, ms", *figures, "step, ms", *figures]
    by_name = {case["case"]: case for case in cases}
    lines = [header, ["---"] * len(header)]
    for name in by_name:
        which, _, rest = name.partition(", ")
        if which != "forward":
            continue
        step = next((by_name[f"{one}, {rest}"] for one in STEPS if f"{one}, {rest}" in by_name), {})
        what, _, dtype = rest.rpartition(", ")
        lines.append([what, DTYPES.get(dtype, dtype), *_cells(by_name[name], beside), *_cells(step, beside)])
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def _cells(case: Mapping[str, Any], beside: str | None) -> list[str]:
    """Milliseconds, ratios and share of the roofline; dashes where the report has no figures."""
    if "best_peer" not in case:
        return ["–"] * (4 if beside else 3)
    peer, roofline = case["best_peer"], case.get("share_of_roofline")
    return [
        milliseconds(case["milliseconds"][case["ours"]]),
        f"{case['ratio'][peer]:.2f} {peer}",
        *([f"{case['ratio'][beside]:.2f}"] if beside else []),
        "" if roofline is None else f"{roofline:.0%}",
    ]


def milliseconds(value: float) -> str:
    """Three figures, at most two of them behind the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def with_table(page: str, new: str) -> str:
    """The page's text with its one table of figures replaced."""
    text, found = TABLE.subn(lambda _: new, page)
    if found != 1:
        raise ValueError(f'expected one table with a column "forward, ms", found {found}')
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="what benchmarks.report wrote")
    parser.add_argument("--pages", type=Path, default=ROOT / "docs" / "kernels", help="folder of SUITE.md")
    options = parser.parse_args(argv)
    for suite, result in read_json(options.results)["suites"].items():
        page = options.pages / f"{suite}.md"
        if page.exists():
            write_text(page, with_table(page.read_text(encoding="utf-8"), table(suite, result["cases"])))
            print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
