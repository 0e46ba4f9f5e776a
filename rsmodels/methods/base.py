"""What the segmentation models of several methods have in common: their input, and what they make of logits.

Shapes: B batch, C bands, K classes, H/W pixels.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rsmodels.arguments import check_choice
from rsmodels.layers import image_size_pair
from rsmodels.methods.losses import ACTIVATIONS, to_probabilities
from rsmodels.registry import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


class Segmenter(nn.Module):
    """images (B, C, H, W), normalised → logits (B, K, H, W).

    A subclass brings `forward`, `losses_and_logits`, `blocks_to_shard`, `load_pretrained` and
    `set_activation_checkpointing`, and calls `check_images` on what it is given.

    Args:
        num_classes: K; 1 means binary.
        image_size: H and W, or one int for both, multiples of `multiple_of`; the size of every input.
        activation: "softmax" over the classes, or "sigmoid" for each.
        channels: C.
        mean, std, bands: the model's Preprocessing, a value per band; ImageNet's statistics unless given,
            repeated over bands.
    """

    model_name: str
    arguments: dict[str, Any]
    base_weights: str | None

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int | tuple[int, int],
        multiple_of: int = 32,
        activation: str = "softmax",
        channels: int = 3,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        bands: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        for name, values in (("mean", mean), ("std", std), ("bands", bands)):
            if values is not None and len(values) != channels:
                raise ValueError(
                    f"{name}={tuple(values)}: expected {channels} values, one for each band that the model "
                    "takes"
                )
        self.num_classes = num_classes
        self.image_size = image_size_pair(image_size, multiple_of=multiple_of)
        self.activation = activation
        self.channels = channels
        self.preprocessing = Preprocessing(
            tuple(mean or (IMAGENET_MEAN[i % 3] for i in range(channels))),
            tuple(std or (IMAGENET_STD[i % 3] for i in range(channels))),
            bands,
        )

    def check_images(self, images: Tensor) -> None:
        """ValueError where `images` are not (B, C, H, W)."""
        expected = (self.channels, *self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(
                f"images of shape {tuple(images.shape)}: this model takes (B, {sizes}); resize or tile the "
                "images, or create the model with their image_size="
            )

    def losses_and_logits(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """The loss terms, weighted, to be summed, and the logits that they were taken of."""
        raise NotImplementedError

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The terms of losses_and_logits."""
        return self.losses_and_logits(batch)[0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K, H, W) logits → probabilities in [0, 1]; they sum to 1 only under softmax."""
        return to_probabilities(logits, activation=self.activation)

    def resize_state(
        self, state: dict[str, Tensor], *, saved_size: Sequence[int] | None = None
    ) -> dict[str, str]:
        """Fit the state dict of this model at another image size to this one, in place; the changed keys,
        each with how. Nothing to do for a model without weights that depend on that size.

        saved_size: H and W that the state was saved at, where they are known.
        """
        return {}
