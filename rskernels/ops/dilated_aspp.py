"""dilated_aspp: parallel dilated 3x3 convolutions, concatenated (atrous spatial pyramid pooling,
Chen et al., arXiv 1706.05587; CrossEarth's masked-image head feeds it four encoder stages).

Shapes: B batch, C_i input and O_i output channels of branch i, h/w map, P channels after the projection.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels.dispatch import choose
from rskernels.library import (
    INTS,
    cast_to_compute_dtype,
    check_tensors,
    define,
    differentiate,
    once_differentiable,
)

ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu")


def dilated_aspp(
    features: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    dilations: Sequence[int] = (1, 6, 12, 18),
    scale_shift: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    projection: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """concat_i activation(scale_i · conv3x3(features_i, weights_i, dilation_i) + shift_i), then a projection.

    Args:
        features: one (B, C_i, h, w) per branch, or a single tensor that every branch reads.
        weights: (O_i, C_i, 3, 3) per branch. biases: (O_i,) or None per branch.
        dilations: one per branch; padding equals the dilation, so the map keeps its size.
        scale_shift: two tensors of sum(O_i) values in the order of the concatenation, a folded norm; for
            inference, they get no gradient. None: neither.
        activation: None, "gelu" (erf), "gelu_tanh" or "relu".
        projection: weight (P, sum(O_i)) and bias (P,) or None of a 1x1 convolution on the concatenation.
    Returns:
        (B, sum(O_i), h, w), or (B, P, h, w) with a projection, in the dtype of the weights, under autocast
        in autocast's dtype (float64 stays). In channels-last memory where a kernel serves, and so are the
        gradients of the features.
    Dtypes: float32 and bfloat16 are accelerated on the CPU, these and float16 on CUDA (backend "triton"); the
    reference serves everything else, and second derivatives.
    Raises:
        ValueError: numbers of branches or shapes that do not fit, unknown activation, scale or shift
            requires grad. TypeError: not a floating-point tensor, or no list of them.
    """
    _check_lists(features, weights, biases, dilations, scale_shift, projection)
    features = [features] * len(weights) if isinstance(features, Tensor) else list(features)
    _check(features, weights, biases, dilations, scale_shift, activation, projection)
    lead = weights[0]
    shared = all(x is features[0] for x in features)
    features = cast_to_compute_dtype(lead, *(features[:1] if shared else features))
    weights = cast_to_compute_dtype(lead, *weights)
    biases = cast_to_compute_dtype(lead, *biases)
    scale, shift = cast_to_compute_dtype(lead, *(scale_shift or (None, None)))
    projection_weight, projection_bias = cast_to_compute_dtype(lead, *(projection or (None, None)))
    tensors = (*features, *weights, *biases, scale, shift, projection_weight, projection_bias)
    refusal = dict.fromkeys(("cpp", "triton"), "it takes no empty dimension but the batch")
    empty = refusal if _is_empty(features, tensors) else None
    if choose("dilated_aspp", *tensors, without=empty) == "reference":
        features = features * len(weights) if shared else features
        return dilated_aspp_reference(
            features, weights, biases, dilations, scale, shift, activation, projection_weight, projection_bias
        )
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    keep = training and (activation in ("gelu", "gelu_tanh") or projection is not None)
    return _dilated_aspp_forward(
        features, weights, _concatenated(weights, biases), dilations, scale, shift, activation or "none",
        projection_weight, projection_bias, keep,
    )[0]  # fmt: skip


def dilated_aspp_reference(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    projection_weight: Tensor | None,
    projection_bias: Tensor | None,
) -> Tensor:
    """What defines the operator; arguments in one dtype."""
    branches = [
        F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
        for x, weight, bias, dilation in zip(features, weights, biases, dilations, strict=True)
    ]
    out = torch.cat(branches, dim=1)
    if scale is not None and shift is not None:
        out = out * scale[:, None, None] + shift[:, None, None]
    out = _activate(out, activation or "none")
    if projection_weight is not None:
        out = F.conv2d(out, projection_weight[:, :, None, None], projection_bias)
    return out


def _activate(pre: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(pre)
    if activation == "none":
        return pre
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def _concatenated(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """One vector in the order of the concatenation, zeros where a branch has no bias."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs])


