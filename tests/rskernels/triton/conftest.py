"""What the tests of the Triton kernels share: the device they run on, and how exact they have to be.

Without a GPU the kernels run in Triton's interpreter, on CPU tensors, through the same launchers.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    # Triton 3.6 (torch 2.11) makes a loop's bound a number by int() of an array of one element, which NumPy
    # refuses from 2.4 on.
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
# The interpreter's bfloat16 product is wrong: bfloat16 is left to a device.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """As PyTorch comes, float32 convolutions are TF32's on a GPU, and dilated_aspp does as they do."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
