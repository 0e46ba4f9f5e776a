"""`python -m rskernels tune`: measure which product serves each shape class of `linear` best."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rskernels import __version__, dispatch, tuning

# (rows, in, out) that stand for each class: token grids and windows of ViTs, decoders' few queries, LoRA.
SAMPLES = {
    "wide/medium": ((256, 128, 512), (196, 768, 768)),
    "wide/large": ((1024, 768, 768), (1024, 768, 2304)),
    "few/medium": ((8, 768, 3072), (16, 1024, 1024)),
    "few/large": ((16, 4096, 4096),),
    "thin/medium": ((4096, 768, 8), (4096, 8, 768)),
    "thin/large": ((16384, 1024, 16),),
}
# A product must be this much faster than the default rule's to replace it.
MARGIN = 0.95
SECONDS = 0.25


def tune(file: Path | None = None) -> dict[str, str]:
    """Measure the shape classes, but for the small ones, at the present number of threads (about 20 seconds),
    store the table in `file` (tuning.path() by default), use it from now on and return it."""
    if "cpp" in dispatch.UNAVAILABLE:
        raise ValueError(f"tune: nothing to choose between: {dispatch.UNAVAILABLE['cpp']}")
    file = file or tuning.path()
    if file is None:
        raise ValueError("tune: RSKERNELS_TUNING is 'off'; unset it or name a file to write")
    if file.is_dir():
        raise ValueError(f"tune: {file} is a folder; name a file with RSKERNELS_TUNING")
    file.parent.mkdir(parents=True, exist_ok=True)  # what is wrong with it, before 20 seconds of measuring
    before = tuning.record()
    table, ratios = tuning.default_table(), {}
    try:
        for key, usual in tuning.default_table().items():
            if key.endswith("/small"):
                continue  # never worth the call of an operator of our own
            seconds = _measure(key)
            ratios[key] = round(seconds["aten"] / seconds["onednn"], 3)
            other = next(product for product in tuning.PRODUCTS if product != usual)
            table[key] = other if seconds[other] < MARGIN * seconds[usual] else usual
            print(f"{key:<34}{table[key]:<8}oneDNN {ratios[key]:.2f}x as fast", flush=True)
    finally:
        tuning.restore(before)
    stored = {
        "version": tuning.VERSION,
        "products": table,
        "aten_over_onednn": ratios,
        "measured_with": {
            "rskernels": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
    }
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(stored, indent=1) + "\n")
    temporary.replace(file)
    tuning.use(stored, str(file))
    return table


def _measure(key: str) -> dict[str, float]:
    """Seconds over the class's sample shapes with each product: the best of several, taken in turns, so that
    whatever else the machine does falls on both."""
    dtype, which, shape = key.split("/", 2)
    samples = SAMPLES[shape]
    totals = dict.fromkeys(tuning.PRODUCTS, 0.0)
    for sizes in samples:
        call = _call(which, getattr(torch, dtype), *sizes)
        best = dict.fromkeys(tuning.PRODUCTS, float("inf"))
        stop, turns = time.perf_counter() + SECONDS, 0
        while turns < 3 or time.perf_counter() < stop:
            for product in tuning.PRODUCTS:
                tuning.restore({**tuning.record(), "products": dict.fromkeys(tuning.KEYS, product)})
                call()  # the first call after a change pays for caches that the other product filled
                start = time.perf_counter()
                call()
                best[product] = min(best[product], time.perf_counter() - start)
            turns += 1
        totals = {product: totals[product] + best[product] for product in totals}
    return totals


def _call(which: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight, bias, grad = (
        random(rows, inputs),
        random(outputs, inputs),
        random(outputs),
        random(rows, outputs),
    )
    if which == "forward":
        return lambda: torch.ops.rskernels.linear_forward(x, weight, bias, "none", False)
    mask = [which == "grad_input", which == "grad_weight", False]
    saved = x.new_empty(0)
    return lambda: torch.ops.rskernels.linear_backward(grad, x, weight, saved, "none", mask)
