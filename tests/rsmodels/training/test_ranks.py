"""Real processes: torchrun on two ranks against one process, SIGKILL and resume, Ctrl-C.

Starting a process costs seconds, so the module trains everything in five launches and the tests compare.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from rsmodels.registry import load_model
from rsmodels.training.checkpoint import newest_first, read_state
from rsmodels.training.trainer import train

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("ranks_worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Eight steps, checkpoints after 3, 6 and 8; a kill in step 5 leaves step-3.
LENGTH: dict[str, Any] = {"steps": 8, "checkpoint_every": 3, "validate_every": 4}
KILLED_IN = 5
# With a teacher and batch norms: checkpoints after 18 and 20; a kill in step 20 leaves step-18.
KTDA: dict[str, Any] = {"method": "ktda", "steps": 20, "checkpoint_every": 18, "validate_every": 4}
# Its losses are means over all images of a step, whatever ranks share them.
CROSSEARTH: dict[str, Any] = {"method": "crossearth", "model_args": {"points": 64}, "steps": 6}
POISONED = "synthetic-train-0-000004"


def launch(jobs: list[dict[str, Any]], *, ranks: int) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*start, str(WORKER), json.dumps(jobs)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, configure: Any, with_same_draws: Any, one_thread: None
) -> dict[str, Any]:
    """Run folders by name, and what the launches said."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name: str, **options: Any) -> dict[str, Any]:
        return {"run": str(folder / name), **LENGTH, **options}

    # One process that sees the same passes as two ranks; two ranks resume from its checkpoint, too.
    train(configure(folder / "alone", **LENGTH, accumulate=2))
    train(configure(folder / "single", **LENGTH))
    with with_same_draws():
        train(configure(folder / "crossearth alone", **{**LENGTH, **CROSSEARTH}))

    said = {
        "killed single": launch([job("killed single", die_in_step=KILLED_IN)], ranks=1),
        "killed": launch([job("killed", die_in_step=KILLED_IN)], ranks=2),
        "ktda killed": launch([job("ktda killed", **KTDA, die_in_step=20)], ranks=2),
        "two": launch(
            [
                job("two"),
                job("ddp", parallel="ddp"),
                job("hsdp", parallel="hsdp", shard_size=1),
                job("bf16", dtype="bf16", activation_checkpointing=True, steps=2),
                job("accumulated", accumulate=2, steps=2, tables=True),
                job("killed", resume="auto"),
                job("ktda", **KTDA),
                job("ktda ddp", **KTDA, parallel="ddp"),
                job("ktda killed", **KTDA, resume="auto"),
                job("crossearth", **CROSSEARTH, same_draws=True),
                job("crossearth ddp", **CROSSEARTH, same_draws=True, parallel="ddp"),
                job("one to two", resume=str(folder / "alone" / "checkpoints" / "step-6")),
                # Fails, so it comes last.
                job("poisoned", poison=POISONED, checkpoint_every=1),
            ],
            ranks=2,
        ),
    }
    return {"folder": folder, "said": said}


def losses(runs: dict[str, Any], name: str) -> list[float]:
    lines = (runs["folder"] / name / "log.jsonl").read_text().splitlines()
    return [event["loss"] for event in map(json.loads, lines)]


