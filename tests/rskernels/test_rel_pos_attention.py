"""rel_pos_attention: the C++ kernel against the reference in float64, forward and every gradient."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rskernels
import rskernels.ops.rel_pos_attention  # the function of the same name hides the module
from rskernels import dispatch, rel_pos_attention

operator = sys.modules["rskernels.ops.rel_pos_attention"]
needs_cpp = pytest.mark.skipif(
    "cpp" in dispatch.UNAVAILABLE, reason=f"no C++ backend: {dispatch.UNAVAILABLE.get('cpp')}"
)
NAMES = ("out", "qkv", "rel_pos_h", "rel_pos_w", "pad_qkv")
# A gradient below this share of its terms (see terms()) is mostly rounding: that share measures its error.
CANCELLED = 0.5
BOUND = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Case:
    """A call: grid, heads, head dim, window side (0: global), with or without tables and pad_qkv."""

    batch: int = 1
    height: int = 9
    width: int = 11
    heads: int = 2
    dim: int = 16
    window: int = 0
    tables: bool = True
    pad: bool = True
    magnitude: float = 1.0
    seed: int = 0

    def arguments(self) -> list[Tensor | None]:
        """qkv, rel_pos_h, rel_pos_w, pad_qkv in float64; biases about as large as scaled products."""
        rng = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64) * std

        channels = 3 * self.heads * self.dim
        rows, columns = (self.window, self.window) if self.window else (self.height, self.width)
        table_std = self.dim**-0.5
        return [
            normal(self.batch, self.height, self.width, channels, std=self.magnitude),
            normal(2 * rows - 1, self.dim, std=table_std) if self.tables else None,
            normal(2 * columns - 1, self.dim, std=table_std) if self.tables else None,
            normal(channels, std=self.magnitude) if self.pad and self.pads() else None,
        ]

    def pads(self) -> bool:
        return self.window > 0 and (self.height % self.window > 0 or self.width % self.window > 0)

    def grad(self) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, self.height, self.width, self.heads * self.dim)
        return torch.randn(*shape, generator=rng, dtype=torch.float64)


def rounded(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """New leaves in `dtype`."""
    return [None if t is None else t.detach().to(dtype).clone().requires_grad_() for t in tensors]


def run(case: Case, arguments: list[Tensor | None], grad: Tensor, backend: str) -> list[Tensor | None]:
    """Output and gradients of `arguments` on a backend."""
    qkv, rel_pos_h, rel_pos_w, pad_qkv = arguments
    with rskernels.backend(backend):
        out = rel_pos_attention(
            qkv, rel_pos_h, rel_pos_w, num_heads=case.heads, window_size=case.window, pad_qkv=pad_qkv
        )
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(None if t is None else t.grad for t in arguments)]


def terms(case: Case, arguments: list[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Gradients with the softmax's denominator held fixed: what the true ones are differences of.

    Where keys are alike (padding) or one key takes all, a softmax has next to no gradient, and what is left
    is the rounding of these terms. Everywhere else their norms are the true gradients' norms.
    """
    qkv, rel_pos_h, rel_pos_w, pad_qkv = arguments
    q, k, v = operator._heads_of_windows(qkv, pad_qkv, case.heads, case.window)
    window = operator._window(qkv, case.window)
    scores = operator._scores(q, k, rel_pos_h, rel_pos_w, case.dim**-0.5, window)
    out = (scores - scores.logsumexp(-1, keepdim=True).detach()).exp() @ v
    out = operator._grid_of_windows(out.transpose(1, 2).flatten(2), qkv, case.window)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(None if t is None else t.grad for t in arguments)]


def relative_error(value: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp_min(max(floor, 1e-30))).item()


