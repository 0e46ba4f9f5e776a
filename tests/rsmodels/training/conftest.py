"""Runs small enough to take steps in milliseconds, on real parts, and what they have written."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint
from torch import Tensor

from rsmodels.methods.teacher import Teacher
from rsmodels.registry import create_teacher, load_model
from rsmodels.training.config import LoaderConfig, OptimConfig, TrainConfig

MakeConfig = Callable[..., TrainConfig]
State = dict[str, Tensor]

# Two debug records per tensor and checkpoint: pytest would keep them all. The import sets another level.
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


@pytest.fixture(scope="module", autouse=True)
def as_in_subprocesses(one_thread: None) -> None:
    """Runs in this process are compared with runs in subprocesses, which have one thread."""


@pytest.fixture
def ktda(make_config: MakeConfig) -> MakeConfig:
    """make_config of a small run of KTDA, which learns from a teacher."""

    def make(**options: Any) -> TrainConfig:
        return make_config(**{"method": "ktda", **options})

    return make


@pytest.fixture(scope="session")
def tiny_teacher() -> Callable[..., Teacher]:
    """tiny_teacher(seed) -> the teacher of that run of KTDA, with other weights for another seed."""

    def make(seed: int = 0) -> Teacher:
        torch.manual_seed(seed)
        return create_teacher("dinov2_vit_tiny", image_size=32)

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images every pass of a teacher saw."""
    seen: list[int] = []
    forward = Teacher.forward

    def counting(self: Teacher, images: Tensor) -> list[Tensor]:
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Teacher, "forward", counting)
    return seen


# ------------------------------------------------------------------------------------- what a run has written


@pytest.fixture(scope="session")
def log_of() -> Callable[..., list[dict[str, Any]]]:
    """log_of(run, kind) -> the lines of that kind in a run's log, those of training if it is not given."""

    def read(run: Path, kind: str = "train") -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    return read


@pytest.fixture(scope="session")
def losses(log_of: Any) -> Callable[[Path], list[float]]:
    """losses(run) -> the loss of every step in a run's log."""
    return lambda run: [line["loss"] for line in log_of(run)]


@pytest.fixture(scope="session")
def weights_of() -> Callable[[Path], State]:
    """weights_of(run) -> those of the best model of a run."""
    return lambda run: load_model(run / "best")[0].state_dict()


@pytest.fixture(scope="session")
def same_weights() -> Callable[[State, State], bool]:
    """Whether two models have the same parameters, to the bit."""

    def same(first: State, second: State) -> bool:
        return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    return same
