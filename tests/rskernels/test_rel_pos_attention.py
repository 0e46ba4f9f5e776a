"""rel_pos_attention: the C++ kernel against the reference in float64, all gradients, NaN, equal bits."""

import os
import subprocess
import sys

import pytest
import rel_pos_attention_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rel_pos_attention_cases import (
    CASES,
    NAMES,
    Case,
    compare,
    needs_cpp,
    operator,
    rounded,
    run,
)
from torch import Tensor

from rskernels import rel_pos_attention


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_reference(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@needs_cpp
@settings(max_examples=40)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        height=st.integers(1, 20),
        width=st.integers(1, 20),
        heads=st.integers(1, 3),
        dim=st.integers(16, 256) | st.sampled_from([16, 32, 64, 80, 128]),
        window=st.integers(0, 9) | st.sampled_from([14, 16]),
        tables=st.booleans(),
        pad=st.booleans(),
        magnitude=st.sampled_from([0.1, 1.0]),
        seed=st.integers(0, 2**16),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_matches_the_float64_reference_on_any_shape(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@needs_cpp
def test_padding_without_tables_in_large_windows() -> None:
    """Over a hundred equal keys: added up one by one, their sums would all round to one side."""
    for window in (14, 16):
        for seed in range(4):
            case = Case(height=18, width=8, heads=1, window=window, tables=False, seed=seed)
            compare(case, torch.float32)


def test_reference_is_the_formula() -> None:
    """Against loops over queries and keys, windows and padding written out."""
    case = Case(height=5, width=4, heads=1, dim=3, window=3)
    qkv, rel_pos_h, rel_pos_w, pad = case.arguments()
    out = operator.rel_pos_attention_reference(qkv, rel_pos_h, rel_pos_w, pad, 1, 3, 0.5)
    d, w = case.dim, case.window
    for y in range(case.height):
        for x in range(case.width):
            q = qkv[0, y, x, :d]
            logits, values = [], []
            for ky in range(y // w * w, y // w * w + w):
                for kx in range(x // w * w, x // w * w + w):
                    token = qkv[0, ky, kx] if ky < case.height and kx < case.width else pad
                    bias = q @ rel_pos_h[y - ky + w - 1] + q @ rel_pos_w[x - kx + w - 1]
                    logits.append(0.5 * q @ token[d : 2 * d] + bias)
                    values.append(token[2 * d :])
            expected = torch.stack(logits).softmax(0) @ torch.stack(values)
            torch.testing.assert_close(out[0, y, x], expected)


@pytest.mark.parametrize("window", [0, 3])
def test_reference_gradcheck(window: int) -> None:
    case = Case(height=4, width=3, heads=2, dim=2, window=window)
    arguments = rounded(case.arguments(), torch.float64)

    def call(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, pad: Tensor | None) -> Tensor:
        return rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=2, window_size=window, pad_qkv=pad)

    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_stay_finite(dtype: torch.dtype) -> None:
    case = Case(height=12, width=12, dim=16, window=7, magnitude=50.0)  # products of ±1e4
    arguments = rounded(case.arguments(), dtype)
    for value in run(case, arguments, case.grad(), "cpp"):
        assert value is None or value.isfinite().all()


@pytest.mark.usefixtures("any_level")
@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_query_spoils_its_own_row_only(dtype: torch.dtype) -> None:
    case = Case(height=12, width=12, heads=1, dim=16)
    qkv, rel_pos_h, rel_pos_w = (t.detach() for t in rounded(case.arguments()[:3], dtype))
    clean = rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=1)
    qkv[0, 3, 5, 7] = torch.nan
    spoiled = rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=1)
    assert spoiled[0, 3, 5].isnan().all()
    spoiled[0, 3, 5] = clean[0, 3, 5]
    assert torch.equal(spoiled, clean)


@pytest.mark.usefixtures("any_level")
@needs_cpp
def test_nan_key_spoils_every_row_that_sees_it() -> None:
    case = Case(height=8, width=8, heads=1, dim=16, window=4)
    qkv, rel_pos_h, rel_pos_w = (t.detach() for t in rounded(case.arguments()[:3], torch.float32))
    qkv[0, 1, 2, 16] = torch.nan
    out = rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=1, window_size=4)
    assert out[0, :4, :4].isnan().all()
    assert out[0, 4:].isfinite().all() and out[0, :, 4:].isfinite().all()


@pytest.mark.usefixtures("any_level")
@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        Case(height=33, width=40, heads=3),
        Case(height=20, width=20, window=7),
        Case(heads=1, height=40, width=40),
        # 196 keys, few units: the forward pass's tile of queries depends on the threads.
        Case(window=14, height=14, width=14, heads=5),
    ],
    ids=str,
)
def test_same_bits_on_every_run_and_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    """Outputs are poisoned first, so this also sees every element written."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, rounded(case.arguments(), dtype), case.grad(), "cpp"))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        for name, value, expected in zip(NAMES, other, results[0], strict=True):
            assert (value is None) == (expected is None), name
            assert value is None or (torch.equal(value, expected) and value.isfinite().all()), name


LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
ONEDNN_LEVELS = {
    "baseline": "SSE41",
    "avx2": "AVX2",
    "avx512": "AVX512_CORE",
    "avx512_bf16": "AVX512_CORE_BF16",
}


@needs_cpp
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: str) -> None:
    """In a fresh process: oneDNN reads its variable once."""
    best = _supported_level()
    if LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this processor has {best}")
    environment = {**os.environ, "RSKERNELS_ISA": level, "ONEDNN_MAX_CPU_ISA": ONEDNN_LEVELS[level]}
    command = [sys.executable, rel_pos_attention_cases.__file__, level]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def _supported_level() -> str:
    from rskernels import _C

    current = _C.cpu_capability()
    for level in reversed(LEVELS):
        try:
            _C.set_cpu_capability(level)
        except ValueError:
            continue
        _C.set_cpu_capability(current)
        return level
    raise AssertionError("no level is accepted")
