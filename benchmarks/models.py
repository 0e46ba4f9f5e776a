"""Whole models: SAM's ViT-B encoder against timm's, RS-SAM's training step against plain PyTorch.

The peers of the encoder run one timm module with our weights: eager, compiled, through OpenVINO and
through zentorch, each where it is installed. They are compiled or converted once per case, outside what is
timed. OpenVINO keeps its working memory between calls, so that its peak memory says nothing.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import rskernels
import rsmodels
from benchmarks.measure import Call, Case, batches, device, lazily, on_gpu
from rsmodels.encoders.sam_vit import sam_vit_b


class _Features(nn.Module):
    """`forward_features` as a module's forward, which is what converters trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


def _infer(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def _compiled(model: nn.Module, images: Tensor, backend: str = "inductor") -> Call:
    return partial(_infer, torch.compile(model, backend=backend), images)


def _through_zentorch(model: nn.Module, images: Tensor) -> Call:
    import zentorch  # noqa: F401  (registers the compiler's backend of that name)

    return _compiled(model, images, "zentorch")


def _through_openvino(model: nn.Module, images: Tensor) -> Call:
    """The module in float32, as OpenVINO wants it, computing in the dtype of `images`."""
    import openvino

    example = images.float()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about sizes that are constants here
        converted = openvino.convert_model(model.float(), example_input=example, input=list(example.shape))
    options = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[images.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    request = compiled.create_infer_request()

    def call() -> Tensor:
        return torch.from_numpy(request.infer([example.numpy()], share_inputs=True)[0])

    return call


def _timm_encoder(size: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("samvit_base_patch16", img_size=size, num_classes=0).eval()


def _build_encoder(size: int, batch: int, dtype: torch.dtype) -> dict[str, Call]:
    theirs = _timm_encoder(size)
    ours = sam_vit_b(image_size=size)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "encoder.pth")
        torch.save(theirs.state_dict(), path)
        ours.load_pretrained(path)
    ours = ours.eval().to(device(), dtype)
    images = torch.randn(batch, 3, size, size).to(device(), dtype)
    module = _Features(theirs).to(device(), dtype)
    calls = {
        "rskernels": partial(_infer, ours, images),
        "timm eager": partial(_infer, module, images),
        "torch.compile": lazily(partial(_compiled, module, images)),
    }
    if on_gpu():
        return calls
    return calls | {
        # A module of its own: conversion wants float32.
        "OpenVINO": lazily(lambda: _through_openvino(_Features(_timm_encoder(size)), images)),
        "zentorch": lazily(partial(_through_zentorch, module, images)),
    }


def build_prediction(name: str, size: int, batch: int, dtype: torch.dtype) -> dict[str, Call]:
    """The logits of a model of the registry, on our kernels and on plain PyTorch."""
    torch.manual_seed(0)
    model = rsmodels.create_model(name, num_classes=6, image_size=size).eval().to(device(), dtype)
    images = torch.randn(batch, 3, size, size).to(device(), dtype)

    def predict(backend: str) -> Tensor:
        with rskernels.backend(backend):
            return _infer(model, images)

    return {
        "rskernels": partial(predict, "auto"),
        "reference backend": partial(predict, "reference"),
        "torch.compile": lazily(partial(_compiled, model, images)),
    }


def build_training_step(name: str, size: int, batch: int, dtype: torch.dtype) -> dict[str, Call]:
    """The gradients of a model's losses under autocast, on our kernels and on plain PyTorch."""
    torch.manual_seed(0)
    model = rsmodels.create_model(name, num_classes=6, image_size=size).train().to(device())
    images, mask = torch.randn(batch, 3, size, size), torch.randint(6, (batch, size, size))
    data = {"image": images.to(device()), "mask": mask.to(device())}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(backend: str) -> Tensor:
        with rskernels.backend(backend), torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
            loss = torch.stack(list(model.losses(data).values())).sum()
            gradients = torch.autograd.grad(loss, parameters)
        return torch.cat([gradient.flatten() for gradient in gradients])

    return {
        "rskernels": partial(step, "auto"),
        "reference backend": partial(step, "reference"),
    }


def _encoder_flops(size: int) -> float:
    """Projections, attention (8 blocks of windows of 14, 4 global), patch embedding and neck of ViT-B."""
    tokens, width = (size // 16) ** 2, 768
    windows = (-(-size // 16 // 14)) ** 2
    projections = 12 * 12 * width**2 * tokens
    attention = 2 * width * (8 * windows * 14**4 + 4 * tokens**2)
    ends = tokens * (width * 3 * 16**2 + width * 256 + 9 * 256**2)
    return 2.0 * (projections + attention + ends)


def cases() -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    encoders = [
        Case(
            name=f"forward, SAM ViT-B encoder, 1024 pixels, batch {batches()}, {str(dtype)[6:]}",
            build=partial(_build_encoder, 1024, batches(), dtype),
            dtype=dtype,
            flops=batches() * _encoder_flops(1024),
            images=batches(),
            reference="timm eager",
            # Twelve layers of bf16 rounding, in another order.
            tolerance=1e-4 if dtype == torch.float32 else 8e-2,
        )
        for dtype in dtypes
    ]
    steps = [
        Case(
            name=f"both, RS-SAM ViT-B training step, 512 pixels, batch {2 * batches()}, {str(dtype)[6:]}",
            build=partial(build_training_step, "rs_sam_vit_b", 512, 2 * batches(), dtype),
            dtype=dtype,
            reference="reference backend",
            images=2 * batches(),
            counted="reference backend",
            tolerance=1e-3 if dtype == torch.float32 else 2e-1,
        )
        for dtype in dtypes
    ]
    if not on_gpu():
        return encoders + steps
    predictions = [
        Case(
            name=f"forward, RS-SAM ViT-B, 1024 pixels, batch {batches()}, {str(dtype)[6:]}",
            build=partial(build_prediction, "rs_sam_vit_b", 1024, batches(), dtype),
            dtype=dtype,
            reference="reference backend",
            images=batches(),
            counted="reference backend",
            tolerance=1e-3 if dtype == torch.float32 else 2e-1,
        )
        for dtype in dtypes
    ]
    return encoders + predictions + steps
