"""Necks and decoders: what turns an encoder's maps into the embeddings that predict."""

from rsmodels.heads import fcn, ktda, mask2former, mprm, multiscale_neck, pixel_decoder, sam_decoder, upernet

__all__ = [
    "fcn",
    "ktda",
    "mask2former",
    "mprm",
    "multiscale_neck",
    "pixel_decoder",
    "sam_decoder",
    "upernet",
]
