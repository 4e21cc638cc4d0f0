# SPDX-License-Identifier: Apache-2.0
"""Which record goes where: the order of training and of evaluation as pure functions.

Nothing here knows about hosts, workers or devices. The row of a global batch alone decides which
record it shows and which random numbers augment it, so a run resumes from its step number, on any
number of hosts, with the batches it would have seen anyway.
"""

import dataclasses
import functools
import threading

import numpy as np

from tnt_flax.core.errors import InputError

SampleKey = tuple[int, int, int]  # (seed, epoch, position within the epoch)


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """Shuffled epochs of whole batches; the last `num_records % batch_size` of each are left out.

    `num_records` counts the source, `batch_size` the rows of a global batch (all hosts together),
    and `seed`, from 0 to 2**64 - 1, chooses the order and the augmentation.

    Repeated augmentation (Hoffer et al., arXiv 1901.09335; Touvron et al., arXiv 2012.12877): with
    `repeats` = 3 an epoch has the same number of steps, but shows only the first third of its
    permutation, each record three times, differently augmented. Position p of the epoch holds
    permutation[p // 3], and a batch is `batch_size` consecutive positions, dealt to its `groups`
    of consecutive rows in turn: group g has the positions g, g + groups, ... In the published
    recipe those are 8 processes with a loader each, of 128 rows; here they are the groups that
    mixup draws for, whatever the hosts and devices. So with groups >= repeats the views of one
    record are in one batch (but for a few at its ends) and in different groups. Without repeats
    positions are dealt row by row.

    Raises InputError for a batch size below one or above the number of records, for groups that
    do not divide it where they matter, and for a seed or a number of repeats out of range.
    """

    num_records: int
    batch_size: int
    seed: int
    repeats: int = 1
    groups: int = 8

    def __post_init__(self):
        _check_batch_size(self.batch_size)
        if self.num_records < self.batch_size:
            raise InputError(
                f"the training split has {self.num_records} records, fewer than one batch of "
                f"{self.batch_size}: choose batch_size <= {self.num_records}"
            )
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed {self.seed} is out of range: choose one from 0 to 2**64 - 1")
        if self.repeats < 1:
            raise InputError(f"augment.repeats={self.repeats} is less than 1, which is off")
        if self.repeats > 1 and (self.groups < 1 or self.batch_size % self.groups):
            raise InputError(
                f"a batch of {self.batch_size} cannot be split evenly into {self.groups} groups: "
                "choose another augment.mix_groups, or augment.repeats=1"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_records // self.batch_size

    def plan(self, step: int, row: int) -> tuple[int, SampleKey]:
        """The record in `row` of the global batch of `step`, and the key of its augmentation."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if self.repeats > 1:
            group, turn = divmod(row, self.batch_size // self.groups)
            row = turn * self.groups + group
        position = k * self.batch_size + row
        record = epoch_permutation(self.num_records, self.seed, epoch)[position // self.repeats]
        return int(record), (self.seed, epoch, position)

    def views(self, step: int, rows: range) -> dict[int, list[tuple[int, SampleKey]]]:
        """The records in these rows of the batch of `step`, each once, with its (row, key)s."""
        views = {}
        for row in rows:
            record, key = self.plan(step, row)
            views.setdefault(record, []).append((row, key))
        return views

    def most_records(self, rows: range) -> int:
        """The most records that these rows show in any step."""
        # Where batches cut the threes of repeats comes round again after `repeats` steps.
        steps = range(min(self.repeats, self.steps_per_epoch))
        return max(len(self.views(step, rows)) for step in steps)


@dataclasses.dataclass(frozen=True)
class EvalPlan:
    """Every record once, in order; the rows left over in the last batch are padding."""

    num_records: int
    batch_size: int

    def __post_init__(self):
        _check_batch_size(self.batch_size)

    @property
    def num_batches(self) -> int:
        return -(-self.num_records // self.batch_size)

    def plan(self, batch: int, row: int) -> int | None:
        """The record in `row` of global batch number `batch`; None for a padding row."""
        record = batch * self.batch_size + row
        return record if record < self.num_records else None


def sample_generator(sample_key: SampleKey) -> np.random.Generator:
    """The random numbers of one sample.

    Philox is a counter: the same key as the epoch's permutation, but a block of 2**128 counts that
    only this position uses. The permutation counts from zero, in block (0, 0).
    """
    seed, epoch, position = sample_key
    philox = np.random.Philox(key=_words(seed, epoch), counter=_words(0, 0, position, 1))
    return np.random.Generator(philox)


def epoch_permutation(num_records: int, seed: int, epoch: int) -> np.ndarray:
    """The read-only order of one epoch, int64 [num_records]; the latest three are kept."""
    with _PERMUTATION_LOCK:  # many threads ask at once when an epoch begins: compute it once
        return _permutation(num_records, seed, epoch)


# Three: prefetching threads read the next epoch while the last rows of this one are still due.
@functools.lru_cache(maxsize=3)
def _permutation(num_records, seed, epoch):
    generator = np.random.Generator(np.random.Philox(key=_words(seed, epoch)))
    permutation = generator.permutation(num_records)
    permutation.setflags(write=False)
    return permutation


# Of the module, not of the plan, so that a plan pickles into a worker process.
_PERMUTATION_LOCK = threading.Lock()


def _words(*numbers):
    return np.array(numbers, np.uint64)  # plain lists overflow for seeds of 2**63 and above


def _check_batch_size(batch_size):
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: it must be at least 1")