def compare(case: Case, dtype: torch.dtype) -> None:
    """C++ in `dtype` against the float64 reference on the same rounded numbers, eager as the measure."""
    arguments = rounded(case.arguments(), dtype)
    grad = case.grad().to(dtype)
    truths = run(case, rounded(arguments, torch.float64), grad, "reference")
    floors = terms(case, rounded(arguments, torch.float64), grad)
    eagers = run(case, rounded(arguments, dtype), grad, "reference")
    values = run(case, arguments, grad, "cpp")
    for name, value, eager, truth, floor in zip(NAMES, values, eagers, truths, floors, strict=True):
        if truth is None:
            assert value is None, name
            continue
        assert value.dtype == dtype and value.shape == truth.shape, name
        size = CANCELLED * floor.norm().item()
        bound = max(BOUND[dtype], 2 * relative_error(eager, truth, size))
        assert relative_error(value, truth, size) < bound, (name, case)


CASES = [
    Case(height=16, width=16, batch=2, dim=64),
    Case(window=4, dim=16, heads=3),
    Case(window=14, height=20, width=30, dim=64),
    Case(window=5, pad=False),
    Case(window=3, tables=False),
    Case(height=1, width=300, dim=80),
    Case(height=1, width=300, dim=32, tables=False, pad=False, batch=2),
    Case(height=30, width=23, dim=48, heads=1),
    Case(height=1, width=1, dim=17, heads=1),
    Case(height=5, width=3, window=7, dim=256, heads=1),
    Case(height=40, width=7, dim=33),
    Case(height=17, width=19, dim=24),  # an odd number of keys in several tiles
    Case(window=14, height=28, width=42, dim=16, heads=4),  # windows enough: all their queries in one tile
]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_reference(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@needs_cpp
@settings(max_examples=40, deadline=None, print_blob=True)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        height=st.integers(1, 20),
        width=st.integers(1, 20),
        heads=st.integers(1, 3),
        dim=st.integers(16, 256) | st.sampled_from([16, 32, 64, 80, 128]),
        window=st.integers(0, 9),
        tables=st.booleans(),
        pad=st.booleans(),
        magnitude=st.sampled_from([0.1, 1.0]),
        seed=st.integers(0, 2**16),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_matches_the_float64_reference_on_any_shape(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


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


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[4], Case(height=3, width=6)], ids=str)
def test_composite_operators_match_the_reference(case: Case) -> None:
    """What serves the registered operators where no extension is built."""
    arguments = rounded(case.arguments(), torch.float64)
    expected = run(case, rounded(arguments, torch.float64), case.grad(), "reference")
    qkv, rel_pos_h, rel_pos_w, pad = arguments
    operators, scale = torch.ops.rskernels, case.dim**-0.5
    tail = (case.heads, case.window, scale)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    with torch.no_grad():
        out, lse = operators.rel_pos_attention_forward.default.redispatch(
            keys, qkv, rel_pos_h, rel_pos_w, pad, *tail
        )
        gradients = operators.rel_pos_attention_backward.default.redispatch(
            keys, case.grad(), qkv, out, lse, rel_pos_h, rel_pos_w, pad, *tail, [True] * 4
        )
    for name, value, truth in zip(NAMES, (out, *gradients), expected, strict=True):
        if truth is not None:
            torch.testing.assert_close(value, truth, msg=lambda m, name=name: f"{name}: {m}")


@needs_cpp
@pytest.mark.parametrize("mask", range(1, 16))
def test_only_wanted_gradients_exist_and_are_right(mask: int) -> None:
    case = Case(window=4, dim=16)
    everything = run(case, rounded(case.arguments(), torch.float32), case.grad(), "cpp")
    arguments = rounded(case.arguments(), torch.float32)
    for bit, argument in enumerate(arguments):
        argument.requires_grad_(bool(mask >> bit & 1))
    some = run(case, arguments, case.grad(), "cpp")
    for bit, (value, expected) in enumerate(zip(some[1:], everything[1:], strict=True)):
        assert (value is not None) == bool(mask >> bit & 1)
        assert value is None or torch.equal(value, expected)


