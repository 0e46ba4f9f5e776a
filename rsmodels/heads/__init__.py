"""Necks and decoders: what turns an encoder's maps into the embeddings that predict."""

from rsmodels.heads import mprm, multiscale_neck, sam_decoder

__all__ = ["mprm", "multiscale_neck", "sam_decoder"]
