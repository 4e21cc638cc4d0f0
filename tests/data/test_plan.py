# SPDX-License-Identifier: Apache-2.0
"""The order of records: complete, different in every epoch and for every seed, and unchanged."""

import collections
import tracemalloc

import numpy as np
import pytest

from tests.helpers.source_checks import message_of
from tnt_flax.data import plan as plan_module
from tnt_flax.data.plan import RecordsByClass, TrainPlan, sample_generator

# From grain 0.2.18 and numpy 2.4, with 1000 records, batches of 8 and seed 42.
GOLDEN_STEP_0 = [93, 202, 440, 758, 740, 562, 587, 313]
GOLDEN_EPOCH_1 = [275, 749, 131, 958, 597, 992, 517, 814]
GOLDEN_NUMBERS = [601, 817, 212, 117]


def records(plan, step):
    return [plan.lookup(step, row)[0] for row in range(plan.batch_size)]


def epoch_records(plan, epoch):
    first = epoch * plan.steps_per_epoch
    return sum((records(plan, first + k) for k in range(plan.steps_per_epoch)), [])


@pytest.mark.parametrize("num_records, batch_size", [(12, 4), (12, 5), (7, 7), (1, 1), (100, 3)])
def test_an_epoch_has_each_record_once_except_the_remainder(num_records, batch_size):
    plan = TrainPlan(num_records, batch_size, seed=3)
    for epoch in range(3):
        shown = epoch_records(plan, epoch)
        assert len(shown) == len(set(shown)) == num_records - num_records % batch_size
        assert set(shown) <= set(range(num_records))


def test_epochs_and_seeds_differ():
    plans = [TrainPlan(50, 10, seed) for seed in (0, 1, 2**64 - 2, 2**64 - 1)]
    orders = [tuple(epoch_records(plan, epoch)) for plan in plans for epoch in range(3)]
    assert len(set(orders)) == 12
    assert all(order != tuple(range(50)) for order in orders)


def test_the_dropped_records_change_with_the_epoch():
    plan = TrainPlan(11, 4, seed=0)
    assert set().union(*(epoch_records(plan, e) for e in range(10))) == set(range(11))


def test_the_order_is_the_golden_one():
    # Literals, to detect a change of the order by a new numpy or a rewrite.
    plan = TrainPlan(1000, 8, seed=42)
    assert records(plan, 0) == GOLDEN_STEP_0
    assert records(plan, 125) == GOLDEN_EPOCH_1
    assert plan.lookup(126, 3)[1] == (42, 1, 11)
    assert sample_generator((42, 1, 11)).integers(0, 1000, 4).tolist() == GOLDEN_NUMBERS


def test_sample_keys_are_unique_and_their_random_numbers_independent():
    plan = TrainPlan(40, 4, seed=7)
    keys = [plan.lookup(step, row)[1] for step in range(50) for row in range(4)]
    assert len(set(keys)) == len(keys)
    first = np.array([sample_generator(key).random(4) for key in keys])
    assert len(np.unique(first)) == first.size
    assert abs(first.mean() - 0.5) < 0.05
    neighbours = np.corrcoef(first[:-1, 0], first[1:, 0])[0, 1]
    assert abs(neighbours) < 0.25  # 3.5 sigma of 200 pairs


def test_samples_share_no_random_numbers():
    first = sample_generator((7, 0, 0)).integers(0, 2**63, 4000).tolist()
    assert not set(first).intersection(sample_generator((7, 0, 1)).integers(0, 2**63, 4000))


@pytest.mark.slow
@pytest.mark.parametrize("num_records", [8, 50, 1437])
def test_every_record_is_equally_likely_at_every_position(num_records):
    orders = np.array(
        [[plan_module.shuffled(i, num_records, 42, e) for i in range(8)] for e in range(2000)]
    )
    expected = len(orders) / num_records
    counts = np.array([np.bincount(column, minlength=num_records) for column in orders.T])
    chi_square = ((counts - expected) ** 2 / expected).sum() / counts.size
    assert 0.7 < chi_square < 1.4


def test_the_order_of_a_billion_records_takes_no_memory():
    plan = TrainPlan(10**9, 1024, seed=0, repeats=3)
    step = plan.steps_per_epoch - 1
    tracemalloc.start()
    shown = records(plan, step)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert 341 <= len(set(shown)) <= 343 and max(shown) > 9e8


# ------------------------------------------------------------------------- repeated augmentation


@pytest.fixture
def in_order(monkeypatch):
    """Disables shuffling, so that records equal positions."""
    monkeypatch.setattr(plan_module, "shuffled", lambda position, *_: position)


def positions(plan, step):
    return [plan.lookup(step, row)[1][2] for row in range(plan.batch_size)]


def test_repeats_are_placed_as_in_the_published_recipe(in_order):
    plan = TrainPlan(1_281_167, 1024, seed=42, repeats=3)
    assert plan.steps_per_epoch == 1251
    rows = records(plan, 0)
    ranks = [rows[128 * r : 128 * (r + 1)] for r in range(8)]
    assert ranks[0][:8] == [0, 2, 5, 8, 10, 13, 16, 18]
    assert ranks[1][:6] == [0, 3, 5, 8, 11, 13]
    assert ranks[2][:5] == [0, 3, 6, 8, 11]
    assert ranks[3][:4] == [1, 3, 6, 9]
    last = records(plan, 1250)
    assert max(last) == 1251 * 1024 // 3 - 1 == 427_007  # a third of 1,281,167 per epoch
    assert plan.lookup(1251, 0) == (0, (42, 1, 0))  # the next epoch


