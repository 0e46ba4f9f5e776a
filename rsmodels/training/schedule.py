"""The learning rate as a function of the step: linear warm-up, then polynomial decay to zero."""

from __future__ import annotations


def learning_rate(step: int, *, base: float, steps: int, warmup: int, power: float) -> float:
    """Learning rate of 0-based `step` out of `steps`.

    Steps 0 … warmup-1 rise linearly and reach `base` at the last of them; the rest falls as
    base · (1 - t)^power, where t runs from 0 right after the warm-up to 1 at `steps` (RS-SAM's baseline,
    SAM LoRA, uses the same shape with warmup 250 and power 0.9).
    """
    if step < warmup:
        return base * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return base * max(0.0, 1.0 - progress) ** power