def _is_empty(features: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> bool:
    operands = [t for t in tensors[len(features) :] if t is not None]
    return any(0 in t.shape for t in operands)


def _check_lists(
    features: Any, weights: Any, biases: Any, dilations: Any, scale_shift: Any, projection: Any
) -> None:
    lists = {"features": features, "weights": weights, "biases": biases, "dilations": dilations}
    for name, value in lists.items():
        if value is None or (isinstance(value, Tensor) and name != "features"):
            found = "None" if value is None else "a tensor"
            raise TypeError(f"dilated_aspp: {name} is {found}; expected a list, one of each per branch")
    if not isinstance(dilations, Sequence) or not all(isinstance(d, INTS) for d in dilations):
        raise TypeError(f"dilated_aspp: dilations is {dilations!r}; expected a list of ints")
    for name, pair in {"scale_shift": scale_shift, "projection": projection}.items():
        if pair is not None and (not isinstance(pair, Sequence) or len(pair) != 2):
            parts = "(scale, shift)" if name == "scale_shift" else "(weight, bias or None)"
            raise TypeError(f"dilated_aspp: {name} is no pair of tensors; expected {parts}, or None")


def _check(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[int],
    scale_shift: tuple[Tensor, Tensor] | None,
    activation: str | None,
    projection: tuple[Tensor, Tensor | None] | None,
) -> None:
    counts = {"features": features, "weights": weights, "biases": biases, "dilations": dilations}
    if len({len(sequence) for sequence in counts.values()}) != 1 or not weights:
        found = ", ".join(f"{len(sequence)} {name}" for name, sequence in counts.items())
        raise ValueError(f"dilated_aspp: got {found}; expected one of each per branch")
    if activation not in ACTIVATIONS:
        raise ValueError(f"dilated_aspp: activation is {activation!r}; expected one of {ACTIVATIONS}")
    named = {f"features[{i}]": x for i, x in enumerate(features)}
    named |= {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    optional = {f"biases[{i}]": bias for i, bias in enumerate(biases)}
    if scale_shift is not None:
        named |= dict(zip(("scale", "shift"), scale_shift, strict=True))
    if projection is not None:
        named["projection weight"], optional["projection bias"] = projection
    check_tensors("dilated_aspp", {**named, **optional}, optional=optional)
    first = features[0]
    for i, (x, weight, bias, dilation) in enumerate(zip(features, weights, biases, dilations, strict=True)):
        if x.dim() != 4 or x.shape[0] != first.shape[0] or x.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"dilated_aspp: features[{i}] has shape {tuple(x.shape)}; expected (B, C, h, w) with the "
                f"batch and size of features[0] {tuple(first.shape)}"
            )
        if 0 in x.shape[1:]:
            raise ValueError(
                f"dilated_aspp: features[{i}] has shape {tuple(x.shape)}; expected nothing empty but "
                "the batch"
            )
        if weight.dim() != 4 or tuple(weight.shape[1:]) != (x.shape[1], 3, 3):
            raise ValueError(
                f"dilated_aspp: weights[{i}] has shape {tuple(weight.shape)}; "
                f"expected (O, {x.shape[1]}, 3, 3)"
            )
        _check_vector(f"biases[{i}]", bias, weight.shape[0])
        if dilation < 1:
            raise ValueError(f"dilated_aspp: dilations[{i}] is {dilation}; expected at least 1")
    channels = sum(weight.shape[0] for weight in weights)
    if scale_shift is not None:
        for name, tensor in zip(("scale", "shift"), scale_shift, strict=True):
            _check_vector(name, tensor, channels)
            if tensor.requires_grad:
                raise ValueError(
                    f"dilated_aspp: {name} requires grad; a folded norm is for inference, detach it"
                )
    if projection is not None:
        weight, bias = projection
        if weight.dim() != 2 or weight.shape[1] != channels:
            raise ValueError(
                f"dilated_aspp: projection weight has shape {tuple(weight.shape)}; expected (P, {channels})"
            )
        _check_vector("projection bias", bias, weight.shape[0])


def _check_vector(name: str, tensor: Tensor | None, length: int) -> None:
    if tensor is not None and tuple(tensor.shape) != (length,):
        raise ValueError(f"dilated_aspp: {name} has shape {tuple(tensor.shape)}; expected ({length},)")


# ---------------------------------------------------------------- registration


def _forward_reference(
    features: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    dilations: list[int],
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    projection_weight: Tensor | None,
    projection_bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    repeated = features * len(weights) if len(features) == 1 else features
    biases = [None] * len(weights) if bias is None else bias.split([len(weight) for weight in weights])
    pre = dilated_aspp_reference(
        repeated, weights, biases, dilations, scale, shift, None, None, None
    ).permute(0, 2, 3, 1).contiguous()  # fmt: skip
    out = _activate(pre, activation)
    if projection_weight is not None:
        out = F.linear(out, projection_weight, projection_bias)
    out = out.clone() if out is pre else out
    return out.permute(0, 3, 1, 2), pre if keep else pre.new_empty(0)


def _forward_fake(
    features: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    dilations: list[int],
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    projection_weight: Tensor | None,
    projection_bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    x = features[0]
    batch, height, width = x.shape[0], x.shape[2], x.shape[3]
    channels = sum(weight.shape[0] for weight in weights)
    outputs = channels if projection_weight is None else projection_weight.shape[0]
    out = x.new_empty((batch, height, width, outputs)).permute(0, 3, 1, 2)
    return out, x.new_empty((batch, height, width, channels) if keep else (0,))


def _backward_reference(
    grad: Tensor,
    features: list[Tensor],
    weights: list[Tensor],
    kept: Tensor,
    scale: Tensor | None,
    projection_weight: Tensor | None,
    dilations: list[int],
    activation: str,
    mask: list[bool],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    def nothing() -> Tensor:  # outputs must not share memory
        return grad.new_empty(0)

    rows = grad.permute(0, 2, 3, 1)
    wants_bias, wants_projection, wants_projection_bias = mask[-3:]
    d_projection, d_projection_bias = nothing(), nothing()
    if projection_weight is not None:
        if wants_projection:
            d_projection = rows.flatten(0, 2).T.contiguous() @ _activate(kept, activation).flatten(0, 2)
        if wants_projection_bias:
            d_projection_bias = rows.sum((0, 1, 2))
        rows = rows @ projection_weight
    if activation == "relu":
        rows = torch.ops.aten.threshold_backward(rows, kept, 0)
    elif activation != "none":
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        rows = torch.ops.aten.gelu_backward(rows, kept, approximate=approximate)
    rows = rows if scale is None else rows * scale
    d_bias = rows.sum((0, 1, 2)) if wants_bias else nothing()
    d_features, d_weights = [nothing() for _ in features], [nothing() for _ in weights]
    slices = rows.permute(0, 3, 1, 2).split([len(weight) for weight in weights], 1)
    for i, (part, weight, dilation) in enumerate(zip(slices, weights, dilations, strict=True)):
        f = 0 if len(features) == 1 else i
        padding = [dilation, dilation]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            part.contiguous(), features[f], weight, None, [1, 1], padding, padding, False, [0, 0], 1,
            [mask[f], mask[len(features) + i], False],
        )  # fmt: skip
        if mask[f]:
            d_features[f] = d_features[f] + dx if d_features[f].numel() > 0 else dx
        if mask[len(features) + i]:
            d_weights[i] = dw.contiguous()
    d_features = [
        d.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if wanted else d
        for d, wanted in zip(d_features, mask, strict=False)
    ]
    return d_features, d_weights, d_bias, d_projection, d_projection_bias


def _backward_fake(
    grad: Tensor,
    features: list[Tensor],
    weights: list[Tensor],
    kept: Tensor,
    scale: Tensor | None,
    projection_weight: Tensor | None,
    dilations: list[int],
    activation: str,
    mask: list[bool],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    def shaped(wanted: bool, *shape: Any) -> Tensor:
        return grad.new_empty(shape if wanted else (0,))

    channels = sum(weight.shape[0] for weight in weights)
    outputs = grad.shape[1]
    d_features = [
        shaped(True, x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)
        if wanted
        else grad.new_empty(0)
        for x, wanted in zip(features, mask, strict=False)
    ]
    d_weights = [
        shaped(wanted, *weight.shape) for weight, wanted in zip(weights, mask[len(features) :], strict=False)
    ]
    return (
        d_features,
        d_weights,
        shaped(mask[-3], channels),
        shaped(mask[-2], outputs, channels),
        shaped(mask[-1], outputs),
    )


# One feature map serves every branch, or there is one per branch; `bias` is the concatenation of theirs.
# `kept`, (B, h, w, sum(O_i)), enters the activation: for gelu, and for the projection's weight gradient.
_dilated_aspp_forward = define(
    "dilated_aspp_forward(Tensor[] features, Tensor[] weights, Tensor? bias, int[] dilations, Tensor? scale,"
    " Tensor? shift, str activation, Tensor? projection_weight, Tensor? projection_bias, bool keep)"
    " -> (Tensor, Tensor)",
    reference=_forward_reference,
    fake=_forward_fake,
    triton="dilated_aspp.forward",
)
# mask: one for each feature map, one for each branch's weight, bias, projection weight and bias.
_dilated_aspp_backward = define(
    "dilated_aspp_backward(Tensor grad, Tensor[] features, Tensor[] weights, Tensor kept, Tensor? scale,"
    " Tensor? projection_weight, int[] dilations, str activation, bool[] mask)"
    " -> (Tensor[], Tensor[], Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    triton="dilated_aspp_backward.backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, weights, _, dilations, scale, _, activation, projection_weight, _, keep = inputs
    out, kept = output
    if not keep and (projection_weight is not None or activation in ("gelu", "gelu_tanh")):
        raise ValueError("dilated_aspp_forward: keep=False drops the pre-activation that backward needs")
    ctx.set_materialize_grads(False)
    ctx.dilations, ctx.activation, ctx.counts = dilations, activation, (len(features), len(weights))
    # relu's gradient reads its output as well as its input.
    ctx.saved_output = activation == "relu" and not keep
    saved = out if ctx.saved_output else kept
    ctx.save_for_backward(*features, *weights, saved, scale, projection_weight)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    f, n = ctx.counts
    tensors = ctx.saved_tensors
    features, weights = list(tensors[:f]), list(tensors[f : f + n])
    saved, scale, projection_weight = tensors[f + n :]
    kept = saved.permute(0, 2, 3, 1) if ctx.saved_output else saved
    needs = ctx.needs_input_grad
    mask = [*needs[0], *needs[1], needs[2], needs[7], needs[8]]
    gradients = _dilated_aspp_backward(
        grad, features, weights, kept, scale, projection_weight, ctx.dilations, ctx.activation, mask
    )

    def wanted(found: list[Tensor], flags: Sequence[bool]) -> list[Tensor | None]:
        return [d if flag else None for d, flag in zip(found, flags, strict=True)]

    d_bias, d_projection, d_projection_bias = wanted(gradients[2:], mask[-3:])
    return (
        wanted(gradients[0], needs[0]), wanted(gradients[1], needs[1]), d_bias, None, None, None, None,
        d_projection, d_projection_bias, None,
    )  # fmt: skip


differentiate("dilated_aspp_forward", _backward, _setup_context)
once_differentiable("dilated_aspp_backward")
