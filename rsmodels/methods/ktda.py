"""KTDA (Zhang et al. 2024, https://arxiv.org/abs/2412.13823): a CNN that learns from a frozen DINOv2.

Stages of the student are aligned with blocks of the teacher (FAM), pulled towards them by KL and MSE,
adapted by transformer blocks (FMM) and decoded by UPerNet. The teacher (rsmodels.methods.teacher) is not
part of the model: training computes its maps and hands them over with the batch, prediction needs none.

Shapes: B batch, K classes, H/W pixels, D teacher embedding, h/w the teacher's grid.
"""

from typing import Any

import torch
from torch import Tensor, nn

import rskernels
from rsmodels.arguments import check_choice, check_numbers
from rsmodels.encoders.cnn import checkpoint_stages, load_timm_stages, stage_maps, timm_stages
from rsmodels.heads.fcn import FCNHead
from rsmodels.heads.ktda import NECK_SCALES, FeatureAlignment, FeatureModulation, MultiLevelNeck
from rsmodels.heads.upernet import UPerNetHead
from rsmodels.layers import resize
from rsmodels.methods.base import Segmenter
from rsmodels.methods.losses import decoder_losses
from rsmodels.methods.teacher import teacher_grid
from rsmodels.registry import register_method, register_model
from rsmodels.weights import LoadReport

SCALES = ("multi", "single")
FMM_POSITIONS = ("before_neck", "after_neck")
# Options of rskernels.distillation_loss: eq. (2), and what the authors' code computes instead.
KL: dict[str, dict[str, Any]] = {
    "paper": {"axis": "channel", "direction": "student||teacher", "reduction": "mean"},
    "authors": {"axis": "width", "direction": "teacher||student", "reduction": "batchmean"},
}


