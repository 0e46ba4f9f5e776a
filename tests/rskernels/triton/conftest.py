"""What the tests of the Triton kernels share: the device they run on, and how exact they have to be.

Without a GPU the kernels run in Triton's interpreter, on CPU tensors, through the same launchers.
"""

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = not torch.cuda.is_available()
# The interpreter's bfloat16 product is wrong: bfloat16 is left to a device.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
