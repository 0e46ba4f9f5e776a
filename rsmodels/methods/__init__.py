"""Methods: encoder and heads assembled, with the losses that train them.

Importing this package announces every model and method to the registry.
"""

from rsmodels.methods import losses, rs_sam, sam_lora

__all__ = ["losses", "rs_sam", "sam_lora"]
