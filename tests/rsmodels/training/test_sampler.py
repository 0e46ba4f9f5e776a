from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsmodels.training.sampler import Purpose, ShardSampler, StepSampler, derive_seed, epoch_order


def steps_of(
    length: int, *, world: int = 1, accumulate: int = 1, first: int = 0, steps: int = 9
) -> list[list]:
    """Per step, the samples of all ranks and passes in the order of the stream."""
    ranks = [
        list(
            StepSampler(
                length,
                seed=5,
                batch_size=12,
                accumulate=accumulate,
                rank=rank,
                world=world,
                first_step=first,
                steps=steps,
            )
        )
        for rank in range(world)
    ]
    return [
        list(
            chain.from_iterable(chain.from_iterable(r[s * accumulate : (s + 1) * accumulate] for r in ranks))
        )
        for s in range(steps - first)
    ]


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 3), (2, 3), (4, 1)])
def test_a_step_takes_the_same_tiles_on_any_number_of_ranks(world: int, accumulate: int) -> None:
    assert steps_of(31, world=world, accumulate=accumulate) == steps_of(31)


def test_a_resumed_run_sees_what_the_uninterrupted_one_sees() -> None:
    assert steps_of(31, first=4) == steps_of(31)[4:]


@given(length=st.integers(1, 40), steps=st.integers(1, 12))
def test_every_epoch_shows_every_tile_once(length: int, steps: int) -> None:
    stream = list(chain.from_iterable(steps_of(length, steps=steps)))
    assert [sample.position for sample in stream] == list(range(12 * steps))
    for start in range(0, len(stream) - length + 1, length):
        assert sorted(sample.tile for sample in stream[start : start + length]) == list(range(length))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    orders = [tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6
    assert orders[0] == tuple(epoch_order(50, seed=0, epoch=0))


def test_the_order_is_a_constant_of_the_library() -> None:
    """A new version of NumPy or of this library must not reorder the data of runs that are to be resumed."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == ORDER


ORDER = [0, 1, 6, 7, 4, 2, 5, 3]


def test_derived_seeds_do_not_collide() -> None:
    seeds = {
        derive_seed(seed, purpose, step) for seed in range(5) for purpose in Purpose for step in range(200)
    }
    assert len(seeds) == 5 * len(Purpose) * 200
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(length=st.integers(1, 50), batch_size=st.integers(1, 9), world=st.integers(1, 5))
def test_validation_counts_every_tile_once_in_batches_that_ignore_the_ranks(
    length: int, batch_size: int, world: int
) -> None:
    samplers = [ShardSampler(length, batch_size=batch_size, rank=r, world=world) for r in range(world)]
    shards = [list(sampler) for sampler in samplers]
    # All ranks pass equally often, as sharded models need it.
    assert {len(shard) for shard in shards} == {len(samplers[0])}
    counted = [[s.tile for s in batch] for shard in shards for batch in shard if batch[0].counts]
    alone = [[s.tile for s in batch] for batch in ShardSampler(length, batch_size=batch_size)]
    assert sorted(counted) == alone
    assert np.concatenate(alone).tolist() == list(range(length))
