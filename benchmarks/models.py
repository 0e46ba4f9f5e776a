"""Whole models: SAM's ViT-B encoder against timm's, RS-SAM's training step against the reference backend."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor

import rskernels
import rsmodels
from benchmarks.measure import Call, Case
from rsmodels.encoders.sam_vit import sam_vit_b


def _build_encoder(size: int, dtype: torch.dtype) -> dict[str, Call]:
    torch.manual_seed(0)
    theirs = timm.create_model("samvit_base_patch16", img_size=size, num_classes=0).eval().to(dtype)
    ours = sam_vit_b(image_size=size)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "encoder.pth")
        torch.save(theirs.state_dict(), path)
        ours.load_pretrained(path)
    ours = ours.eval().to(dtype)
    images = torch.randn(1, 3, size, size).to(dtype)

    def run_theirs() -> Tensor:
        with torch.no_grad():
            return theirs.forward_features(images)

    def run_ours() -> Tensor:
        with torch.no_grad():
            return ours(images)

    return {"rskernels": run_ours, "timm eager": run_theirs}


def _build_training_step(size: int, batch: int, dtype: torch.dtype) -> dict[str, Call]:
    torch.manual_seed(0)
    model = rsmodels.create_model("rs_sam_vit_b", num_classes=6, image_size=size).train()
    data = {"image": torch.randn(batch, 3, size, size), "mask": torch.randint(6, (batch, size, size))}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(backend: str) -> tuple[Tensor, ...]:
        with rskernels.backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = torch.stack(list(model.losses(data).values())).sum()
            gradients = torch.autograd.grad(loss, parameters)
        return (torch.cat([g.flatten() for g in gradients]),)

    return {"rskernels": partial(step, "auto"), "reference backend": partial(step, "reference")}


def cases() -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    encoders = [
        Case(
            name=f"SAM ViT-B encoder, {size} pixels, batch 1, forward, {str(dtype)[6:]}",
            build=partial(_build_encoder, size, dtype),
            dtype=dtype,
            reference="timm eager",
            # Twelve layers of bf16 rounding, in another order.
            tolerance=1e-4 if dtype == torch.float32 else 8e-2,
        )
        for size in (512, 1024)
        for dtype in dtypes
    ]
    steps = [
        Case(
            name=f"RS-SAM ViT-B training step, 512 pixels, batch 2, {str(dtype)[6:]}",
            build=partial(_build_training_step, 512, 2, dtype),
            dtype=dtype,
            reference="reference backend",
            tolerance=1e-3 if dtype == torch.float32 else 2e-1,
        )
        for dtype in dtypes
    ]
    return encoders + steps
