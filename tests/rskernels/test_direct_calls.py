"""Registered operators, called directly as an exported graph calls them: arguments that do not fit are
an error that names the operator, never a crash or a read of foreign memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("extension")

F32, BF16, F64, INT = torch.float32, torch.bfloat16, torch.float64, torch.int64
FLOATS = {F32, BF16, F64}


def operators() -> dict[str, torch._C.FunctionSchema]:
    """Every operator of the library, whoever registered it."""
    schemas = torch._C._jit_get_all_schemas()
    return {s.name.removeprefix("rskernels::"): s for s in schemas if s.name.startswith("rskernels::")}


@dataclass
class Row:
    """A call that works, and what of it may change all the same."""

    make: Callable[[], dict[str, Any]]
    dims: dict[str, set[int]] = field(default_factory=dict)  # sizes that no other argument fixes
    rows: set[str] = field(default_factory=set)  # arguments of any number of leading dimensions
    dtypes: dict[str, set[torch.dtype]] = field(default_factory=dict)  # that an argument may have, too


def rel_pos_attention() -> dict[str, Any]:
    tables = {"rel_pos_h": torch.randn(3, 4), "rel_pos_w": torch.randn(5, 4), "pad_qkv": torch.randn(24)}
    return {"qkv": torch.randn(2, 2, 3, 24), **tables, "num_heads": 2, "window_size": 0, "scale": 0.5}


def rel_pos_attention_backward() -> dict[str, Any]:
    call = rel_pos_attention()
    grad, out, lse = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 2, 3)
    return {"grad": grad, "out": out, "lse": lse, **call, "mask": [True] * 4}


def linear() -> dict[str, Any]:
    tensors = {"x": torch.randn(5, 3), "weight": torch.randn(4, 3), "bias": torch.randn(4)}
    return {**tensors, "activation": "gelu", "keep_pre": True}


def linear_backward() -> dict[str, Any]:
    tensors = {"grad": torch.randn(5, 4), "x": torch.randn(5, 3), "weight": torch.randn(4, 3)}
    return {**tensors, "saved": torch.randn(5, 4), "activation": "gelu", "mask": [True] * 3}


def layer_norm() -> dict[str, Any]:
    weights = {"weight": torch.randn(64), "bias": torch.randn(64)}
    return {"x": torch.randn(5, 64), **weights, "eps": 1e-6, "dtype": F32}


def layer_norm_backward() -> dict[str, Any]:
    call = {"grad": torch.randn(5, 64), "x": torch.randn(5, 64), "weight": torch.randn(64)}
    return {**call, "mean": torch.randn(5), "rstd": torch.rand(5), "mask": [True] * 3}


def lora() -> dict[str, Any]:
    factors = {"a": [torch.randn(2, 5), torch.randn(3, 5)], "b": [torch.randn(4, 2), torch.randn(4, 3)]}
    weights = {"weight": torch.randn(12, 5), "bias": torch.randn(12)}
    return {
        "x": torch.randn(7, 5),
        **weights,
        **factors,
        "first_columns": [0, 8],
        "scale": 0.5,
        "keep_xa": True,
    }


def lora_backward() -> dict[str, Any]:
    call = lora()
    del call["bias"], call["keep_xa"]
    return {"grad": torch.randn(7, 12), **call, "xa": torch.randn(7, 5), "mask": [True] * 3}


def dilated_aspp() -> dict[str, Any]:
    return {
        "features": [torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)],
        "weights": [torch.randn(2, 3, 3, 3), torch.randn(7, 6, 3, 3)],
        "bias": torch.randn(9),
        "dilations": [1, 2],
        "scale": torch.randn(9),
        "shift": torch.randn(9),
        "activation": "gelu",
        "projection_weight": torch.randn(8, 9),
        "projection_bias": torch.randn(8),
        "keep": True,
    }


def dilated_aspp_backward() -> dict[str, Any]:
    call = dilated_aspp()
    for name in ("bias", "shift", "projection_bias", "keep"):
        del call[name]
    return {"grad": torch.randn(2, 8, 4, 5), **call, "kept": torch.randn(2, 4, 5, 9), "mask": [True] * 7}


def distillation_loss() -> dict[str, Any]:
    maps = {"student": torch.randn(2, 3, 4, 5), "teacher": torch.randn(2, 3, 4, 5)}
    options = {"axis": "channel", "direction": "student||teacher", "temperature": 2.0, "reduction": "mean"}
    return {**maps, **options}


def distillation_loss_backward() -> dict[str, Any]:
    grads = {"grad_kl": torch.ones(()), "grad_mse": torch.ones(())}
    return {**grads, **distillation_loss(), "stats": torch.rand(3, 40)}


def deformable_attention() -> dict[str, Any]:
    return {
        "value": torch.randn(2, 14, 3, 4),
        "sides": [2, 4, 2, 3],
        "sampling_locations": torch.rand(2, 5, 3, 2, 6, 2),
        "attention_weights": torch.rand(2, 5, 3, 2, 6),
    }


def deformable_attention_backward() -> dict[str, Any]:
    return {"grad": torch.randn(2, 5, 12), **deformable_attention(), "mask": [True] * 3}


def cross_attention() -> dict[str, Any]:
    tensors = {"q": torch.randn(3, 2, 4, 8), "k": torch.randn(3, 2, 5, 8), "v": torch.randn(3, 2, 5, 8)}
    mask = torch.ones(3, 4, 5, dtype=torch.bool)
    return {**tensors, "mask": mask, "scale": 0.5, "drop_first_key_value": False}


def cross_attention_backward() -> dict[str, Any]:
    saved = {"out": torch.randn(3, 2, 4, 8), "lse": torch.randn(3, 2, 4)}
    return {"grad": torch.randn(3, 2, 4, 8), **cross_attention(), **saved, "wanted": [True] * 3}


_TABLES = {name: FLOATS for name in ("rel_pos_h", "rel_pos_w", "pad_qkv")}
_SAMPLES = {name: FLOATS for name in ("sampling_locations", "attention_weights")}

ROWS = {
    "rel_pos_attention_forward": Row(rel_pos_attention, dims={"qkv": {0}}, dtypes={"qkv": {BF16}, **_TABLES}),
    "rel_pos_attention_backward": Row(rel_pos_attention_backward, dtypes=_TABLES),
    "linear_forward": Row(linear, dims={"x": {0}}, rows={"x"}),
    "linear_backward": Row(linear_backward),
    "layer_norm_forward": Row(
        layer_norm, dims={"x": {0}}, rows={"x"}, dtypes={"x": {BF16}, "weight": FLOATS, "bias": FLOATS}
    ),
    "layer_norm_backward": Row(layer_norm_backward, dtypes={"grad": {BF16}, "x": {BF16}, "weight": FLOATS}),
    "lora_forward": Row(lora, dims={"x": {0}, "b": {0}}, rows={"x"}),
    "lora_backward": Row(lora_backward, dims={"b": {0}}),
    "dilated_aspp_forward": Row(dilated_aspp),
    "dilated_aspp_backward": Row(dilated_aspp_backward),
    "distillation_loss_forward": Row(distillation_loss, dtypes={"student": {BF16}, "teacher": {BF16}}),
    "distillation_loss_backward": Row(
        distillation_loss_backward,
        dtypes={"student": {BF16}, "teacher": {BF16}, "grad_kl": FLOATS, "grad_mse": FLOATS},
    ),
    "deformable_attention_forward": Row(
        deformable_attention, dims={"value": {3}}, dtypes={"value": {BF16}, **_SAMPLES}
    ),
    "deformable_attention_backward": Row(deformable_attention_backward, dtypes=_SAMPLES),
    "cross_attention_forward": Row(cross_attention),
    "cross_attention_backward": Row(cross_attention_backward),
}


# Its kernels still trust their callers, and some of these calls crash them.


def wrong_tensors(row: Row, name: str, t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What must not pass for `t`, each with a name."""
    if t.dim() == 0:
        yield "two values", t.expand(2)
        yield "no value", t.expand(0)
    else:
        yield "a dimension less", t[..., 0]
        yield "a dimension more at the end", t.unsqueeze(-1)
        if name not in row.rows:
            yield "a dimension more", t.unsqueeze(0)
    for dim in set(range(t.dim())) - row.dims.get(name, set()):
        yield f"dimension {dim} longer", torch.cat([t, t.narrow(dim, 0, 1)], dim)
        yield f"dimension {dim} shorter", t.narrow(dim, 0, t.shape[dim] - 1)
        yield f"dimension {dim} empty", t.narrow(dim, 0, 0)
    for dtype in {INT, BF16, F64} - row.dtypes.get(name, set()):
        yield str(dtype), t.to(dtype)


