"""For the whole suite, before anything imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported whether kernels are compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
