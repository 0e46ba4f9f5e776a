"""One process or many: the same trainer code runs under `python train.py` and under `torchrun`."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names for its two running averages


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. With one process no process group exists and everything is local."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks, on every rank."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def average(self, tensors: list[Tensor]) -> None:
        """Replace floating-point `tensors` of one dtype by their mean over all ranks, with the same bits on
        every rank."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        parts = (self.sum(flat) / self.world).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return bool(self.sum(torch.tensor(int(flag))).item())

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main rank, on every rank.

        For what is read from disk: file systems may show two ranks two states, on which they would part ways.
        """
        with self.together():
            value = work() if self.main else None
        return self.gather(value)[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run local work (no collectives inside) so that all ranks go on, or all of them stop.

        Without it a rank that fails leaves the others waiting for it. The lowest failing rank raises its own
        error, so that it is said once; the others exit with status 2 and no words.
        """
        error: BaseException | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failing = torch.tensor(self.world if error is None else self.rank)
        if self.world > 1:
            dist.all_reduce(failing, dist.ReduceOp.MIN)
        if failing < self.world:
            if error is not None and failing == self.rank:
                raise error
            raise SystemExit(2)


@contextmanager
def processes(device: str | None) -> Iterator[Ranks]:
    """Join the process group that torchrun announces in the environment, if any; leave it at the end.

    A caller who has set torch.distributed up already keeps what it has.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no usable GPU here; leave it out, or use --device cpu")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = torch.device(kind)
    if kind == "cuda":
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(local)
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), local)
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks(0, 1, local)
        return
    # Small agreements between ranks are CPU tensors and go over gloo; gradients on GPUs go over nccl.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()


class LossModule(nn.Module):
    """A model as FSDP and DDP need it: its training loss is what `forward` computes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any], with_logits: bool = False) -> Any:
        """The loss terms of `batch`; for validation also the logits, as a pair."""
        return self.model.losses_and_logits(batch) if with_logits else self.model.losses(batch)


def check_mode(mode: str, world: int, shard_size: int | None = None) -> None:
    """Whether `mode` can work with `world` ranks; ValueError otherwise."""
    if mode == "none" and world > 1:
        raise ValueError(f"--parallel none cannot use {world} ranks; choose ddp, fsdp or hsdp")
    if mode != "none" and world == 1:
        raise ValueError(
            f"--parallel {mode} needs several processes; start them with torchrun, or leave it out"
        )
    if shard_size is not None and world % shard_size:
        raise ValueError(f"--shard-size {shard_size} does not divide the {world} ranks")


def parallelize(model: Any, ranks: Ranks, *, mode: str, shard_size: int | None = None) -> nn.Module:
    """Wrap `model` so that calling the result with a batch gives its losses, and backward averages the
    gradients over ranks. Parameters keep their names inside `model`.

    mode: "none" (one process only), "ddp" (a full copy per rank), "fsdp" (parameters, gradients and optimiser
    state sharded over all ranks) or "hsdp" (sharded over `shard_size` ranks, copied between such groups).
    """
    model.to(ranks.device)
    module = LossModule(model)
    if mode == "none":
        return module
    if mode == "ddp":
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        # An ablation may leave parts of a decoder without influence on the loss; DDP must be told to look.
        # Buffers are left to the trainer, which averages them (see running_statistics).
        return DistributedDataParallel(
            module, device_ids=devices, find_unused_parameters=True, broadcast_buffers=False
        )
    if mode == "fsdp":
        mesh = init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("shard",))
    else:
        shard = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
        mesh = init_device_mesh(
            ranks.device.type, (ranks.world // shard, shard), mesh_dim_names=("replicate", "shard")
        )
    # Weights travel in fp32 and autocast rounds them where it computes, as in one process and under DDP: no
    # MixedPrecisionPolicy, so that the way of sharing does not change the numbers.
    # FSDP warns of blocks that return a view, as changing it in place would break backward: nobody does here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in model.blocks_to_shard():
        fully_shard(block, mesh=mesh)
    # Resharded after forward like the blocks, so that parameters are always found in their sharded form.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Average gradients over ranks in this backward, or (`enabled=False`) only add to them locally."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
    else:
        yield


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a global norm of `max_norm` (0: leave them); returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of the batch norms of `model`: every rank updates its own."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]


def start_moments(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give AdamW the state it has after `step` steps, its moments zero.

    AdamW itself would make it in its first step; a checkpoint needs it before, sharded like the parameters,
    to be read into.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }


def full_state_dict(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """All weights of a possibly sharded model, whole and on the CPU. Every rank must call it; only those with
    `keep` hold the result, so that a large model is gathered one tensor at a time."""
    state = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            state[name] = whole.detach().cpu()
    return state


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request that the trainer meets after the running step.

    A second Ctrl-C stops at once. SIGTERM is never the second: torchrun sends it after a Ctrl-C of its own.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self.previous: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for name in (signal.SIGINT, signal.SIGTERM):
                self.previous[name] = signal.signal(name, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self.previous.items():
            signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            os._exit(130)
        self.requested = True


def detach_reader(worker: int) -> None:
    """Take a reader process out of its rank's group: Ctrl-C, and torchrun's SIGTERM, are for the rank alone.

    It still ends when its rank ends it, and by itself when the rank is gone.
    """
    os.setpgrp()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
