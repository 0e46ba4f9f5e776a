"""rsmodels: segment remote-sensing imagery with foundation models.

model = rsmodels.create_model("rs_sam_vit_b", num_classes=6, pretrained="sam_vit_b_01ec64.pth")
rsmodels.predict("scene.tif", model="runs/x/best", output="mask.tif")
"""

import importlib
from typing import Any

from rsmodels import encoders, heads, methods
from rsmodels.registry import LIBRARY_VERSION as __version__
from rsmodels.registry import (
    create_backbone,
    create_model,
    create_teacher,
    list_encoders,
    list_models,
    load_model,
    save_model,
)

__all__ = [
    "__version__",
    "create_backbone",
    "create_model",
    "create_teacher",
    "encoders",
    "heads",
    "list_encoders",
    "list_models",
    "load_model",
    "methods",
    "predict",
    "save_model",
]


def __getattr__(name: str) -> Any:
    # Prediction reads GeoTIFFs. Models alone need no rasterio, so that it waits until it is asked for.
    if name == "predict":
        return importlib.import_module("rsmodels.predict")
    raise AttributeError(f"module 'rsmodels' has no attribute {name!r}")
