"""Image encoders. Importing this package announces each to the registry."""

from rsmodels.encoders import cnn, dinov2, rvsa, sam_vit

__all__ = ["cnn", "dinov2", "rvsa", "sam_vit"]
