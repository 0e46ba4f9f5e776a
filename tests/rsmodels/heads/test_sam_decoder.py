"""heads/sam_decoder.py: equal to segment-anything's modules on the same state dict."""

import pytest
import segment_anything.modeling as sam
import torch
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom

from rsmodels.heads.sam_decoder import RandomPositionEncoding, TwoWayTransformer, make_upscaling


def test_two_way_transformer_equals_sam() -> None:
    torch.manual_seed(0)
    theirs = sam.TwoWayTransformer(depth=2, embedding_dim=32, num_heads=4, mlp_dim=48).eval()
    ours = TwoWayTransformer(32, depth=2, num_heads=4, mlp_dim=48).eval()
    ours.load_state_dict(theirs.state_dict())
    image, pe, tokens = torch.randn(2, 32, 3, 5), torch.randn(32, 3, 5), torch.randn(2, 6, 32)
    with torch.no_grad():
        tokens_theirs, image_theirs = theirs(image, pe.expand(2, -1, -1, -1), tokens)
        image_ours, tokens_ours = ours(image, pe, tokens)
    torch.testing.assert_close(tokens_ours, tokens_theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image_ours, image_theirs, rtol=1e-4, atol=1e-5)


def test_default_sizes_are_the_official_ones() -> None:
    theirs = sam.TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048).state_dict()
    ours = TwoWayTransformer().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("size", [(8, 8), (3, 7), (1, 5)])
def test_position_encoding_equals_sam(size: tuple[int, int]) -> None:
    theirs = PositionEmbeddingRandom(16)
    ours = RandomPositionEncoding(32)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(size), theirs(size), rtol=1e-5, atol=1e-5)


def test_position_encoding_ignores_autocast() -> None:
    """In bf16 the coordinates of a 64x64 grid collide."""
    layer = RandomPositionEncoding(32)
    with torch.autocast("cpu", torch.bfloat16):
        encoding = layer((64, 64))
    assert torch.equal(encoding, layer((64, 64)))


def test_upscaling_equals_sam(miniature_sam: sam.Sam) -> None:
    theirs = miniature_sam.mask_decoder.output_upscaling
    ours = make_upscaling(64, 8)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 64, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
