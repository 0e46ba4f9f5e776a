"""cross_attention on the CPU: the C++ kernels against the float64 reference, see test_cross_attention.py."""

import sys
from dataclasses import dataclass, replace

import pytest
import torch
from accuracy import allowed_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rskernels
import rskernels.ops.cross_attention  # the function of the same name hides the module
from rskernels import dispatch

operator = sys.modules["rskernels.ops.cross_attention"]
needs_cpp = pytest.mark.skipif(
    "cpp" in dispatch.UNAVAILABLE, reason=f"no C++ backend: {dispatch.UNAVAILABLE.get('cpp')}"
)
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("out", "q", "k", "v")
# A gradient below this share of its terms (see terms()) is mostly rounding: that share measures its error.
CANCELLED = 0.5


@dataclass(frozen=True)
class Case:
    """A call. density: share of True in the mask (None: no mask); shared: k, v have a batch of 1;
    layout: "tokens" as projections leave them, "heads" contiguous, "channels" with d not contiguous."""

    batch: int = 2
    heads: int = 2
    queries: int = 20
    keys: int = 30
    dim: int = 16
    density: float | None = None
    drop: bool = False
    shared: tuple[bool, bool] = (False, False)
    layout: str = "tokens"
    magnitude: float = 1.0
    scale: float | None = None
    seed: int = 0

    def inputs(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """q, k, v with their layout as leaves, the mask, and the gradient of the output."""
        rng = torch.Generator().manual_seed(self.seed)

        def normal(batch: int, tokens: int, std: float = 1.0) -> Tensor:
            shape = {
                "tokens": (batch, tokens, self.heads, self.dim),
                "heads": (batch, self.heads, tokens, self.dim),
                "channels": (batch, self.heads, self.dim, tokens),
            }[self.layout]
            x = (torch.randn(shape, generator=rng, dtype=torch.float64) * std).to(dtype)
            if self.layout == "tokens":
                return x.transpose(1, 2)
            return x if self.layout == "heads" else x.transpose(2, 3)

        k_batch, v_batch = (1 if shared else self.batch for shared in self.shared)
        leaves = [
            normal(self.batch, self.queries, self.magnitude),
            normal(k_batch, self.keys, self.magnitude),
            normal(v_batch, self.keys),
        ]
        mask = None
        if self.density is not None:
            mask = torch.rand(self.batch, self.queries, self.keys, generator=rng) < self.density
            mask[:, :, self.keys // 3 : 2 * self.keys // 3] = False  # whole tiles of keys
            mask[0, self.queries // 2] = False  # attends nowhere, hence everywhere
        return [leaf.requires_grad_() for leaf in leaves], mask, normal(self.batch, self.queries)


def run(case: Case, leaves: list[Tensor], mask: Tensor | None, grad: Tensor, backend: str) -> list[Tensor]:
    """Output and gradients on a backend; what needs no gradient gives None."""
    with rskernels.backend(backend):
        out = rskernels.cross_attention(*leaves, mask=mask, scale=case.scale, drop_first_key_value=case.drop)
    for leaf in leaves:
        leaf.grad = None
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def as_double(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def terms(case: Case, leaves: list[Tensor], mask: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Gradients with the softmax's denominator held fixed: what the true ones are differences of.

    Where keys are alike, or one key takes all, a softmax has next to no gradient, and what is left is the
    rounding of these terms. Everywhere else their norms are the true gradients' norms.
    """
    q, k, v = leaves
    scores = operator._scores(q, k, mask, case.dim**-0.5 if case.scale is None else case.scale)
    p = (scores - scores.logsumexp(-1, keepdim=True).detach()).exp()
    (p @ operator._kept_values(v, case.drop)).backward(grad.to(q.dtype))
    return [torch.zeros(()), *(leaf.grad for leaf in leaves)]


def relative_error_of(value: Tensor, truth: Tensor, floor: float) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp_min(max(floor, 1e-30))).item()


def compare(case: Case, dtype: torch.dtype) -> None:
    """C++ in `dtype` against the float64 reference on the same rounded numbers, eager as the measure."""
    leaves, mask, grad = case.inputs(dtype)
    truths = run(case, as_double(leaves), mask, grad, "reference")
    floors = terms(case, as_double(leaves), mask, grad)
    eagers = run(case, leaves, mask, grad, "reference")
    values = run(case, leaves, mask, grad, "cpp")
    for name, value, eager, truth, floor in zip(NAMES, values, eagers, truths, floors, strict=True):
        assert value.dtype == dtype and value.shape == truth.shape, name
        size = CANCELLED * floor.norm().item()
        bound = max(allowed_error(value, case.queries * case.keys), 2 * relative_error_of(eager, truth, size))
        error = relative_error_of(value, truth, size)
        assert error <= bound, f"{name} of {case}: error {error:.2e}, allowed {bound:.2e}"


CASES = [
    Case(batch=1, heads=8, queries=7, keys=1030, dim=16),  # SAM, tokens to image: the keys are cut
    Case(heads=8, queries=1030, keys=9, dim=16),  # SAM, image to tokens: few keys
    Case(heads=8, queries=10, keys=10, dim=32),  # SAM, tokens to tokens
    Case(heads=3, queries=100, keys=1100, dim=32, density=0.3),  # Mask2Former
    Case(heads=1, queries=300, keys=100, dim=300, drop=True, shared=(True, True)),  # Rein
    Case(batch=3, heads=1, queries=600, keys=40, dim=20, drop=True, shared=(True, False)),
    Case(batch=1, queries=530, keys=530, dim=64),  # injector: parts of the queries
    Case(heads=3, queries=33, keys=700, dim=5, density=0.02, drop=True, layout="heads"),
    Case(queries=5, keys=519, dim=7, drop=True, magnitude=2.0),  # few queries, tails
    Case(queries=9, keys=600, dim=48, density=0.5, shared=(False, True), layout="channels"),
    Case(batch=1, heads=1, queries=1, keys=1, dim=1),
    Case(batch=1, heads=1, queries=1, keys=1, dim=3, drop=True),
    Case(heads=1, queries=70, keys=513, dim=257, magnitude=0.1, scale=0.7),
    Case(queries=100, keys=1100, dim=32),  # no mask: the keys are cut
    Case(
        heads=1, queries=300, keys=70, dim=72, density=0.1, drop=True, shared=(True, False)
    ),  # several tiles
    Case(queries=7, keys=700, dim=16, shared=(True, True)),
    Case(batch=1, queries=1, keys=1, dim=256, density=0.02, magnitude=0.1, seed=2),  # one key takes all
]


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_reference(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@needs_cpp
@settings(max_examples=60, deadline=None, print_blob=True)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        heads=st.integers(1, 4),
        queries=st.integers(1, 150) | st.integers(1, 12),
        keys=st.integers(1, 700) | st.integers(1, 12),
        dim=st.integers(1, 128) | st.sampled_from([16, 32, 64, 256]),
        density=st.sampled_from([None, 0.02, 0.5]),
        drop=st.booleans(),
        shared=st.tuples(st.booleans(), st.booleans()),
        layout=st.sampled_from(["tokens", "heads", "channels"]),
        magnitude=st.sampled_from([0.1, 1.0]),  # logits up to some 50; beyond, finite is all that is asked
        scale=st.sampled_from([None, 0.3]),
        seed=st.integers(0, 2**16),
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_the_float64_reference_on_any_shape(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@pytest.mark.parametrize("case", [CASES[2], CASES[5], Case(queries=9, density=0.3, drop=True)], ids=str)
def test_composite_operators_match_the_reference(case: Case) -> None:
    """What serves the registered operators where no extension is built."""
    leaves, mask, grad = case.inputs(torch.float64)
    expected = run(case, leaves, mask, grad, "reference")
    operators, tail = torch.ops.rskernels, (mask, case.dim**-0.5, case.drop)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    with torch.no_grad():
        out, lse = operators.cross_attention_forward.default.redispatch(keys, *leaves, *tail)
        gradients = operators.cross_attention_backward.default.redispatch(
            keys, grad, *leaves, out, lse, *tail, [True] * 3
        )
    for name, value, truth in zip(NAMES, (out, *gradients), expected, strict=True):
        torch.testing.assert_close(value, truth, msg=lambda m, name=name: f"{name}: {m}")


@needs_cpp
@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[5]], ids=str)
def test_only_wanted_gradients_exist_and_are_right(case: Case, wanted: int) -> None:
    leaves, mask, grad = case.inputs(torch.float32)
    everything = run(case, leaves, mask, grad, "cpp")
    for bit, leaf in enumerate(leaves):
        leaf.grad = None
        leaf.requires_grad_(bool(wanted >> bit & 1))
    some = run(case, leaves, mask, grad, "cpp")
    for bit, (value, expected) in enumerate(zip(some[1:], everything[1:], strict=True)):
        assert (value is not None) == bool(wanted >> bit & 1)
        assert value is None or torch.equal(value, expected)


@needs_cpp
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_output_and_gradients_are_stored_by_token(case: Case) -> None:
    """What the models do next, `.transpose(1, 2).flatten(2)`, must be a view."""
    leaves, mask, grad = case.inputs(torch.float32)
    for name, value in zip(NAMES, run(case, leaves, mask, grad, "cpp"), strict=True):
        assert value.transpose(1, 2).is_contiguous(), name


@needs_cpp
def test_reads_expanded_gradients_and_masks_of_any_strides() -> None:
    case = CASES[3]
    leaves, mask, _ = case.inputs(torch.float32)
    ones = torch.ones(()).expand(2, 3, 100, 32)
    expected = run(case, leaves, mask, ones.contiguous(), "cpp")
    strided = mask.transpose(1, 2).contiguous().transpose(1, 2)
    rows_of_more = torch.cat([mask, mask], 2)[:, :, : case.keys]
    for each in (mask, strided, rows_of_more):
        for value, truth in zip(run(case, leaves, each, ones, "cpp"), expected, strict=True):
            assert torch.equal(value, truth)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=str)
def test_huge_logits_stay_finite(case: Case, dtype: torch.dtype) -> None:
    leaves, mask, grad = case.inputs(dtype)
    leaves = [(100 * leaf).detach().requires_grad_() for leaf in leaves[:2]] + leaves[2:]
    assert (leaves[0] @ leaves[1].transpose(2, 3) * case.dim**-0.5).abs().max() > 1e4
    for value in run(case, leaves, mask, grad, "cpp"):
        assert value.isfinite().all()


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[6]], ids=str)
def test_nan_query_spoils_its_own_row_only(case: Case, dtype: torch.dtype) -> None:
    (q, k, v), mask, _ = case.inputs(dtype)
    q, k, v = q.detach(), k.detach(), v.detach()
    with rskernels.backend("cpp"):
        clean = rskernels.cross_attention(q, k, v, mask=mask)
        q[0, 1, 3, 0] = torch.nan
        spoiled = rskernels.cross_attention(q, k, v, mask=mask)
    assert spoiled[0, 1, 3].isnan().all()
    spoiled[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(spoiled, clean)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_key_spoils_every_row_that_sees_it(dtype: torch.dtype) -> None:
    (q, k, v), _, _ = CASES[6].inputs(dtype)
    with torch.no_grad(), rskernels.backend("cpp"):
        k[0, 1, 400, 3] = torch.nan
        out = rskernels.cross_attention(q, k, v)
    assert out[0, 1].isnan().all() and out[0, 0].isfinite().all()


@needs_cpp
def test_dropped_value_counts_for_nothing_even_if_nan() -> None:
    case = CASES[4]
    leaves, mask, grad = case.inputs(torch.float32)
    expected = run(case, leaves, mask, grad, "cpp")
    with torch.no_grad():
        leaves[2][:, :, 0] = torch.nan
    values = run(case, leaves, mask, grad, "cpp")
    assert not values[3][:, :, 0].any()
    for value, truth in zip(values, expected, strict=True):
        assert torch.equal(value, truth)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 3, 5, 6, 13, 14)], ids=str)
def test_same_bits_on_every_run_and_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    """Outputs are poisoned first, so this also sees every element written."""
    torch.use_deterministic_algorithms(True)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(run(case, *case.inputs(dtype), "cpp"))
    for other in results[1:]:
        for name, value, expected in zip(NAMES, other, results[0], strict=True):
            assert torch.equal(value, expected) and value.isfinite().all(), name


@needs_cpp
def test_opcheck() -> None:
    forward = torch.ops.rskernels.cross_attention_forward.default
    backward = torch.ops.rskernels.cross_attention_backward.default
    for case in (Case(shared=(True, False)), Case(density=0.3, drop=True)):
        leaves, mask, grad = case.inputs(torch.float32)
        tail = (mask, 0.25, case.drop)
        torch.library.opcheck(forward, (*leaves, *tail))
        leaves = [leaf.detach() for leaf in leaves]
        torch.library.opcheck(forward, (*(leaf.bfloat16() for leaf in leaves), *tail))
        out, lse = forward(*leaves, *tail)
        torch.library.opcheck(backward, (grad, *leaves, out, lse, *tail, [True, False, True]))


@needs_cpp
def test_second_derivative_is_an_error_not_a_wrong_answer() -> None:
    leaves, _, _ = Case().inputs(torch.float32)
    with rskernels.backend("cpp"):
        out = rskernels.cross_attention(*leaves)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


class Decoder(torch.nn.Module):
    """Attention as the models use it: projections, heads as views, heads joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = torch.nn.Linear(32, 32), torch.nn.Linear(32, 64)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (self.q(x), *self.kv(memory).chunk(2, -1))
        )
        return rskernels.cross_attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)


def decoder_inputs(batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, queries, 32),
        torch.randn(batch, keys, 32),
        torch.rand(batch, queries, keys) > 0.5,
    )


@pytest.mark.parametrize(
    ("dynamic", "backend"),
    [(True, "reference"), *(pytest.param(d, "cpp", marks=needs_cpp) for d in (False, True))],
)
def test_compiles_whole(dynamic: bool, backend: str) -> None:
    decoder = Decoder()
    compiled = torch.compile(decoder, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    parameters = list(decoder.parameters())
    with rskernels.backend(backend):
        for sizes in [(2, 5, 70), (3, 20, 33)]:
            inputs = decoder_inputs(*sizes)
            expected, out = decoder(*inputs), compiled(*inputs)
            torch.testing.assert_close(out, expected)
            truths = torch.autograd.grad(expected.square().sum(), parameters)
            for value, truth in zip(torch.autograd.grad(out.square().sum(), parameters), truths, strict=True):
                torch.testing.assert_close(value, truth)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_exports_with_dynamic_sizes(backend: str) -> None:
    decoder = Decoder().eval()
    batch, queries, keys = (torch.export.Dim(name, min=2, max=512) for name in ("batch", "queries", "keys"))
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch, 1: queries, 2: keys})
    with rskernels.backend(backend):
        exported = torch.export.export(decoder, decoder_inputs(2, 8, 40), dynamic_shapes=shapes)
        inputs = decoder_inputs(3, 5, 300)
        torch.testing.assert_close(exported.module()(*inputs), decoder(*inputs))


@needs_cpp
def test_autocast_of_the_kernel_and_gradients_keep_their_dtypes() -> None:
    case = Case(queries=70, keys=90, dim=32)
    leaves, mask, grad = case.inputs(torch.float32)
    leaves[1] = leaves[1].detach().bfloat16().requires_grad_()
    truths = run(case, as_double(leaves), mask, grad, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        values = run(case, leaves, mask, grad, "cpp")
    assert [value.dtype for value in values] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    for value, truth in zip(values, truths, strict=True):
        assert relative_error_of(value, truth, 0.0) < 2e-2  # q, k, v themselves are rounded to bf16


@needs_cpp
@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(1, shape[1], 7, 16, requires_grad=True)
    with rskernels.backend("cpp"):
        out = rskernels.cross_attention(q, k, k)
    out.sum().backward()
    assert out.shape == shape and q.grad.shape == shape and not k.grad.any()


@needs_cpp
@pytest.mark.parametrize("level", ("baseline", "avx2", "avx512", "avx512_bf16"))
def test_every_instruction_set(level: str) -> None:
    """Each kernel, with and without a mask."""
    from rskernels import _C

    current = _C.cpu_capability()
    try:
        _C.set_cpu_capability(level)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for each in (*CASES[:4], *CASES[5:]):
            small = replace(each, heads=min(each.heads, 3))
            compare(small, torch.float32)
            compare(small, torch.bfloat16)
    finally:
        _C.set_cpu_capability(current)
