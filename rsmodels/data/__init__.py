"""Data sets: schemas, readers, the synthetic scenes, transforms and the checks of a folder."""

from rsmodels.data.base import (
    SegmentationDataset,
    create_dataset,
    dataset_options,
    list_datasets,
    register_dataset,
    seeded_split,
)
from rsmodels.data.check import CheckReport, check_dataset
from rsmodels.data.deepglobe import DeepGlobeRoads
from rsmodels.data.folder import FolderDataset
from rsmodels.data.grass import Grass
from rsmodels.data.l8_biome import L8Biome
from rsmodels.data.schema import IGNORE, LabelSchema
from rsmodels.data.synthetic import Domain, SyntheticEarth, write_scene
from rsmodels.data.whdld import WHDLD
from rsmodels.data.whu import WHUAerial

__all__ = [
    "IGNORE",
    "WHDLD",
    "CheckReport",
    "DeepGlobeRoads",
    "Domain",
    "FolderDataset",
    "Grass",
    "L8Biome",
    "LabelSchema",
    "SegmentationDataset",
    "SyntheticEarth",
    "WHUAerial",
    "check_dataset",
    "create_dataset",
    "dataset_options",
    "list_datasets",
    "register_dataset",
    "seeded_split",
    "write_scene",
]
