"""Training: one readable trainer (`trainer.py`) around the registry's models and the data sets.

from rsmodels.training.config import TrainConfig
from rsmodels.training.trainer import train

run = train(TrainConfig(data="whdld", root="/data/WHDLD"))
"""
