"""dilated_aspp: parallel dilated 3x3 convolutions, concatenated (atrous spatial pyramid pooling,
Chen et al., arXiv 1706.05587; CrossEarth's masked-image head feeds it four encoder stages).

Shapes: B batch, C_i input and O_i output channels of branch i, h/w map, P channels after the projection.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels.dispatch import choose
from rskernels.library import cast_to_compute_dtype

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
        in autocast's dtype (float64 stays).
    Raises:
        ValueError: numbers of branches or shapes that do not fit, unknown activation, scale or shift
            requires grad. TypeError: not floating point.
    """
    features = [features] * len(weights) if isinstance(features, Tensor) else list(features)
    _check(features, weights, biases, dilations, scale_shift, activation, projection)
    lead = weights[0]
    features = cast_to_compute_dtype(lead, *features)
    weights = cast_to_compute_dtype(lead, *weights)
    biases = cast_to_compute_dtype(lead, *biases)
    scale, shift = cast_to_compute_dtype(lead, *(scale_shift or (None, None)))
    projection_weight, projection_bias = cast_to_compute_dtype(lead, *(projection or (None, None)))
    choose("dilated_aspp", *features, *weights)
    return dilated_aspp_reference(
        features, weights, biases, dilations, scale, shift, activation, projection_weight, projection_bias
    )


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
    if activation == "relu":
        out = F.relu(out)
    elif activation is not None:
        out = F.gelu(out, approximate="tanh" if activation == "gelu_tanh" else "none")
    if projection_weight is not None:
        out = F.conv2d(out, projection_weight[:, :, None, None], projection_bias)
    return out


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
    first = features[0]
    named: dict[str, Tensor | None] = {}
    for i, (x, weight, bias, dilation) in enumerate(zip(features, weights, biases, dilations, strict=True)):
        if x.dim() != 4 or x.shape[0] != first.shape[0] or x.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"dilated_aspp: features[{i}] has shape {tuple(x.shape)}; expected (B, C, h, w) with the "
                f"batch and size of features[0] {tuple(first.shape)}"
            )
        if weight.dim() != 4 or tuple(weight.shape[1:]) != (x.shape[1], 3, 3):
            raise ValueError(
                f"dilated_aspp: weights[{i}] has shape {tuple(weight.shape)}; "
                f"expected (O, {x.shape[1]}, 3, 3)"
            )
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"dilated_aspp: biases[{i}] has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)"
            )
        if dilation < 1:
            raise ValueError(f"dilated_aspp: dilations[{i}] is {dilation}; expected at least 1")
        named |= {f"features[{i}]": x, f"weights[{i}]": weight, f"biases[{i}]": bias}
    channels = sum(weight.shape[0] for weight in weights)
    if scale_shift is not None:
        for name, tensor in zip(("scale", "shift"), scale_shift, strict=True):
            if tuple(tensor.shape) != (channels,):
                raise ValueError(
                    f"dilated_aspp: {name} has shape {tuple(tensor.shape)}; expected ({channels},)"
                )
            if tensor.requires_grad:
                raise ValueError(
                    f"dilated_aspp: {name} requires grad; a folded norm is for inference, detach it"
                )
            named[name] = tensor
    if projection is not None:
        weight, bias = projection
        if weight.dim() != 2 or weight.shape[1] != channels:
            raise ValueError(
                f"dilated_aspp: projection weight has shape {tuple(weight.shape)}; expected (P, {channels})"
            )
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"dilated_aspp: projection bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)"
            )
        named |= {"projection weight": weight, "projection bias": bias}
    for name, value in named.items():
        if value is not None and not value.is_floating_point():
            raise TypeError(f"dilated_aspp: {name} is {value.dtype}; expected a floating-point tensor")
        if value is not None and value.device != first.device:
            raise ValueError(f"dilated_aspp: {name} is on {value.device}, features[0] on {first.device}")
