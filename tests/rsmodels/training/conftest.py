"""A run small enough to take steps in milliseconds, on real parts: the tiny model, synthetic scenes."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from rsmodels.training.config import LoaderConfig, OptimConfig, TrainConfig

MakeConfig = Callable[..., TrainConfig]

# Two debug records per tensor and checkpoint: pytest would keep them all.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


def small_config(run: Path, *, lr: float = 1e-3, clip: float = 1.0, **options: Any) -> TrainConfig:
    """TrainConfig of a small run in the folder `run`; `options` replace its fields."""
    defaults: dict[str, Any] = {
        "data_args": {"size": 32, "length": 10},
        "image_size": 32,
        "loader": LoaderConfig(cache=True),
        "num_workers": 0,
        "batch_size": 4,
        "steps": 4,
        "log_every": 1,
        "checkpoint_every": 100,
        "validate_every": 100,
        "device": "cpu",
        "report": False,
    }
    return TrainConfig(run_dir=str(run), optim=OptimConfig(lr=lr, clip=clip), **{**defaults, **options})


@contextmanager
def same_draws() -> Iterator[None]:
    """Random numbers that depend on their place in a row alone: what is drawn for an image is then the same
    on any rank and anywhere in a batch. A single number is small: what has a probability happens."""

    def rows(*size: Any, dtype: Any = None, **_: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        values = torch.arange(1, 1 + math.prod(shape[1:]), dtype=torch.float64) * 0.618 % 1
        row = values.to(dtype or torch.float32).view(shape[1:])
        return row.expand(shape).clone() if shape else torch.tensor(0.01)

    with mock.patch.object(torch, "rand", rows), mock.patch.object(torch, "randn", rows):
        yield


@pytest.fixture(scope="session")
def with_same_draws() -> Any:
    """`same_draws`, for tests in this process."""
    return same_draws


@pytest.fixture(scope="session")
def configure() -> MakeConfig:
    """`small_config`, for tests that choose their folder."""
    return small_config


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """make_config(**fields) -> TrainConfig of a small run in tmp_path/run."""

    def make(**options: Any) -> TrainConfig:
        return small_config(tmp_path / options.pop("folder", "run"), **options)

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As in the subprocesses that the runs are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
