"""What test_ranks.py starts, alone or by torchrun: `ranks_worker.py JOBS`, runs to train in turn, as JSON.

A job is the keyword arguments of `small_config`, with "run". "die_in_step" has the process killed in that
step; "poison" makes a pixel of that training tile NaN; "tables" lets the ranks start with different tables
of matrix products; "same_draws" draws the same for an image wherever it is.
"""

import json
import math
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import same_draws, small_config

from rskernels import tuning
from rsmodels.data import SyntheticEarth
from rsmodels.training.trainer import Trainer, train


def die_in_step(number: int) -> None:
    """Let the process be killed between the gradients and the update of its `number`-th step."""
    step, calls = torch.optim.AdamW.step, iter(range(1, number + 1))

    def fatal(self: torch.optim.AdamW) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)

    torch.optim.AdamW.step = fatal  # type: ignore[method-assign]


def poison(name: str) -> None:
    """Let one tile hold a NaN, as a broken file might."""
    read = SyntheticEarth.__getitem__

    def reading(self: SyntheticEarth, index: int) -> dict[str, Any]:
        sample = read(self, index)
        if sample["name"] == name:
            sample["image"][0, 3, 4] = math.nan
        return sample

    SyntheticEarth.__getitem__ = reading  # type: ignore[method-assign]


def watch_teachers() -> None:
    """Let every rank note what a run did to its teacher, in the run's folder."""
    run = Trainer.run

    def watching(self: Trainer) -> None:
        run(self)
        if self.teacher is not None:
            network = self.teacher.network
            gradients = sum(parameter.grad is not None for parameter in network.parameters())
            seen = {
                "before": self.teacher.record["sha256"],
                "after": network.sha256(),
                "gradients": gradients,
            }
            (self.folder / f"teacher-{self.ranks.rank}.json").write_text(json.dumps(seen))

    Trainer.run = watching  # type: ignore[method-assign]


def products() -> list[Any]:
    """The table of every rank."""
    tables: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(tables, tuning.record()["products"])
    return tables


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")  # one group for all jobs
    watch_teachers()
    for job in json.loads(sys.argv[1]):
        if "die_in_step" in job:
            die_in_step(job.pop("die_in_step"))
        if "poison" in job:
            poison(job.pop("poison"))
        tables = job.pop("tables", False)
        if tables:
            product = tuning.PRODUCTS[dist.get_rank()]
            tuning.restore({**tuning.record(), "products": dict.fromkeys(tuning.KEYS, product)})
        with same_draws() if job.pop("same_draws", False) else nullcontext():
            train(small_config(Path(job.pop("run")), **job))
        if tables:
            first, second = products()
            assert first == second == dict.fromkeys(tuning.KEYS, tuning.PRODUCTS[0])
            tuning.load()
    if "WORLD_SIZE" in os.environ:
        dist.destroy_process_group()
