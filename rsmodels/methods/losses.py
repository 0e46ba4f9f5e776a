"""Cross entropy and soft Dice over the pixels that count.

Shapes: B batch, K classes (1 = binary: one logit for class 1 of masks 0 and 1), H/W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("sigmoid", "softmax")


def segmentation_losses(
    logits: Tensor, mask: Tensor, *, activation: str = "sigmoid", ignore_index: int = 255
) -> dict[str, Tensor]:
    """{"ce": cross entropy, "dice": soft Dice}, unweighted scalars in float32.

    Args:
        logits: (B, K, H, W).
        mask: (B, H, W) class ids; pixels of `ignore_index` are left out of both terms.
        activation: "sigmoid" takes every class as a binary problem of its own and averages over classes;
            "softmax" takes them as alternatives. K = 1 is always a sigmoid.

    Dice sums over the batch, so that a class is held to be absent only where no image has it; its smoothing
    of one pixel makes an absent and unpredicted class cost nothing. With no pixel left both terms are 0,
    and still have a gradient.
    """
    check_mask(logits, mask, ignore_index)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        valid = mask != ignore_index
        ids = torch.where(valid, mask, 0).long()
        target = one_hot(ids, logits.shape[1]).to(logits.dtype)
        ce = _cross_entropy(logits, ids, target, valid, activation)
        dice = soft_dice(to_probabilities(logits, activation=activation), target, valid.unsqueeze(1)).mean()
    return {"ce": ce, "dice": dice}


def cross_entropy_loss(
    logits: Tensor, mask: Tensor, *, activation: str = "softmax", ignore_index: int = 255
) -> Tensor:
    """The "ce" of segmentation_losses alone: the mean over the pixels that count, 0 where there are none."""
    check_mask(logits, mask, ignore_index)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        valid = mask != ignore_index
        ids = torch.where(valid, mask, 0).long()
        return _cross_entropy(logits, ids, None, valid, activation)


def _cross_entropy(
    logits: Tensor, ids: Tensor, target: Tensor | None, valid: Tensor, activation: str
) -> Tensor:
    """`target`: the ids one-hot, where they are at hand."""
    if activation == "softmax" and logits.shape[1] > 1:
        ce = F.cross_entropy(logits, ids, reduction="none")
    else:
        target = one_hot(ids, logits.shape[1]).to(logits.dtype) if target is None else target
        ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
    return torch.where(valid, ce, 0).sum() / valid.sum().clamp(min=1)


def decoder_losses(
    logits: Tensor, aux: Tensor | None, mask: Tensor, *, aux_weight: float, activation: str
) -> dict[str, Tensor]:
    """L_da of KTDA (eqs. 4 and 5): {"ce": cross entropy} of `logits`, and {"aux": `aux_weight` times that of
    `aux`}, the auxiliary head's logits, where there are any; both (B, K, H, W), the size of `mask`."""
    terms = {"ce": cross_entropy_loss(logits, mask, activation=activation)}
    if aux is not None:
        terms["aux"] = aux_weight * cross_entropy_loss(aux, mask, activation=activation)
    return terms


def to_probabilities(logits: Tensor, *, activation: str) -> Tensor:
    """(B, K, H, W) logits → float32 probabilities in [0, 1]; they sum to 1 only under softmax and K > 1."""
    if activation == "softmax" and logits.shape[1] > 1:
        return logits.float().softmax(dim=1)
    return logits.float().sigmoid()


def one_hot(ids: Tensor, classes: int) -> Tensor:
    """(B, H, W) class ids → (B, K, H, W) of 0 and 1, laid out as logits are; K = 1 takes the ids as they
    are."""
    ids = ids.unsqueeze(1)
    return ids if classes == 1 else ids == torch.arange(classes, device=ids.device)[:, None, None]


def soft_dice(probabilities: Tensor, target: Tensor, valid: Tensor, *, smooth: float = 1.0) -> Tensor:
    """1 − (2·Σpt + smooth) / (Σp + Σt + smooth) per class, over the valid pixels of the batch: (K,)."""
    p, t = torch.where(valid, probabilities, 0), torch.where(valid, target, 0)
    over = (0, 2, 3)
    return 1 - (2 * (p * t).sum(over) + smooth) / (p.sum(over) + t.sum(over) + smooth)


def check_mask(logits: Tensor, mask: Tensor, ignore_index: int) -> None:
    """A mask that does not fit its logits is a ValueError or TypeError."""
    batch, classes, height, width = logits.shape
    if mask.shape != (batch, height, width):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)}: expected {(batch, height, width)}, one id per pixel"
        )
    check_ids(mask, classes, ignore_index)


def check_ids(mask: Tensor, classes: int, ignore_index: int) -> None:
    """A mask that holds other values than class ids and `ignore_index` is a ValueError or TypeError."""
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask of dtype {mask.dtype}: expected integer class ids")
    if torch.compiler.is_compiling() or mask.is_cuda:
        return  # looking at values would break the graph, or make every step wait for the GPU
    highest = max(classes, 2) - 1
    outside = (mask != ignore_index) & ((mask < 0) | (mask > highest))
    if outside.any():
        raise ValueError(
            f"mask holds the value {int(mask[outside][0])}: expected class ids 0 to {highest}, or "
            f"{ignore_index} to ignore a pixel; check num_classes and the label schema"
        )
