"""Image encoders. Importing this package announces each to the registry."""

from rsmodels.encoders import sam_vit

__all__ = ["sam_vit"]
