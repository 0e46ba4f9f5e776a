"""Checkpoints of MTP and of Remote-Sensing-RVSA, their pyramid left out.

MTP's files are whole training states: the encoder alone (`..._model_encoder.pth`) or with its decoders
(`encoder.*`), beside optimizer, scheduler and a NumPy array of losses. Remote-Sensing-RVSA names the global
blocks' relative tables as those of the windows.
"""

import re
from typing import Any

import numpy as np
import torch

from rsmodels.weights import LoadReport, State, load_part, read_state, resolve, sha256_of

# What pickled NumPy arrays of floats are made of; the function has another home since NumPy 2.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_NUMPY: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.float64)),
]
_RENAMED = (
    (r"\.attn\.full_attn_rel_pos_", ".attn.rel_pos_"),
    # Theirs is a pooling, an activation and a 1x1 convolution; ours is the last of these, as a matrix.
    (r"\.attn\.sampling_(offsets|scales|angles)\.2\.", r".attn.sampling_\1."),
)


def load_rvsa(encoder: Any, source: str) -> LoadReport:
    """Fill an RVSAViT from a checkpoint; print and return the report."""
    path = resolve(source)
    with torch.serialization.safe_globals(_NUMPY):
        state = read_state(path)
    report = LoadReport(str(source), sha256_of(path))
    state = read_rvsa(state, str(path), report)
    _check_variant(encoder, state, str(path))
    report.resized.update(encoder.resize_state(state))
    # MTP's encoders for fine-tuning have no final norm, and none of its maps passes it.
    needed = {key for key in encoder.state_dict() if key in state or not key.startswith("norm.")}
    load_part(encoder, state, report, "", needed=needed)
    report.finish(encoder)
    return report


def read_rvsa(state: State, source: str, report: LoadReport) -> State:
    """The encoder in `state` under the names of RVSAViT; `report` notes what is left out."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("encoder.") for key in state):
        others = {key.split(".")[0] for key in state} - {"encoder"}
        report.dropped.update({f"{other}.*": "not part of the encoder" for other in sorted(others)})
        state = {key.removeprefix("encoder."): v for key, v in state.items() if key.startswith("encoder.")}
    if "pos_embed" not in state or not any(".attn.sampling_offsets." in key for key in state):
        raise ValueError(
            f"{source}: no RVSA encoder in it (first keys: {', '.join(list(state)[:3])}); expected MTP's or "
            "Remote-Sensing-RVSA's layout, with pos_embed and blocks.*.attn.sampling_offsets.*"
        )
    encoder = {}
    for key, value in state.items():
        if re.match(r"fpn\d\.", key):
            report.dropped[key] = "of MTP's pyramid"
        elif key.endswith(".attn.relative_position_index"):
            report.dropped[key] = "follows from the window size"
        else:
            for pattern, name in _RENAMED:
                key = re.sub(pattern, name, key)
            convolution = ".attn.sampling_" in key and value.shape[2:] == (1, 1)
            encoder[key] = value.flatten(1) if convolution else value
    return encoder


def _check_variant(encoder: Any, state: State, source: str) -> None:
    """A ViT-L file for a ViT-B model deserves better than a list of keys."""
    depth = 1 + max((int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.", k)), default=-1)
    width = state["pos_embed"].shape[-1]
    if (width, depth) != (encoder.embed_dim, len(encoder.blocks)):
        raise ValueError(
            f"{source}: holds an encoder of {depth} blocks of width {width}, this model has "
            f"{len(encoder.blocks)} of width {encoder.embed_dim}; give a checkpoint of that variant, or "
            "create the model of the checkpoint's"
        )
