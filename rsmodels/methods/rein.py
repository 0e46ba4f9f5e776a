"""Rein (Wei et al. 2024, https://arxiv.org/abs/2312.04265), the baseline that CrossEarth builds on.

It is CrossEarth without its geospatial parts, its masked images and its styles: a frozen DINOv2, Rein's
tokens after every block, and Mask2Former with the queries that are linked to them.
"""

from typing import Any

from rsmodels.methods.crossearth import CrossEarth
from rsmodels.methods.crossearth_models import crossearth_tiny, dinov2
from rsmodels.registry import register_method, register_model

BASELINE: dict[str, Any] = {"rein": True, "gse": False, "mim": False, "style": False}
# Those, and what has no meaning without the ones that are off.
SETTLED = (
    *BASELINE,
    "gse_width",
    "injector_heads",
    "mask_ratio",
    "mask_patch",
    "prompt",
    "mim_decoder",
    "mim_width",
    "mim_loss",
    "mim_target",
    "style_probability",
    "style_ratio",
    "style_patch",
    "style_mask",
    "style_mix",
    "style_covariance",
    "style_model",
    "style_weights",
    "style_statistics",
    "value_range",
)


@register_model(fixed=SETTLED)
def rein_vit_s(
    *, num_classes: int, image_size: int | tuple[int, int] = 512, registers: int = 0, **options: Any
) -> CrossEarth:
    """Rein on DINOv2 ViT-S."""
    encoder = dinov2("vit_s", registers)
    return CrossEarth(encoder, num_classes=num_classes, image_size=image_size, **BASELINE, **options)


@register_model(fixed=SETTLED)
def rein_vit_b(
    *, num_classes: int, image_size: int | tuple[int, int] = 512, registers: int = 0, **options: Any
) -> CrossEarth:
    """Rein on DINOv2 ViT-B."""
    encoder = dinov2("vit_b", registers)
    return CrossEarth(encoder, num_classes=num_classes, image_size=image_size, **BASELINE, **options)


@register_model(fixed=SETTLED)
def rein_vit_l(
    *, num_classes: int, image_size: int | tuple[int, int] = 512, registers: int = 0, **options: Any
) -> CrossEarth:
    """The papers' baseline: Rein on DINOv2 ViT-L."""
    encoder = dinov2("vit_l", registers)
    return CrossEarth(encoder, num_classes=num_classes, image_size=image_size, **BASELINE, **options)


@register_model(fixed=SETTLED)
def rein_vit_g(
    *, num_classes: int, image_size: int | tuple[int, int] = 512, registers: int = 0, **options: Any
) -> CrossEarth:
    """Rein on DINOv2 ViT-g."""
    encoder = dinov2("vit_g", registers)
    return CrossEarth(encoder, num_classes=num_classes, image_size=image_size, **BASELINE, **options)


@register_model(fixed=SETTLED)
def rein_tiny(*, num_classes: int, image_size: int | tuple[int, int] = 128, **options: Any) -> CrossEarth:
    """Rein with crossearth_tiny's encoder and decoder."""
    return crossearth_tiny(num_classes=num_classes, image_size=image_size, **BASELINE, **options)


register_method("rein", "rein", variant="vit_l", optim={"lr": 1e-4, "weight_decay": 0.05})
