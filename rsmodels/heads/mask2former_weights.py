"""Mask2Former checkpoints in transformers' layout, under the names of rsmodels.heads.mask2former."""

import re

from rsmodels.weights import State

# transformers' names, patterns in order; what none of them fits is no part of the head.
_NAMES = (
    (r"^model\.pixel_level_module\.decoder\.", "pixel_decoder."),
    (r"^model\.transformer_module\.", ""),
    (r"^pixel_decoder\.encoder\.layers\.", "pixel_decoder.layers."),
    (r"^(pixel_decoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(pixel_decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(pixel_decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.lateral."),
    (r"^pixel_decoder\.layer_1\.", "pixel_decoder.output."),
    (r"^queries_embedder\.weight$", "query_position"),
    (r"^queries_features\.weight$", "query_features"),
    (r"^level_embed\.weight$", "level_embed"),
    (r"^decoder\.layernorm\.", "norm."),
    (r"^decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.", r"mask_mlp.\1."),
    (r"^decoder\.layers\.", "layers."),
    (r"^(layers\.\d+)\.(cross|self)_attn\.", r"\1.\2_attention."),
    (r"^(layers\.\d+)\.(cross|self)_attn_layer_norm\.", r"\1.\2_norm."),
    (r"^(layers\.\d+)\.final_layer_norm\.", r"\1.mlp_norm."),
    (r"\.fc(\d)\.", r".mlp.lin\1."),
)
_OTHERS = ("model.pixel_level_module.encoder.", "criterion.")


def from_transformers(state: State) -> State:
    """The head's part of a Mask2FormerForUniversalSegmentation's state dict, for Mask2FormerHead's
    load_state_dict; the backbone and the criterion are left out."""
    renamed: State = {}
    for key, tensor in state.items():
        if key.startswith(_OTHERS):
            continue
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        if ".in_proj_" in key:  # queries, keys and values in one
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[key.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            renamed[key] = tensor
    return renamed