def terms_of(runs: dict[str, Any], name: str) -> list[dict[str, float]]:
    """The losses of every step, in parts."""
    lines = map(json.loads, (runs["folder"] / name / "log.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in event.items() if key.startswith("loss")}
        for event in lines
        if event["kind"] == "train"
    ]


def best(runs: dict[str, Any], name: str) -> dict[str, Tensor]:
    return load_model(runs["folder"] / name / "best")[0].state_dict()


def tensors_of(runs: dict[str, Any], name: str, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    path = runs["folder"] / name / "checkpoints" / f"step-{step}"
    metadata = torch.distributed.checkpoint.FileSystemReader(path).read_metadata()
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(tensors, checkpoint_id=path)
    return tensors


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys() and len(first) > 100
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different, different[:3]


def test_a_killed_and_resumed_process_ends_with_the_same_bits(runs: dict[str, Any], configure: Any) -> None:
    killed = runs["folder"] / "killed single"
    assert runs["said"]["killed single"].returncode == -signal.SIGKILL
    assert [path.name for path in newest_first(killed / "checkpoints")] == ["step-3"]
    train(configure(killed, **LENGTH, resume="auto"))
    assert_same_bits(tensors_of(runs, "killed single", 8), tensors_of(runs, "single", 8))
    assert_same_bits(best(runs, "killed single"), best(runs, "single"))
    assert losses(runs, "killed single") == losses(runs, "single")


def test_two_killed_and_resumed_ranks_end_with_the_same_bits(runs: dict[str, Any]) -> None:
    assert "SIGKILL" in runs["said"]["killed"].stderr or "exitcode  : -9" in runs["said"]["killed"].stderr
    assert_same_bits(tensors_of(runs, "killed", 8), tensors_of(runs, "two", 8))
    assert_same_bits(best(runs, "killed"), best(runs, "two"))
    assert losses(runs, "killed") == losses(runs, "two")


def test_killed_ranks_with_batch_norms_and_a_teacher_end_with_the_same_bits(runs: dict[str, Any]) -> None:
    tensors = tensors_of(runs, "ktda", 20)
    assert any("running_var" in name for name in tensors)
    assert_same_bits(tensors_of(runs, "ktda killed", 20), tensors)
    assert_same_bits(best(runs, "ktda killed"), best(runs, "ktda"))
    assert losses(runs, "ktda killed") == losses(runs, "ktda")


def test_a_sharded_student_learns_as_a_copied_one(runs: dict[str, Any]) -> None:
    """Up to the first validation, which uses the averaged statistics. Batch norms over two pooled tiles,
    which know only signs, amplify rounding faster than RS-SAM does."""
    sharded, copied = losses(runs, "ktda")[:5], losses(runs, "ktda ddp")[:5]
    assert sharded[0] == pytest.approx(copied[0], rel=1e-5)
    assert sharded == pytest.approx(copied, rel=5e-3)


@pytest.mark.parametrize("name", ["ktda", "ktda ddp"])
def test_no_rank_changes_the_teacher(runs: dict[str, Any], name: str) -> None:
    seen = [json.loads((runs["folder"] / name / f"teacher-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1]
    assert seen[0]["before"] == seen[0]["after"] and seen[0]["gradients"] == 0
    kept = tensors_of(runs, name, 20)
    moments = {key.partition(".")[2] for key in kept if key.startswith("exp_avg.")}
    weights = {key.partition(".")[2] for key in kept if key.startswith("model.")}
    assert weights == best(runs, name).keys() and moments < weights


@pytest.mark.parametrize("name", ["two", "ddp", "hsdp"])
def test_two_ranks_compute_what_one_process_computes(runs: dict[str, Any], name: str) -> None:
    """On the same batches in the same passes, up to the order of a few sums, which eight steps amplify."""
    alone, shared = losses(runs, "alone"), losses(runs, name)
    assert len(alone) == len(shared) == 10
    assert shared[0] == pytest.approx(alone[0], rel=1e-5)
    assert shared == pytest.approx(alone, rel=5e-3)


@pytest.mark.parametrize("name", ["crossearth", "crossearth ddp"])
def test_two_ranks_compute_crossearths_losses(runs: dict[str, Any], name: str) -> None:
    """With styles, masks and points drawn alike: Rein, both flows and the number of segments, over the ranks.
    Validation is left out: there every rank counts its own segments."""
    alone, shared = (terms_of(runs, run) for run in ("crossearth alone", name))
    assert {f"loss_{term}" for term in ("class", "mask", "dice", "mim", "delta")} <= shared[0].keys()
    assert shared[0] == pytest.approx(alone[0], rel=1e-5)
    assert [step["loss"] for step in shared] == pytest.approx([step["loss"] for step in alone], rel=5e-3)


def test_bf16_and_accumulation_work_on_two_ranks(runs: dict[str, Any]) -> None:
    assert losses(runs, "bf16")[0] == pytest.approx(losses(runs, "two")[0], rel=2e-2)
    # One tile a pass: another soft Dice, so only close.
    assert losses(runs, "accumulated")[0] == pytest.approx(losses(runs, "two")[0], rel=0.1)


def test_all_ranks_use_the_first_ones_table_of_products(runs: dict[str, Any]) -> None:
    state = read_state(newest_first(runs["folder"] / "accumulated" / "checkpoints")[0])
    assert set(state["kernels"]["tuning"]["products"].values()) == {"aten"}
    assert "AssertionError" not in runs["said"]["two"].stderr  # the worker compares the ranks


def test_a_run_moves_from_one_process_to_two_ranks(runs: dict[str, Any]) -> None:
    assert losses(runs, "one to two") == pytest.approx(losses(runs, "alone")[-3:], rel=1e-3)


def test_a_run_moves_from_two_ranks_to_one_process(runs: dict[str, Any], configure: Any) -> None:
    folder = runs["folder"]
    step_6 = str(folder / "two" / "checkpoints" / "step-6")
    train(configure(folder / "two to one", **LENGTH, accumulate=2, resume=step_6))
    assert losses(runs, "two to one") == pytest.approx(losses(runs, "two")[-3:], rel=1e-3)


def test_a_poisoned_tile_is_named_by_the_rank_that_saw_it(runs: dict[str, Any]) -> None:
    said = [line for line in runs["said"]["two"].stderr.splitlines() if "NonFiniteLossError: " in line]
    assert len(said) == 1, "one rank speaks for all"
    tiles = said[0].split("its tiles: ")[1].split("; ")[0].split(", ")
    assert POISONED in tiles and len(tiles) == 2
    newest = newest_first(runs["folder"] / "poisoned" / "checkpoints")[0]
    assert str(newest) in said[0]


def test_ctrl_c_on_one_rank_stops_all_after_a_checkpoint(tmp_path: Path) -> None:
    """Through train.py, as a user starts it; the ranks are started by hand so that each exit code shows."""
    run = tmp_path / "run"
    options = (
        "--steps 100000 --batch-size 2 --image-size 32 --data-args.size 32 --data-args.length 4 --log-every 1"
    )
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *options.split(),
        "--run-dir",
        str(run),
        "--num-workers",
        "1",
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command,
            env={**ENVIRONMENT, **where, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in ("0", "1")
    ]
    try:
        log = run / "log.jsonl"
        deadline = time.monotonic() + 100
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
        # To the whole group, as a terminal sends it: the reader processes must not die of it.
        os.killpg(ranks[1].pid, signal.SIGINT)
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [130, 130]
    newest = newest_first(run / "checkpoints")[0]
    assert f"{newest} is written; --resume auto goes on from there" in said[0]
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert newest.name == f"step-{steps[-1]}"
    assert "Traceback" not in "".join(said)
