"""rel_pos_attention in Triton against the reference in float64: output, log-sum-exp and every gradient."""

import importlib
import math

import pytest
import torch
from accuracy import allowed_error
from hypothesis import given, settings
from hypothesis import strategies as st
from rel_pos_attention_cases import CANCELLED, NAMES, Case, operator, relative_error, rounded, run, terms
from torch import Tensor

import rskernels
from rskernels import rel_pos_attention
from rskernels.triton import rel_pos_attention_tiles as tiles
from rskernels.triton.launch import CHIPS, shipped

kernels = importlib.import_module("rskernels.triton.rel_pos_attention")
KERNELS = ("forward", "query_gradients", "key_gradients", "table_gradients")
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1, "num_stages": 1}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in calls that the interpreter can take."""
    monkeypatch.setattr(tiles, "config", lambda kernel, shape_class, device: dict(SMALL))


def on(device, tensors):
    return [None if t is None else t.detach().to(device) for t in tensors]


def call(case: Case, arguments: list[Tensor | None], grad: Tensor, mask=(True,) * 4, scale=None):
    """(out, lse) and the gradients, from the launchers."""
    qkv, *rest = arguments
    tail = (case.heads, case.window, case.dim**-0.5 if scale is None else scale)
    out, lse = kernels.forward(qkv, *rest, *tail)
    return out, lse, kernels.backward(grad, qkv, out, lse, *rest, *tail, list(mask))


def compare(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Against the float64 reference on the same rounded numbers, eager as the measure."""
    arguments = rounded(case.arguments(), dtype)
    grad = case.grad().to(dtype)
    out, lse, gradients = call(case, on(device, arguments), grad.to(device))
    exact = rounded(arguments, torch.float64)
    qkv, *rest = (None if t is None else t.detach() for t in exact)
    true_lse = operator._forward_composite(qkv, *rest, case.heads, case.window, case.dim**-0.5)[1]
    assert lse.dtype == torch.float32 and lse.shape == true_lse.shape
    # Logits of half precision numbers are exact sums in float32. To base 2, as backward subtracts it.
    assert relative_error(lse.cpu(), true_lse / math.log(2)) < 2e-6, case
    truths = run(case, exact, grad, "reference")
    floors = terms(case, rounded(arguments, torch.float64), grad)
    eagers = run(case, arguments, grad, "reference")
    for name, value, eager, truth, floor in zip(
        NAMES, (out, *gradients), eagers, truths, floors, strict=True
    ):
        if truth is None:
            assert value.numel() == 0, name
            continue
        assert value.dtype == dtype and value.shape == truth.shape and value.is_contiguous(), name
        size = CANCELLED * floor.norm().item()
        bound = max(allowed_error(value), 2 * relative_error(eager, truth, size))
        error = relative_error(value.cpu(), truth, size)
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}, {case}"


@pytest.mark.parametrize(
    "case",
    [
        Case(height=4, width=8, heads=2, batch=2),
        Case(height=5, width=3, window=3, heads=2),
        Case(height=3, width=2, dim=80, heads=1),
        Case(height=2, width=3, dim=256, heads=1),
        Case(height=1, width=1, dim=17, heads=1),
        Case(height=9, width=8, window=14, tables=False, heads=1),  # over a hundred equal keys
        Case(height=1, width=1, window=14, heads=1),  # all but one: of dp - δ hardly anything is left
        Case(height=4, width=8, heads=1, dim=64, magnitude=3.0),  # logits to 30
        Case(height=4, width=8, heads=1, dim=64, magnitude=5.0),  # and to 90
        Case(height=1, width=70, tables=False, heads=1, dim=48),
    ],
    ids=str,
)
def test_matches_the_float64_reference_with_shipped_tiles(case, dtype, device) -> None:
    compare(case, dtype, device)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "case",
    [
        Case(height=6, width=5, heads=1),  # rows of 8 with 3 too many
        Case(height=2, width=21, heads=1),  # a row in slices: sums over it go on from slice to slice
        Case(height=1, width=33, heads=1, dim=17),
        Case(height=19, width=1, heads=1),
        Case(height=5, width=6, window=5, heads=1),
        Case(height=5, width=4, window=4, heads=1, pad=False),
        Case(height=4, width=3, window=3, tables=False, heads=1),
        Case(height=2, width=4, window=2, heads=2),  # nothing is padded
        Case(height=3, width=11, heads=2, tables=False),  # a flat sequence, the last tile not full
    ],
    ids=str,
)
def test_matches_the_float64_reference_over_several_tiles(case, dtype, device) -> None:
    compare(case, dtype, device)


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=6)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        height=st.integers(1, 5),
        width=st.integers(1, 7),
        heads=st.integers(1, 2),
        dim=st.integers(16, 40),
        window=st.integers(0, 6),
        tables=st.booleans(),
        pad=st.booleans(),
        magnitude=st.sampled_from([0.1, 1.0]),
        seed=st.integers(0, 2**16),
    ),
)
def test_matches_the_float64_reference_on_any_shape(device, case) -> None:
    compare(case, torch.float32, device)