@needs_cpp
def test_reads_any_strides() -> None:
    case = Case(batch=2, height=6, width=5, dim=16, window=4)
    arguments = rounded(case.arguments(), torch.float32)
    expected = run(case, arguments, case.grad(), "cpp")
    dense = arguments[0].detach()
    layouts = {
        "channels first": dense.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "grid transposed": dense.transpose(1, 2).contiguous().transpose(1, 2),
        "a slice of more channels": torch.cat([dense, dense], 3)[..., : dense.shape[3]],
    }
    for name, qkv in layouts.items():
        strided = [qkv.requires_grad_(), *rounded(arguments[1:], torch.float32)]
        # An expanded gradient, as sum() gives it, has strides of 0.
        for value, truth in zip(run(case, strided, case.grad(), "cpp"), expected, strict=True):
            assert torch.equal(value, truth), name
    for arguments_ in (arguments, strided):
        for tensor in arguments_:
            tensor.grad = None
    ones = torch.ones(()).expand(2, 6, 5, 32)
    for value, truth in zip(
        run(case, strided, ones, "cpp"), run(case, arguments, ones.contiguous(), "cpp"), strict=True
    ):
        assert torch.equal(value, truth)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_stay_finite(dtype: torch.dtype) -> None:
    case = Case(height=12, width=12, dim=16, window=7, magnitude=50.0)  # products of ±1e4
    arguments = rounded(case.arguments(), dtype)
    for value in run(case, arguments, case.grad(), "cpp"):
        assert value is None or value.isfinite().all()


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


@needs_cpp
def test_nan_key_spoils_every_row_that_sees_it() -> None:
    case = Case(height=8, width=8, heads=1, dim=16, window=4)
    qkv, rel_pos_h, rel_pos_w = (t.detach() for t in rounded(case.arguments()[:3], torch.float32))
    qkv[0, 1, 2, 16] = torch.nan
    out = rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=1, window_size=4)
    assert out[0, :4, :4].isnan().all()
    assert out[0, 4:].isfinite().all() and out[0, :, 4:].isfinite().all()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        Case(height=33, width=40, heads=3),
        Case(height=20, width=20, window=7),
        Case(heads=1, height=40, width=40),
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


@needs_cpp
def test_opcheck() -> None:
    case = Case(window=4, height=5, width=6)
    qkv, rel_pos_h, rel_pos_w, pad = rounded(case.arguments(), torch.float32)
    tail = (case.heads, case.window, 0.25)
    forward = torch.ops.rskernels.rel_pos_attention_forward.default
    torch.library.opcheck(forward, (qkv, rel_pos_h, rel_pos_w, pad, *tail))
    torch.library.opcheck(forward, (qkv.detach().bfloat16(), None, None, None, *tail))
    qkv, rel_pos_h, rel_pos_w, pad = (t.detach() for t in (qkv, rel_pos_h, rel_pos_w, pad))
    out, lse = forward(qkv, rel_pos_h, rel_pos_w, pad, *tail)
    torch.library.opcheck(
        torch.ops.rskernels.rel_pos_attention_backward.default,
        (torch.ones_like(out), qkv, out, lse, rel_pos_h, rel_pos_w, pad, *tail, [True, True, False, True]),
    )


