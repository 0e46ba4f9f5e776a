"""Checkpoints that survive a kill at any moment and resume on another number of ranks.

    run/checkpoints/frozen/     frozen weights, written once: training never changes them
    run/checkpoints/step-200/   trained weights, buffers, AdamW's two moments, state.json

A run that started from `--pretrained` still writes its frozen weights: its folder is then complete by itself,
whatever happens to the file it started from, at the cost of one copy per run.

Tensors go through torch.distributed.checkpoint, every rank writing its own shards. Only tensors do: the
optimiser's other state follows from the step, and the rest is JSON. A folder is written as step-N.tmp and
renamed when complete; state.json holds a checksum of every file in it, so that damage is noticed.
All ranks must see one file system, and all of them call every method.
"""

from __future__ import annotations

import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from rsmodels import files
from rsmodels.training.parallel import MOMENTS, Ranks, start_moments

STATE = "state.json"
FROZEN = "frozen"


class DamagedCheckpointError(ValueError):
    """A checkpoint folder that is incomplete or does not hold what was written."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, ranks: Ranks, *, keep: int = 2) -> None:
        self.folder = run / "checkpoints"
        self.ranks = ranks
        self.keep = keep
        # Not whether the folder exists: a run that ended before its first step-N may have left other weights.
        self.has_frozen = False

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> Path:
        """Write step-N, whole or not at all, then drop the oldest beyond `keep`, and any later step."""
        if not self.has_frozen:
            self._write(self.folder / FROZEN, _frozen_tensors(model), {})
            self.has_frozen = True
        target = self.folder / f"step-{step}"
        self._write(target, _trained_tensors(model, optimizer), {"step": step, **state})
        with self.ranks.together():
            if self.ranks.main:
                # Later steps are what a run left that now goes on from before them: damaged, or abandoned.
                kept = [path for path in newest_first(self.folder) if _step_of(path) <= step][: self.keep]
                for other in set(newest_first(self.folder)) - set(kept):
                    shutil.rmtree(other)
        return target

    def read_state(self, folder: Path) -> dict[str, Any]:
        """What state.json of a checkpoint says, as the main rank sees it: all ranks take the same checkpoint.

        DamagedCheckpointError, on all of them, where it cannot be read.
        """

        def attempt() -> dict[str, Any] | str:
            try:
                return read_state(folder)
            except DamagedCheckpointError as error:
                return str(error)

        state = self.ranks.from_main(attempt)
        if isinstance(state, str):
            raise DamagedCheckpointError(state)
        return state

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Read the checkpoint at `path` into `model` and `optimizer`, resharding as needed.

        DamagedCheckpointError where it cannot be read whole; model and optimiser are then half-read.
        """
        start_moments(optimizer, step)
        self._read(path.parent / FROZEN, _frozen_tensors(model))
        self._read(path, _trained_tensors(model, optimizer))
        self.has_frozen = path.parent.resolve() == self.folder.resolve()

    def _write(self, target: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        temporary = target.with_name(target.name + ".tmp")
        try:
            with self.ranks.together():
                if self.ranks.main:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
            failure = _collective(dcp.save, tensors, temporary)
            with self.ranks.together():
                if failure is not None:
                    raise failure
                checksums = {file.name: _checksum(file) for file in temporary.glob(f"__{self.ranks.rank}_*")}
            everybodys = self.ranks.gather(checksums)
            with self.ranks.together():
                if self.ranks.main:
                    checksums = {".metadata": _checksum(temporary / ".metadata")}
                    for part in everybodys:
                        checksums |= part
                    files.write_json(temporary / STATE, {**state, "checksums": checksums})
                    if target.exists():
                        shutil.rmtree(target)
                    temporary.rename(target)
        except (OSError, RuntimeError) as error:  # torch's own writer reports a full disk as RuntimeError
            shutil.rmtree(temporary, ignore_errors=True)
            last = next(iter(newest_first(self.folder)), None)
            advice = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
            reason = getattr(error, "strerror", None) or f"is the disk full? {str(error).splitlines()[0]}"
            raise OSError(f"{target}: cannot write the checkpoint ({reason}); {advice}") from error

    def _read(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        problem = ""
        checksums = self.read_state(folder)["checksums"]
        # Every rank checks its share of the files.
        for name in sorted(checksums)[self.ranks.rank :: self.ranks.world]:
            file = folder / name
            try:
                if _checksum(file) != checksums[name]:
                    problem = f"{file} is damaged (its checksum differs)"
            except FileNotFoundError:
                problem = f"{file} is missing"
            except OSError as error:  # not raised here: the other ranks would wait for this one
                problem = f"{file} cannot be read ({error.strerror or error})"
        problem = next(filter(None, self.ranks.gather(problem)), "")
        if problem:
            raise DamagedCheckpointError(problem)
        failure = _collective(dcp.load, tensors, folder)
        if failure is not None:
            raise DamagedCheckpointError(f"{folder} cannot be read ({failure})") from failure


def newest_first(folder: Path) -> list[Path]:
    """The complete step-N folders in `folder`, newest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def candidates(resume: str, run: Path) -> list[Path]:
    """The checkpoints that `--resume` may mean, newest first; none where `auto` finds none: a fresh start."""
    if resume == "auto":
        return newest_first(run / "checkpoints")
    path = Path(resume)
    if path.name.startswith("step-") and path.is_dir():
        return [path]
    for folder in (path, path / "checkpoints"):
        if newest_first(folder):
            return newest_first(folder)
    raise FileNotFoundError(
        f"--resume {resume}: no checkpoint there; give a run's folder, one of its checkpoints/step-N, or auto"
    )


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json of a checkpoint says."""
    path = folder / STATE
    if not path.is_file():
        raise DamagedCheckpointError(f"{path} is missing: the checkpoint is incomplete")
    try:
        return files.read_json(path)
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if not value.requires_grad}


def _trained_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    # state_dict() is what knows which buffers are persistent.
    tensors = {
        f"model.{name}": value.detach()
        for name, value in model.state_dict().items()
        if name not in parameters or parameters[name].requires_grad
    }
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors


def _collective(work: Callable[..., Any], tensors: dict[str, Tensor], folder: Path) -> BaseException | None:
    """Run dcp.save or dcp.load on all ranks; what went wrong on any of them comes back on all of them."""
    with warnings.catch_warnings():
        # Said of every run of one process.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            work(tensors, checkpoint_id=folder)
        except CheckpointException as error:
            return next(iter(error.failures.values()))[0]
    return None


def _checksum(file: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    value = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value
