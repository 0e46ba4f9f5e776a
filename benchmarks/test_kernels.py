"""`pytest benchmarks/`: one test and one group per case, which holds every candidate that works here.

`-k` chooses suites and cases ("linear and backward and bfloat16"); RSKERNELS_BENCHMARK_ROUNDS (3) is how
often each candidate runs. Candidates run one after the other here: for ratios, `python -m benchmarks.report`
interleaves them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import SUITES
from benchmarks.measure import Call, Case, first_calls

CASES = {f"{suite}: {case.name}": case for suite, module in SUITES.items() for case in module.cases()}
ROUNDS = int(os.environ.get("RSKERNELS_BENCHMARK_ROUNDS", "3"))


@pytest.fixture
def profile(request: pytest.FixtureRequest) -> Callable[[str, str, Call], None]:
    """The `benchmark` fixture serves one function a test; which candidates a case has is known only when it
    is built, so that here each gets a fixture of its own inside one test."""
    session = request.config._benchmarksession
    if session.skip:
        pytest.skip("--benchmark-skip")

    def run(group: str, name: str, call: Call) -> None:
        fixture = BenchmarkFixture(
            request.node,
            add_stats=session.benchmarks.append,
            logger=session.logger,
            warner=request.node.warn,
            disabled=session.disabled,
            **session.options,
        )
        fixture.group, fixture.name = group, name
        fixture.pedantic(call, rounds=ROUNDS)
        fixture._cleanup()

    return run


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", CASES)
def test_speed(profile: Callable[[str, str, Call], None], name: str) -> None:
    case: Case = CASES[name]
    torch.compiler.reset()
    calls = case.build()
    _, missing = first_calls(case, calls)
    for candidate, reason in missing.items():
        warnings.warn(f"{name}: {candidate} is not available: {reason}", stacklevel=1)
    assert case.ours not in missing and case.reference not in missing, missing
    for candidate, call in calls.items():
        if candidate not in missing:
            profile(name, candidate, call)
