"""What several test files of rsmodels need: a SAM of segment-anything's own modules, in miniature."""

from pathlib import Path

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

# rs_sam_tiny with this embedding_dim has every part that the miniature SAM has weights for.
MINIATURE_EMBEDDING_DIM = 8


def make_miniature_sam(image_size: int = 128) -> Sam:
    """A SAM of sam_vit_tiny's sizes; zero-initialised parameters are drawn, so that each one matters."""
    grid = image_size // 16
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=image_size,
            embed_dim=128,
            depth=4,
            num_heads=4,
            out_chans=64,
            norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6),
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1, 3),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=64,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=64,
            transformer=TwoWayTransformer(depth=2, embedding_dim=64, num_heads=4, mlp_dim=128),
        ),
    )
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                nn.init.normal_(parameter, std=0.3)
    return sam.eval()


@pytest.fixture(scope="session")
def miniature_sam() -> Sam:
    torch.manual_seed(7)
    return make_miniature_sam()


@pytest.fixture(scope="session")
def sam_checkpoint(miniature_sam: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature in the official layout, as a .pth file."""
    path = tmp_path_factory.mktemp("sam") / "sam_vit_miniature.pth"
    torch.save(miniature_sam.state_dict(), path)
    return path
