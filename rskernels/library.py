"""The `rskernels` operator namespace, and what every operator file needs to register itself.

Schemas are defined here, once, in Python: a pure-Python install has every operator. The extension only
adds CPU kernels to them (TORCH_LIBRARY_IMPL), Triton CUDA kernels; without those the reference given to
`define` serves.
"""

import importlib
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rskernels import dispatch

LIBRARY = torch.library.Library("rskernels", "DEF")


def define(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any], triton: str = "") -> Any:
    """Register the operator of `schema` and return it.

    `reference` computes it in plain PyTorch on any device; it runs with autocast off, so that an operator
    computes in the dtype of its arguments wherever it is called from. `fake` gives shapes and dtypes only.
    `triton`, "module.function" of rskernels.triton, serves CUDA tensors of the dtypes in TRITON_DTYPES; it is
    imported when the first one comes.
    """
    name = schema.split("(")[0]

    def without_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableAutocast():
            return reference(*args, **kwargs)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        tensors = list(_tensors_in(args))
        if not takes_triton(tensors):
            return without_autocast(*args, **kwargs)
        if problem := dispatch.device_problem(tensors[0].device):
            if dispatch.falls_back():
                return without_autocast(*args, **kwargs)
            raise ValueError(f"backend 'triton' cannot serve {name}: {problem}; use set_backend('auto')")
        module, function = triton.split(".")
        launcher = getattr(importlib.import_module(f"rskernels.triton.{module}"), function)
        with torch._C._DisableAutocast():
            return launcher(*args, **kwargs)

    LIBRARY.impl(name, without_autocast, "CompositeExplicitAutograd")
    if triton and "triton" not in dispatch.UNAVAILABLE:
        LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"rskernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rskernels, name).default


TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _tensors_in(args: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the arguments of an operator, and in lists of them."""
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


def takes_triton(tensors: Iterable[Tensor]) -> bool:
    """Are the numbers in these tensors of dtypes that the Triton kernels have?"""
    return all(tensor.dtype in TRITON_DTYPES for tensor in tensors if tensor.is_floating_point())


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give operator `name` its autograd formula (see torch.library.register_autograd)."""
    torch.library.register_autograd(f"rskernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def once_differentiable(name: str) -> None:
    """Make differentiating the backward operator `name` an error instead of a silent wrong answer."""

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            f"rskernels::{name} has no second derivative; "
            "compute under rskernels.backend('reference') to differentiate twice"
        )

    differentiate(name, backward, lambda ctx, inputs, output: None)


INTS = (int, torch.SymInt)  # a traced size is no int


def check_tensors(op: str, tensors: Mapping[str, Any], *, optional: Collection[str] = ()) -> None:
    """Refuse, by name, what is no floating-point tensor, or not on the device of the first; those named in
    `optional` may be None."""
    lead, device = "", None
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} is {_found(tensor)}; expected a floating-point tensor")
        if device is None:
            lead, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {lead} on {device}")


def _found(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype)
    return "None" if value is None else type(value).__name__


def check_finite(op: str, name: str, value: float, expected: str = "a finite number") -> None:
    """Refuse an argument that is no number, NaN or infinite: a kernel would make NaN of every output."""
    if not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} is {value!r}; expected {expected}")
    if not abs(value) < math.inf:
        raise ValueError(f"{op}: {name} is {value}; expected {expected}")


def autocast_dtype(lead: Tensor) -> torch.dtype | None:
    """What autocast makes of a call that `lead` leads: its dtype, or None where it leaves things alone.

    float64 is never rounded; the meta device has no autocast to ask about.
    """
    device = lead.device.type
    if lead.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast_to_compute_dtype(lead: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The autocast rule of the product operators: every tensor in autocast's dtype where autocast is on
    (float64 stays as it is), else in the dtype of `lead`. What already has it stays the same object."""
    dtype = autocast_dtype(lead) or lead.dtype
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)
