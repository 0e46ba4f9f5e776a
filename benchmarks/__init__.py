"""Benchmarks: `pytest benchmarks/` profiles each case; `python -m benchmarks.report` writes the figures."""

from __future__ import annotations

from types import ModuleType

from benchmarks import (
    cross_attention,
    crossearth,
    deformable_attention,
    dilated_aspp,
    distillation_loss,
    ktda,
    layer_norm,
    linear,
    lora,
    models,
    rel_pos_attention,
)

SUITES: dict[str, ModuleType] = {
    "rel_pos_attention": rel_pos_attention,
    "linear": linear,
    "lora": lora,
    "layer_norm": layer_norm,
    "cross_attention": cross_attention,
    "distillation_loss": distillation_loss,
    "dilated_aspp": dilated_aspp,
    "deformable_attention": deformable_attention,
    "models": models,
    "ktda": ktda,
    "crossearth": crossearth,
}
