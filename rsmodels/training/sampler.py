"""Which sample comes when, and with which random numbers: pure functions of the seed and the step.

Training reads an endless stream of positions 0, 1, 2, …; position p is the (p mod N)-th sample of epoch
p // N, whose order is a permutation computed from (seed, epoch). Step s takes the positions
[s·batch, (s+1)·batch), and every rank its share of them. So all batches are full, every epoch shows every
sample once, resuming needs nothing but the step, and another number of ranks sees the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler


class Purpose(IntEnum):
    """What a derived seed is for: two purposes never share random numbers. The values are part of a run."""

    WEIGHTS = 0
    ORDER = 1
    AUGMENT = 2
    STEP = 3
    VALIDATION = 4
    TEACHER = 5


class Sample(NamedTuple):
    """What is asked for.

    tile: its index in the data set.
    position: in the training stream; it decides the tile's random numbers.
    counts: False for a stand-in whose mask is to be ignored everywhere.
    """

    tile: int
    position: int = 0
    counts: bool = True


def derive_seed(*path: int) -> int:
    """A 63-bit seed for one place of a run, such as (seed, purpose, step, rank), unlike its neighbours'."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int) -> None:
    """Seed every global generator that a model or a data set might draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def epoch_order(length: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of `length` samples in `epoch`: (length,) int64.

    Sorts the output of a counter-based generator, whose bits NumPy promises to keep in every version (it
    promises nothing of the kind for `permutation`).
    """
    keys = np.random.Philox(key=derive_seed(seed, Purpose.ORDER), counter=[0, 0, 0, epoch]).random_raw(length)
    return np.argsort(keys, kind="stable")


class StepSampler(Sampler[list[Sample]]):
    """Batches of this rank from `first_step` on: `accumulate` lists per step."""

    def __init__(
        self,
        length: int,
        *,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        first_step: int = 0,
        steps: int,
    ) -> None:
        self.length, self.seed = length, seed
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.world = rank, world
        self.first_step, self.steps = first_step, steps
        self.share = batch_size // (world * accumulate)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.first_step, self.steps):
            for part in range(self.accumulate):
                start = step * self.batch_size + (self.rank * self.accumulate + part) * self.share
                batch = []
                for position in range(start, start + self.share):
                    if position // self.length != epoch:
                        epoch = position // self.length
                        order = epoch_order(self.length, seed=self.seed, epoch=epoch)
                    batch.append(Sample(int(order[position % self.length]), position))
                yield batch


class ShardSampler(Sampler[list[Sample]]):
    """Batches of consecutive samples, dealt to the ranks in turn; every sample counts once.

    Every rank gets the same number of batches, because a sharded model needs all ranks in every pass; where
    the batches do not divide evenly, some ranks end with a stand-in that counts nothing. What a batch holds
    does not depend on the number of ranks.
    """

    def __init__(self, length: int, *, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.batch_size = length, batch_size
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[Sample]]:
        for turn in range(len(self)):
            start = (turn * self.world + self.rank) * self.batch_size
            indices = range(start, min(start + self.batch_size, self.length))
            yield [Sample(index) for index in indices] or [Sample(0, counts=False)]
