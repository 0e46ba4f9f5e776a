"""The benchmark harness on cases of a few numbers: what is published, what is left out and why. No timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import SUITES, report
from benchmarks.measure import PASSES, Case, call_of, first_calls, lazily, peak_bytes, seconds

ROOT = Path(__file__).resolve().parents[1]
REACHED = {"float32": 1e9, "bfloat16": 1e9, "copy": 1e9}


@pytest.fixture(autouse=True)
def three_rounds(monkeypatch):
    monkeypatch.setattr(report, "seconds", partial(seconds, budget=0))


def fail():
    raise RuntimeError("no such library\nand a long story")


def calls(**more):
    x = torch.arange(1.0, 5.0)
    return {"rskernels": lambda: x * 2, "eager": lambda: x + x, "other": lambda: (x * 2,), **more}


def case(name="forward, tiny", build=calls, **more):
    return Case(name=name, build=build, dtype=torch.float32, **more)


def test_first_calls_says_why_a_candidate_is_missing():
    more = {
        "raises": fail,
        "late": lazily(fail),
        "wrong": lambda: torch.ones(4),
        "nan": lambda: torch.full((4,), float("nan")),
        "two": lambda: (torch.ones(4), torch.ones(4)),
    }
    errors, missing = first_calls(case(), calls(**more))
    assert {"rskernels", "eager", "other"} <= set(errors) and errors["eager"] == 0
    assert missing["raises"] == missing["late"] == "RuntimeError: no such library"
    assert missing["wrong"].startswith("outputs disagree") and missing["nan"].startswith("outputs disagree")
    assert missing["two"].startswith("outputs of other shapes")
    assert set(missing) == set(more)


def test_a_row_is_published_only_if_ours_and_the_reference_agree():
    memory_bound = case(flops=8, bytes=32, build=lambda: calls(gone=fail))
    row = report.run_case(memory_bound)
    row |= report.roofline(memory_bound, row, REACHED)
    assert set(row["milliseconds"]) == {"rskernels", "eager", "other"} and set(row["ratio"]) == {
        "eager",
        "other",
    }
    assert row["ratio"][row["best_peer"]] == min(row["ratio"].values())
    assert row["bound_by"] == "memory"
    floor = row["share_of_roofline"] * row["milliseconds"]["rskernels"]
    assert floor == pytest.approx(1e3 * 32 / REACHED["copy"])
    assert row["not_available"] == {"gone": "RuntimeError: no such library"}

    broken = ({"rskernels": fail}, {"rskernels": lambda: torch.ones(4)}, {"eager": fail})
    for more in broken:
        row = report.run_case(case(build=lambda more=more: calls(**more)))
        assert "not_reported" in row and "milliseconds" not in row
        assert report.roofline(memory_bound, row, REACHED) == {}
    assert "does not build" in report.run_case(case(build=fail))["not_reported"]


def test_what_is_shown_beside_is_no_peer():
    row = report.run_case(case(build=calls, beside=("other",)))
    assert row["best_peer"] == "eager" and "other" in row["ratio"]
    row = report.run_case(case(build=calls, beside=("other", "eager")))
    assert row["ours"] == "rskernels" and "best_peer" not in row


def test_floor():
    assert case(flops=10, bytes=10).floor(1, 2) == 10
    assert case(flops=10, bytes=10).floor(2, 1) == 10
    assert case().floor(1, 1) == 0


def test_figures_are_rounded_and_counts_are_not():
    figures = {"ms": [{"a": 1234567.8}, {"a": 0.000123456789}], "n": 12345678, "at": "1.0000001"}
    found = report.rounded(figures)
    assert found == {"ms": [{"a": 1234570.0}, {"a": 0.000123457}], "n": 12345678, "at": "1.0000001"}


def test_report_writes_figures_and_charts(tmp_path, monkeypatch, capsys):
    passes = [case(f"{which}, tiny") for which in PASSES]
    bad = case("forward, wrong", lambda: calls(rskernels=lambda: torch.zeros(4)))
    suites = {"one": [*passes, bad], "two": [case(build=lambda: calls(gone=fail))], "cut": []}
    suites = {name: SimpleNamespace(cases=lambda cases=cases: cases) for name, cases in suites.items()}

    def interrupted():
        raise KeyboardInterrupt

    suites["cut"].cases = interrupted
    monkeypatch.setattr(report, "SUITES", suites)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "matrix_peak", lambda dtype: 1e9)
    monkeypatch.setattr(report, "copy_bandwidth", lambda: 1e9)

    assert report.main(["--match", "tiny", "one"]) == 0 and not list(tmp_path.iterdir())
    assert report.main(["--name", "here"]) == 130
    out, err = capsys.readouterr()
    assert "not reported: rskernels: outputs disagree" in out and "- gone not available: RuntimeError" in out
    assert "one 1/4: forward, tiny" in err and "interrupted" in err
    names = {"here.json", "here.png", "here-one.png", "here-two.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(path.stat().st_size < 200_000 for path in tmp_path.iterdir())
    stored = json.loads((tmp_path / "here.json").read_text())
    assert stored["machine"]["torch"] == torch.__version__ and "timm" in stored["machine"]["peers"]
    assert [row["case"] for row in stored["suites"]["one"]["cases"]] == [c.name for c in (*passes, bad)]
    assert stored["suites"]["two"]["date"]
    assert report.rounded(stored) == stored  # no figure is longer than it can be meant

    # One suite again: the other keeps its figures, unless the machine or a version is another one.
    assert report.main(["--name", "here", "one"]) == 0
    assert set(json.loads((tmp_path / "here.json").read_text())["suites"]) == {"one", "two"}
    monkeypatch.setattr(report, "machine", lambda: stored["machine"] | {"torch": "0.1"})
    assert report.main(["--name", "here", "one"]) == 0
    assert set(json.loads((tmp_path / "here.json").read_text())["suites"]) == {"one"}
    with pytest.raises(SystemExit):
        report.main(["three"])


def test_seconds_interleaves_and_ends():
    order = []
    found = seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=5, budget=0)
    assert "".join(order) == "ab" * 4 and set(found) == {"a", "b"}  # the warm-up and three rounds


def test_peak_bytes_sees_a_temporary():
    size = 64 * 2**20
    found = peak_bytes(lambda: torch.ones(size // 4).sum())
    assert found is None or 0.9 * size < found < 1.5 * size


def test_call_of_gives_each_pass():
    x, w = torch.randn(3, 2, requires_grad=True), torch.randn(2, 4)
    grad = torch.randn(3, 4)
    results = {which: call_of(which, torch.matmul, (x, w), grad) for which in PASSES}
    torch.testing.assert_close(results["forward"](), x @ w)
    for which in ("backward", "both"):
        for _ in range(2):  # a kept graph serves again
            torch.testing.assert_close(results[which](), (grad @ w.T,))


def test_every_case_has_a_name_of_its_own():
    for suite, module in SUITES.items():
        names = [case.name for case in module.cases()]
        assert names and len(set(names)) == len(names), suite


def test_pytest_benchmark_groups_every_candidate(tmp_path):
    """A case of a suite through `pytest benchmarks/`, timing switched off: every candidate is an entry."""
    # Under xdist, which this process may run in, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-k", "linear and forward and 1024x768 and float32", f"--benchmark-json={tmp_path / 'out.json'}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    entries = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert {entry["name"] for entry in entries} >= {"rskernels", "F.linear"}
    assert len({entry["group"] for entry in entries}) == 1
