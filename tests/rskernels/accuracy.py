"""The accuracy that every operator test asks for."""

import torch
from torch import Tensor

BOUND = {torch.float32: 2e-6, torch.float16: 6.25e-4, torch.bfloat16: 5e-3}


def allowed_error(result: Tensor, roundings: int | None = None) -> float:
    """Of ‖result − reference‖ / ‖reference‖: 2e-6 in float32, 5e-3 in bfloat16, an eighth of that in float16
    (three more bits); more where eager is worse.

    Twice that where the result depends on fewer than 16 roundings, which then do not average out (one to
    bfloat16 alone is up to 4e-3): on as many as it has numbers, unless `roundings` says otherwise.
    """
    return BOUND[result.dtype] * (2 if min(result.numel(), roundings or result.numel()) < 16 else 1)