@pytest.mark.parametrize(
    "mask",
    [(True, False, False, False), (False, True, False, True), (False, False, True, False), (False,) * 4],
)
def test_only_wanted_gradients_exist_and_are_right(mask, device) -> None:
    case = Case(height=3, width=5, window=3, heads=1)
    arguments, grad = on(device, rounded(case.arguments(), torch.float32)), case.grad().float().to(device)
    everything = call(case, arguments, grad)[2]
    some = call(case, arguments, grad, mask)[2]
    for value, expected, wanted in zip(some, everything, mask, strict=True):
        assert torch.equal(value, expected) if wanted else value.numel() == 0


@pytest.mark.parametrize("tables", [True, False])
def test_reads_any_strides(tables, device) -> None:
    case = Case(batch=2, height=3, width=4, heads=1, tables=tables)
    arguments, grad = on(device, rounded(case.arguments(), torch.float32)), case.grad().float().to(device)
    dense, *rest = arguments
    expected = [*call(case, arguments, grad)[:2], *call(case, arguments, grad)[2]]
    for qkv in (
        dense.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        dense.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([dense, dense], 3)[..., : dense.shape[3]],
    ):
        out, lse, gradients = call(case, [qkv, *rest], grad.transpose(1, 2).contiguous().transpose(1, 2))
        for value, truth in zip((out, lse, *gradients), expected, strict=True):
            torch.testing.assert_close(value, truth)  # without tables other strides mean other tiles
    ones = torch.ones((), device=device).expand(2, 3, 4, 16)  # as sum() gives it: strides of 0
    for value, truth in zip(
        call(case, arguments, ones)[2], call(case, arguments, ones.contiguous())[2], strict=True
    ):
        assert torch.equal(value, truth)


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_twice_and_in_any_order_of_programs(device, monkeypatch) -> None:
    case = Case(height=3, width=8, window=5, heads=1)
    arguments, grad = on(device, rounded(case.arguments(), torch.float32)), case.grad().float().to(device)
    first = call(case, arguments, grad)
    if device.type == "cpu":
        from triton.runtime.interpreter import interpreter_builder

        forwards = interpreter_builder.set_grid_idx

        def backwards(*index: int) -> None:
            forwards(*(size - 1 - i for size, i in zip(interpreter_builder.grid_dim, index, strict=True)))

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    second = call(case, arguments, grad)
    for value, expected in zip((*second[:2], *second[2]), (*first[:2], *first[2]), strict=True):
        assert torch.equal(value, expected) and value.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_programs_without_a_query_inside_the_grid_end_at_once(device, monkeypatch) -> None:
    """They write nothing, and nobody reads what they would have written: memory is full of NaN."""
    case = Case(height=6, width=5, window=5, heads=1)  # of the lower window, one row of five
    scratch, biases = [], tiles.Call.biases

    def noted(call):
        scratch.append(biases(call))
        return scratch[-1]

    monkeypatch.setattr(tiles.Call, "biases", noted)
    arguments, grad = on(device, rounded(case.arguments(), torch.float32)), case.grad().float().to(device)
    out, lse, gradients = call(case, arguments, grad)
    assert all(value.isfinite().all() for value in (out, lse, *gradients))
    for rel in scratch:  # (windows, rows and columns of keys, queries up to a multiple of 16)
        assert rel[0, :, :25].isfinite().all()
        assert rel[1, :, :5].isfinite().all() and rel[1, :, 16:].isnan().all()


