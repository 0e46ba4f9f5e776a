"""CrossEarth (Gong et al. 2024, https://arxiv.org/abs/2410.22629): a frozen DINOv2 that segments in places it
was not trained on.

Rein's tokens refine the frozen blocks, a geospatial extractor and injectors the features of the segmentation
flow, Mask2Former decodes them. Training shows styled images now and then, and restores masked ones in a
second flow that shares the encoder's one pass. With all of that off but Rein, the model is its baseline
(rsmodels.methods.rein), and without Rein a Mask2Former on frozen features.

Shapes: B batch, K classes, H/W pixels, D encoder embedding, h/w the encoder's grid.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsmodels.arguments import check_choice, check_numbers
from rsmodels.heads.geospatial import GeospatialExtractor, Injector
from rsmodels.heads.mask2former import NORM_GROUPS, Mask2FormerHead, Mask2FormerOutput, semantic_scores
from rsmodels.layers import resize
from rsmodels.layers.rein import Rein
from rsmodels.methods.base import Segmenter
from rsmodels.methods.mask_losses import mask2former_losses
from rsmodels.methods.masked_images import MaskedImageFlow
from rsmodels.methods.styled_images import make_earth_style
from rsmodels.methods.teacher import TAPS
from rsmodels.style import COVARIANCES, MODES, from_unit, to_unit
from rsmodels.weights import LoadReport

STRIDES = (4, 8, 16, 32)  # of what the decoder sees
FAR_ABOVE = 2  # times white, as the mean of a batch, is no bright image but another range of values
EPSILON = 1e-6  # keeps the logarithm of a score finite
# What of the trained matrices does not decay.
TOKENS = ("token_a", "token_b", "prompt", "query_position", "query_features", "level_embed")


class CrossEarth(Segmenter):
    """images (B, 3, H, W), normalised → logits (B, K, H, W), the logarithms of Mask2Former's scores.

    Args:
        encoder: builds the backbone for an image size: a DinoViT, or another with its `blocks`, `embed_dim`,
            `patch_size`, `prefix_tokens` and `forward_intermediates(..., after_block=)`.
        num_classes: K; 1 means binary.
        image_size: H and W, or one int for both; multiples of 32.
        rein, gse, mim, style: Table 8's switches: tokens after every block; extractor and injectors; the flow
            of masked images, with its loss; styled images.
        taps: blocks whose features are used, four, ascending; None: a quarter of the depth apart.
        num_queries: of Mask2Former, and tokens of Rein. rein_rank: of the tokens.
        gse_width, injector_heads: see GeospatialExtractor and Injector.
        mask_ratio, mask_patch: τ and B of X_M; prompt, mim_decoder, mim_width, mim_loss, mim_target: see
            MaskedImageFlow.
        style_probability: of a step's images being styled ones, in both flows (App. B.2).
        style_ratio, style_patch, style_mask: τ, B and the reading of the mask of X_S; style_mix,
            style_covariance: how styles are drawn; see EarthStyle.
        style_model, style_weights, style_statistics: the style model and the files it starts from, see
            make_earth_style; a saved model needs them no more.
        value_range: the raw value that is white, 255 for 8 bits: styles live in [0, 1].
        points: of the mask losses, sampled per mask.
        head_dim, head_heads: width and attention heads of Mask2Former; pixel_layers, pixel_mlp_dim,
            decoder_layers, decoder_mlp_dim: of its two transformers.
        mean, std, bands: the model's Preprocessing; ImageNet's statistics unless given.
    """

    file_options: ClassVar = ("style_weights", "style_statistics")

    def __init__(
        self,
        encoder: Callable[..., Any],
        /,
        *,
        num_classes: int,
        image_size: int | tuple[int, int],
        rein: bool = True,
        gse: bool = True,
        mim: bool = True,
        style: bool = True,
        taps: tuple[int, ...] | None = None,
        num_queries: int = 100,
        rein_rank: int = 16,
        gse_width: int = 64,
        injector_heads: int = 8,
        mask_ratio: float = 0.7,
        mask_patch: int = 64,
        prompt: str = "fill",
        mim_decoder: str = "aspp",
        mim_width: int = 256,
        mim_loss: str = "l1",
        mim_target: str = "image",
        style_probability: float = 0.1,
        style_ratio: float = 0.1,
        style_patch: int = 64,
        style_mask: str = "eq4",
        style_mix: float = 0.5,
        style_covariance: str = "full",
        style_model: str = "color",
        style_weights: str | None = None,
        style_statistics: str | None = None,
        value_range: float = 255.0,
        points: int = 12544,
        head_dim: int = 256,
        head_heads: int = 8,
        pixel_layers: int = 6,
        pixel_mlp_dim: int = 1024,
        decoder_layers: int = 9,
        decoder_mlp_dim: int = 2048,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        bands: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            image_size=image_size,
            multiple_of=STRIDES[-1],
            mean=mean,
            std=std,
            bands=bands,
        )
        check_numbers(0, 1, style_probability=style_probability, style_ratio=style_ratio, style_mix=style_mix)
        check_numbers(1, style_patch=style_patch, num_queries=num_queries, points=points)
        check_numbers(1, gse_width=gse_width, injector_heads=injector_heads, mim_width=mim_width)
        check_numbers(1, pixel_layers=pixel_layers, pixel_mlp_dim=pixel_mlp_dim)
        check_numbers(1, decoder_layers=decoder_layers, decoder_mlp_dim=decoder_mlp_dim)
        check_numbers(1, head_dim=head_dim, head_heads=head_heads)
        if head_dim % (least := math.lcm(NORM_GROUPS, head_heads)):
            raise ValueError(
                f"head_dim={head_dim} with head_heads={head_heads}: expected a multiple of {least}, for the "
                f"heads and for {NORM_GROUPS} groups in the normalisations"
            )
        check_choice("style_mask", style_mask, MODES)
        check_choice("style_covariance", style_covariance, COVARIANCES)
        check_numbers(0, above=True, value_range=value_range)
        self.points = points

        self.encoder = encoder(image_size=self.image_size).requires_grad_(False)
        depth, dim, patch = len(self.encoder.blocks), self.encoder.embed_dim, self.encoder.patch_size
        self.taps = _taps(depth, taps)
        self.rein = Rein(depth, dim, tokens=num_queries, rank=rein_rank, query_dim=head_dim) if rein else None
        self.gse = GeospatialExtractor(dim, stride=patch, width=gse_width) if gse else None
        injectors = len(self.taps) if gse else 0
        self.injectors = nn.ModuleList(Injector(dim, num_heads=injector_heads) for _ in range(injectors))
        self.mim = (
            MaskedImageFlow(
                dim,
                image_size=self.image_size,
                patch_size=patch,
                decoder=mim_decoder,
                width=mim_width,
                loss=mim_loss,
                target=mim_target,
                ratio=mask_ratio,
                patch=mask_patch,
                prompt=prompt,
            )
            if mim
            else None
        )
        self.style_probability, self.value_range = style_probability, value_range
        self.style = (
            make_earth_style(
                style_model,
                style_weights,
                style_statistics,
                image_size=self.image_size,
                mix=style_mix,
                ratio=style_ratio,
                patch=style_patch,
                mode=style_mask,
                covariance=style_covariance,
            )
            if style
            else None
        )
        self.head = Mask2FormerHead(
            [dim] * len(STRIDES),
            max(num_classes, 2),  # one logit tells foreground from background, both of which are classes here
            num_queries=None if rein else num_queries,
            dim=head_dim,
            num_heads=head_heads,
            encoder_layers=pixel_layers,
            encoder_mlp_dim=pixel_mlp_dim,
            decoder_layers=decoder_layers,
            decoder_mlp_dim=decoder_mlp_dim,
        )
        # On from the start: between the blocks all that training needs are their inputs.
        self.set_activation_checkpointing(True)

    # ------------------------------------------------------------------------------------------ inference

    def forward(self, images: Tensor) -> Tensor:
        stages = self._encode(images)
        return self._logits(self._segment(images, stages))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """What the decoder sees: (B, D, ·, ·) at 1/4, 1/8, 1/16 and 1/32."""
        stages = self._injected(images, self._encode(images))
        return [resize(x, size) for x, size in zip(stages, self._sizes(), strict=True)]

    def _encode(self, images: Tensor) -> list[Tensor]:
        """The four tapped maps (B, D, h, w), after Rein."""
        self.check_images(images)
        # Nothing before Rein learns but the prompt, which is in the image.
        learns = torch.is_grad_enabled() and (self.rein is not None or images.requires_grad)
        with torch.set_grad_enabled(learns):
            return self.encoder.forward_intermediates(
                images, self.taps, after_block=None if self.rein is None else self._refine
            )

    def _refine(self, tokens: Tensor, index: int) -> Tensor:
        assert self.rein is not None
        return self.rein(tokens, index, self.encoder.prefix_tokens)

    def _injected(self, images: Tensor, stages: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the injectors make of the stages; these stay as they are."""
        if self.gse is None:
            return stages
        queries = self.gse(images)
        return [inject(x, queries) for inject, x in zip(self.injectors, stages, strict=True)]

    def _sizes(self) -> list[tuple[int, int]]:
        """At which the decoder sees the stages, each by itself."""
        height, width = self.image_size
        return [(height // stride, width // stride) for stride in STRIDES]

    def _segment(self, images: Tensor, stages: Sequence[Tensor]) -> Mask2FormerOutput:
        queries = None if self.rein is None else self.rein.queries()
        return self.head(self._injected(images, stages), queries, self._sizes())

    def _logits(self, output: Mask2FormerOutput) -> Tensor:
        logs = (semantic_scores(output, self.image_size) + EPSILON).log()
        return logs if self.num_classes > 1 else logs[:, 1:] - logs[:, :1]

    # ------------------------------------------------------------------------------------------- training

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The terms of eq. (10), to be summed: L_Seg as {"class", "mask", "dice"}, already weighted, and
        where there is the masked-image flow {"mim"}, with styles also {"delta"}. In evaluation L_Seg alone.

        Args:
            batch: "image" (B, 3, H, W), normalised, and "mask" (B, H, W), class ids and 255 = ignore; one
                image or more. Images whose raw values lie far above value_range are a ValueError on the CPU.
        """
        images, mask = batch["image"], batch["mask"]
        if not len(images):
            raise ValueError("a batch of 0 images: expected 1 or more, for losses are means over them")
        if not self.training:
            return self._segmentation_losses(self._segment(images, self._encode(images)), mask)
        styled = self._styled(images)
        seen = images if styled is None else styled
        if self.mim is None:
            return self._segmentation_losses(self._segment(seen, self._encode(seen)), mask)
        masked = self.mim.masked(images)
        # Both flows are one batch for the encoder, which is the same in both.
        stages = self._encode(torch.cat([seen, masked]))
        terms = self._segmentation_losses(self._segment(seen, [x[: len(images)] for x in stages]), mask)
        if styled is None:
            stages = [x[len(images) :] for x in stages]
        restoring = self.mim.losses(stages, images, masked, styled)
        if self.style is None:
            del restoring["delta"]
        return terms | restoring

    def losses_and_logits(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of `losses` in evaluation, and the logits of the images; for validation."""
        images = batch["image"]
        output = self._segment(images, self._encode(images))
        return self._segmentation_losses(output, batch["mask"]), self._logits(output)

    def _segmentation_losses(self, output: Mask2FormerOutput, mask: Tensor) -> dict[str, Tensor]:
        return mask2former_losses(output, mask, num_classes=max(self.num_classes, 2), points=self.points)

    def _styled(self, images: Tensor) -> Tensor | None:
        """X_S of X with the probability of App. B.2, drawn for the whole batch; else None."""
        if self.style is None:
            return None
        self._check_range(images)
        if torch.rand(()).item() >= self.style_probability:
            return None
        mean, std = self.preprocessing.mean, self.preprocessing.std
        styled = self.style.styled(self._unit(images))
        return from_unit(styled, mean, std, self.value_range).to(images.dtype)

    def _unit(self, images: Tensor) -> Tensor:
        return to_unit(images.float(), self.preprocessing.mean, self.preprocessing.std, self.value_range)

    def _check_range(self, images: Tensor) -> None:
        """ValueError where `images` are of another range of values than value_range says."""
        if torch.compiler.is_compiling() or images.is_cuda:
            return  # looking at values would break the graph, or make every step wait for the GPU
        unit = self._unit(images)
        if unit.mean() > FAR_ABOVE:
            raise ValueError(
                f"value_range={self.value_range:g}: images hold raw values up to "
                f"{unit.max() * self.value_range:.6g}, far above what is white; say with value_range which "
                "value is, for example 10000, and normalise with statistics of these images"
            )

    def style_examples(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Normalised images (B, 3, H, W) → X, X_S and X_M of them, drawn anew, each (B, 3, H, W) in [0, 1];
        None for a model that does not train on both."""
        if self.style is None or self.mim is None:
            return None
        unit = self._unit(images)
        masked = self._unit(self.mim.masked(images))
        return unit.clamp(0, 1), self.style.styled(unit).clamp(0, 1), masked.clamp(0, 1)

    def no_weight_decay(self) -> set[str]:
        """Names of what does not decay besides norms, biases and scales: tokens, embeddings, the prompt."""
        return {name for name, _ in self.named_parameters() if name.endswith(TOKENS)}

    def blocks_to_shard(self) -> list[nn.Module]:
        """The modules that FSDP wraps one by one."""
        return [*self.encoder.blocks, self.head]

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of each block, and of Rein behind it, in backward; on by default."""
        self.encoder.set_activation_checkpointing(enabled)

    # -------------------------------------------------------------------------------------------- weights

    def load_pretrained(self, source: str) -> LoadReport:
        """Load a checkpoint of the encoder (a file or a hub id); print and return the report."""
        return self.encoder.load_pretrained(source)

    def resize_state(
        self, state: dict[str, Tensor], *, saved_size: Sequence[int] | None = None
    ) -> dict[str, str]:
        """Fit another image size's state dict of this model to this one, in place: positions, prompt."""
        changed = self.encoder.resize_state(state, prefix="encoder.", saved_size=saved_size)
        return changed | ({} if self.mim is None else self.mim.resize_state(state, prefix="mim."))


def _taps(depth: int, taps: Sequence[int] | None) -> tuple[int, ...]:
    found = TAPS.get(depth, ()) if taps is None else tuple(taps)
    if len(found) != len(STRIDES) or list(found) != sorted(set(found)) or found[0] < 0 or found[-1] >= depth:
        raise ValueError(
            f"taps={taps}: expected {len(STRIDES)} ascending block indices from 0 to {depth - 1}, one per "
            "stride of the decoder"
        )
    return found
