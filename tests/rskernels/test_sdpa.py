"""Backends "sdpa" and "xformers": the two attention operators composed from other libraries' attention,
against the reference in float64.

xFormers has no CPU kernels: here a double takes its place that asks of its arguments what xFormers asks, so
that layout, padding of the bias and what is refused are tested everywhere; itself on a device.
"""

import importlib.util
from dataclasses import replace

import cross_attention_cases
import pytest
import rel_pos_attention_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rskernels
from rskernels import dispatch, xformers

RelPos, Cross = rel_pos_attention_cases.Case, cross_attention_cases.Case
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

REL_POS_CASES = [
    RelPos(height=6, width=5, batch=2),
    RelPos(height=9, width=10, window=4, heads=3),  # padded windows
    RelPos(height=5, width=3, window=4, pad=False),
    RelPos(height=8, width=8, window=4, dim=24),
    RelPos(height=5, width=7, window=3, tables=False),
    RelPos(height=1, width=37, dim=32, tables=False, pad=False),
    RelPos(height=1, width=1, dim=16, heads=1),
]
CROSS_CASES = [
    Cross(heads=4, queries=7, keys=130),
    Cross(heads=4, queries=130, keys=7),
    Cross(heads=3, queries=20, keys=90, density=0.3),  # with a row that attends nowhere
    Cross(queries=9, keys=61, density=0.5, drop=True, shared=(False, True), layout="channels"),
    Cross(heads=1, queries=30, keys=20, dim=304, drop=True, shared=(True, True)),  # Rein
    Cross(queries=12, keys=1, dim=8, drop=True, layout="heads"),
]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Backend "xformers" on CPU tensors, by a double; the list counts its calls."""
    calls: list[int] = []

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None, *, scale: float
    ) -> Tensor:
        calls.append(1)
        multiple = 16 // q.element_size()
        (B, Q, h, d), M = q.shape, k.shape[1]
        assert k.shape == v.shape == (B, M, h, d)
        for x in (q, k, v):
            assert x.dtype == q.dtype and x.stride(-1) == 1
            assert not any(s % multiple for s in (*x.stride()[:-1], x.storage_offset(), x.shape[-1]))
        logits = scale * torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float())
        if attn_bias is not None:
            assert attn_bias.shape == (B, h, Q, M) and attn_bias.dtype == q.dtype
            assert attn_bias.stride(-1) <= 1 and not any(s % multiple for s in attn_bias.stride()[:-1])
            logits = logits + attn_bias.float()
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v.float()).to(q.dtype)

    monkeypatch.delitem(dispatch.UNAVAILABLE, "xformers", raising=False)
    monkeypatch.setattr(xformers, "_load", lambda: attention)
    monkeypatch.setattr(xformers, "_problem", lambda: "")
    for op in ("rel_pos_attention", "cross_attention"):
        rows = {dtype: ("xformers",) for dtype in DTYPES}
        monkeypatch.setitem(dispatch.TABLE, op, {**dispatch.TABLE[op], "cpu": rows})
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REL_POS_CASES, ids=str)
def test_sdpa_rel_pos_attention(case: RelPos, dtype: torch.dtype) -> None:
    rel_pos_attention_cases.compare(case, dtype, "sdpa")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CROSS_CASES, ids=str)
def test_sdpa_cross_attention(case: Cross, dtype: torch.dtype) -> None:
    cross_attention_cases.compare(case, dtype, "sdpa")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REL_POS_CASES, ids=str)
def test_xformers_rel_pos_attention(case: RelPos, dtype: torch.dtype, double: list[int]) -> None:
    rel_pos_attention_cases.compare(case, dtype, "xformers")
    assert len(double) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CROSS_CASES, ids=str)
def test_xformers_cross_attention(case: Cross, dtype: torch.dtype, double: list[int]) -> None:
    cross_attention_cases.compare(case, dtype, "xformers")
    assert len(double) == 1


@settings(max_examples=15)
@given(
    case=st.builds(
        RelPos,
        batch=st.integers(1, 2),
        height=st.integers(1, 9),
        width=st.integers(1, 9),
        heads=st.integers(1, 3),
        dim=st.integers(16, 48),
        window=st.integers(0, 5),
        tables=st.booleans(),
        pad=st.booleans(),
        seed=st.integers(0, 2**16),
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_sdpa_rel_pos_attention_of_any_shape(case: RelPos, dtype: torch.dtype) -> None:
    rel_pos_attention_cases.compare(case, dtype, "sdpa")


@settings(max_examples=15)
@given(
    case=st.builds(
        Cross,
        batch=st.integers(1, 3),
        heads=st.integers(1, 3),
        queries=st.integers(1, 40),
        keys=st.integers(1, 80),
        dim=st.integers(1, 48),
        density=st.sampled_from([None, 0.02, 0.5]),
        drop=st.booleans(),
        shared=st.tuples(st.booleans(), st.booleans()),
        layout=st.sampled_from(["tokens", "heads", "channels"]),
        scale=st.sampled_from([None, 0.3]),
        seed=st.integers(0, 2**16),
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_sdpa_cross_attention_of_any_shape(case: Cross, dtype: torch.dtype) -> None:
    cross_attention_cases.compare(case, dtype, "sdpa")


@pytest.mark.parametrize("name", ["sdpa", "xformers"])
def test_autocast_and_mixed_dtypes(name: str, request: pytest.FixtureRequest) -> None:
    """Autocast rounds q, k, v; the tables' gradients come back in their own dtype."""
    if name == "xformers":
        request.getfixturevalue("double")
    qkv, rel_pos_h, rel_pos_w, pad = rel_pos_attention_cases.rounded(
        REL_POS_CASES[1].arguments(), torch.float32
    )
    with rskernels.backend(name), torch.autocast("cpu", torch.bfloat16):
        out = rskernels.rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=3, window_size=4, pad_qkv=pad)
        leaves, mask, _ = CROSS_CASES[2].inputs(torch.float32)
        crossed = rskernels.cross_attention(*leaves, mask=mask)
    assert out.dtype == crossed.dtype == torch.bfloat16 and out.is_contiguous()
    (out.sum() + crossed.sum()).backward()
    for leaf in (qkv, rel_pos_h, rel_pos_w, pad, *leaves):
        assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_sdpa_compiles_in_one_graph(dynamic: bool) -> None:
    def both(qkv, rel_pos_h, rel_pos_w, pad, q, k, v, mask):
        grid = rskernels.rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=3, window_size=4, pad_qkv=pad)
        return grid, rskernels.cross_attention(q, k, v, mask=mask, drop_first_key_value=True)

    leaves, mask, _ = CROSS_CASES[2].inputs(torch.float32)
    grid = rel_pos_attention_cases.rounded(REL_POS_CASES[1].arguments(), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="eager")
    with rskernels.backend("sdpa"):
        for found, expected in zip(compiled(*grid, *leaves, mask), both(*grid, *leaves, mask), strict=True):
            torch.testing.assert_close(found, expected)


