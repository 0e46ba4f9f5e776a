"""`python -m benchmarks.tables`: write the operators' tables of docs/kernels/ anew.

From results/cpu.json the table whose header has a column "forward, ms": a row is a case and a dtype, its
forward pass and its training step. From results/triton-resources.json the table with a column "sm_80": what
the compiled Triton kernels of some of the examples take. A test holds the pages against the same functions.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
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
COMPILED = RESULTS.with_name("triton-resources.json")
CHIPS = (80, 90, 100)
# Page -> how the names of the examples begin that it shows.
SHOWN = {
    "rel_pos_attention": ("64x64 global, d 64", "64x64 windows of 14, d 64"),
    "cross_attention": ("SAM, tokens on image, bf16", "SAM, image on tokens, bf16", "Mask2Former, bf16",
                        "Rein, ViT-L, bf16", "injector, 768, bf16"),
    "lora": ("ViT-B qkv, rank 4,",),
    "distillation_loss": ("4x768x32x32 contiguous channel", "4x768x32x32 channels-last channel"),
    "dilated_aspp": ("head 256-1024", "ASPP 2048"),
    "deformable_attention": ("pixel decoder", "extractor"),
}  # fmt: skip


def of_column(name: str) -> re.Pattern[str]:
    """Tables whose header has this column."""
    return re.compile(rf"^\|[^\n]*\| {name} \|[^\n]*\n(?:\|[^\n]*\n)+", re.MULTILINE)


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


def resources(page: str, rows: Sequence[Sequence[Any]]) -> str:
    """Registers of a thread and KiB of shared memory of a block, of every kernel of the examples shown; of
    several builds the largest."""
    cells: dict[tuple[str, str], dict[int, tuple[int, int]]] = {}
    for operator, kernel, example, chip, registers, shared, *_ in rows:
        if operator.startswith(page) and example.startswith(SHOWN[page]):
            chips = cells.setdefault((example.removesuffix(", backward"), kernel.strip("_")), {})
            before = chips.get(chip, (0, 0))
            chips[chip] = max(before[0], registers), max(before[1], shared)
    lines = [["example", "kernel", *(f"sm_{chip}" for chip in CHIPS)], ["---"] * (2 + len(CHIPS))]
    for (example, kernel), chips in sorted(cells.items(), key=lambda item: _place(page, item[0][0])):
        found = (chips.get(chip) for chip in CHIPS)
        lines.append(
            [example, kernel, *("–" if one is None else f"{one[0]}, {one[1] / 1024:.0f}" for one in found)]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _place(page: str, example: str) -> int:
    return next(i for i, begins in enumerate(SHOWN[page]) if example.startswith(begins))


def with_table(page: str, new: str, column: str = "forward, ms") -> str:
    """The page's text with its one table that has this column replaced."""
    text, found = of_column(column).subn(lambda _: new, page)
    if found != 1:
        raise ValueError(f'expected one table with a column "{column}", found {found}')
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="what benchmarks.report wrote")
    parser.add_argument("--pages", type=Path, default=ROOT / "docs" / "kernels", help="folder of SUITE.md")
    options = parser.parse_args(argv)
    suites, compiled = read_json(options.results)["suites"], read_json(COMPILED)["rows"]
    for page in sorted(options.pages.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if page.stem in suites:
            text = with_table(text, table(page.stem, suites[page.stem]["cases"]))
        if page.stem in SHOWN:
            text = with_table(text, resources(page.stem, compiled), "sm_80")
        if page.stem in suites or page.stem in SHOWN:
            write_text(page, text)
            print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
