"""RS-SAM (Zhang et al., ACCV 2024): SAM without prompts, with LoRA, a multi-scale neck and MPRM.

Its baseline in the paper, SAMed (`sam_lora_*`), is the same model with all three of Table 5's switches off.
Shapes: B batch, K classes, H/W pixels, D encoder embedding, C decoder width, E width of the comparison.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsmodels.arguments import check_choice
from rsmodels.encoders.sam_vit import SamViT
from rsmodels.heads.mprm import HybridFeatureFusion, MaskFeatureFusion
from rsmodels.heads.multiscale_neck import MultiScaleNeck
from rsmodels.heads.sam_decoder import RandomPositionEncoding, TwoWayTransformer, make_upscaling
from rsmodels.layers import make_neck
from rsmodels.methods.base import Segmenter
from rsmodels.methods.losses import segmentation_losses
from rsmodels.registry import ENCODERS, register_method, register_model
from rsmodels.weights import LoadReport, SamCheckpoint, load_encoder, load_part, read_sam

NECK_SOURCES = ("last", "layers")
# Loss weights of section 4.2.
CE_WEIGHT, DICE_WEIGHT = 0.2, 0.8


class RSSAM(Segmenter):
    """images (B, C, H, W), normalised → logits (B, K, H, W).

    Args:
        encoder: name of a SAM encoder.
        num_classes: K; 1 means binary.
        image_size: H and W, or one int for both; multiples of 32 (of 16 without the neck).
        neck, mff, mhff: Table 5's switches. Without the neck one decoder works at 1/16; without MFF the
            finest tokens alone go through its MLP; without MHFF SAM's upscaling serves the finest map.
        neck_source: "last", or "layers": Table 6's four maps from four depths.
        early_block: block whose output is F_early; None takes the first global one.
        mff_last_relu: see MaskFeatureFusion.
        activation: "sigmoid", the paper's loss per class, or "softmax".
        lora_rank: rank of the encoder's LoRA; 0 for none.
        freeze_encoder: train nothing of the encoder but LoRA. False trains all of it, except the qkv weights
            that carry LoRA.
        in_chans, in_chans_mode: input bands and how to adapt to them, see SamViT.
        mean, std, bands: the model's Preprocessing; ImageNet's statistics, as SAM's, unless given, repeated
            over bands.
        decoder_dim, decoder_heads, decoder_mlp_dim, embedding_dim: C, the transformers' sizes, and E.
    """

    def __init__(
        self,
        encoder: str,
        /,
        *,
        num_classes: int,
        image_size: int | tuple[int, int],
        neck: bool = True,
        mff: bool = True,
        mhff: bool = True,
        neck_source: str = "last",
        early_block: int | None = None,
        mff_last_relu: bool = False,
        activation: str = "sigmoid",
        lora_rank: int = 4,
        freeze_encoder: bool = True,
        in_chans: int = 3,
        in_chans_mode: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        bands: tuple[int, ...] | None = None,
        decoder_dim: int = 256,
        decoder_heads: int = 8,
        decoder_mlp_dim: int = 2048,
        embedding_dim: int = 32,
    ) -> None:
        if (mff or mhff) and not neck:
            raise ValueError(
                f"neck=False with mff={mff}, mhff={mhff}: MPRM fuses the neck's scales; "
                "set neck=True, or mff=False and mhff=False"
            )
        check_choice("neck_source", neck_source, NECK_SOURCES)
        positive = min(decoder_dim, decoder_heads, decoder_mlp_dim, embedding_dim) > 0
        if not positive or decoder_dim % (2 * decoder_heads):  # cross-attention works at half the width
            raise ValueError(
                f"decoder_dim={decoder_dim}, decoder_heads={decoder_heads}, "
                f"decoder_mlp_dim={decoder_mlp_dim}, embedding_dim={embedding_dim}: expected sizes above 0, "
                "with decoder_dim a multiple of twice the heads"
            )
        super().__init__(
            num_classes=num_classes,
            image_size=image_size,
            multiple_of=32 if neck else 16,
            activation=activation,
            channels=in_chans,
            mean=mean,
            std=std,
            bands=bands,
        )

        vit: Any = ENCODERS[encoder](
            image_size=self.image_size,
            neck_dim=None,
            lora_rank=lora_rank,
            in_chans=in_chans,
            in_chans_mode=in_chans_mode,
        )
        self.encoder: SamViT = vit
        if freeze_encoder:
            self.encoder.freeze()
        depth, dim = len(vit.blocks), vit.embed_dim
        self.neck_blocks: tuple[int, ...] = (depth - 1,) * 4
        if neck_source == "layers":
            self.neck_blocks = tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
        self.early_block = vit.global_blocks[0] if early_block is None else early_block
        if not 0 <= self.early_block < depth:
            raise ValueError(f"early_block={early_block}: expected a block index from 0 to {depth - 1}")

        self.neck = MultiScaleNeck(dim, decoder_dim) if neck else make_neck(dim, decoder_dim)
        self.mask_tokens = nn.Parameter(torch.randn(num_classes, decoder_dim))
        self.no_mask_embed = nn.Parameter(torch.zeros(decoder_dim))
        self.pe_layer = RandomPositionEncoding(decoder_dim)
        # Coarse to fine: 1/32, 1/16, 1/8, 1/4.
        self.decoders = nn.ModuleList(
            TwoWayTransformer(decoder_dim, num_heads=decoder_heads, mlp_dim=decoder_mlp_dim)
            for _ in range(4 if neck else 1)
        )
        self.sum_tokens = mff
        self.mff = MaskFeatureFusion(decoder_dim, embedding_dim, last_relu=mff_last_relu)
        self.mhff = HybridFeatureFusion(dim, decoder_dim, embedding_dim) if mhff else None
        self.upscaling: Any = None if mhff else make_upscaling(decoder_dim, embedding_dim)
        self.activation_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        pyramid, early = self._encode(images)
        tokens = self.mask_tokens.expand(images.shape[0], -1, -1)
        maps, tokens_per_scale = [], []
        for decoder, feature in zip(self.decoders, reversed(pyramid), strict=True):
            image_pe = self.pe_layer(feature.shape[-2:]).to(feature.dtype)
            arguments = (feature + self.no_mask_embed[:, None, None], image_pe, tokens)
            if self.activation_checkpointing and torch.is_grad_enabled():
                updated, tokens = checkpoint(decoder, *arguments, use_reentrant=False)
            else:
                updated, tokens = decoder(*arguments)
            maps.append(updated.transpose(1, 2).unflatten(2, feature.shape[-2:]))
            tokens_per_scale.append(tokens)

        d_fusion = self.mff(sum(tokens_per_scale) if self.sum_tokens else tokens)
        f_fusion = self.upscaling(maps[-1]) if self.mhff is None else self.mhff(maps, early)
        logits = torch.einsum("behw,bke->bkhw", f_fusion, d_fusion)
        return F.interpolate(logits, size=self.image_size, mode="bilinear", align_corners=False)

    def _encode(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The neck's maps (B, C, ·, ·), finest first, and F_early (B, D, H/16, W/16)."""
        taps = sorted({*self.neck_blocks, self.early_block})
        features = dict(zip(taps, self.encoder.forward_intermediates(images, taps), strict=True))
        early = features[self.early_block]
        if isinstance(self.neck, MultiScaleNeck):
            return self.neck([features[i] for i in self.neck_blocks]), early
        return [self.neck(features[self.neck_blocks[-1]])], early

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The neck's maps: (B, C, ·, ·) at 1/4, 1/8, 1/16 and 1/32, or at 1/16 alone without the neck."""
        return self._encode(images)[0]

    def losses_and_logits(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Weighted terms of eq. (7), to be summed, {"ce": 0.2·CE, "dice": 0.8·Dice}, and their logits.

        Args:
            batch: "image" (B, C, H, W), normalised, and "mask" (B, H, W), class ids and 255 = ignore.
        """
        logits = self(batch["image"])
        terms = segmentation_losses(logits, batch["mask"], activation=self.activation)
        return {"ce": CE_WEIGHT * terms["ce"], "dice": DICE_WEIGHT * terms["dice"]}, logits

    def merge_lora(self) -> None:
        """Fold LoRA into the encoder's weights for inference; `unmerge_lora()` and `train()` undo it."""
        self.encoder.merge_lora()

    def unmerge_lora(self) -> None:
        """Undo merge_lora() exactly."""
        self.encoder.unmerge_lora()

    def blocks_to_shard(self) -> list[nn.Module]:
        """The modules that FSDP wraps one by one."""
        return [*self.encoder.blocks, *self.decoders]

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of encoder blocks and decoders in backward instead of keeping them."""
        self.encoder.set_activation_checkpointing(enabled)
        self.activation_checkpointing = enabled

    def resize_state(
        self, state: dict[str, Tensor], *, saved_size: Sequence[int] | None = None
    ) -> dict[str, str]:
        """Fit another image size's state dict of this model to this one, in place; its own shapes tell that
        size. See SamViT."""
        return self.encoder.resize_state(state, prefix="encoder.")

    def load_pretrained(self, source: str) -> LoadReport:
        """Load what fits of a SAM checkpoint (a file or a hub id); print and return the report.

        The encoder must fit exactly. SAM's neck goes to the 1/16 scale, its two-way transformer to every
        decoder, its position encoding, no_mask_embed and upscaling to theirs; prompts, mask tokens,
        hypernetworks and the IoU head have no place here.
        """
        checkpoint = read_sam(source)
        report = LoadReport(checkpoint.source, checkpoint.sha256)
        neck, neck_name = self.neck, "neck"
        if isinstance(neck, MultiScaleNeck):
            neck, neck_name = neck.neck_16, "neck.neck_16"
        load_encoder(self.encoder, checkpoint, report, name="encoder", neck=neck, neck_name=neck_name)
        self._load_decoder(checkpoint, report)
        report.finish(self)
        return report

    def _load_decoder(self, checkpoint: SamCheckpoint, report: LoadReport) -> None:
        rest = dict(checkpoint.rest)

        def take(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): rest.pop(key) for key in list(rest) if key.startswith(prefix)}

        if transformer := take("mask_decoder.transformer."):
            for i, decoder in enumerate(self.decoders):
                load_part(decoder, transformer, report, f"decoders.{i}")
        if position := take("prompt_encoder.pe_layer."):
            load_part(self.pe_layer, position, report, "pe_layer")
        if "prompt_encoder.no_mask_embed.weight" in rest:
            with torch.no_grad():
                self.no_mask_embed.copy_(rest.pop("prompt_encoder.no_mask_embed.weight").view(-1))
            report.loaded.append("no_mask_embed")
        if self.upscaling is not None and (upscaling := take("mask_decoder.output_upscaling.")):
            load_part(self.upscaling, upscaling, report, "upscaling")
        report.dropped.update(dict.fromkeys(rest, "no place in a prompt-free model"))


TINY: dict[str, Any] = {
    "freeze_encoder": False,  # nothing to keep: no pretrained weights of this size exist
    "decoder_dim": 64,
    "decoder_heads": 4,
    "decoder_mlp_dim": 128,
}


@register_model
def rs_sam_vit_b(*, num_classes: int, image_size: int | tuple[int, int] = 512, **options: Any) -> RSSAM:
    """RS-SAM on SAM ViT-B."""
    return RSSAM("sam_vit_b", num_classes=num_classes, image_size=image_size, **options)


@register_model
def rs_sam_vit_l(*, num_classes: int, image_size: int | tuple[int, int] = 512, **options: Any) -> RSSAM:
    """RS-SAM on SAM ViT-L."""
    return RSSAM("sam_vit_l", num_classes=num_classes, image_size=image_size, **options)


@register_model
def rs_sam_vit_h(*, num_classes: int, image_size: int | tuple[int, int] = 512, **options: Any) -> RSSAM:
    """RS-SAM on SAM ViT-H."""
    return RSSAM("sam_vit_h", num_classes=num_classes, image_size=image_size, **options)


@register_model
def rs_sam_tiny(*, num_classes: int, image_size: int | tuple[int, int] = 128, **options: Any) -> RSSAM:
    """RS-SAM small enough to train from scratch in minutes on a CPU."""
    return RSSAM("sam_vit_tiny", num_classes=num_classes, image_size=image_size, **{**TINY, **options})


register_method("rs-sam", "rs_sam")
