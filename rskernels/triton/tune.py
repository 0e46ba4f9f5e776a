"""Which configuration of a Triton kernel is fastest on this GPU: measured on request, kept as data.

    python -m rskernels tune

Every operator's `examples()` are noted down (rskernels.triton.launch) and replayed on the device with numbers
in their tensors, once per configuration of its `candidates(kernel, shape class)`. A candidate's outputs have
to be those of the shipped configuration before its time is taken: one that is fast and wrong is never kept.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from rskernels import __version__, tuning
from rskernels.triton import aot, launch
from rskernels.triton.launch import CHIPS, CONFIGS, Configs, Launch, noting, trying
from rskernels.triton.replay import Buffer, Replay

# A configuration must take less than this share of the shipped one's time to replace it.
MARGIN = 0.97
# Of ‖out − shipped‖ / ‖shipped‖, by the coarsest dtype of a call: other tiles sum in another order.
ALLOWED = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}

Constants = Mapping[str, int]
Timer = Callable[[Callable[[], Any]], float]
Example = Callable[[], Any]


@dataclass(frozen=True)
class Found:
    """What came of one kernel and shape class: the time of the best over that of the shipped configuration (1
    where that is kept), how many were tried, and why some were refused."""

    kernel: str
    shape_class: str
    constants: dict[str, int]
    share_of_time: float
    tried: int
    refused: dict[str, str]


def median_seconds(call: Callable[[], Any]) -> float:
    """Of calls behind cold caches, by the device's clock."""
    milliseconds = triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median")
    return float(milliseconds) / 1e3


def tune(
    device: torch.device | None = None,
    *,
    operators: Sequence[str] | None = None,
    file: Path | None = None,
    seconds: float = float("inf"),
    again: bool = False,
    timer: Timer = median_seconds,
) -> list[Found]:
    """Measure the configurations of `operators` (default: all) on `device` (default: the current GPU), store
    the best in `file` (default: tuning.triton_path) after every class, and use them from now on.

    seconds: no further class is begun after that long; what was measured is kept.
    again: measure classes too that `file` has from an earlier call with this Triton and rskernels.
    Raises ValueError where there is no file to write (RSKERNELS_TUNING=off).
    """
    device = device or torch.device("cuda", torch.cuda.current_device())
    capability = launch.capability_of(device)
    file = file or tuning.triton_path(capability)
    if file is None:
        raise ValueError("tune: RSKERNELS_TUNING is 'off'; unset it or name a file to write")
    file.parent.mkdir(parents=True, exist_ok=True)  # what is wrong with it, before minutes of measuring
    stop = time.monotonic() + seconds
    found: list[Found] = []
    by_class: dict[tuple[str, str], tuple[list[Example], Iterable[Constants]]] = {}
    for operator in aot.OPERATORS if operators is None else operators:
        module = importlib.import_module(f"rskernels.triton.{operator}")
        for key, examples in classes_of(module.examples(), capability).items():  # two modules may share one
            tried = module.candidates(key[0].partition(".")[2], key[1])
            by_class.setdefault(key, ([], tried))[0].extend(examples)
    classes = [(*key, *what) for key, what in by_class.items()]
    known = {} if again else _stored(file, capability).get("measured", {})
    left = [one for one in classes if one[1] not in known.get(one[0], ())]
    if len(left) < len(classes):
        print(f"tune: {len(classes) - len(left)} of {len(classes)} classes are in {file}", flush=True)
    for number, (kernel, shape_class, examples, candidates) in enumerate(left, 1):
        if time.monotonic() > stop:
            print(f"tune: {seconds:.0f} seconds are over; {len(left) - number + 1} classes left", flush=True)
            break
        try:
            with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: none
                found.append(_best(kernel, shape_class, examples, candidates, device, timer))
        except RuntimeError as error:  # a fault of the device, which no call after it survives
            broken = Found(kernel, shape_class, {}, 1.0, 0, {"device": str(error)})
            _store(file, capability, device, broken)  # so that the next run begins behind it
            raise
        _say(f"{number}/{len(left)}", found[-1])
        _store(file, capability, device, found[-1])
        tuning.forget_triton()
    return found


