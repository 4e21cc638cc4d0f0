# SPDX-License-Identifier: Apache-2.0
"""The order of records in training, as pure functions.

The record and the random numbers of a sample depend only on seed, step and position in the global
batch, not on the number of hosts, devices or workers. A run resumes from its step number, on any
number of hosts, with the batches that it would have seen without the interruption.
"""

import dataclasses
import functools

import numpy as np
from grain.experimental import index_shuffle

from tnt_flax.core.errors import InputError

SampleKey = tuple[int, int, int]  # (seed, epoch, position within the epoch)
ROUNDS = 4  # of the cipher, as in Grain's own shuffle


class RecordsByClass:
    """The records of each class that has any, in 4 bytes per record.

    `labels` are int [records]. Raises InputError if records have several labels.
    """

    def __init__(self, labels: np.ndarray):
        if labels.ndim > 1:
            raise InputError(
                "data.balanced is for images of one class each, and images of these data may have "
                "several: use loss.class_weights='balanced'"
            )
        order = np.argsort(labels, kind="stable").astype(np.uint32)
        _, starts = np.unique(labels[order], return_index=True)
        self._records = np.split(order, starts[1:])  # views of `order`

    def lookup(self, position: int, seed: int, epoch: int) -> int:
        """Returns the record at `position` of an epoch in which all classes are equally frequent.

        Each run of K positions has one record of each of the K classes, in random order. A class
        repeats a record once all its records have been used.
        """
        turn, i = divmod(position, len(self._records))
        k = _shuffled_few(i, len(self._records), seed, epoch, 1, turn)
        records = self._records[k]
        cycle, i = divmod(turn, len(records))
        return int(records[_shuffled_few(i, len(records), seed, epoch, 2, k, cycle)])


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """Shuffled epochs of whole batches; each epoch drops `num_records % batch_size` records.

    Repeated augmentation (Hoffer et al., arXiv 1901.09335; Touvron et al., arXiv 2012.12877): with
    `repeats` = 3 an epoch has the same number of steps, but uses only the first third of its
    permutation, each record three times with different augmentation. Position p of the epoch holds
    permutation[p // 3]. A batch is `batch_size` consecutive positions, assigned to its `groups` of
    consecutive rows in turn: group g has the positions g, g + groups, ... In the published recipe
    the groups are 8 processes with 128 rows each; here they are the groups within which mixup
    mixes, independent of hosts and devices. With groups >= repeats, all views of a record are in
    one batch (except a few at its ends) and in different groups. Without repeats, row r of a batch
    has its r-th position.

    With `balance`, an epoch has as many positions, and all classes have as many of them, plus or
    minus one: records of large classes are left out, differently in every epoch, and those of small
    classes are repeated.

    Raises InputError if the batch is larger than the data set, or if the groups do not divide it
    (with repeats > 1).
    """

    num_records: int
    batch_size: int  # rows of a global batch, over all hosts
    seed: int  # selects order and augmentation; 0 to 2**64 - 1
    repeats: int = 1  # views of a record per epoch; 1 disables repeated augmentation
    groups: int = 8  # per batch; used if repeats > 1
    balance: RecordsByClass | None = None  # make all classes equally frequent

    def __post_init__(self):
        if self.num_records < self.batch_size:
            raise InputError(
                f"the training split has {self.num_records} records, fewer than one batch of "
                f"{self.batch_size}: choose batch_size <= {self.num_records}"
            )
        if self.repeats > 1 and (self.groups < 1 or self.batch_size % self.groups):
            raise InputError(
                f"a batch of {self.batch_size} cannot be split evenly into {self.groups} groups: "
                "choose another augment.mix_groups, or augment.repeats=1"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_records // self.batch_size

    def lookup(self, step: int, row: int) -> tuple[int, SampleKey]:
        """Returns the record in `row` of the global batch of `step` and its augmentation key."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if self.repeats > 1:
            group, turn = divmod(row, self.batch_size // self.groups)
            row = turn * self.groups + group
        position = k * self.batch_size + row
        first_view = position // self.repeats
        if self.balance:
            record = self.balance.lookup(first_view, self.seed, epoch)
        else:
            record = shuffled(first_view, self.num_records, self.seed, epoch)
        return record, (self.seed, epoch, position)


@functools.lru_cache(maxsize=16)  # at least the number of unfinished batches
def views_of_records(
    plan: TrainPlan, step: int, rows: range
) -> tuple[tuple[int, list[tuple[int, SampleKey]]], ...]:
    """Returns each record in `rows` of the batch of `step` with its (row, key) pairs."""
    views = {}
    for row in rows:
        record, key = plan.lookup(step, row)
        views.setdefault(record, []).append((row, key))
    return tuple(views.items())


def sample_generator(sample_key: SampleKey) -> np.random.Generator:
    """Returns the random number generator of one sample.

    Philox is counter-based: all samples of an epoch share a key, and each has a block of 2**128
    counts of its own.
    """
    seed, epoch, position = sample_key
    philox = np.random.Philox(key=_words(seed, epoch), counter=_words(0, 0, position, 1))
    return np.random.Generator(philox)


def shuffled(position: int, num_records: int, *key: int) -> int:
    """Returns the record at `position` of the permutation of an epoch, in constant memory.

    The permutation is a block cipher of the position, with 32 bits made from `key`: seed, epoch
    and what else tells permutations apart (`grain.experimental.index_shuffle`).
    """
    return index_shuffle(position, num_records - 1, seed=_cipher_key(key), rounds=ROUNDS)


def _shuffled_few(position, count, *key):
    """Returns what `shuffled` does, fast for few records: its cipher takes 1 ms for 10."""
    if count > 1024:
        return shuffled(position, count, *key)
    return int(_permutation(count, key)[position])


@functools.lru_cache(maxsize=2048)
def _permutation(count, key):
    bits = np.random.Philox(np.random.SeedSequence(key))
    return np.random.Generator(bits).permutation(count).astype(np.uint16)


@functools.lru_cache(maxsize=16)
def _cipher_key(key):
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _words(*numbers):
    return np.array(numbers, np.uint64)  # plain lists overflow for seeds of 2**63 and above
