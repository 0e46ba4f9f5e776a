"""The accuracy that every operator test asks for."""

import torch
from torch import Tensor

BOUND = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def allowed_error(result: Tensor) -> float:
    """Of ‖result − reference‖ / ‖reference‖: 2e-6 in float32, 5e-3 in bfloat16 (more where eager is worse).

    Twice that below 16 numbers: roundings do not average out in so few (one to bfloat16 alone is up to 4e-3).
    """
    return BOUND[result.dtype] * (2 if result.numel() < 16 else 1)