class KTDA(Segmenter):
    """images (B, 3, H, W), normalised → logits (B, K, H, W).

    Args:
        num_classes: K; 1 means binary.
        image_size: H and W, or one int for both; multiples of 32.
        student: name of a timm network with stages at 1/4 to 1/32.
        student_options: timm's own options for the student.
        teacher_dim: D, the width of the teacher that training uses: 768 for ViT-B, 384 for S, 1024 for L and
            1536 for g.
        patch_size: the teacher's; with the image size it fixes the grid that stages are aligned to.
        scales: "multi", four stages against four blocks, or "single", Table III's last stage against the last
            block, whose map then feeds every level of the neck.
        fmm_depth: N, transformer blocks per scale; 0 leaves FMM out. fmm_heads: their heads.
        fmm_position: "before_neck" as in the paper, "after_neck" as in the authors' code.
        transfer: learn from a teacher. False trains the same network without one (Table III's "w/o loss").
        kl: "paper", eq. (2), or "authors": softmax over image columns, teacher to student, sum over batch.
        temperature: of the KL term.
        kl_weight, mse_weight, aux_weight: lambda of eqs. (3) and (5); 0 drops the term (Table II).
        drop_path: of the student's last block, rising from 0 at the first; 0 for networks of timm's that have
            none, and where student_options has timm's own drop_path_rate. dropout: of both heads.
        neck_dim, head_dim, aux_dim: widths of the neck (None: D), of UPerNet and of the auxiliary head.
        activation: "softmax" over the classes, or "sigmoid" for each.
        mean, std, bands: the model's Preprocessing; ImageNet's statistics unless given.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int | tuple[int, int],
        student: str = "convnext_base",
        student_options: dict[str, Any] | None = None,
        teacher_dim: int = 768,
        patch_size: int = 14,
        scales: str = "multi",
        fmm_depth: int = 4,
        fmm_heads: int = 8,
        fmm_position: str = "before_neck",
        transfer: bool = True,
        kl: str = "paper",
        temperature: float = 1.0,
        kl_weight: float = 0.5,
        mse_weight: float = 0.5,
        aux_weight: float = 0.4,
        drop_path: float = 0.4,
        dropout: float = 0.1,
        neck_dim: int | None = None,
        head_dim: int = 512,
        aux_dim: int = 256,
        activation: str = "softmax",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        bands: tuple[int, ...] | None = None,
    ) -> None:
        check_choice("scales", scales, SCALES)
        check_choice("fmm_position", fmm_position, FMM_POSITIONS)
        check_choice("kl", kl, KL)
        check_numbers(0, kl_weight=kl_weight, mse_weight=mse_weight, aux_weight=aux_weight)
        check_numbers(0, above=True, temperature=temperature)
        check_numbers(0, 1, below=True, drop_path=drop_path, dropout=dropout)
        check_numbers(0, fmm_depth=fmm_depth)
        check_numbers(1, fmm_heads=fmm_heads, teacher_dim=teacher_dim)
        check_numbers(1, neck_dim=neck_dim, head_dim=head_dim, aux_dim=aux_dim)
        options = dict(student_options or {})
        channels = options.get("in_chans", 3)
        if type(channels) is not int or channels < 1:
            raise ValueError(
                f"student_options: in_chans={channels!r}: expected a whole number of bands, at least 1"
            )
        if drop_path and "drop_path_rate" in options:
            raise ValueError(
                f"student_options: drop_path_rate={options['drop_path_rate']} beside drop_path={drop_path}; "
                "give the rate as drop_path alone"
            )
        super().__init__(
            num_classes=num_classes,
            image_size=image_size,
            activation=activation,
            channels=channels,
            mean=mean,
            std=std,
            bands=bands,
        )
        self.teacher_dim = teacher_dim
        self.grid_size = teacher_grid(self.image_size, patch_size)
        self.transfers = transfer and max(kl_weight, mse_weight) > 0
        self.kl, self.temperature = KL[kl], temperature
        self.kl_weight, self.mse_weight, self.aux_weight = kl_weight, mse_weight, aux_weight

        if drop_path:
            options["drop_path_rate"] = drop_path
        self.student_name = student
        self.student = timm_stages(student, image_size=self.image_size, **options)
        widths = self.student.feature_info.channels()
        self.single_scale = scales == "single"
        used = widths[-1:] if self.single_scale else widths
        dim = teacher_dim
        width = neck_dim or dim
        self.align = FeatureAlignment(used, dim)
        self.fmm_first = fmm_position == "before_neck"
        fmm_dim, fmm_scales = (dim, len(used)) if self.fmm_first else (width, len(NECK_SCALES))
        if fmm_depth and fmm_dim % fmm_heads:
            raise ValueError(f"fmm_heads={fmm_heads}: expected heads that divide {fmm_dim}")
        self.modulation = (
            FeatureModulation(fmm_dim, scales=fmm_scales, depth=fmm_depth, num_heads=fmm_heads)
            if fmm_depth
            else nn.Identity()
        )
        self.neck = MultiLevelNeck([dim] * len(NECK_SCALES), width)
        self.head = UPerNetHead([width] * len(NECK_SCALES), num_classes, dim=head_dim, dropout=dropout)
        self.aux_head = FCNHead(width, num_classes, dim=aux_dim, dropout=dropout) if aux_weight else None

    def forward(self, images: Tensor) -> Tensor:
        return self._logits(self.head(self._levels(self._aligned(images))))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """What the decoder sees: (B, ·, ·, ·) at 4, 2, 1 and 1/2 times the teacher's grid."""
        return self._levels(self._aligned(images))

    def _aligned(self, images: Tensor) -> list[Tensor]:
        """The student's stages, aligned with the teacher's blocks: (B, D, h, w) each."""
        self.check_images(images)
        stages = stage_maps(self.student, images)
        return self.align(stages[-1:] if self.single_scale else stages, self.grid_size)

    def _levels(self, aligned: list[Tensor]) -> list[Tensor]:
        if self.fmm_first:
            aligned = self.modulation(aligned)
        levels = self.neck(aligned * len(NECK_SCALES) if self.single_scale else aligned)
        return levels if self.fmm_first else self.modulation(levels)

    def _logits(self, coarse: Tensor) -> Tensor:
        return resize(coarse, self.image_size)

    def losses_and_logits(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms of eq. (6), to be summed, and the logits they were taken of.

        Args:
            batch: "image" (B, 3, H, W), normalised, "mask" (B, H, W), class ids and 255 = ignore, and, where
                the model transfers, "teacher": a Teacher's maps (B, D, h, w) of the images.
        """
        aligned = self._aligned(batch["image"])
        levels = self._levels(aligned)
        logits = self._logits(self.head(levels))
        aux = None if self.aux_head is None else self._logits(self.aux_head(levels[2]))
        terms = self.transfer_losses(aligned, batch.get("teacher")) if self.transfers else {}
        terms |= decoder_losses(
            logits, aux, batch["mask"], aux_weight=self.aux_weight, activation=self.activation
        )
        return terms, logits

    def transfer_losses(self, aligned: list[Tensor], teacher: list[Tensor] | None) -> dict[str, Tensor]:
        """L_kt (eqs. 2, 3): the mean over scales of the KL and MSE terms, weighted."""
        if teacher is None:
            raise ValueError(
                "losses: the batch has no 'teacher' maps to learn from; add those of rsmodels.create_teacher "
                "or create the model with transfer=False"
            )
        if len(teacher) != len(NECK_SCALES):
            raise ValueError(
                f"losses: {len(teacher)} teacher maps, expected {len(NECK_SCALES)}, those of "
                "rsmodels.create_teacher"
            )
        expected = (self.teacher_dim, *self.grid_size)
        found = {tuple(theirs.shape[1:]) for theirs in teacher}
        if found != {expected}:
            raise ValueError(
                f"losses: teacher maps of {', '.join(map(str, sorted(found)))} per image, this model learns "
                f"from {expected}; take a teacher of that width and grid, or create the model with the "
                "teacher's teacher_dim= and patch_size="
            )
        pairs = list(zip(aligned, teacher[-len(aligned) :], strict=True))
        terms = [
            rskernels.distillation_loss(ours, theirs, temperature=self.temperature, **self.kl)
            for ours, theirs in pairs
        ]
        kl, mse = (torch.stack(values).mean() for values in zip(*terms, strict=True))
        weighted = {"kl": (self.kl_weight, kl), "mse": (self.mse_weight, mse)}
        return {name: weight * value for name, (weight, value) in weighted.items() if weight}

    def blocks_to_shard(self) -> list[nn.Module]:
        """The modules that FSDP wraps one by one."""
        fmm = [] if isinstance(self.modulation, nn.Identity) else [*self.modulation.scales]
        return [self.student, *fmm, self.head]

    def load_pretrained(self, source: str) -> LoadReport:
        """Load timm weights of the student (a file or a hub id); print and return the report."""
        return load_timm_stages(
            self, "student", source, advice=f", {self.student_name}; a teacher's go to --teacher-weights"
        )

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the student and of FMM in backward instead of keeping them."""
        checkpoint_stages(self.student, self.student_name, enabled)
        if isinstance(self.modulation, FeatureModulation):
            self.modulation.activation_checkpointing = enabled


# A ConvNeXt of timm's with an eighth of the smallest published one's parameters.
TINY: dict[str, Any] = {
    "student": "convnext_atto",
    "teacher_dim": 128,
    "fmm_depth": 1,
    "fmm_heads": 4,
    "drop_path": 0.0,
    "dropout": 0.0,
    "neck_dim": 64,
    "head_dim": 64,
    "aux_dim": 32,
}
TINY_STUDENT: dict[str, Any] = {"depths": [1, 1, 2, 1], "dims": [24, 48, 96, 128]}


@register_model(teacher="dinov2_vit_b")
def ktda_convnext_b(*, num_classes: int, image_size: int | tuple[int, int] = 256, **options: Any) -> KTDA:
    """KTDA's ConvNeXt-B, for a teacher of DINOv2 ViT-B's width."""
    return KTDA(num_classes=num_classes, image_size=image_size, **options)


@register_model(teacher="dinov2_vit_tiny")
def ktda_tiny(*, num_classes: int, image_size: int | tuple[int, int] = 128, **options: Any) -> KTDA:
    """KTDA small enough to train from scratch in minutes on a CPU, for the teacher dinov2_vit_tiny."""
    if "student" not in options:
        options["student_options"] = TINY_STUDENT | (options.get("student_options") or {})
    return KTDA(num_classes=num_classes, image_size=image_size, **{**TINY, **options})


# The decay is the authors' configuration's; the warm-up starts at this share of the rate.
register_method(
    "ktda", "ktda", variant="convnext_b", optim={"lr": 1e-3, "weight_decay": 0.01, "warmup_start": 1e-3}
)
