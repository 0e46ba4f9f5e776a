"""cross_attention in Triton: the launchers against the reference in float64, every path and gradient."""

import json
import math
import mmap
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from accuracy import allowed_error
from cross_attention_cases import (
    CANCELLED,
    CASES,
    NAMES,
    Case,
    as_double,
    operator,
    relative_error_of,
    run,
    terms,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import rskernels
from rskernels.triton import cross_attention as kernels
from rskernels.triton import cross_attention_backward, cross_attention_parts, cross_attention_wide
from rskernels.triton.cross_attention_parts import CUT, cut, pack
from rskernels.triton.launch import CHIPS, CONFIGS, config, noting, shipped

ALL = [True] * 3
MAP_NORESERVE = 0x4000  # Linux's, which Python's mmap does not name
FEW_QUERIES = Case(batch=1, queries=7, keys=140, dim=16)  # SAM, tokens on image: two parts of the keys
FEW_KEYS = Case(batch=1, queries=140, keys=9, dim=16)  # SAM, image on tokens: two parts of the queries
MASKED = Case(batch=1, queries=20, keys=140, dim=32, density=0.3)  # Mask2Former
REIN = Case(heads=1, queries=20, keys=20, dim=257, drop=True, shared=(True, True))
GENERAL = Case(batch=1, heads=1, queries=70, keys=70, dim=128)  # the injector: neither side fits one tile
GENERAL_MASKED = Case(
    heads=1, queries=70, keys=70, dim=72, density=0.3, drop=True, shared=(False, True), layout="channels"
)
WIDE = Case(
    batch=1, heads=1, queries=9, keys=140, dim=257, magnitude=0.1, scale=0.7
)  # many keys for a wide head
WIDE_MASKED = Case(heads=1, queries=5, keys=140, dim=257, density=0.3, drop=True, shared=(True, False))
PATHS = [FEW_QUERIES, FEW_KEYS, MASKED, REIN, GENERAL, GENERAL_MASKED, WIDE, WIDE_MASKED]


def sized(case: Case, dtype: torch.dtype) -> Case:
    """In float32 heads are wide, and neither side is one tile, from smaller sizes on."""
    if dtype != torch.float32 or case.dim < 72:
        return case
    return replace(case, queries=min(case.queries, 40), keys=min(case.keys, 140), dim=min(case.dim, 131))


def launched(case: Case, leaves: list[Tensor], mask: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Output, the three gradients and the statistics."""
    q, k, v = (leaf.detach() for leaf in leaves)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    out, statistics = kernels.forward(q, k, v, mask, scale, case.drop)
    gradients = kernels.backward(grad, q, k, v, out, statistics, mask, scale, case.drop, ALL)
    return [out, *gradients, statistics]


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    leaves, mask, grad = case.inputs(dtype)
    mask = None if mask is None else mask.to(device)
    return [leaf.detach().to(device).requires_grad_() for leaf in leaves], mask, grad.to(device)


def compare(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """As cross_attention_cases.compare, and the statistics; layouts of everything that is returned."""
    leaves, mask, grad = inputs(case, dtype, device)
    truths = run(case, as_double(leaves), mask, grad, "reference")
    floors = terms(case, as_double(leaves), mask, grad)
    eagers = run(case, leaves, mask, grad, "reference")
    *values, statistics = launched(case, leaves, mask, grad)
    for name, value, eager, truth, floor in zip(NAMES, values, eagers, truths, floors, strict=True):
        assert value.dtype == dtype and value.shape == truth.shape, name
        assert value.transpose(1, 2).is_contiguous(), name
        size = CANCELLED * floor.norm().item()
        bound = max(allowed_error(value, case.queries * case.keys), 2 * relative_error_of(eager, truth, size))
        error = relative_error_of(value, truth, size)
        assert error <= bound, f"{name} of {case}: error {error:.2e}, allowed {bound:.2e}"
    scale = case.dim**-0.5 if case.scale is None else case.scale
    q, k, _ = as_double(leaves)
    truth = operator._scores(q, k, mask, scale).logsumexp(-1)
    assert statistics.dtype == torch.float32 and statistics.shape == (*truth.shape, 2)
    top, factor = statistics.double().unbind(-1)
    lse = math.log(2) * top - factor.log()
    # Of numbers around 0 the logits' own size is the measure.
    assert (lse - truth).abs().max() <= 2e-6 * truth.abs().max().clamp_min(1)


@pytest.mark.parametrize("case", PATHS, ids=str)
def test_every_path_matches_the_float64_reference(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    compare(sized(case, dtype), dtype, device)


@pytest.mark.parametrize(
    "case",
    [
        *(CASES[i] for i in (10, 11, 16)),  # one token, one key
        Case(batch=1, heads=3, queries=10, keys=10, dim=32),  # SAM, tokens on tokens
        Case(batch=3, heads=1, queries=20, keys=40, dim=20, drop=True, shared=(True, False)),
        Case(batch=1, queries=50, keys=20, dim=16, density=0.5, layout="heads"),
        Case(heads=1, queries=5, keys=131, dim=7, drop=True, shared=(False, True), magnitude=2.0),
        Case(batch=1, heads=1, queries=1, keys=70, dim=256, scale=-0.05),
        Case(batch=1, heads=1, queries=17, keys=33, dim=48, density=0.5, scale=0.0),
    ],
    ids=str,
)
def test_odd_shapes(case: Case, device: torch.device) -> None:
    compare(case, torch.float32, device)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, heads=1, queries=33, keys=129, dim=64, magnitude=3.0, seed=1),  # many of both
        Case(batch=1, heads=1, queries=40, keys=70, dim=64, magnitude=5.0, seed=1, density=0.5),
        Case(batch=1, heads=1, queries=20, keys=140, dim=32, magnitude=8.0, density=0.3),  # all queries
        Case(batch=1, heads=1, queries=70, keys=9, dim=16, magnitude=8.0, seed=1),  # all keys
        Case(batch=1, heads=1, queries=20, keys=40, dim=160, magnitude=4.0, seed=1),  # wide
        Case(batch=1, heads=1, queries=20, keys=140, dim=160, magnitude=4.0, seed=1),
    ],
    ids=str,
)
def test_large_logits_cost_no_digits(case: Case, device: torch.device) -> None:
    """Weights are close to 0 or 1, and a logit of 100 has 4e-6 of rounding in float32: only where backward
    rebuilds what forward had, with the same rounding, does it cancel."""
    compare(case, torch.float32, device)


@pytest.mark.parametrize("shape_class", ["float/d16", "float/d32", "float/d64", "float/d128"])
def test_float32_products_of_a_head_dim_are_one_instruction(shape_class: str) -> None:
    """From 64 rows on it is another one (wgmma, tcgen05), which may sum in another order."""
    for chip in CHIPS[1:]:
        sides = set()
        for kernel, rows in (("forward", "BLOCK_M"), ("by_queries", "BLOCK_M"), ("by_keys", "BLOCK_N")):
            row = shipped(chip)[f"cross_attention.{kernel}"][shape_class]
            sides |= {each[rows] for each in (row, *kernels.candidates(kernel, shape_class))}
        assert min(sides) >= 64 or max(sides) < 64, sides


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes gigabytes of what has no address space to spare")
def test_rows_2_to_the_31_numbers_apart() -> None:
    tokens, dim, stride = 128, 16, 17_000_000
    # Pages that are not touched do not exist. Base and rows are such that what wraps around is inside, too.
    size = 2 * (2**31 + tokens * stride)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided(
        (1, 1, tokens, dim), (1, 1, stride, 1), 2**31
    )
    near = torch.randn(far.shape, dtype=torch.float16)
    far.copy_(near)
    k = torch.randn(1, 1, 3, dim, dtype=torch.float16)
    expected = kernels.forward(near, k, k, None, 1.0, False)[0]
    assert torch.equal(kernels.forward(far, k, k, None, 1.0, False)[0], expected)


def test_packed_mask_of_many_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits of a query that attends nowhere are set, those of one that attends to the last key are kept."""
    monkeypatch.setattr(cross_attention_parts, "CHUNK", 128)
    mask = torch.zeros(1, 33, 32 * 128 + 3, dtype=torch.bool, device=device)
    mask[0, 1, -1] = mask[0, 32, 0] = True
    bits, groups = pack(mask)
    assert bits is not None and groups == 2
    for query in (0, 1, 31, 32):
        found = bits[0, query // 32] >> query % 32 & 1
        assert torch.equal(found, (mask[0, query] | ~mask[0, query].any()).int())


@settings(max_examples=5)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        heads=st.just(1),
        queries=st.integers(1, 40),
        keys=st.integers(1, 140),
        dim=st.integers(1, 128) | st.sampled_from([16, 144]),
        density=st.sampled_from([None, 0.02, 0.5]),
        drop=st.booleans(),
        shared=st.tuples(st.booleans(), st.booleans()),
        layout=st.sampled_from(["tokens", "heads", "channels"]),
        magnitude=st.sampled_from([0.1, 1.0]),
        scale=st.sampled_from([None, 0.3]),
        seed=st.integers(0, 2**16),
    )
)
def test_any_shape(case: Case, device: torch.device) -> None:
    compare(case, torch.float32, device)


@pytest.mark.parametrize(
    "case",
    [replace(sized(c, torch.float32), batch=1, heads=1) for c in (FEW_QUERIES, FEW_KEYS, GENERAL, REIN)],
    ids=str,
)
def test_only_wanted_gradients_exist_and_are_right(case: Case, device: torch.device) -> None:
    leaves, mask, grad = inputs(case, torch.float32, device)
    out, *everything, statistics = launched(case, leaves, mask, grad)
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        tail = (out, statistics, mask, case.dim**-0.5, case.drop, wanted)
        some = kernels.backward(grad, *(leaf.detach() for leaf in leaves), *tail)
        for value, expected, asked in zip(some, everything, wanted, strict=True):
            assert torch.equal(value, expected) if asked else value.shape == (0, 0, 0, 0)


@pytest.mark.parametrize("case", [MASKED, FEW_KEYS, sized(GENERAL_MASKED, torch.float32)], ids=str)
def test_same_bits_in_any_order_of_programs(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = inputs(case, torch.float32, device)
    results = [launched(case, *call)]
    if device.type == "cuda":
        results.append(launched(case, *call))
    else:
        from triton.runtime.interpreter import interpreter_builder as machine

        run_program = machine.set_grid_idx
        monkeypatch.setattr(
            machine, "set_grid_idx", lambda x, y, z: run_program(machine.grid_dim[0] - 1 - x, y, z)
        )
        results.append(launched(case, *call))
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected) and value.isfinite().all()


def test_reads_masks_and_gradients_of_any_strides(device: torch.device) -> None:
    case = replace(MASKED, queries=33, keys=70)
    leaves, mask, _ = inputs(case, torch.float32, device)
    assert mask is not None
    ones = torch.ones((), device=device).expand(1, 2, 33, 32)
    expected = launched(case, leaves, mask, ones.contiguous())
    strided = mask.transpose(1, 2).contiguous().transpose(1, 2)
    rows_of_more = torch.cat([mask, mask], 2)[:, :, :70]
    for each in (strided, rows_of_more):
        for value, truth in zip(launched(case, leaves, each, ones), expected, strict=True):
            assert torch.equal(value, truth)


@pytest.mark.parametrize("case", [FEW_QUERIES, FEW_KEYS, MASKED, WIDE], ids=str)
def test_huge_logits_stay_finite(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    case = replace(sized(case, dtype), scale=None, magnitude=1.0)
    leaves, mask, grad = inputs(case, dtype, device)
    leaves = [100 * leaf.detach() for leaf in leaves[:2]] + leaves[2:]
    assert (leaves[0].double() @ leaves[1].double().mT * case.dim**-0.5).abs().max() > 1e4
    for value in launched(case, leaves, mask, grad):
        assert value.isfinite().all()


@pytest.mark.parametrize(
    "case", [sized(c, torch.float32) for c in (FEW_QUERIES, MASKED, REIN, WIDE)], ids=str
)
def test_nan_query_spoils_its_own_row_only(case: Case, device: torch.device) -> None:
    (q, k, v), mask, _ = inputs(case, torch.float32, device)
    q, k, v = q.detach(), k.detach(), v.detach()
    clean, clean_statistics = kernels.forward(q, k, v, mask, 0.1, case.drop)
    q[0, -1, 3, 0] = torch.nan
    spoiled, statistics = kernels.forward(q, k, v, mask, 0.1, case.drop)
    assert spoiled[0, -1, 3].isnan().all() and statistics[0, -1, 3].isnan().any()
    spoiled[0, -1, 3], statistics[0, -1, 3] = clean[0, -1, 3], clean_statistics[0, -1, 3]
    assert torch.equal(spoiled, clean) and torch.equal(statistics, clean_statistics)


@pytest.mark.parametrize(
    "case",
    [replace(FEW_QUERIES, drop=True), replace(FEW_KEYS, drop=True), sized(REIN, torch.float32)],
    ids=str,
)
def test_dropped_value_counts_for_nothing_even_if_nan(case: Case, device: torch.device) -> None:
    leaves, mask, grad = inputs(case, torch.float32, device)
    expected = launched(case, leaves, mask, grad)
    with torch.no_grad():
        leaves[2][:, :, 0] = torch.nan
    values = launched(case, leaves, mask, grad)
    assert not values[3][:, :, 0].any()
    for value, truth in zip(values, expected, strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("dim", (16, 131))
@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_nothing_to_do(shape: tuple[int, int, int], dim: int, device: torch.device) -> None:
    q = torch.randn(*shape, dim, device=device)
    for keys in (7, 70):
        k = torch.randn(1, shape[1], keys, dim, device=device)
        out, statistics = kernels.forward(q, k, k, None, 1.0, False)
        dq, dk, dv = kernels.backward(q, q, k, k, out, statistics, None, 1.0, False, ALL)
        assert out.shape == dq.shape == q.shape and statistics.shape == (*shape, 2)
        assert dk.shape == dv.shape == k.shape and not dk.any() and not dv.any()


def test_traced_shapes_are_the_kernels(device: torch.device) -> None:
    q = torch.randn(1, 2, 5, 20)
    with FakeTensorMode():
        traced = torch.empty(q.shape, device="cuda")
        known = torch.ops.rskernels.cross_attention_forward(traced, traced, traced, None, 1.0, False)
    q = q.to(device)
    for value, empty in zip(kernels.forward(q, q, q, None, 1.0, False), known, strict=True):
        assert value.shape == empty.shape and value.dtype == empty.dtype
        assert value.stride() == empty.stride()


def test_keys_are_cut_by_shape_alone() -> None:
    for length, other, programs in [(4096, 7, 8), (16384, 100, 16), (1024, 1024, 64), (1, 1, 1), (0, 5, 0)]:
        parts, part = cut(length, other, programs)
        assert parts * part >= length > (parts - 1) * part or length == 0
        assert part % CUT == 0 and (parts == 1 or part >= other)
    assert cut(4096, 7, 8)[0] > 1 and cut(1024, 1024, 64)[0] == 1
    assert cut(4096, 100, 8) == (16, 256) and cut(1024, 100, 8) == (8, 128)  # half of the chip idle


@pytest.mark.parametrize("chip", CHIPS)
def test_examples_use_every_configuration(chip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, set[str]] = {}

    def noted(kernel: str, shape_class: str, device: torch.device) -> dict[str, int]:
        used.setdefault(kernel, set()).add(shape_class)
        return config(kernel, shape_class, device)

    for module in (kernels, cross_attention_backward, cross_attention_wide):
        monkeypatch.setattr(module, "config", noted)
    torch.use_deterministic_algorithms(False)  # what is only noted down need not be filled
    for _, call in kernels.examples():
        with noting(chip) as launches:
            call()
        assert launches
    shipped = json.loads((CONFIGS / f"cross_attention.sm{chip}.json").read_text())
    assert used == {kernel: set(rows) - {"default"} for kernel, rows in shipped.items()}


def test_candidates_are_configurations() -> None:
    for kernel, rows in json.loads((CONFIGS / "cross_attention.sm90.json").read_text()).items():
        for shape_class, row in rows.items():
            if shape_class == "default":
                continue
            tried = kernels.candidates(kernel.partition(".")[2], shape_class)
            assert 2 <= len(tried) <= 12 and all(set(each) == set(row) for each in tried)
            assert all(one != other for one, other in pairwise(tried))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the public operator takes Triton on CUDA only")
@pytest.mark.parametrize("case", PATHS, ids=str)
def test_the_operator_on_a_device(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    leaves, mask, grad = inputs(case, dtype, device)
    expected = launched(case, leaves, mask, grad)
    options = {"mask": mask, "scale": case.scale, "drop_first_key_value": case.drop}
    for value, truth in zip(run(case, leaves, mask, grad, "triton"), expected, strict=False):
        assert torch.equal(value, truth)
    with rskernels.backend("triton"):
        compiled = torch.compile(rskernels.cross_attention, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*leaves, **options), expected[0])
        tail = (mask, case.dim**-0.5, case.drop)
        torch.library.opcheck(torch.ops.rskernels.cross_attention_forward.default, (*leaves, *tail))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("match", "k", "v", "mask"),
    [
        (r"v has shape \(1, 2, 8, 16\); expected \(1, 2, 40, 16\)", (1, 2, 40, 16), (1, 2, 8, 16), None),
        (r"k has shape \(1, 2, 40, 8\); expected \(1, 2, 40, 16\)", (1, 2, 40, 8), (1, 2, 40, 8), None),
        ("at least one key", (1, 2, 0, 16), (1, 2, 0, 16), None),
        (r"mask has shape \(1, 5, 4\); expected \(1, 5, 40\)", (1, 2, 40, 16), (1, 2, 40, 16), (1, 5, 4)),
    ],
)
def test_a_direct_call_that_does_not_fit_is_refused(match, k, v, mask) -> None:
    q, k, v = torch.zeros(1, 2, 5, 16), torch.zeros(k), torch.zeros(v)
    mask = None if mask is None else torch.zeros(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=match):
        kernels.forward(q, k, v, mask, 1.0, False)
    with pytest.raises(ValueError, match=match):
        kernels.backward(q, q, k, v, q, torch.zeros(1, 2, 5, 2), mask, 1.0, False, [True] * 3)
