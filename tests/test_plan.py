# SPDX-License-Identifier: Apache-2.0
"""The order of the data: complete, different in every epoch and for every seed, and never silently
changed."""

import concurrent.futures
import pickle

import numpy as np
import pytest

from tnt_flax.data import plan as plan_module
from tnt_flax.data.plan import EvalPlan, TrainPlan, epoch_permutation, sample_generator
from tnt_flax.errors import InputError

# Of numpy 2.4, 1000 records, batches of 8, seed 42.
GOLDEN_STEP_0 = [3, 884, 354, 865, 142, 764, 560, 901]
GOLDEN_EPOCH_1 = [955, 660, 109, 211, 812, 778, 907, 262]
GOLDEN_DRAWS = [601, 817, 212, 117]


def records(plan, step):
    return [plan.plan(step, row)[0] for row in range(plan.batch_size)]


def epoch_records(plan, epoch):
    first = epoch * plan.steps_per_epoch
    return sum((records(plan, first + k) for k in range(plan.steps_per_epoch)), [])


@pytest.mark.parametrize("num_records, batch_size", [(12, 4), (12, 5), (7, 7), (1, 1), (100, 3)])
def test_an_epoch_shows_no_record_twice_and_leaves_out_only_the_remainder(num_records, batch_size):
    plan = TrainPlan(num_records, batch_size, seed=3)
    for epoch in range(3):
        shown = epoch_records(plan, epoch)
        assert len(shown) == len(set(shown)) == num_records - num_records % batch_size
        assert set(shown) <= set(range(num_records))


def test_epochs_and_seeds_differ():
    a, b = TrainPlan(50, 10, seed=0), TrainPlan(50, 10, seed=1)
    orders = [tuple(epoch_records(p, e)) for p in (a, b) for e in range(3)]
    assert len(set(orders)) == 6
    assert all(order != tuple(range(50)) for order in orders)


def test_the_left_out_records_change_with_the_epoch():
    plan = TrainPlan(11, 4, seed=0)
    assert set().union(*(epoch_records(plan, e) for e in range(10))) == set(range(11))


def test_the_first_records_never_change():
    # Literal, so that a new numpy or a rewrite cannot change the order of the data unnoticed.
    plan = TrainPlan(1000, 8, seed=42)
    assert records(plan, 0) == GOLDEN_STEP_0
    assert records(plan, 125) == GOLDEN_EPOCH_1
    assert plan.plan(126, 3)[1] == (42, 1, 11)
    draws = sample_generator((42, 1, 11)).integers(0, 1000, 4).tolist()
    assert draws == GOLDEN_DRAWS


def test_a_plan_is_a_pure_function():
    plan = TrainPlan(64, 8, seed=5)
    expected = [plan.plan(step, row) for step in range(40) for row in range(8)]
    backwards = [plan.plan(step, row) for step in reversed(range(40)) for row in reversed(range(8))]
    assert backwards[::-1] == expected
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.plan(step, row) for step in range(40) for row in range(8)] == expected


def test_threads_around_the_end_of_an_epoch_agree():
    plan = TrainPlan(5000, 50, seed=9)
    calls = [(step, row) for step in range(97, 203) for row in range(0, 50, 7)]
    expected = [plan.plan(*call) for call in calls]
    plan_module._permutation.cache_clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda call: plan.plan(*call), calls)) == expected
    assert plan_module._permutation.cache_info().misses == 3  # epochs 0, 1 and 2: once each


def test_the_permutation_cannot_be_changed_by_its_reader():
    with pytest.raises(ValueError, match="read-only"):
        epoch_permutation(10, 0, 0)[0] = 3


def test_sample_keys_are_unique_and_their_numbers_independent():
    plan = TrainPlan(40, 4, seed=7)
    keys = [plan.plan(step, row)[1] for step in range(50) for row in range(4)]
    assert len(set(keys)) == len(keys)
    first = np.array([sample_generator(key).random(4) for key in keys])
    assert len(np.unique(first)) == first.size
    assert abs(first.mean() - 0.5) < 0.05
    neighbours = np.corrcoef(first[:-1, 0], first[1:, 0])[0, 1]
    assert abs(neighbours) < 0.25  # 3.5 sigma of 200 pairs


def test_samples_do_not_share_the_stream_of_the_permutation():
    generator = np.random.Generator(np.random.Philox(key=np.array([7, 0], np.uint64)))
    stream = set(generator.integers(0, 2**63, 4000).tolist())
    drawn = sample_generator((7, 0, 0)).integers(0, 2**63, 4000).tolist()
    assert not stream.intersection(drawn)
    # Nor with the neighbour, however many numbers one sample draws.
    assert not set(drawn).intersection(sample_generator((7, 0, 1)).integers(0, 2**63, 4000))


def test_the_largest_seed_works_and_differs_from_its_neighbour():
    high, below = TrainPlan(99, 9, seed=2**64 - 1), TrainPlan(99, 9, seed=2**64 - 2)
    assert epoch_records(high, 0) != epoch_records(below, 0)


@pytest.mark.parametrize("num_records", [1, 2, 7, 8, 9, 64])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 100])
def test_evaluation_shows_every_record_once_in_order(num_records, batch_size):
    plan = EvalPlan(num_records, batch_size)
    rows = [plan.plan(b, r) for b in range(plan.num_batches) for r in range(batch_size)]
    assert [row for row in rows if row is not None] == list(range(num_records))
    assert rows[:num_records] == list(range(num_records))  # padding comes last
    assert len(rows) - num_records < batch_size  # and no batch is all padding


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrainPlan(7, 8, 0), "has 7 records, fewer than one batch of 8"),
        (lambda: TrainPlan(7, 0, 0), "batch_size is 0"),
        (lambda: EvalPlan(7, -1), "batch_size is -1"),
        (lambda: TrainPlan(7, 7, -1), "seed -1 is out of range"),
        (lambda: TrainPlan(7, 7, 2**64), "out of range"),
    ],
)
def test_errors_say_the_numbers(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
