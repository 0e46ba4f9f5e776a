"""rsmodels: segment remote-sensing imagery with foundation models.

model = rsmodels.create_model("rs_sam_vit_b", num_classes=6, pretrained="sam_vit_b_01ec64.pth")
rsmodels.predict("scene.tif", model="runs/x/best", output="mask.tif")
"""

from rsmodels import encoders, heads, methods
from rsmodels.registry import LIBRARY_VERSION as __version__
from rsmodels.registry import (
    create_backbone,
    create_model,
    list_encoders,
    list_models,
    load_model,
    save_model,
)

__all__ = [
    "__version__",
    "create_backbone",
    "create_model",
    "encoders",
    "heads",
    "list_encoders",
    "list_models",
    "load_model",
    "methods",
    "save_model",
]
