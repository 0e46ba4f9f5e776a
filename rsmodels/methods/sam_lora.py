"""SAMed (Zhang & Liu 2023, https://arxiv.org/abs/2304.13785), the baseline that RS-SAM compares with.

It is RS-SAM with all three of Table 5's switches off: one prompt-free decoder at 1/16, SAM's upscaling.
"""

from typing import Any

from rsmodels.methods.rs_sam import RSSAM, TINY
from rsmodels.registry import register_method, register_model

BASELINE: dict[str, Any] = {"neck": False, "mff": False, "mhff": False}


@register_model(fixed=tuple(BASELINE))
def sam_lora_vit_b(*, num_classes: int, image_size: int | tuple[int, int] = 512, **options: Any) -> RSSAM:
    """The paper's baseline on SAM ViT-B: one decoder at 1/16, SAM's upscaling."""
    return RSSAM("sam_vit_b", num_classes=num_classes, image_size=image_size, **BASELINE, **options)


@register_model(fixed=tuple(BASELINE))
def sam_lora_vit_l(*, num_classes: int, image_size: int | tuple[int, int] = 512, **options: Any) -> RSSAM:
    """The baseline on SAM ViT-L."""
    return RSSAM("sam_vit_l", num_classes=num_classes, image_size=image_size, **BASELINE, **options)


@register_model(fixed=tuple(BASELINE))
def sam_lora_vit_h(*, num_classes: int, image_size: int | tuple[int, int] = 512, **options: Any) -> RSSAM:
    """The baseline on SAM ViT-H."""
    return RSSAM("sam_vit_h", num_classes=num_classes, image_size=image_size, **BASELINE, **options)


@register_model(fixed=tuple(BASELINE))
def sam_lora_tiny(*, num_classes: int, image_size: int | tuple[int, int] = 128, **options: Any) -> RSSAM:
    """The baseline with rs_sam_tiny's encoder and decoder."""
    return RSSAM(
        "sam_vit_tiny", num_classes=num_classes, image_size=image_size, **BASELINE, **{**TINY, **options}
    )


register_method("sam-lora", "sam_lora")
