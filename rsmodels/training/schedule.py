"""The learning rate as a function of the step: linear warm-up, then polynomial decay to zero."""

from __future__ import annotations


def learning_rate(
    step: int, *, base: float, steps: int, warmup: int, power: float, start: float | None = None
) -> float:
    """Learning rate of 0-based `step` out of `steps`.

    Steps 0 … warmup-1 rise linearly and reach `base` at the last of them, from base / warmup or from
    `start` · base (as mmengine's LinearLR, which KTDA trains with); the rest falls as
    base · (1 - t)^power, where t runs from 0 right after the warm-up to 1 at `steps` (RS-SAM's baseline,
    SAM LoRA, uses the same shape with warmup 250 and power 0.9).
    """
    if step < warmup:
        if start is None:
            return base * (step + 1) / warmup
        return base * (start + (1 - start) * step / max(1, warmup - 1))
    progress = (step - warmup) / max(1, steps - warmup)
    return base * max(0.0, 1.0 - progress) ** power
