import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from rsmodels.training.parallel import (
    Interrupt,
    LossModule,
    Ranks,
    check_mode,
    clip_gradients,
    processes,
    running_statistics,
)

CPU = torch.device("cpu")


def test_together_raises_the_error_of_a_lone_process() -> None:
    with pytest.raises(ValueError, match="mine"), Ranks(0, 1, CPU).together():
        raise ValueError("mine")


def check_averages(ranks: Ranks) -> None:
    norm = nn.BatchNorm1d(2)
    norm(torch.tensor([[0.0, 1.0], [2.0, 9.0]]) * (ranks.rank + 1))
    statistics = running_statistics(nn.Sequential(norm, nn.BatchNorm1d(3, track_running_stats=False)))
    before = ranks.gather([value.clone() for value in statistics])
    ranks.average(statistics)
    assert len(statistics) == 2 and statistics[0] is norm.running_mean
    for index, averaged in enumerate(ranks.gather(statistics)[0]):
        assert torch.equal(averaged, statistics[index]), "the same bits on every rank"
        everybodys = torch.stack([values[index] for values in before])
        assert not torch.equal(everybodys[0], everybodys[1])
        torch.testing.assert_close(averaged, everybodys.mean(0))


def rank_of_three(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    ranks = Ranks(rank, 3, CPU)
    said = Path(folder) / f"rank{rank}.txt"
    with ranks.together():
        pass  # nobody fails: all go on
    assert ranks.gather(rank) == [0, 1, 2] and ranks.any(rank == 2) and not ranks.any(False)
    assert ranks.from_main(lambda: f"of rank {rank}") == "of rank 0"
    check_averages(ranks)
    try:
        with ranks.together():
            if rank > 0:
                raise ValueError(f"rank {rank} failed")
    except ValueError as error:
        said.write_text(str(error))
    except SystemExit as stop:
        said.write_text(f"exit {stop.code}")
    dist.destroy_process_group()


def test_ranks_average_and_one_speaks_for_those_that_fail(tmp_path: Path) -> None:
    mp.spawn(rank_of_three, args=(str(tmp_path),), nprocs=3)
    said = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(3)]
    assert said == ["exit 2", "rank 1 failed", "exit 2"]


@pytest.mark.parametrize(
    "mode, world, shard_size, expected",
    [
        ("none", 2, None, "--parallel none cannot use 2 ranks"),
        ("ddp", 1, None, "--parallel ddp needs several processes"),
        ("hsdp", 4, 3, "--shard-size 3 does not divide the 4 ranks"),
    ],
)
def test_a_mode_that_cannot_work_is_refused(mode: str, world: int, shard_size: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_mode(mode, world, shard_size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no usable GPU"), processes("cuda"):
        pass


def test_the_first_signal_is_a_request_and_the_second_ctrl_c_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested and not ended
        # torchrun sends SIGTERM after a Ctrl-C: not the user's second one.
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_works_outside_the_main_thread() -> None:
    requested: list[bool] = []

    def enter() -> None:
        with Interrupt() as interrupt:
            requested.append(interrupt.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert requested == [False]


class Counting(nn.Module):
    """Counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def losses_and_logits(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        self.passes += 1
        logits = batch["image"] * 2
        return {"a": logits.sum()}, logits

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.losses_and_logits(batch)[0]


def test_validation_gets_logits_in_one_pass() -> None:
    model = Counting()
    batch = {"image": torch.ones(1, 3, 4, 4)}
    terms, logits = LossModule(model)(batch, with_logits=True)
    assert torch.equal(logits, batch["image"] * 2) and model.passes == 1
    assert terms == LossModule(model)(batch)


def test_one_process_has_nothing_to_average() -> None:
    values = torch.tensor([0.1, 0.2])
    Ranks(0, 1, CPU).average([values])
    assert torch.equal(values, torch.tensor([0.1, 0.2]))


def test_clip_returns_the_norm_before_and_leaves_small_gradients() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((4,), -1.0)
    assert clip_gradients(parameters, 0.0).item() == pytest.approx(4.0)
    assert clip_gradients(parameters, 8.0).item() == pytest.approx(4.0)
    assert parameters[0].grad[0] == 2.0
    assert clip_gradients(parameters, 1.0).item() == pytest.approx(4.0)
    assert parameters[0].grad[0].item() == pytest.approx(0.5, rel=1e-4)
