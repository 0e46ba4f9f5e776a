"""DINOv2 checkpoints in three layouts: Meta's, timm's and transformers'. All become Meta's.

timm adds the class token's position to the token itself where there are registers; transformers keeps q, k
and v (and the two halves of SwiGLU) apart, under names that its versions have changed once.
"""

import re
from typing import Any

import torch
from torch import Tensor

from rsmodels.weights import LoadReport, State, load_part, read_state, resolve, sha256_of

# transformers' names, of this and of earlier versions.
_TRANSFORMERS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    (r"^layernorm\.", "norm."),
)
# What transformers stores in parts, and Meta in one piece.
_JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.w1", "mlp.w2")}


def load_dinov2(encoder: Any, source: str) -> LoadReport:
    """Fill a DinoViT from a checkpoint; print and return the report."""
    path = resolve(source)
    state = read_dinov2(read_state(path), str(path), swiglu=hasattr(encoder.blocks[0].mlp, "w12"))
    report = LoadReport(str(source), sha256_of(path))
    if state.pop("mask_token", None) is not None:
        report.dropped["mask_token"] = "only pretraining uses it"
    for key in [key for key in state if key.startswith(("head.", "fc_norm."))]:
        del state[key]
        report.dropped[key] = "a classifier's"
    _check_variant(encoder, state, str(path))
    report.resized.update(encoder.resize_state(state))
    load_part(encoder, state, report, "")
    report.finish(encoder)
    return report


def read_dinov2(state: State, source: str, *, swiglu: bool) -> State:
    """`state` under Meta's names, whatever its layout."""
    state = {
        key.removeprefix("dinov2.").removeprefix("dinov2_with_registers."): t for key, t in state.items()
    }
    if "embeddings.cls_token" in state:
        return _from_transformers(state)
    if not {"patch_embed.proj.weight", "cls_token", "pos_embed"} <= state.keys():
        raise ValueError(
            f"{source}: no DINOv2 encoder in it (first keys: {', '.join(list(state)[:3])}); expected Meta's, "
            "timm's or transformers' layout"
        )
    return _from_timm(state, swiglu=swiglu)


def _from_transformers(state: State) -> State:
    renamed = {}
    for key, value in state.items():
        for pattern, name in _TRANSFORMERS:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for whole, parts in _JOINED.items():
        for key in [key for key in renamed if f".{parts[0]}." in key]:
            pieces = [renamed.pop(key.replace(parts[0], part)) for part in parts]
            renamed[key.replace(parts[0], whole)] = torch.cat(pieces)
    return renamed


def _from_timm(state: State, *, swiglu: bool) -> State:
    """timm's names, where they differ from Meta's; Meta's own state comes back as it is."""
    if swiglu:
        state = {
            k.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v for k, v in state.items()
        }
    if "reg_token" not in state:
        return state
    state["register_tokens"] = state.pop("reg_token")
    # The class token's position is in the token already.
    position = state["pos_embed"]
    state["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    return state


def _check_variant(encoder: Any, state: dict[str, Tensor], source: str) -> None:
    """A ViT-L file for a ViT-B model, or one with registers, deserves better than a list of keys."""

    def described(width: int, depth: int, registers: int) -> str:
        return f"{depth} blocks of width {width} and {registers} registers"

    depth = 1 + max((int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.", k)), default=-1)
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    found = described(state["cls_token"].shape[-1], depth, registers)
    expected = described(encoder.embed_dim, len(encoder.blocks), encoder.prefix_tokens - 1)
    if found != expected:
        raise ValueError(
            f"{source}: holds an encoder of {found}, this model has {expected}; give a checkpoint of that "
            "variant, or create the model of the checkpoint's (registers= for its registers)"
        )
