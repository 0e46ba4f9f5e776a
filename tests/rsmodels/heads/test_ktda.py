"""heads/ktda.py: alignment, modulation and neck, each against its formula in plain PyTorch."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from rsmodels.heads.ktda import Block, FeatureAlignment, FeatureModulation, MultiLevelNeck


def bilinear(x: Tensor, **size) -> Tensor:
    return F.interpolate(x, mode="bilinear", align_corners=False, **size)


def test_alignment_is_a_projection_then_a_resize() -> None:
    """Also where the projection runs after it: stages larger than the grid."""
    torch.manual_seed(0)
    dims, sizes, grid = (3, 4, 5, 6), ((20, 24), (10, 12), (5, 6), (3, 3)), (7, 8)
    module = FeatureAlignment(dims, 8)
    torch.nn.init.normal_(module.convs[0].bias)
    torch.nn.init.normal_(module.convs[3].bias)
    stages = [torch.randn(2, dim, *size) for dim, size in zip(dims, sizes, strict=True)]
    aligned = module(stages, grid)
    for conv, stage, found in zip(module.convs, stages, aligned, strict=True):
        torch.testing.assert_close(found, bilinear(conv(stage), size=grid), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 3])
def test_modulation_is_timms_blocks_per_scale(depth: int) -> None:
    torch.manual_seed(0)
    module = FeatureModulation(16, scales=2, depth=depth, num_heads=4)
    maps = [torch.randn(2, 16, 3, 5), torch.randn(2, 16, 4, 2)]
    found = module(maps)
    for blocks, x, y in zip(module.scales, maps, found, strict=True):
        assert len(blocks) == depth
        tokens = x.flatten(2).mT
        for block in blocks:
            theirs = timm.models.vision_transformer.Block(16, num_heads=4, mlp_ratio=4, qkv_bias=True)
            theirs.load_state_dict(block.state_dict())
            theirs.norm1.eps = theirs.norm2.eps = block.norm1.eps
            tokens = theirs(tokens)
        torch.testing.assert_close(y, tokens.mT.unflatten(2, x.shape[-2:]), rtol=1e-4, atol=1e-5)


def test_scales_have_weights_of_their_own() -> None:
    module = FeatureModulation(8, scales=4, depth=2, num_heads=2)
    one = sum(p.numel() for p in Block(8, num_heads=2).parameters())
    assert sum(p.numel() for p in module.parameters()) == 4 * 2 * one


@pytest.mark.parametrize("size", [(8, 6), (5, 7)])
def test_neck_is_mmsegmentations(size: tuple[int, int]) -> None:
    """1x1 convolution, interpolation by the factor, 3x3 convolution."""
    torch.manual_seed(0)
    neck = MultiLevelNeck([3, 4, 5, 6], 7)
    maps = [torch.randn(2, dim, *size) for dim in (3, 4, 5, 6)]
    found = neck(maps)
    for lateral, conv, x, scale, level in zip(
        neck.lateral_convs, neck.convs, maps, (4, 2, 1, 0.5), found, strict=True
    ):
        assert level.shape[-2:] == tuple(int(side * scale) for side in size)
        expected = conv(bilinear(lateral(x), scale_factor=scale))
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)


def test_first_weights_are_the_authors() -> None:
    torch.manual_seed(0)
    align = FeatureAlignment([64] * 4, 64)
    blocks = FeatureModulation(64, scales=1, depth=1, num_heads=4)
    for weight in (align.convs[0].weight, blocks.scales[0][0].mlp.fc1.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not align.convs[0].bias.any() and not blocks.scales[0][0].attn.qkv.bias.any()
