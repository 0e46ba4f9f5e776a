from itertools import pairwise

import pytest

from rsmodels.training.schedule import learning_rate


def rates(steps: int, warmup: int, start: float | None = None) -> list[float]:
    return [
        learning_rate(s, base=2.0, steps=steps, warmup=warmup, power=0.9, start=start) for s in range(steps)
    ]


def test_warm_up_rises_to_the_base_rate_and_the_rest_falls() -> None:
    found = rates(20, 5)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[5] == 2.0
    assert all(a > b > 0 for a, b in pairwise(found[5:]))


def test_warm_up_starts_at_the_share_asked_for() -> None:
    assert rates(20, 5, start=0.1)[:6] == pytest.approx([0.2, 0.65, 1.1, 1.55, 2.0, 2.0])
    assert rates(20, 1, start=0.1)[0] == pytest.approx(0.2)
    assert rates(20, 0, start=0.1) == rates(20, 0)


def test_decay_is_polynomial_and_ends_at_zero() -> None:
    assert learning_rate(60, base=1.0, steps=100, warmup=20, power=0.9) == pytest.approx(0.5**0.9)
    assert learning_rate(100, base=1.0, steps=100, warmup=20, power=0.9) == 0.0


def test_no_warm_up_starts_at_the_base_rate() -> None:
    assert rates(10, 0)[0] == 2.0
