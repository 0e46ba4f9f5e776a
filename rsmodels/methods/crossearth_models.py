"""CrossEarth's variants by name: DINOv2 of four sizes, MTP's RVSA of two, and a tiny one."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rsmodels.methods.crossearth import CrossEarth
from rsmodels.registry import ENCODERS, register_method, register_model


def dinov2(size: str, registers: int = 0) -> Callable[..., Any]:
    """The frozen encoder of a variant: patch 16, whichever its checkpoint has, as the authors use it."""
    return partial(ENCODERS[f"dinov2_{size}"], patch_size=16, registers=registers)


TINY: dict[str, Any] = {
    "num_queries": 20,
    "rein_rank": 8,
    "gse_width": 8,
    "injector_heads": 4,
    "mask_patch": 16,
    "mim_width": 16,
    "style_patch": 16,
    "points": 1024,
    "head_dim": 64,
    "head_heads": 4,
    "pixel_layers": 2,
    "pixel_mlp_dim": 128,
    "decoder_layers": 3,
    "decoder_mlp_dim": 128,
}


@register_model
def crossearth_vit_s(
    *, num_classes: int, image_size: int | tuple[int, int] = 512, registers: int = 0, **options: Any
) -> CrossEarth:
    """CrossEarth on DINOv2 ViT-S."""
    return CrossEarth(dinov2("vit_s", registers), num_classes=num_classes, image_size=image_size, **options)


@register_model
def crossearth_vit_b(
    *, num_classes: int, image_size: int | tuple[int, int] = 512, registers: int = 0, **options: Any
) -> CrossEarth:
    """CrossEarth on DINOv2 ViT-B."""
    return CrossEarth(dinov2("vit_b", registers), num_classes=num_classes, image_size=image_size, **options)


@register_model
def crossearth_vit_l(
    *, num_classes: int, image_size: int | tuple[int, int] = 512, registers: int = 0, **options: Any
) -> CrossEarth:
    """The paper's CrossEarth, on DINOv2 ViT-L."""
    return CrossEarth(dinov2("vit_l", registers), num_classes=num_classes, image_size=image_size, **options)


@register_model
def crossearth_vit_g(
    *, num_classes: int, image_size: int | tuple[int, int] = 512, registers: int = 0, **options: Any
) -> CrossEarth:
    """CrossEarth on DINOv2 ViT-g."""
    return CrossEarth(dinov2("vit_g", registers), num_classes=num_classes, image_size=image_size, **options)


@register_model
def crossearth_rvsa_b(
    *, num_classes: int, image_size: int | tuple[int, int] = 512, **options: Any
) -> CrossEarth:
    """CrossEarth on MTP's ViT-B with RVSA (Table 10)."""
    options = {"taps": (3, 5, 7, 11), **options}
    return CrossEarth(ENCODERS["rvsa_vit_b"], num_classes=num_classes, image_size=image_size, **options)


@register_model
def crossearth_rvsa_l(
    *, num_classes: int, image_size: int | tuple[int, int] = 512, **options: Any
) -> CrossEarth:
    """CrossEarth on MTP's ViT-L with RVSA."""
    return CrossEarth(ENCODERS["rvsa_vit_l"], num_classes=num_classes, image_size=image_size, **options)


@register_model
def crossearth_tiny(
    *, num_classes: int, image_size: int | tuple[int, int] = 128, **options: Any
) -> CrossEarth:
    """CrossEarth small enough to train in minutes on a CPU; `rsmodels pretrain` makes its encoder."""
    model = CrossEarth(
        dinov2("vit_tiny"), num_classes=num_classes, image_size=image_size, **{**TINY, **options}
    )
    model.set_activation_checkpointing(False)  # four small blocks: nothing worth the time
    return model


register_method("crossearth", "crossearth", variant="vit_l", optim={"lr": 1e-4, "weight_decay": 0.05})