def test_huge_logits_stay_finite(dtype, device) -> None:
    case = Case(height=4, width=5, heads=1, window=3, magnitude=50.0)  # products of ±1e4
    arguments, grad = on(device, rounded(case.arguments(), dtype)), case.grad().to(device, dtype)
    out, lse, gradients = call(case, arguments, grad)
    assert lse.abs().max() > 1000
    assert all(value.isfinite().all() for value in (out, lse, *gradients))


@pytest.mark.usefixtures("small_tiles")
def test_nan_spoils_only_rows_that_see_it(dtype, device) -> None:
    case = Case(height=4, width=6, heads=1)
    qkv, *rest = on(device, rounded(case.arguments(), dtype))
    grad = case.grad().to(device, dtype)
    clean = kernels.forward(qkv, *rest, 1, 0, 0.25)[0]
    query = qkv.clone()
    query[0, 2, 3, 7] = torch.nan
    spoiled, lse, gradients = call(case, [query, *rest], grad)
    assert spoiled[0, 2, 3].isnan().all() and lse[0, 0, 2, 3].isnan()
    spoiled[0, 2, 3] = clean[0, 2, 3]
    assert torch.equal(spoiled, clean)
    dq = gradients[0][..., :16]
    assert dq[0, 2, 3].isnan().all() and dq.isnan().any(-1).sum() == 1
    windows = Case(height=4, width=4, heads=1, window=2)
    qkv, *rest = on(device, rounded(windows.arguments(), dtype))
    qkv[0, 1, 0, 16] = torch.nan
    out = kernels.forward(qkv, *rest, 1, 2, 0.25)[0]
    assert out[0, :2, :2].isnan().all()
    assert out[0, 2:].isfinite().all() and out[0, :, 2:].isfinite().all()


def test_tables_and_padding_may_be_fp32_beside_half_activations(device) -> None:
    """Their gradients are fp32 sums, not rounded ones cast back; half ones are the same, rounded."""
    case = Case(height=3, width=4, window=3, heads=1)
    qkv, *rest = on(device, case.arguments())
    qkv, rest, grad = qkv.half(), [t.float() for t in rest], case.grad().half().to(device)
    gradients = call(case, [qkv, *rest], grad)[2]
    rounded_gradients = call(case, [qkv, *(t.half() for t in rest)], grad)[2]
    for value, expected in zip(gradients[1:], rounded_gradients[1:], strict=True):
        assert value.dtype == torch.float32 and not torch.equal(value, value.half().float())
        assert torch.equal(value.half(), expected)


def test_empty_batch(device) -> None:
    case = Case(batch=0, height=3, width=4, window=3, heads=1)
    arguments = on(device, rounded(case.arguments(), torch.float32))
    out, lse, gradients = call(case, arguments, case.grad().float().to(device))
    assert out.shape == (0, 3, 4, 16) and lse.shape == (0, 1, 3, 4) and gradients[0].numel() == 0
    assert all(value.shape == t.shape for value, t in zip(gradients, arguments, strict=True))
    assert not any(value.any() for value in gradients)