def main(operators: Sequence[str] | None, seconds: float, again: bool, into_package: bool) -> None:
    """What `python -m rskernels tune` does on a GPU."""
    found = tune(operators=operators, seconds=seconds, again=again)
    if into_package:
        for file in write_package(found, launch.capability_of(torch.device("cuda"))):
            print(f"written: {file}")


def modules_of(names: Sequence[str] | None) -> list[str] | None:
    """The modules with the kernels of these operators, by the public names or their own; None for all."""
    if names is None:
        return None
    found = []
    for name in names:
        own = [one for one in aot.OPERATORS if f"{one}_".startswith(f"{name}_") or name.startswith(f"{one}_")]
        if not own:
            there = ", ".join(aot.OPERATORS)
            raise ValueError(f"tune --operators: {name!r} has no Triton kernels; there are {there}")
        found += own
    return list(dict.fromkeys(found))


def write_package(found: Iterable[Found], capability: int) -> list[Path]:
    """Put what was found into the configurations that the package ships for `capability`, for developers."""
    if capability not in CHIPS:
        raise ValueError(
            f"tune: the package ships configurations for sm_{CHIPS}, this GPU is sm_{capability}"
        )
    by_operator: dict[str, list[Found]] = defaultdict(list)
    for row in found:
        by_operator[row.kernel.partition(".")[0]].append(row)
    written = []
    for operator, rows in by_operator.items():
        file = CONFIGS / f"{operator}.sm{capability}.json"
        table: Configs = json.loads(file.read_text())
        for row in rows:
            if row.share_of_time < 1:
                table[row.kernel][row.shape_class] = row.constants
        _write(file, _formatted(table))
        written.append(file)
    return written


def classes_of(
    examples: Iterable[tuple[str, Example]], capability: int
) -> dict[tuple[str, str], list[Example]]:
    """(kernel, shape class) -> the examples that ask for it; float32, which few run on a GPU, last."""
    classes: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for _, call in examples:
        with noting(launch.nearest_chip(capability)), trying({}) as asked:
            call()
        for key in sorted(asked):
            classes[key].append(call)
    return dict(sorted(classes.items(), key=lambda item: item[0][1].startswith("float")))


def _best(
    kernel: str,
    shape_class: str,
    examples: Sequence[Example],
    candidates: Iterable[Constants],
    device: torch.device,
    timer: Timer,
) -> Found:
    """The candidate with the least share of the shipped configuration's time, the mean over the examples."""
    chip = launch.nearest_chip(launch.capability_of(device))
    rows = launch.shipped(chip)[kernel]
    shipped = dict(rows.get(shape_class, rows["default"]))
    others = [dict(one) for one in candidates if dict(one) != shipped]
    noted = [
        [_note(call, chip, {(kernel, shape_class): one}) for one in (shipped, *others)] for call in examples
    ]
    deadly: set[str] = set()
    if device.type == "cuda":
        every = aot.distinct(one for variants in noted for launches in variants for one in launches)
        jobs = len(os.sched_getaffinity(0))
        fatal = aot.warm(list(every.values()), launch.capability_of(device), jobs)
        deadly = {key for number, key in enumerate(every) if number in fatal}
    shares: dict[int, list[float]] = {number: [] for number in range(len(others))}
    refused: dict[str, str] = {}
    for launches in noted:
        concerned = _differing(launches)
        ends = [bool(deadly & aot.distinct(variant).keys()) for variant in launches] if deadly else []
        if ends and ends[0]:
            return Found(kernel, shape_class, shipped, 1.0, 0, {"shipped": "its compilation crashes"})
        reference = Replay(launches[0], device)
        if reason := _failure(reference):
            refused["shipped"] = reason
            return Found(kernel, shape_class, shipped, 1.0, 0, refused)
        expected = reference.written()
        bound = max(ALLOWED[dtype] for dtype in reference.dtypes)
        seconds = timer(partial(reference.run, concerned))
        for number in list(shares):
            replay = Replay(launches[1 + number], device)
            if ends and ends[1 + number]:
                reason = "its compilation crashes"
            elif set(others[number]) != set(shipped):
                reason = "other constants than the shipped"
            else:
                reason = _problem(replay, expected, bound)
            if reason:
                refused[json.dumps(others[number])] = reason
                del shares[number]
                continue
            shares[number].append(timer(partial(replay.run, concerned)) / seconds)
    means = {number: sum(values) / len(values) for number, values in shares.items()}
    best = min(means, key=means.__getitem__, default=None)
    if best is None or means[best] > MARGIN:
        return Found(kernel, shape_class, shipped, 1.0, len(others), refused)
    return Found(kernel, shape_class, others[best], means[best], len(others), refused)


