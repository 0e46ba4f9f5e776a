"""What the operator tests share: error measure and bounds, a clean dispatch state, fresh processes."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import rskernels
from rskernels import dispatch, tuning

sys.path.append(str(Path(__file__).parent))  # for modules that test files share
from accuracy import allowed_error

ROOT = Path(rskernels.__file__).resolve().parents[1]  # of the package under test: `make sanitize` has its own


@pytest.fixture(autouse=True)
def restore_state():
    """Every test starts from, and leaves, the same backend, products, threads and seed."""
    backend, products, threads = rskernels.get_backend(), tuning.record(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    rskernels.set_backend(backend)
    tuning.restore(products)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def extension():
    """The C++ extension; tests that need it skip, saying why, where it is not built."""
    if "cpp" in dispatch.UNAVAILABLE:
        pytest.skip(dispatch.UNAVAILABLE["cpp"])
    from rskernels import _C

    return _C


LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")


@contextmanager
def instruction_set(extension, level):
    """Kernels use `level` meanwhile; skips the test where the processor lacks it."""
    before = extension.cpu_capability()
    try:
        extension.set_cpu_capability(level)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        extension.set_cpu_capability(before)


@pytest.fixture(params=LEVELS)
def every_level(request, extension):
    """Runs a test on every instruction set."""
    with instruction_set(extension, request.param):
        yield request.param


@pytest.fixture(params=["best", "baseline", "avx2"])
def any_level(request, extension):
    """Runs a test on the processor's best instruction set and on the two without AVX-512."""
    level = extension.cpu_capability() if request.param == "best" else request.param
    with instruction_set(extension, level):
        yield


@pytest.fixture(params=["reference", "cpp"])
def any_backend(request):
    """Once on the reference, once on the kernels."""
    if request.param == "cpp":
        request.getfixturevalue("extension")
    with rskernels.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def relative_error():
    """‖out − reference‖ / ‖reference‖ in float64 (the absolute norm where the reference is zero)."""

    def measure(out, reference):
        out, reference = out.detach().double(), reference.detach().double()
        assert out.shape == reference.shape
        return ((out - reference).norm() / reference.norm().clamp_min(1e-30)).item()

    return measure


@pytest.fixture(scope="session")
def assert_accurate(relative_error):
    """An accelerated result against the float64 reference: below allowed_error, or below twice what the same
    computation in eager PyTorch of that dtype reaches. `unavoidable` is the error that allowed errors of a
    sum's terms bring, where a test knows it."""

    def check(out, eager, reference, what, unavoidable=0.0):
        bound = max(allowed_error(out), 2 * relative_error(eager, reference), unavoidable)
        error = relative_error(out, reference)
        assert error <= bound, f"{what}: error {error:.2e}, allowed {bound:.2e}"

    return check


@pytest.fixture(scope="session")
def run_python():
    """Run code in a fresh interpreter with extra environment variables; returns the completed process."""

    def run(code, **environment):
        env = {k: v for k, v in os.environ.items() if not k.startswith("RSKERNELS_")}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )

    return run