@needs_cpp
def test_second_derivative_is_an_error_not_a_wrong_answer() -> None:
    case = Case()
    qkv, rel_pos_h, rel_pos_w, _ = rounded(case.arguments(), torch.float32)
    with rskernels.backend("cpp"):
        out = rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=2)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        self.rel_pos_h = torch.nn.Parameter(torch.randn(7, 16))
        self.rel_pos_w = torch.nn.Parameter(torch.randn(7, 16))

    def forward(self, x: Tensor) -> Tensor:
        return rel_pos_attention(
            self.qkv(x), self.rel_pos_h, self.rel_pos_w, num_heads=2, window_size=4, pad_qkv=self.qkv.bias
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    torch.manual_seed(0)
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in [(1, 6, 5, 32), (2, 9, 7, 32)]:
        x = torch.randn(shape)
        expected, out = block(x), compiled(x)
        torch.testing.assert_close(out, expected)
        parameters = list(block.parameters())
        gradients = torch.autograd.grad(out.square().sum(), parameters)
        for value, truth in zip(
            gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True
        ):
            torch.testing.assert_close(value, truth)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs(backend: str) -> None:
    case = Case(window=4, dim=32)
    arguments = rounded(case.arguments(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values = run(case, arguments, case.grad(), backend)
    assert values[0].dtype == torch.bfloat16
    truths = run(case, rounded(arguments, torch.float64), case.grad(), "reference")
    for name, value, truth in zip(NAMES[1:], values[1:], truths[1:], strict=True):
        assert value.dtype == torch.float32, name
        assert relative_error(value, truth) < 2e-2, name  # q, k, v themselves are rounded to bf16


@needs_cpp
def test_tables_may_be_fp32_beside_bf16_activations() -> None:
    """Their gradients are fp32 sums, not bf16 numbers cast back."""
    case = Case(window=4, dim=32)
    qkv, *rest = case.arguments()
    arguments = [*rounded([qkv], torch.bfloat16), *rounded(rest, torch.float32)]
    values = run(case, arguments, case.grad(), "cpp")
    assert values[1].dtype == torch.bfloat16
    for value in values[2:]:
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float())


@needs_cpp
def test_empty_batch() -> None:
    qkv = torch.randn(0, 4, 4, 96, requires_grad=True)
    table = torch.randn(7, 16, requires_grad=True)
    out = rel_pos_attention(qkv, table, table, num_heads=2)
    out.sum().backward()
    assert out.shape == (0, 4, 4, 32) and qkv.grad.shape == qkv.shape and not table.grad.any()


BAD = {
    "qkv is list": (TypeError, {"qkv": [1.0]}),
    "qkv is torch.int64": (TypeError, {"qkv": torch.ones(1, 4, 4, 96, dtype=torch.int64)}),
    r"qkv has shape \(4, 4, 96\)": (ValueError, {"qkv": torch.ones(4, 4, 96)}),
    r"divisible by 2 heads": (ValueError, {"qkv": torch.ones(1, 4, 4, 99)}),
    "nothing empty but": (ValueError, {"qkv": torch.ones(1, 0, 4, 96)}),
    r"rel_pos_h has shape \(5, 16\); expected \(7, 16\)": (ValueError, {"rel_pos_h": torch.ones(5, 16)}),
    r"rel_pos_w has shape \(7, 8\); expected \(7, 16\)": (ValueError, {"rel_pos_w": torch.ones(7, 8)}),
    "expected both or neither": (ValueError, {"rel_pos_h": None}),
    r"pad_qkv has shape \(32,\); expected \(96,\)": (ValueError, {"pad_qkv": torch.ones(32)}),
    "num_heads is 0": (ValueError, {"num_heads": 0}),
    "num_heads is 2.0; expected an int": (TypeError, {"num_heads": 2.0}),
    "window_size -1": (ValueError, {"window_size": -1}),
    "window_size is 4294967296": (ValueError, {"window_size": 2**32}),
    "window_size is 4097": (ValueError, {"window_size": 4097}),
    "window_size is 3.5; expected an int": (TypeError, {"window_size": 3.5}),
    "scale is inf": (ValueError, {"scale": float("inf")}),
    "scale is nan": (ValueError, {"scale": float("nan")}),
    "scale is 'large'; expected a finite number": (TypeError, {"scale": "large"}),
    "rel_pos_w is on meta": (ValueError, {"rel_pos_w": torch.ones(7, 16, device="meta")}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str) -> None:
    error, change = BAD[message]
    good = {
        "qkv": torch.ones(1, 4, 4, 96),
        "rel_pos_h": torch.ones(7, 16),
        "rel_pos_w": torch.ones(7, 16),
        "num_heads": 2,
    }
    assert rel_pos_attention(**good).shape == (1, 4, 4, 32)
    with pytest.raises(error, match=message):
        rel_pos_attention(**{**good, **change})


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
    result = subprocess.run(
        [sys.executable, __file__, level], env=environment, capture_output=True, text=True, timeout=240
    )
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


if __name__ == "__main__":  # one instruction set, see test_every_instruction_set
    from rskernels import _C

    assert _C.cpu_capability() == sys.argv[1]
    for each in (CASES[0], CASES[1], CASES[2], CASES[6], CASES[8], *CASES[11:]):
        compare(each, torch.float32)
        compare(each, torch.bfloat16)