def wrong_calls(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    call = row.make()
    for name, value in call.items():
        if isinstance(value, Tensor):
            for what, wrong in wrong_tensors(row, name, value):
                yield f"{name}: {what}", {**call, name: wrong}
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            for i, t in enumerate(value):
                for what, wrong in wrong_tensors(row, name, t):
                    yield f"{name}[{i}]: {what}", {**call, name: [*value[:i], wrong, *value[i + 1 :]]}
            yield f"{name}: none", {**call, name: []}
            yield f"{name}: one more", {**call, name: [*value, value[0]]}


def run(name: str, call: dict[str, Any]) -> Any:
    return getattr(torch.ops.rskernels, name)(**call)


def assert_refused(name: str, call: dict[str, Any], what: str) -> None:
    try:
        run(name, call)
    except (ValueError, TypeError) as error:
        operator = name.removesuffix("_forward").removesuffix("_backward")
        # lora leaves its bias to linear.
        assert str(error).startswith((f"{operator}: ", "linear: bias")), f"{what}: {error}"
    else:
        pytest.fail(f"{name} took a wrong {what}")


def test_every_operator_has_a_row() -> None:
    assert set(ROWS) == set(operators())


@pytest.mark.parametrize("name", ROWS)
def test_the_call_itself_works_and_names_every_tensor(name: str) -> None:
    call = ROWS[name].make()
    run(name, call)
    assert set(call) == {argument.name for argument in operators()[name].arguments}


@pytest.mark.parametrize("name", ROWS)
def test_wrong_tensors_are_refused(name: str) -> None:
    for what, call in wrong_calls(ROWS[name]):
        assert_refused(name, call, what)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rel_pos_attention", {"window_size": 2**32}),
        ("rel_pos_attention", {"window_size": 2**31}),
        ("rel_pos_attention", {"window_size": -1}),
        ("rel_pos_attention", {"num_heads": 0}),
        ("rel_pos_attention", {"num_heads": 2**62}),
        ("rel_pos_attention", {"num_heads": 3}),
        ("rel_pos_attention", {"rel_pos_w": None}),
        ("linear", {"activation": "tanh"}),
        ("lora", {"first_columns": [0, 9]}),
        ("lora", {"first_columns": [0, 2**62]}),
        ("lora", {"first_columns": [-1, 8]}),
        ("lora", {"first_columns": [0, 3]}),
        ("lora", {"first_columns": [0]}),
        ("dilated_aspp", {"dilations": [1, 0]}),
        ("dilated_aspp", {"dilations": [1, 2**62]}),
        ("dilated_aspp", {"dilations": [1]}),
        ("dilated_aspp", {"activation": "tanh"}),
        ("distillation_loss", {"axis": "height"}),
        ("distillation_loss", {"direction": "both"}),
        ("distillation_loss", {"reduction": "sum"}),
        ("distillation_loss", {"temperature": 0.0}),
        ("distillation_loss", {"temperature": float("nan")}),
        ("deformable_attention", {"sides": [2, 4, 2, 4]}),
        ("deformable_attention", {"sides": [14, 1]}),
        ("deformable_attention", {"sides": [-2, -4, 2, 3]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_wrong_options_are_refused(name: str, which: str, wrong: dict[str, Any]) -> None:
    operator = f"{name}_{which}"
    assert_refused(operator, {**ROWS[operator].make(), **wrong}, str(wrong))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dilated_aspp_forward", {"scale": None}),
        ("dilated_aspp_forward", {"shift": None}),
        ("dilated_aspp_backward", {"mask": [True] * 6}),
        ("dilated_aspp_backward", {"projection_weight": None, "grad": torch.ones(2, 9, 4, 5)}),
        ("layer_norm_forward", {"dtype": torch.float16}),
        ("layer_norm_forward", {"eps": -1.0}),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(name: str, wrong: dict[str, Any]) -> None:
    assert_refused(name, {**ROWS[name].make(), **wrong}, str(wrong))


def gaps(t: Tensor) -> Tensor:
    """The same values, with memory between them."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] if t.dim() > 0 else t


@pytest.mark.parametrize("name", ROWS)
def test_strides_do_not_matter(name: str) -> None:
    call = ROWS[name].make()

    def spread(value: Any) -> Any:
        if isinstance(value, list):
            return [spread(item) for item in value]
        apart = isinstance(value, Tensor) and value.is_floating_point()
        return gaps(value) if apart else value

    dense, apart = run(name, call), run(name, {key: spread(value) for key, value in call.items()})
    torch.testing.assert_close(apart, dense)
