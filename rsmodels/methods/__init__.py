"""Methods: encoder and heads assembled, with the losses that train them.

Importing this package announces every model and method to the registry.
"""

from rsmodels.methods import (
    crossearth,
    crossearth_models,
    dinov2_upernet,
    ktda,
    losses,
    rein,
    rs_sam,
    sam_lora,
    teacher,
)

__all__ = [
    "crossearth",
    "crossearth_models",
    "dinov2_upernet",
    "ktda",
    "losses",
    "rein",
    "rs_sam",
    "sam_lora",
    "teacher",
]