@pytest.mark.parametrize(
    ("h", "w", "keys", "expected"),
    [
        (64, 64, 64, (1, 64)),  # a row
        (64, 64, 128, (2, 64)),
        (14, 14, 64, (4, 16)),
        (14, 14, 256, (16, 16)),
        (7, 7, 64, (8, 8)),
        (48, 48, 64, (4, 16)),  # three slices of a row, no padding
        (1, 300, 64, (1, 64)),
        (64, 64, 32, (1, 32)),
        (1, 1, 64, (16, 1)),
    ],
)
def test_key_tiles_span_rows(h: int, w: int, keys: int, expected: tuple[int, int]) -> None:
    assert tiles.key_tile(h, w, keys) == expected


def test_every_class_is_configured_and_among_the_candidates() -> None:
    """So that a tuner starts from what is shipped."""
    classes = ["half/d32", "half/d64", "half/d128", "half/d256", "float/d32", "float/d64"]
    for chip in CHIPS:
        for kernel in KERNELS:
            rows = shipped(chip)[f"rel_pos_attention.{kernel}"]
            assert set(rows) == {"default", *classes}
            for each in classes:
                found = kernels.candidates(kernel, each)
                assert len(found) <= 12 and rows[each] in found, (chip, kernel, each)


def test_examples_cover_every_class_and_kernel() -> None:
    from rskernels.triton.launch import noting

    for each, dims in (("bfloat16", (16, 32, 64, 128, 256)), ("float32", (16, 32, 64))):
        names = set()
        for name, example in kernels.examples():
            if not name.endswith(each):
                continue
            with noting(90) as launches:
                example()
            names |= {(launch.kernel.fn.__name__, launch.constants["BLOCK_D"]) for launch in launches}
        assert names == {
            (kernel, dim)
            for kernel in ("forward_kernel", *KERNELS[1:])
            for dim in dims
        }  # fmt: skip


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 64), (torch.float16, 256)])
def test_a_larger_head_dim_is_refused_by_name_and_left_to_the_reference(dtype, limit) -> None:
    qkv = torch.empty(0, dtype=dtype)
    assert operator._without(qkv, limit) == {}
    assert operator._without(qkv, limit + 1)["triton"].endswith(f"at most {limit}, this is {limit + 1}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the interpreter ran the launchers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_operator_on_a_device(dtype: torch.dtype) -> None:
    case = Case(height=20, width=30, window=14, dim=64)
    arguments = [t.cuda().requires_grad_() for t in rounded(case.arguments(), dtype) if t is not None]

    def attention(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, pad: Tensor) -> Tensor:
        return rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=2, window_size=14, pad_qkv=pad)

    grad = case.grad().to("cuda", dtype)
    results = []
    for function, backend in (
        (attention, "reference"),
        (attention, "triton"),
        (torch.compile(attention, fullgraph=True), "triton"),
    ):
        with rskernels.backend(backend):
            out = function(*arguments)
            results.append([out, *torch.autograd.grad(out, arguments, grad)])
    for value, compiled, expected in zip(results[1], results[2], results[0], strict=True):
        assert torch.equal(value, compiled)
        assert relative_error(value, expected.double()) < 4 * allowed_error(value)
    plain = [t.detach() for t in arguments]
    torch.library.opcheck(operator._attention_forward, (*plain, 2, 14, 0.125))


@pytest.mark.parametrize(
    ("match", "tables", "pad"),
    [
        (r"rel_pos_h has shape \(3, 16\); expected \(7, 16\)", ((3, 16), (9, 16)), None),
        (r"rel_pos_w has shape \(9, 8\); expected \(9, 16\)", ((7, 16), (9, 8)), None),
        ("one of both tables is None", ((7, 16), None), None),
        (r"pad_qkv has shape \(7,\); expected \(48,\)", (None, None), 7),
    ],
)
def test_a_direct_call_that_does_not_fit_is_refused(match, tables, pad) -> None:
    table_h, table_w = (None if shape is None else torch.zeros(shape) for shape in tables)
    pad_qkv = None if pad is None else torch.zeros(pad)
    with pytest.raises(ValueError, match=f"rel_pos_attention: {match}"):
        kernels.forward(torch.zeros(1, 4, 5, 48), table_h, table_w, pad_qkv, 1, 0, 1.0)
