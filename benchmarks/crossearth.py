"""CrossEarth's training step, with its two flows, and Rein's, on ViT-L against the reference backend.

The peer is the same model on plain PyTorch operators. Both models recompute the activations of the frozen
blocks in backward unless told otherwise; what that costs and saves is in CrossEarth's rows.
Every call draws the same masks and points, and no styles: X_M alone makes the second flow.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import rskernels
import rsmodels
from benchmarks.measure import Call, Case, batches, device, on_gpu

SIZE, CLASSES = 512, 6
OURS, PEER = "rskernels", "reference backend"
KEPT = ", activations kept"


def _build_step(name: str, options: dict[str, Any], kept: bool, dtype: torch.dtype) -> dict[str, Call]:
    torch.manual_seed(0)
    model = rsmodels.create_model(name, num_classes=CLASSES, image_size=SIZE, **options).train().to(device())
    images = torch.randn(batches(), 3, SIZE, SIZE)
    data = {"image": images.to(device()), "mask": _patches(batches()).to(device())}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(backend: str, checkpointing: bool) -> Tensor:
        torch.manual_seed(1)
        model.set_activation_checkpointing(checkpointing)
        with rskernels.backend(backend), torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
            loss = torch.stack(list(model.losses(data).values())).sum()
            gradients = torch.autograd.grad(loss, parameters)
        return torch.cat([gradient.flatten() for gradient in gradients])

    calls = {OURS: partial(step, "auto", True), PEER: partial(step, "reference", True)}
    if kept:
        calls |= {OURS + KEPT: partial(step, "auto", False), PEER + KEPT: partial(step, "reference", False)}
    return calls


def _build_prediction(dtype: torch.dtype) -> dict[str, Call]:
    torch.manual_seed(0)
    model = (
        rsmodels.create_model("crossearth_vit_l", num_classes=CLASSES, image_size=SIZE).eval().to(device())
    )
    images = torch.randn(batches(), 3, SIZE, SIZE).to(device())

    def predict(backend: str) -> Tensor:
        autocast = torch.autocast(device().type, dtype, enabled=dtype != torch.float32)
        with rskernels.backend(backend), autocast, torch.no_grad():
            return model(images)

    return {OURS: partial(predict, "auto"), PEER: partial(predict, "reference")}


def _patches(batch: int) -> Tensor:
    """A mask (B, H, W) of fields of 64 pixels."""
    fields = torch.randint(CLASSES, (batch, SIZE // 64, SIZE // 64))
    return fields.repeat_interleave(64, 1).repeat_interleave(64, 2)


def cases() -> list[Case]:
    # On a CPU each candidate takes half a minute.
    forms = [
        ("crossearth_vit_l", {"style_probability": 0.0}, True, "CrossEarth"),
        ("rein_vit_l", {}, on_gpu(), "Rein"),
    ]
    steps = [
        Case(
            name=f"both, {title} ViT-L training step, {SIZE} pixels, batch {batches()}, {str(dtype)[6:]}",
            build=partial(_build_step, name, options, kept, dtype),
            dtype=dtype,
            reference=PEER,
            beside=(OURS + KEPT,),
            images=batches(),
            counted=PEER + KEPT,
            # Where queries attend, and which points count, are decisions that rounding may turn.
            tolerance=2e-2 if dtype == torch.float32 else 3e-1,
        )
        for name, options, kept, title in forms
        for dtype in (torch.float32, torch.bfloat16)
    ]
    if not on_gpu():
        return steps
    predictions = [
        Case(
            name=f"forward, CrossEarth ViT-L, {SIZE} pixels, batch {batches()}, {str(dtype)[6:]}",
            build=partial(_build_prediction, dtype),
            dtype=dtype,
            reference=PEER,
            images=batches(),
            counted=PEER,
            tolerance=2e-2 if dtype == torch.float32 else 3e-1,
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return predictions + steps
