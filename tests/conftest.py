"""For the whole suite, before anything imports Triton."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Triton decides when it is imported whether kernels are compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# First calls load what they need: no deadline. No example changes what a fixture holds.
settings.register_profile(
    "rsmodels",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("rsmodels")
