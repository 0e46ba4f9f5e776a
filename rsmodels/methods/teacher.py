"""A frozen foundation model that a student learns from: it gives features, takes no gradient, never changes.

A teacher stands beside the model that learns, not inside it: it is in no checkpoint, no optimiser and no
prediction. Shapes: B batch, H/W pixels, p patch size, h = ceil(H / p), w = ceil(W / p), D embedding.
"""

import functools
import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmodels.arguments import check_choice, check_numbers
from rsmodels.encoders.dinov2 import PATCH_SIZES, DinoViT
from rsmodels.layers import image_size_pair
from rsmodels.registry import ENCODERS, list_encoders, register_teacher
from rsmodels.weights import LoadReport

FITS = ("pad", "resize")
# Blocks that are learned from, by the depth of the teacher.
TAPS = {4: (0, 1, 2, 3), 12: (2, 5, 8, 11), 24: (7, 11, 15, 23), 40: (9, 19, 29, 39)}


class Teacher(nn.Module):
    """images (B, 3, H, W), normalised → four maps (B, D, h, w): blocks 2, 5, 8 raw, 11 after the final norm
    (of a ViT-B; see TAPS).

    Args:
        encoder: name of a DINOv2 encoder.
        image_size: H and W of the images, of any size.
        fit: how images get to a multiple of the patch: "pad" adds zeros at the bottom and right (256 → 266,
            as KTDA's authors do), "resize" stretches them.
        options: of the encoder, e.g. registers.
    """

    def __init__(
        self, encoder: str, *, image_size: int | tuple[int, int], fit: str = "pad", **options: Any
    ) -> None:
        super().__init__()
        check_choice("fit", fit, FITS)
        check_numbers(0, registers=options.get("registers"))
        patch = options.get("patch_size", 14)
        self.image_size = image_size_pair(image_size, multiple_of=1)
        self.grid_size = teacher_grid(self.image_size, patch)
        self.fit = fit
        fitted = (self.grid_size[0] * patch, self.grid_size[1] * patch)
        vit: Any = ENCODERS[encoder](image_size=fitted, **options)
        self.encoder: DinoViT = vit
        self.embed_dim: int = vit.embed_dim
        self.taps = TAPS[len(vit.blocks)]
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        if images.shape[-2:] != self.image_size:
            expected = ", ".join(map(str, self.image_size))
            raise ValueError(
                f"images of shape {tuple(images.shape)}: this teacher takes (B, 3, {expected}); create it "
                "with their image_size="
            )
        height, width = self.encoder.image_size
        if self.fit == "pad":
            images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        elif self.image_size != (height, width):
            images = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
        return self.encoder.forward_intermediates(images, self.taps, normed=self.taps[-1:])

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher is never in train mode."""
        return super().train(False)

    def load_pretrained(self, source: str) -> LoadReport:
        """Load a DINOv2 checkpoint (a file or a hub id)."""
        return self.encoder.load_pretrained(source)

    def sha256(self) -> str:
        """The SHA-256 of all weights, names and shapes included, in hex: it tells teachers apart, whatever
        the layout of the file that they came in."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def teacher_grid(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(h, w) of a teacher's maps: 256 pixels and patch 14 give 19."""
    if patch_size not in PATCH_SIZES:
        raise ValueError(f"patch_size={patch_size}: expected one of {', '.join(map(str, PATCH_SIZES))}")
    return -(-image_size[0] // patch_size), -(-image_size[1] // patch_size)


for _encoder in list_encoders("dinov2_*"):
    register_teacher(_encoder, functools.partial(Teacher, _encoder))
