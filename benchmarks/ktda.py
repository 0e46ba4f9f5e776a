"""KTDA's training step and prediction against a reading of the authors' code in plain PyTorch.

The peer has the same weights and takes the same step as their public code does: the student runs once for
the decoder and once more for the transfer loss, every map is convolved at the size it is resized to,
attention and projections are timm's blocks and the loss is composed of PyTorch's operators. It follows the
paper where their code does another thing (KL, place of FMM), so that both compute one and the same gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import rsmodels
from benchmarks.measure import Call, Case, batches, device, on_gpu
from rsmodels.heads.upernet import UPerNetHead
from rsmodels.methods.teacher import Teacher

OURS, PEER = "rskernels", "eager, as the authors' code"
CHANNELS_LAST = "rskernels, channels-last"
BILINEAR: dict[str, Any] = {"mode": "bilinear", "align_corners": False}


class _Peer:
    """`model` (a KTDA) and its teacher, layer by layer as they are written down."""

    def __init__(self, model: Any, teacher: nn.Module) -> None:
        self.model, self.teacher = model, teacher
        self.fmm = [nn.Sequential(*map(_timm_block, scale)) for scale in model.modulation.scales]

    def align(self, images: Tensor) -> list[Tensor]:
        stages = self.model.student(images)
        grid = self.model.grid_size
        convs = self.model.align.convs
        return [F.interpolate(conv(x), size=grid, **BILINEAR) for conv, x in zip(convs, stages, strict=True)]

    def levels(self, aligned: Sequence[Tensor]) -> list[Tensor]:
        neck, levels = self.model.neck, []
        for blocks, x, lateral, conv, scale in zip(
            self.fmm, aligned, neck.lateral_convs, neck.convs, (4, 2, 1, 0.5), strict=True
        ):
            x = blocks(x.flatten(2).mT).mT.unflatten(2, x.shape[-2:])
            levels.append(conv(F.interpolate(lateral(x), scale_factor=scale, **BILINEAR)))
        return levels

    def full_size(self, logits: Tensor) -> Tensor:
        return F.interpolate(logits, size=self.model.image_size, **BILINEAR)

    def predict(self, images: Tensor) -> Tensor:
        return self.full_size(_upernet(self.model.head, self.levels(self.align(images))))

    def loss(self, images: Tensor, mask: Tensor) -> Tensor:
        model = self.model
        levels = self.levels(self.align(images))
        ce = F.cross_entropy(self.full_size(_upernet(model.head, levels)), mask, ignore_index=255)
        aux = F.cross_entropy(self.full_size(model.aux_head(levels[2])), mask, ignore_index=255)
        transfer = []
        for ours, theirs in zip(self.align(images), self._teach(images), strict=True):
            p, q = ours.float().softmax(1), theirs.float().softmax(1)
            kl = F.kl_div(q.log(), p, reduction="sum") / (p.numel() // p.shape[1])
            transfer.append(0.5 * kl + 0.5 * F.mse_loss(ours.float(), theirs.float()))
        return ce + 0.4 * aux + torch.stack(transfer).mean()

    @torch.no_grad()
    def _teach(self, images: Tensor) -> list[Tensor]:
        side = self.teacher.patch_embed.img_size[0]
        images = F.pad(images, (0, side - images.shape[-1], 0, side - images.shape[-2]))
        *raw, last = self.teacher.forward_intermediates(
            images, indices=(2, 5, 8, 11), intermediates_only=True
        )
        return [*raw, self.teacher.norm(last.flatten(2).mT).mT.unflatten(2, last.shape[-2:])]


def _timm_block(ours: nn.Module) -> nn.Module:
    """timm's block on the very parameters of ours."""
    block = Block(ours.norm1.weight.numel(), num_heads=ours.attn.num_heads, qkv_bias=True)
    block.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    block.norm1.eps = block.norm2.eps = ours.norm1.eps
    return block


def _upernet(head: UPerNetHead, levels: Sequence[Tensor]) -> Tensor:
    *finer, coarsest = levels
    pooled = [F.interpolate(psp(coarsest), size=coarsest.shape[-2:], **BILINEAR) for psp in head.psp_modules]
    laterals = [lateral(x) for lateral, x in zip(head.lateral_convs, finer, strict=True)]
    laterals.append(head.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
    for i in range(len(finer), 0, -1):
        size = laterals[i - 1].shape[-2:]
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=size, **BILINEAR)
    outs = [*(conv(x) for conv, x in zip(head.fpn_convs, laterals, strict=False)), laterals[-1]]
    outs = [outs[0], *(F.interpolate(x, size=outs[0].shape[-2:], **BILINEAR) for x in outs[1:])]
    return head.conv_seg(head.dropout(head.fpn_bottleneck(torch.cat(outs, dim=1))))


