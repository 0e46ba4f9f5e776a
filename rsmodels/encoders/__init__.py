"""Image encoders. Importing this package announces each to the registry."""

from rsmodels.encoders import dinov2, sam_vit

__all__ = ["dinov2", "sam_vit"]
