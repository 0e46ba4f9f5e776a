"""What every plain ViT does with its blocks: taps, the hook behind each block, recomputing."""

import pytest
import torch
from torch import Tensor

from rsmodels.registry import ENCODERS

FACTORS = (0.5, 2.0, -1.0, 3.0)
TAPS = (0, 2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name, side", [("dinov2_vit_tiny", 14), ("rvsa_vit_tiny", 16), ("sam_vit_tiny", 16)])
def test_maps_are_of_what_the_hook_makes(name: str, side: int, checkpointing: bool) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name](image_size=(2 * side, 3 * side))
    encoder.set_activation_checkpointing(checkpointing)
    images = torch.randn(2, 3, 2 * side, 3 * side)
    scale = torch.tensor(FACTORS, requires_grad=True)
    calls = []

    def after_block(x: Tensor, index: int) -> Tensor:
        calls.append(index)
        return scale[index] * x

    parameters = [scale, encoder.pos_embed, *encoder.blocks[:3].parameters()]
    maps = encoder.forward_intermediates(images, TAPS, after_block=after_block)
    assert calls == [0, 1, 2]  # no later block runs
    found = torch.autograd.grad(sum(m.square().sum() for m in maps), parameters)
    assert (len(calls) > 3) == checkpointing

    x, expected = encoder.embed(images), []
    for index, block in enumerate(encoder.blocks[:3]):
        x = scale[index] * block(x)
        if index in TAPS:
            patches = x.reshape(2, -1, 128)[:, -6:]  # whatever stands before them, and SAM's grid
            expected.append(patches.reshape(2, 2, 3, 128).permute(0, 3, 1, 2))
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    right = torch.autograd.grad(sum(m.square().sum() for m in expected), parameters)
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert found[0][:3].abs().min() > 0 and found[0][3] == 0 and found[1].abs().max() > 0
