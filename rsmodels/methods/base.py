"""What the segmentation models of several methods have in common: their input, and what they make of logits.

Shapes: B batch, C bands, K classes, H/W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rsmodels.arguments import check_choice
from rsmodels.layers import check_images, image_size_pair
from rsmodels.methods.losses import ACTIVATIONS, to_probabilities
from rsmodels.registry import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from rsmodels.weights import LoadReport


class Segmenter(nn.Module, ABC):
    """images (B, C, H, W), normalised → logits (B, K, H, W).

    A subclass brings `forward` and the abstract methods, and calls `check_images` on what it is given, unless
    its encoder takes the same images and checks them.

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
                    "takes; mean, std and bands have one value per band"
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
        check_images(images, self.channels, self.image_size)

    @abstractmethod
    def forward_features(self, images: Tensor) -> list[Tensor]:
        """What the decoder sees: maps (B, ·, ·, ·)."""

    @abstractmethod
    def losses_and_logits(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """The loss terms, weighted, to be summed, and the logits that they were taken of."""

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

    @abstractmethod
    def blocks_to_shard(self) -> list[nn.Module]:
        """The modules that FSDP wraps one by one."""

    @abstractmethod
    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in backward instead of keeping them."""

    @abstractmethod
    def load_pretrained(self, source: str) -> LoadReport:
        """Load published weights (a file or a hub id) that the model starts from; print and return the
        report."""
