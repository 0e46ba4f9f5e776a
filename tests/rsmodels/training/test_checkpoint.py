import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from rsmodels.training import checkpoint
from rsmodels.training.build import make_optimizer
from rsmodels.training.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
    candidates,
    newest_first,
    read_state,
)
from rsmodels.training.config import OptimConfig
from rsmodels.training.parallel import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


class Model(nn.Module):
    """Frozen and trained parameters, a buffer that training changes and one that is not saved."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 2)
        self.register_buffer("scratch", torch.rand(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.frozen(x)))


def trained(seed: int, steps: int = 0) -> tuple[Model, torch.optim.AdamW]:
    model = Model(seed)
    optimizer = make_optimizer(model, OptimConfig(lr=0.01, weight_decay=0.1))
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        model(torch.randn(8, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def same(first: tuple[Model, torch.optim.AdamW], second: tuple[Model, torch.optim.AdamW]) -> bool:
    states = [pair[0].state_dict() for pair in (first, second)]
    moments = [
        [value for state in pair[1].state_dict()["state"].values() for value in state.values()]
        for pair in (first, second)
    ]
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0]) and all(
        torch.equal(a, b) for a, b in zip(*moments, strict=True)
    )


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 2, 4 and 6, of which two are kept."""
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2)
    for step in (2, 4, 6):
        checkpoints.save(step, *trained(0, step), {"note": f"at {step}"})
    return checkpoints


def test_everything_comes_back(saved: Checkpoints) -> None:
    other = trained(1)
    assert not same(other, trained(0, 6))
    saved.load(saved.folder / "step-6", *other, step=6)
    assert same(other, trained(0, 6))
    assert read_state(saved.folder / "step-6")["note"] == "at 6"


def test_the_newest_are_kept_and_nothing_temporary_is_left(saved: Checkpoints) -> None:
    assert [path.name for path in newest_first(saved.folder)] == ["step-6", "step-4"]
    assert sorted(path.name for path in saved.folder.iterdir()) == ["frozen", "step-4", "step-6"]


def test_later_steps_give_way_to_a_run_that_went_back(saved: Checkpoints) -> None:
    saved.save(5, *trained(0, 5), {})
    assert [path.name for path in newest_first(saved.folder)] == ["step-5", "step-4"]


def test_frozen_weights_are_written_once(saved: Checkpoints) -> None:
    metadata = torch.distributed.checkpoint.FileSystemReader(saved.folder / "step-6").read_metadata()
    names = set(metadata.state_dict_metadata)
    assert not any("frozen" in name or "scratch" in name for name in names)
    assert {"model.head.weight", "model.norm.running_mean", "exp_avg.head.weight"} <= names


def test_frozen_weights_of_a_run_that_died_early_are_not_kept(tmp_path: Path) -> None:
    Checkpoints(tmp_path, ALONE).save(1, *trained(0), {})
    shutil.rmtree(tmp_path / "checkpoints" / "step-1")
    anew = Checkpoints(tmp_path, ALONE)
    anew.save(1, *trained(5), {})
    other = trained(1)
    anew.load(anew.folder / "step-1", *other, step=1)
    assert torch.equal(other[0].frozen.weight, trained(5)[0].frozen.weight)


def cut_short(step: Path) -> None:
    file = next(step.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(step: Path) -> None:
    file = next(step.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def without_metadata(step: Path) -> None:
    (step / ".metadata").unlink()


def without_state(step: Path) -> None:
    (step / "state.json").unlink()


def half_a_state(step: Path) -> None:
    text = (step / "state.json").read_text()
    (step / "state.json").write_text(text[: len(text) // 2])


def without_frozen(step: Path) -> None:
    shutil.rmtree(step.parent / "frozen")


@pytest.mark.parametrize(
    "damage", [cut_short, flip_a_bit, without_metadata, without_state, half_a_state, without_frozen]
)
def test_damage_is_noticed_and_named(saved: Checkpoints, damage: Any) -> None:
    path = saved.folder / "step-6"
    damage(path)
    with pytest.raises(DamagedCheckpointError, match=str(saved.folder)) as error:
        read_state(path)
        saved.load(path, *trained(1), step=6)
    assert "\n" not in str(error.value)


def one_of_two_ranks(rank: int, folder: str, store: str) -> None:
    """The rank that does not see state.json is first the other one, then the main one."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    checkpoints = Checkpoints(Path(folder), Ranks(rank, 2, torch.device("cpu")))
    path = checkpoints.folder / "step-6"
    read = checkpoint.read_state

    def late(folder: Path) -> Any:
        raise DamagedCheckpointError(f"{folder} is late")

    checkpoint.read_state = read if rank == 0 else late
    assert checkpoints.read_state(path)["note"] == "at 6"
    other = trained(1)
    checkpoints.load(path, *other, step=6)
    assert same(other, trained(0, 6))
    checkpoint.read_state = late if rank == 0 else read
    with pytest.raises(DamagedCheckpointError, match="step-6 is late"):
        checkpoints.read_state(path)
    dist.destroy_process_group()


def test_all_ranks_see_a_checkpoint_as_the_main_one_does(saved: Checkpoints, tmp_path: Path) -> None:
    mp.spawn(one_of_two_ranks, args=(str(tmp_path), str(tmp_path / "store")), nprocs=2)


def test_a_full_disk_leaves_the_checkpoint_before(saved: Checkpoints) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            saved.save(8, *trained(0, 8), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    text = str(error.value)
    assert "step-8: cannot write the checkpoint" in text and "\n" not in text
    assert text.endswith(f"the last good checkpoint is {saved.folder / 'step-6'}")
    assert not list(saved.folder.glob("*.tmp"))
    other = trained(1)
    saved.load(saved.folder / "step-6", *other, step=6)
    assert same(other, trained(0, 6))


def test_what_a_kill_left_half_written_is_no_candidate(saved: Checkpoints) -> None:
    shutil.copytree(saved.folder / "step-6", saved.folder / "step-8.tmp")
    assert [path.name for path in newest_first(saved.folder)] == ["step-6", "step-4"]
    saved.save(8, *trained(0, 8), {})
    assert not list(saved.folder.glob("*.tmp"))


def test_resume_names_a_run_a_step_or_auto(saved: Checkpoints, tmp_path: Path) -> None:
    newest = [saved.folder / "step-6", saved.folder / "step-4"]
    assert candidates("auto", tmp_path) == newest
    assert candidates("auto", tmp_path / "new") == []
    assert candidates(str(tmp_path), tmp_path / "new") == newest
    assert candidates(str(saved.folder), tmp_path / "new") == newest
    assert candidates(str(newest[1]), tmp_path / "new") == newest[1:]
    with pytest.raises(FileNotFoundError, match=r"--resume .*elsewhere: no checkpoint there"):
        candidates(str(tmp_path / "elsewhere"), tmp_path)


def test_state_is_plain_json(saved: Checkpoints) -> None:
    state = json.loads((saved.folder / "step-6" / "state.json").read_text())
    assert state["step"] == 6 and set(state["checksums"]) == {".metadata", "__0_0.distcp"}
