"""Necks and decoders: what turns an encoder's maps into the embeddings that predict."""

from rsmodels.heads import fcn, ktda, mprm, multiscale_neck, sam_decoder, upernet

__all__ = ["fcn", "ktda", "mprm", "multiscale_neck", "sam_decoder", "upernet"]
