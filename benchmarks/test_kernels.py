"""`pytest benchmarks/`: every candidate of every case under pytest-benchmark, one group per case."""

from __future__ import annotations

import pytest

from benchmarks import SUITES
from benchmarks.measure import Case

CASES = [(f"{suite}: {case.name}", case) for suite, module in SUITES.items() for case in module.cases()]


@pytest.fixture(scope="module")
def built():
    """The candidates of the case at hand; one case is kept at a time."""
    kept: dict[str, object] = {}

    def build(name: str, case: Case):
        if name not in kept:
            kept.clear()
            kept[name] = case.build()
        return kept[name]

    return build


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize(("name", "case"), CASES, ids=[name for name, _ in CASES])
def test_speed(benchmark, built, name: str, case: Case, position: int) -> None:
    candidates = list(built(name, case).items())
    if position >= len(candidates):
        pytest.skip("fewer candidates")
    candidate, call = candidates[position]
    benchmark.group = name
    benchmark.name = candidate
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
