"""What torchrun starts in test_ranks.py: `ranks_worker.py JOBS`, a JSON list of runs to train one by one.

A job is the keyword arguments of `small_config`, with "run", and with "die_in_step" to be killed in that step.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from conftest import small_config

from rsmodels.training.trainer import train


def die_in_step(number: int) -> None:
    """Let the process be killed between the gradients and the update of its `number`-th step."""
    step, calls = torch.optim.AdamW.step, iter(range(1, number + 1))

    def fatal(self: torch.optim.AdamW) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)

    torch.optim.AdamW.step = fatal  # type: ignore[method-assign]


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        if "die_in_step" in job:
            die_in_step(job.pop("die_in_step"))
        train(small_config(Path(job.pop("run")), **job))
