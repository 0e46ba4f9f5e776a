"""The baseline that KTDA compares with (arXiv 2412.13823, Table V): a frozen DINOv2 under UPerNet.

The teacher itself is the backbone; neck, UPerNet and the auxiliary head are KTDA's and all that trains.
Shapes: B batch, K classes, H/W pixels, D encoder embedding, h/w the encoder's grid.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rsmodels.arguments import check_numbers
from rsmodels.heads.fcn import FCNHead
from rsmodels.heads.ktda import NECK_SCALES, MultiLevelNeck
from rsmodels.heads.upernet import UPerNetHead
from rsmodels.layers import resize
from rsmodels.methods.base import Segmenter
from rsmodels.methods.losses import decoder_losses
from rsmodels.methods.teacher import Teacher
from rsmodels.registry import register_method, register_model
from rsmodels.weights import LoadReport


class DinoUPerNet(Segmenter):
    """images (B, 3, H, W), normalised → logits (B, K, H, W).

    Args:
        encoder: name of a DINOv2 encoder.
        num_classes: K; 1 means binary.
        image_size: H and W, or one int for both; multiples of 32, as KTDA's.
        patch_size, registers: of the encoder.
        fit: how images get to a multiple of the patch, see Teacher.
        aux_weight: of the auxiliary head's loss; 0 leaves that head out.
        dropout: of both heads.
        neck_dim, head_dim, aux_dim: widths of the neck (None: D), of UPerNet and of the auxiliary head.
        activation: "softmax" over the classes, or "sigmoid" for each.
        mean, std, bands: the model's Preprocessing; ImageNet's statistics unless given.
    """

    def __init__(
        self,
        encoder: str,
        /,
        *,
        num_classes: int,
        image_size: int | tuple[int, int],
        patch_size: int = 14,
        registers: int = 0,
        fit: str = "pad",
        aux_weight: float = 0.4,
        dropout: float = 0.1,
        neck_dim: int | None = None,
        head_dim: int = 512,
        aux_dim: int = 256,
        activation: str = "softmax",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        bands: tuple[int, ...] | None = None,
    ) -> None:
        check_numbers(0, aux_weight=aux_weight)
        check_numbers(0, 1, below=True, dropout=dropout)
        check_numbers(1, neck_dim=neck_dim, head_dim=head_dim, aux_dim=aux_dim)
        super().__init__(
            num_classes=num_classes,
            image_size=image_size,
            activation=activation,
            mean=mean,
            std=std,
            bands=bands,
        )
        self.aux_weight = aux_weight

        self.backbone = Teacher(
            encoder, image_size=self.image_size, fit=fit, patch_size=patch_size, registers=registers
        )
        dim, levels = self.backbone.encoder.embed_dim, len(NECK_SCALES)
        width = neck_dim or dim
        self.neck = MultiLevelNeck([dim] * levels, width)
        self.head = UPerNetHead([width] * levels, num_classes, dim=head_dim, dropout=dropout)
        self.aux_head = FCNHead(width, num_classes, dim=aux_dim, dropout=dropout) if aux_weight else None

    def forward(self, images: Tensor) -> Tensor:
        return resize(self.head(self.forward_features(images)), self.image_size)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """What the decoder sees: (B, ·, ·, ·) at 4, 2, 1 and 1/2 times the encoder's grid."""
        self.check_images(images)
        return self.neck(self.backbone(images))

    def losses_and_logits(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """{"ce": CE, "aux": aux_weight·CE of the auxiliary head}, to be summed, and the logits.

        Args:
            batch: "image" (B, 3, H, W), normalised, and "mask" (B, H, W), class ids and 255 = ignore.
        """
        levels = self.forward_features(batch["image"])
        logits = resize(self.head(levels), self.image_size)
        aux = None if self.aux_head is None else resize(self.aux_head(levels[2]), self.image_size)
        terms = decoder_losses(
            logits, aux, batch["mask"], aux_weight=self.aux_weight, activation=self.activation
        )
        return terms, logits

    def blocks_to_shard(self) -> list[nn.Module]:
        """The modules that FSDP wraps one by one."""
        return [*self.backbone.encoder.blocks, self.head]

    def load_pretrained(self, source: str) -> LoadReport:
        """Load a DINOv2 checkpoint (a file or a hub id) into the backbone; print and return the report."""
        return self.backbone.load_pretrained(source)

    def resize_state(
        self, state: dict[str, Tensor], *, saved_size: Sequence[int] | None = None
    ) -> dict[str, str]:
        """Fit another image size's state dict of this model to this one, in place; see DinoViT."""
        return self.backbone.encoder.resize_state(state, prefix="backbone.encoder.", saved_size=saved_size)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Nothing to do: a frozen backbone keeps no activations."""


TINY: dict[str, Any] = {"dropout": 0.0, "neck_dim": 64, "head_dim": 64, "aux_dim": 32}


@register_model
def dinov2_upernet_vit_s(
    *, num_classes: int, image_size: int | tuple[int, int] = 256, **options: Any
) -> DinoUPerNet:
    """Frozen DINOv2 ViT-S under UPerNet."""
    return DinoUPerNet("dinov2_vit_s", num_classes=num_classes, image_size=image_size, **options)


@register_model
def dinov2_upernet_vit_b(
    *, num_classes: int, image_size: int | tuple[int, int] = 256, **options: Any
) -> DinoUPerNet:
    """The paper's baseline: frozen DINOv2 ViT-B under UPerNet."""
    return DinoUPerNet("dinov2_vit_b", num_classes=num_classes, image_size=image_size, **options)


@register_model
def dinov2_upernet_vit_l(
    *, num_classes: int, image_size: int | tuple[int, int] = 256, **options: Any
) -> DinoUPerNet:
    """Frozen DINOv2 ViT-L under UPerNet."""
    return DinoUPerNet("dinov2_vit_l", num_classes=num_classes, image_size=image_size, **options)


@register_model
def dinov2_upernet_vit_g(
    *, num_classes: int, image_size: int | tuple[int, int] = 256, **options: Any
) -> DinoUPerNet:
    """Frozen DINOv2 ViT-g under UPerNet."""
    return DinoUPerNet("dinov2_vit_g", num_classes=num_classes, image_size=image_size, **options)


@register_model
def dinov2_upernet_tiny(
    *, num_classes: int, image_size: int | tuple[int, int] = 128, **options: Any
) -> DinoUPerNet:
    """The baseline over the tiny DINOv2, which no published weights exist for."""
    return DinoUPerNet(
        "dinov2_vit_tiny", num_classes=num_classes, image_size=image_size, **{**TINY, **options}
    )


# The schedule is KTDA's, which it is compared with.
register_method(
    "dinov2-upernet", "dinov2_upernet", optim={"lr": 1e-3, "weight_decay": 0.01, "warmup_start": 1e-3}
)
