"""CrossEarth's masked-image flow (arXiv 2410.22629, eqs. 6, 8 and 9, and the last two terms of eq. 10).

Parts of the image give way to a learned prompt, and a small decoder restores the image from the encoder's
stages. Images are normalised ones. Shapes: B batch, H/W pixels, D embedding, h/w the encoder's grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmodels.arguments import check_choice, check_numbers
from rsmodels.heads.aspp import ASPPDecoder, LinearDecoder
from rsmodels.layers import resize
from rsmodels.style import draw_mask

DECODERS = ("aspp", "linear")
LOSSES = ("l1", "mse")
TARGETS = ("image", "input")
PROMPTS = ("fill", "multiply")


class MaskedImageFlow(nn.Module):
    """Makes X_M, restores it, and holds the result against the image.

    Args:
        dim: D.
        image_size: H and W.
        patch_size: pixels per token, H / h.
        decoder: "aspp" (eq. 8), or "linear" (Table 9). width: channels per dilation of the former.
        loss: "l1" or "mse" (Table 13), of the mean over pixels and channels.
        target: "image": X̂_M is to be X, all of it; "input": X̂_M is to be X_M, as the text has it.
        ratio: τ of eq. (4); 1 − τ is the share of patches that X_M keeps.
        patch: B of eq. (3), their side in pixels.
        prompt: "fill": X_M = X·M + v·(1 − M); "multiply": X·M·v, eq. (6) to the letter, which is an image of
            zeros as long as v is zero.
    """

    def __init__(
        self,
        dim: int,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        decoder: str = "aspp",
        width: int = 256,
        loss: str = "l1",
        target: str = "image",
        ratio: float = 0.7,
        patch: int = 64,
        prompt: str = "fill",
    ) -> None:
        super().__init__()
        check_choice("mim_decoder", decoder, DECODERS)
        check_choice("mim_loss", loss, LOSSES)
        check_choice("mim_target", target, TARGETS)
        check_choice("prompt", prompt, PROMPTS)
        check_numbers(0, 1, mask_ratio=ratio)
        check_numbers(1, mask_patch=patch)
        self.loss, self.target, self.fills = loss, target, prompt == "fill"
        self.ratio, self.patch = ratio, patch
        self.prompt = nn.Parameter(torch.zeros(1, 3, *image_size))
        self.decoder = (
            ASPPDecoder(dim, patch_size=patch_size, width=width)
            if decoder == "aspp"
            else LinearDecoder(dim, patch_size=patch_size)
        )

    def masked(self, images: Tensor) -> Tensor:
        """X_M of X: (B, 3, H, W) in X's dtype, with a mask of its own for every image."""
        height, width = images.shape[-2:]
        mask = draw_mask(len(images), (height, width), self.patch, self.ratio, device=images.device)
        mask = mask.to(images.dtype)
        if not self.fills:
            return images * mask * self.prompt
        return images * mask + self.prompt * (1 - mask)

    def losses(
        self, stages: Sequence[Tensor], images: Tensor, masked: Tensor, styled: Tensor | None
    ) -> dict[str, Tensor]:
        """{"mim": L_MIM, "delta": L_Δ}, to be summed.

        Args:
            stages: four maps, of the styled images, where there are any, followed by the masked ones.
            images, masked, styled: X, X_M and X_S, each (B, 3, H, W); None where X_S was not drawn: L_Δ is
                then zero, as it compares the two reconstructions.
        """
        restored = self.decoder(stages)
        # A mean over so many pixels is not for half precision.
        restored = restored.to(torch.promote_types(restored.dtype, torch.float32))
        restored_masked = restored[-len(images) :]
        mim = self._distance(restored_masked, images if self.target == "image" else masked)
        if styled is None:
            return {"mim": mim, "delta": torch.zeros_like(mim)}
        restored_styled = restored[: len(images)]
        # X_S is its own target either way.
        mim = mim + self._distance(restored_styled, styled)
        return {"mim": mim, "delta": F.l1_loss(restored_styled, restored_masked)}

    def _distance(self, restored: Tensor, target: Tensor) -> Tensor:
        # The prompt is in X_M: it learns to be seen, not to be easy to restore.
        distance = F.l1_loss if self.loss == "l1" else F.mse_loss
        return distance(restored, target.detach().to(restored.dtype))

    def resize_state(self, state: dict[str, Tensor], prefix: str) -> dict[str, str]:
        """Fit the prompt in `state` to this image size, in place; the changed keys, each with how."""
        key = f"{prefix}prompt"
        if key not in state or state[key].shape == self.prompt.shape:
            return {}
        size = self.prompt.shape[-2:]
        before = "x".join(map(str, state[key].shape[-2:]))
        state[key] = resize(state[key], size)
        return {key: f"{before} → {size[0]}x{size[1]} pixels, bilinear"}
