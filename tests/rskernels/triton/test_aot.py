"""The shipped configurations on chips that are not there: they compile, spill nothing and fit.

A process that interprets kernels cannot compile them: others do.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from rskernels.triton import aot, launch  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "benchmarks" / "results" / "triton-resources.json"


def run(*arguments, **variables):
    """In a process that does not interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def run_aot(*arguments):
    return run("-m", "rskernels.triton.aot", "--jobs", 1, *arguments)


def test_what_is_compiled_is_what_a_first_call_would_be(tmp_path):
    script = Path(__file__).with_name("same_as_triton.py")
    done = run(script, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    compared, built = map(int, re.findall(r"\d+", done.stdout))
    assert compared > 50 and built == 1


@pytest.fixture(scope="module")
def same_triton():
    written_by = json.loads(TABLE.read_text())["triton"]
    if written_by != triton.__version__:
        pytest.skip(f"the table is Triton {written_by}'s, this is {triton.__version__}")


def test_every_build_of_this_source_was_compiled_and_fits(same_triton):
    done = run_aot("--check", TABLE)
    advice = f"run python -m rskernels.triton.aot --output {TABLE}"
    assert done.returncode == 0, f"{advice}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("operator", "chip"), [(op, launch.CHIPS[i % 3]) for i, op in enumerate(aot.OPERATORS)]
)
def test_the_table_is_what_compiling_gives(same_triton, operator, chip, tmp_path):
    """The first example of an operator, on one chip."""
    again = tmp_path / "again.json"
    done = run_aot("--operators", operator, "--chips", chip, "--examples", 1, "--output", again)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, known = aot.read_table(again), aot.read_table(TABLE)
    assert rows and all(known[digest] == row for digest, row in rows.items())


def test_a_build_that_is_missing_or_does_not_fit_is_named(same_triton, tmp_path):
    operator, rows = aot.OPERATORS[0], aot.read_table(TABLE)
    first, *others = (row for row in rows.values() if row.operator == operator)
    table = tmp_path / "table.json"
    aot.write_table(table, others)
    missing = run_aot("--check", table, "--operators", operator)
    assert missing.returncode == 1 and "has no row of" in missing.stdout
    large = aot.Compiled(**{**vars(first), "shared": aot.SHARED_LIMIT[first.chip] + 1})
    aot.write_table(table, [large, *others])
    too_large = run_aot("--check", table, "--operators", operator)
    assert too_large.returncode == 1 and "does not fit" in too_large.stdout
