"""A run small enough to take steps in milliseconds, on real parts: the tiny model, synthetic scenes."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
