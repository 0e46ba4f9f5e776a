"""A foundation model small enough to make here: encoders of the registry, trained on unlabelled scenes.

from rsmodels.pretraining.config import PretrainConfig
from rsmodels.pretraining.pretrain import pretrain

pretrain(PretrainConfig(output="dinov2_vit_tiny.safetensors", minutes=15))
"""