@pytest.mark.parametrize("num_records, batch_size, groups", [(200, 24, 8), (90, 8, 8), (50, 12, 4)])
@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_each_view_has_its_own_group_and_key(num_records, batch_size, groups, repeats):
    plan = TrainPlan(num_records, batch_size, seed=1, repeats=repeats, groups=groups)
    assert plan.steps_per_epoch == num_records // batch_size
    rows, group_size = plan.steps_per_epoch * batch_size, batch_size // groups
    views = collections.defaultdict(list)
    for step in range(plan.steps_per_epoch):
        for row in range(batch_size):
            record, key = plan.lookup(step, row)
            views[record].append((key, row // group_size))
        assert sorted(positions(plan, step)) == [*range(step * batch_size, (step + 1) * batch_size)]
    assert len(views) == -(-rows // repeats)
    assert sorted(map(len, views.values()))[1:] == [repeats] * (len(views) - 1)
    for of_record in views.values():
        keys, where = zip(*of_record, strict=True)
        assert len(set(keys)) == len(set(where)) == len(of_record)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_repeats_work_for_small_data_sets(groups):
    plan = TrainPlan(8, 8, seed=0, repeats=3, groups=groups)
    assert plan.steps_per_epoch == 1  # the published sampler gives none below 256 records
    shown = [records(plan, epoch) for epoch in range(60)]
    assert all(sorted(map(rows.count, set(rows))) == [2, 3, 3] for rows in shown)
    assert set(sum(shown, [])) == set(range(8))
    assert len({tuple(rows) for rows in shown}) > 50


def test_one_repeat_is_the_plain_order():
    calls = [(step, row) for step in range(30) for row in range(8)]
    plans = [TrainPlan(100, 8, seed=4, repeats=1, groups=groups) for groups in (1, 3, 8)]
    first, *others = ([plan.lookup(*call) for call in calls] for plan in plans)
    assert others == [first, first] and [key[2] for _, key in first[:24]] == list(range(24))


def test_the_order_with_repeats_is_the_golden_one():
    plan = TrainPlan(1000, 8, seed=42, repeats=3, groups=4)  # group 0 has positions 0 and 4
    a, b, c = GOLDEN_STEP_0[:3]
    assert records(plan, 0) == [a, b, a, b, a, c, b, c]
    assert positions(plan, 1) == [8, 12, 9, 13, 10, 14, 11, 15]


@pytest.mark.parametrize("repeats, records, batch_size", [(1, 40, 8), (3, 40, 8), (3, 9, 8)])
def test_views_group_the_rows_by_record(repeats, records, batch_size):
    plan = TrainPlan(records, batch_size, seed=5, repeats=repeats, groups=4)
    for rows in (range(8), range(4), range(4, 8), range(2, 3)):
        counts = []
        for step in range(12):
            views = plan_module.views_of_records(plan, step, rows)
            counts.append(len(views))
            by_row = {row: (record, key) for record, keys in views for row, key in keys}
            assert by_row == {row: plan.lookup(step, row) for row in rows}
        assert max(counts) == max(counts[:repeats])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7, 8, 0), "has 7 records, fewer than one batch of 8"),
        ((7, 7, 0, 3), "batch of 7 cannot be split evenly into 8 groups"),
        ((7, 7, 0, 3, 0), "into 0 groups"),
    ],
)
def test_invalid_plans_are_refused(arguments, message):
    assert message in message_of(lambda: TrainPlan(*arguments))


# ----------------------------------------------------------------------------- balanced classes

SIZES = {3: 40, 4: 1, 7: 9}  # records by label; other labels have none
LABELS = np.random.default_rng(0).permutation(np.repeat([*SIZES], [*SIZES.values()]))


@pytest.mark.parametrize("repeats, batch_size", [(1, 10), (1, 7), (2, 8)])
def test_balanced_classes_are_equally_frequent(repeats, batch_size):
    plan = TrainPlan(50, batch_size, 3, repeats, 4, RecordsByClass(LABELS))
    assert plan.steps_per_epoch == 50 // batch_size
    epochs = [epoch_records(plan, epoch) for epoch in range(60)]
    for shown in epochs:
        frequencies = [np.count_nonzero(LABELS[shown] == label) for label in SIZES]
        assert max(frequencies) - min(frequencies) <= repeats
        small = np.unique(shown)[LABELS[np.unique(shown)] != 3]
        assert repeats > 1 or len(small) == SIZES[4] + SIZES[7]  # all records of small classes
    assert set().union(*epochs) == set(range(50))
    orders = {tuple(LABELS[shown]) for shown in epochs}
    assert len(orders) == 60  # no fixed order of classes, which would fix the pairs of mixup


def test_large_classes_repeat_no_record_within_an_epoch():
    shown = epoch_records(TrainPlan(50, 10, 0, balance=RecordsByClass(LABELS)), 0)
    large = [record for record in shown if LABELS[record] == 3]
    assert len(large) == len(set(large)) in (16, 17)  # of 50 positions for 3 classes


def test_one_class_is_balanced():
    plan = TrainPlan(9, 3, 0, balance=RecordsByClass(np.full(9, 5)))
    assert sorted(epoch_records(plan, 2)) == [*range(9)]
