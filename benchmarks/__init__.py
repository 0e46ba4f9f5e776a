"""Benchmarks: `pytest benchmarks/` profiles each case; `python -m benchmarks.report` writes the figures."""

from __future__ import annotations

from types import ModuleType

from benchmarks import layer_norm, linear, models, rel_pos_attention

SUITES: dict[str, ModuleType] = {
    "rel_pos_attention": rel_pos_attention,
    "linear": linear,
    "layer_norm": layer_norm,
    "models": models,
}
