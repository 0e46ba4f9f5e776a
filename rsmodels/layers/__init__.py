"""Small shared modules, each a thin user of rskernels."""

from rsmodels.layers.conv import ConvNormAct
from rsmodels.layers.linear import MLP, Linear
from rsmodels.layers.lora import LoRAQKV
from rsmodels.layers.neck import make_neck
from rsmodels.layers.norm import LayerNorm, LayerNorm2d
from rsmodels.layers.patches import PatchEmbed
from rsmodels.layers.resize import conv_of_resized, resize
from rsmodels.layers.sizes import check_images, image_size_pair
from rsmodels.layers.transformer import FeedForward, SelfAttention

__all__ = [
    "MLP",
    "ConvNormAct",
    "FeedForward",
    "LayerNorm",
    "LayerNorm2d",
    "Linear",
    "LoRAQKV",
    "PatchEmbed",
    "SelfAttention",
    "check_images",
    "conv_of_resized",
    "image_size_pair",
    "make_neck",
    "resize",
]
