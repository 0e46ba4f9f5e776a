"""Any encoder as a timm-like backbone: `.feature_info`, and a forward that returns a list of maps.

Such an encoder has `blocks`, `embed_dim`, `neck` and `forward_intermediates(images, indices)`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class FeatureInfo:
    """What each map of a backbone is, with the accessors of timm's FeatureInfo."""

    def __init__(self, info: list[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = info
        self.out_indices = tuple(out_indices)

    def get_dicts(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One dict per output: module, num_chs, reduction, index (or the given keys of it)."""
        return [{key: entry[key] for key in keys or entry} for entry in self.info]

    def channels(self) -> list[int]:
        """Channels of each output."""
        return [entry["num_chs"] for entry in self.info]

    def reduction(self) -> list[int]:
        """Input pixels per output pixel, along one axis."""
        return [entry["reduction"] for entry in self.info]

    def module_name(self) -> list[str]:
        """The module whose output each map is."""
        return [entry["module"] for entry in self.info]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


class FeatureBackbone(nn.Module):
    """images (B, C, H, W) → the maps (B, D, h, w) after the encoder's blocks `out_indices`, in that order.

    Blocks behind the last one asked for, and the neck, are removed: every parameter left is used.
    """

    def __init__(self, encoder: Any, out_indices: Sequence[int], *, reduction: int) -> None:
        super().__init__()
        depth = len(encoder.blocks)
        indices = [index + depth if index < 0 else index for index in out_indices]
        if not indices or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < depth:
            raise ValueError(
                f"out_indices={tuple(out_indices)}: expected ascending block indices from 0 to {depth - 1}"
            )
        encoder.blocks = encoder.blocks[: indices[-1] + 1]
        encoder.neck = None
        self.encoder = encoder
        self.out_indices = tuple(indices)
        self.feature_info = FeatureInfo(
            [
                {"module": f"blocks.{i}", "num_chs": encoder.embed_dim, "reduction": reduction, "index": i}
                for i in indices
            ],
            indices,
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.encoder.forward_intermediates(images, self.out_indices)