def test_auto_leaves_them_alone(extension) -> None:
    for op in ("rel_pos_attention", "cross_attention"):
        assert dispatch.choose(op, torch.zeros(2)) == "cpp"
        assert dispatch.choose(op, torch.zeros(2, dtype=torch.float16)) == "reference"
        rows = dispatch.TABLE[op]["cuda"]
        assert all(rows[dtype][-2:] == ("sdpa", "xformers") for dtype in DTYPES)
        with (
            rskernels.backend("sdpa"),
            pytest.raises(ValueError, match=f"{op} for float64 on cpu: it serves"),
        ):
            dispatch.choose(op, torch.zeros(2).double())
    with rskernels.backend("sdpa"), pytest.raises(ValueError, match="it has no linear"):
        rskernels.linear(torch.zeros(1, 4), torch.zeros(4, 4), None)
    assert "by name only: sdpa, for rel_pos_attention, cross_attention\n" in rskernels.explain()


def test_xformers_says_what_it_cannot(double: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    odd = replace(CROSS_CASES[0], dim=20).inputs(torch.bfloat16)[0]
    with rskernels.backend("xformers"):
        reason = "the head dim is 20; it takes multiples of 8 in this dtype"
        with pytest.raises(ValueError, match=f"cannot serve cross_attention for bfloat16 on cpu: {reason}"):
            rskernels.cross_attention(*odd)
        rskernels.cross_attention(*(leaf.float() for leaf in odd))  # multiples of 4 in float32
        monkeypatch.setattr(xformers, "_problem", lambda: "it does not load (built for another torch)")
        with pytest.raises(
            ValueError, match=r"on cpu: it does not load \(built for another torch\); use set_b"
        ):
            rskernels.rel_pos_attention(torch.zeros(1, 2, 2, 48), None, None, num_heads=1)
    assert len(double) == 1


def test_xformers_that_does_not_load_is_a_reason() -> None:
    if importlib.util.find_spec("xformers") is not None:
        pytest.skip("xFormers is installed")
    assert dispatch.UNAVAILABLE["xformers"] == "xFormers is not installed"
    xformers._problem.cache_clear()
    assert xformers._problem() == "it does not load (No module named 'xformers')"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sdpa", "xformers"])
def test_on_a_device(name: str, dtype: torch.dtype, assert_accurate) -> None:
    if name in dispatch.UNAVAILABLE:
        pytest.skip(dispatch.UNAVAILABLE[name])
    for case in REL_POS_CASES:
        arguments = rel_pos_attention_cases.rounded(case.arguments(), dtype)
        grad = case.grad().to(dtype)
        here = rel_pos_attention_cases.run(case, arguments, grad, "reference")
        exact = rel_pos_attention_cases.rounded(arguments, torch.float64)
        truth = rel_pos_attention_cases.run(case, exact, grad, "reference")
        there = [None if a is None else a.detach().cuda().requires_grad_() for a in arguments]
        values = rel_pos_attention_cases.run(case, there, grad.cuda(), name)
        _all_accurate(values, here, truth, assert_accurate, case)
    for case in CROSS_CASES:
        leaves, mask, grad = case.inputs(dtype)
        here = cross_attention_cases.run(case, leaves, mask, grad, "reference")
        exact = cross_attention_cases.as_double(leaves)
        truth = cross_attention_cases.run(case, exact, mask, grad, "reference")
        there = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
        on_device = None if mask is None else mask.cuda()
        values = cross_attention_cases.run(case, there, on_device, grad.cuda(), name)
        _all_accurate(values, here, truth, assert_accurate, case)


def _all_accurate(values, eagers, truths, assert_accurate, case) -> None:
    for value, eager, truth in zip(values, eagers, truths, strict=True):
        if truth is not None and truth.norm() > 0:
            assert_accurate(value.cpu(), eager, truth, str(case))
