"""What a run says: log.jsonl for programs, TensorBoard where installed, a bar or plain lines for people."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from rsmodels import files
from rsmodels.evaluation.report import read_log, without_nan

NAME = "log.jsonl"


class RunLog:
    """The log of one run, on its main rank; on every other rank it keeps silent.

    first_step: where this process starts. Lines of later steps, left by a process that was killed after its
    last checkpoint, are dropped, so that a resumed run's log reads like an uninterrupted one's.
    """

    def __init__(self, run: Path, *, first_step: int, steps: int, main: bool) -> None:
        self.stream: TextIO | None = None
        self.tensorboard: Any = None
        self.bar: tqdm | None = None
        if not main:
            return
        path = run / NAME
        kept = [line for line in read_log(path) if line["step"] <= first_step] if first_step else []
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.stream = path.open("a", encoding="utf-8")
        self.tensorboard = _tensorboard(run, first_step)
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Add one event ("train" or "validation") after `step` steps."""
        if self.stream is None:
            return
        self.stream.write(json.dumps(without_nan({"kind": kind, "step": step, **values})) + "\n")
        self.stream.flush()
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar is None or kind != "train":
            self.say(f"{kind} {step}: {text}")
        else:
            self.bar.set_postfix_str(f"loss {values['loss']:.4f}", refresh=False)

    def advance(self) -> None:
        """Move the bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """One line for the reader, on stderr."""
        if self.stream is not None:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything."""
        for part in (self.bar, self.tensorboard, self.stream):
            if part is not None:
                part.close()


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held so far: on the GPU, or resident for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _tensorboard(run: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run), purge_step=first_step + 1 if first_step else None)