def _note(call: Example, chip: int, choice: Mapping[tuple[str, str], Constants]) -> list[Launch]:
    with noting(chip) as launches, trying(choice):
        call()
    return list(launches)


def _differing(variants: Sequence[Sequence[Launch]]) -> list[int] | None:
    """The launches that the choice of a configuration changes; None (all) where it changes their number."""
    if len({len(variant) for variant in variants}) > 1:
        return None

    def looks(launched: Launch) -> tuple[Any, ...]:
        plain = [value for value in launch.flat(launched.arguments) if not isinstance(value, Tensor)]
        return launched.grid, dict(launched.constants), plain

    changed = [
        i
        for i, same in enumerate(zip(*variants, strict=True))
        if any(looks(x) != looks(same[0]) for x in same)
    ]
    return changed or None


def _failure(replay: Replay) -> str:
    """Why a replay does not run, "" where it does."""
    try:
        replay.run()
        if replay.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # whatever Triton raises: registers, shared memory, a tile it cannot make
        if replay.device.type == "cuda":
            torch.cuda.synchronize()  # a fault, after which the device answers no more, is this class's
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"[:160]
    return ""


def _problem(replay: Replay, expected: Mapping[Buffer, Tensor], bound: float) -> str:
    """Why a candidate is out of the question: it does not run, or its outputs are not the shipped one's."""
    if reason := _failure(replay):
        return reason
    compared = 0
    for key, reference in expected.items():
        if key not in replay.named:
            continue  # room that only one of them needs
        out, compared = replay.named[key], compared + 1
        if not reference.dtype.is_floating_point:
            if not torch.equal(out, reference):
                return "another answer than the shipped configuration's"
            continue
        difference = (out.double() - reference.double()).norm()
        if not difference <= bound * reference.double().norm():  # NaN is no answer
            return "another answer than the shipped configuration's"
    return "" if compared else "no output to compare with the shipped configuration's"


def _say(which: str, found: Found) -> None:
    what = "kept" if found.share_of_time == 1 else f"{found.share_of_time:.2f} of its time: {found.constants}"
    if "shipped" in found.refused:
        what = f"not measured, the shipped one does not run: {found.refused['shipped']}"
    print(
        f"{which:<9}{found.kernel:<40}{found.shape_class:<24}{found.tried} tried, {len(found.refused)} "
        f"refused; {what}",
        flush=True,
    )


def _stored(file: Path, capability: int) -> dict[str, Any]:
    """What the file has; nothing where it is not one of this version, chip and Triton."""
    try:
        saved: dict[str, Any] = json.loads(file.read_text())
        launch.checked(saved, capability)
    except (OSError, ValueError):
        return {}
    return saved


def _store(file: Path, capability: int, device: torch.device, row: Found) -> None:
    """The whole file anew: what was tuned before stays."""
    saved = _stored(file, capability)
    configs, measured = saved.get("configs", {}), saved.get("measured", {})
    classes = configs.setdefault(row.kernel, {})
    if row.share_of_time < 1:
        classes[row.shape_class] = row.constants
    else:
        classes.pop(row.shape_class, None)
    if row.shape_class not in measured.setdefault(row.kernel, []):
        measured[row.kernel].append(row.shape_class)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    stored = {
        "version": __version__,
        "capability": capability,
        "triton": launch.triton_version(),
        "configs": {kernel: classes for kernel, classes in configs.items() if classes},
        "measured": measured,
        "measured_with": {
            "gpu": gpu,
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        },
    }
    _write(file, json.dumps(stored, indent=1) + "\n")


def _formatted(table: Configs) -> str:
    """A line per shape class, as the package's files have them."""
    kernels = []
    for kernel, classes in table.items():
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in classes.items())
        kernels.append(f" {json.dumps(kernel)}: {{\n{rows}\n }}")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def _write(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(file)