def _models(size: int) -> tuple[Any, Teacher, _Peer]:
    """Ours, our teacher, and the peer on the same weights. Without drop path and dropout, which would make
    two runs of the student differ."""
    torch.manual_seed(0)
    model = (
        rsmodels.create_model("ktda_convnext_b", num_classes=5, image_size=size, drop_path=0.0, dropout=0.0)
        .train()
        .to(device())
    )
    teacher = Teacher("dinov2_vit_b", image_size=size).to(device())
    theirs = timm.create_model(
        "vit_base_patch14_dinov2", img_size=teacher.encoder.image_size[0], num_classes=0
    ).eval()
    theirs.to(device()).load_state_dict(teacher.encoder.state_dict())
    return model, teacher, _Peer(model, theirs)


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(
        device().type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32
    )


def _build_step(size: int, batch: int, dtype: torch.dtype) -> dict[str, Call]:
    model, teacher, peer = _models(size)
    images = torch.randn(batch, 3, size, size).to(device())
    mask = torch.randint(5, (batch, size, size)).to(device())

    def ours(model: Any, images: Tensor) -> Tensor:
        data = {"image": images, "mask": mask, "teacher": teacher(images)}
        return torch.stack(list(model.losses(data).values())).sum()

    def step(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
        with _autocast(dtype):
            gradients = torch.autograd.grad(loss(), list(model.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    calls: dict[str, Call] = {
        name: partial(step, one, partial(ours, one, pixels)) for name, one, pixels in _layouts(model, images)
    }
    return calls | {PEER: partial(step, model, partial(peer.loss, images, mask))}


def _layouts(model: nn.Module, images: Tensor) -> list[tuple[str, Any, Tensor]]:
    """The model and its input as they are; on a GPU also with weights and input channels-last."""
    found = [(OURS, model, images)]
    if on_gpu():
        layout = torch.channels_last
        other = copy.deepcopy(model).to(memory_format=layout)
        found.append((CHANNELS_LAST, other, images.contiguous(memory_format=layout)))
    return found


def _build_prediction(size: int, dtype: torch.dtype) -> dict[str, Call]:
    model, _, peer = _models(size)
    images = torch.randn(batches(), 3, size, size).to(device())
    model.eval()
    calls: dict[str, Call] = {
        name: partial(_predict, one, pixels, dtype) for name, one, pixels in _layouts(model, images)
    }
    return calls | {PEER: partial(_predict, peer.predict, images, dtype)}


def _build_with_teacher(size: int, dtype: torch.dtype) -> dict[str, Call]:
    """What prediction would cost if the teacher had to run along."""
    model, teacher, _ = _models(size)
    images = torch.randn(batches(), 3, size, size).to(device())
    model.eval()

    def both(images: Tensor) -> Tensor:
        teacher(images)
        return model(images)

    return {
        OURS: partial(_predict, model, images, dtype),
        "with the teacher": partial(_predict, both, images, dtype),
    }


def _predict(model: Callable[[Tensor], Tensor], images: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad(), _autocast(dtype):
        return model(images)


def cases() -> list[Case]:
    forms = [(size, dtype) for size in (256, 512) for dtype in (torch.float32, torch.bfloat16)]
    steps = [
        Case(
            name=f"both, KTDA ConvNeXt-B training step, {size} pixels, batch {2 * batches()}, "
            f"{str(dtype)[6:]}",
            build=partial(_build_step, size, 2 * batches(), dtype),
            dtype=dtype,
            reference=PEER,
            beside=(CHANNELS_LAST,),
            images=2 * batches(),
            counted=OURS,
            # UPerNet's coarsest batch norm sees two values per channel, and makes much of their rounding.
            tolerance=5e-3 if dtype == torch.float32 else 2e-1,
        )
        for size, dtype in forms
    ]
    predictions = [
        Case(
            name=f"forward, KTDA ConvNeXt-B{title}, {size} pixels, batch {batches()}, {str(dtype)[6:]}",
            build=partial(build, size, dtype),
            dtype=dtype,
            reference=reference,
            tolerance=1e-4 if dtype == torch.float32 else 8e-2,
            beside=("with the teacher", CHANNELS_LAST),
            images=batches(),
            counted=OURS,
        )
        for build, title, reference in (
            (_build_prediction, "", PEER),
            (_build_with_teacher, " without its teacher", "with the teacher"),
        )
        for size, dtype in forms
    ]
    return steps + predictions
