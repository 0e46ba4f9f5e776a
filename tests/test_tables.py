"""The figures of README and docs are those of the report: none is typed twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.experiments import compare
from benchmarks.experiments.compare import RESULTS
from rsmodels.files import read_json

ROOT = Path(__file__).resolve().parents[1]
SUITES: dict[str, Any] = read_json(tables.RESULTS)["suites"]
OPERATORS = [suite for suite in SUITES if suite not in ("models", "ktda", "crossearth")]


@pytest.mark.parametrize("suite", OPERATORS)
def test_an_operators_table_is_the_reports(suite: str) -> None:
    page = (ROOT / "docs" / "kernels" / f"{suite}.md").read_text(encoding="utf-8")
    expected = tables.with_table(page, tables.table(suite, SUITES[suite]["cases"]))
    assert page == expected, "run python -m benchmarks.tables"


@pytest.mark.parametrize("page", tables.SHOWN)
def test_a_pages_resources_are_those_that_were_compiled(page: str) -> None:
    text = (ROOT / "docs" / "kernels" / f"{page}.md").read_text(encoding="utf-8")
    new = tables.resources(page, read_json(tables.COMPILED)["rows"])
    for begins in tables.SHOWN[page]:
        assert f"| {begins}" in new
    assert text == tables.with_table(text, new, "sm_80"), "run python -m benchmarks.tables"


# A row of README's table, by how it begins, and the case whose ratios to its peers stand in it.
ROWS = {
    "… against timm eager": ("models", "forward, SAM ViT-B encoder, 1024 pixels, batch 1", None),
    "RS-SAM ViT-B training step": ("models", "both, RS-SAM ViT-B training step, 512 pixels, batch 2", None),
    "attention in windows of 14": ("rel_pos_attention", "both, 1x64x64 windows of 14", "best"),
    "global attention": ("rel_pos_attention", "both, 1x64x64 global", "best"),
    "Mask2Former's masked attention": ("cross_attention", "both, Mask2Former, 100x16384 masked", "sdpa"),
    "deformable attention": ("deformable_attention", "both, pixel decoder", "eager"),
    "KL + MSE distillation": ("distillation_loss", "both, 4x768x32x32, channels-last, channel", "eager"),
}


@pytest.mark.parametrize("begins", ROWS)
def test_readmes_ratios_are_the_reports(begins: str) -> None:
    suite, name, peer = ROWS[begins]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in readme.splitlines() if line.startswith(f"| {begins}"))
    cases = {case["case"]: case for case in SUITES[suite]["cases"]}
    for cell, dtype in zip(row.strip("| ").split(" | ")[1:], tables.DTYPES, strict=True):
        case = cases[f"{name}, {dtype}"]
        ratios = case["ratio"]
        if peer is not None:
            ratios = {peer: ratios[case["best_peer"] if peer == "best" else peer]}
        for printed in re.findall(r"([\d.]+)x", cell):
            decimals = len(printed.partition(".")[2])
            assert any(f"{ratio:.{decimals}f}" == printed for ratio in ratios.values()), (row, printed)


@pytest.mark.parametrize(
    ("experiment", "page"), [("crossearth_ladder", "crossearth"), ("ktda_transfer", "ktda")]
)
def test_an_experiments_table_is_its_runs(experiment: str, page: str) -> None:
    runs = read_json(RESULTS / f"{experiment}.json")["runs"]
    expected = compare.table(list(dict.fromkeys(run["variant"] for run in runs)), runs)
    assert expected in (ROOT / "docs" / "methods" / f"{page}.md").read_text(encoding="utf-8")


def test_a_table_is_made_of_what_the_report_has() -> None:
    def case(name: str, **more: Any) -> dict[str, Any]:
        figures = {"ours": "rskernels", "best_peer": "a", "ratio": {"a": 1.005, "without LoRA": 0.5}}
        return {"case": name, "milliseconds": {"rskernels": 9.996}, **figures, **more}

    cases = [
        case("forward, 2x3, rank 4, float32", share_of_roofline=0.745),
        case("both, 2x3, rank 4, float32", milliseconds={"rskernels": 1234.5}),
        {"case": "forward, 2x3, rank 4, bfloat16", "not_reported": "rskernels: outputs disagree"},
    ]
    assert tables.table("lora", cases).splitlines()[2:] == [
        "| 2x3, rank 4 | fp32 | 10.0 | 1.00 a | 0.50 | 74% | 1234 | 1.00 a | 0.50 | |",
        "| 2x3, rank 4 | bf16 | – | – | – | – | – | – | – | – |",
    ]
    with pytest.raises(ValueError, match="found 0"):
        tables.with_table("| case | forward |\n", "")


def test_the_command_rewrites_a_page(tmp_path: Path) -> None:
    page = tmp_path / "linear.md"
    old = "| case | dtype | forward, ms |\n| --- | --- | --- |\n| old | row | 1 |\n"
    page.write_text(f"# linear\n\n{old}\nAfter.\n")
    assert tables.main(["--pages", str(tmp_path)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# linear\n\n| case |") and text.endswith("\n\nAfter.\n") and "old" not in text
    assert list(tmp_path.iterdir()) == [page]
