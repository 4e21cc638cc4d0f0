# SPDX-License-Identifier: Apache-2.0
"""Batches of NumPy arrays from a plan, a source and a transform, prefetched by Grain.

A view is a sequence that computes any part of any batch from its index; Grain evaluates it ahead of
time in threads or worker processes. A record with several views in a batch is read and decoded
once. There is no iterator state to save.

Host h of H produces the contiguous rows [h * b, (h + 1) * b) of every global batch of H * b rows.
Global batches do not depend on the number of hosts, threads or worker processes.
"""

import dataclasses
import errno
import functools
import logging
import multiprocessing.connection
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from tnt_flax.core.errors import InputError
from tnt_flax.data.images import CorruptImageError, Encoded
from tnt_flax.data.plan import TrainPlan, sample_generator, views_of_records
from tnt_flax.data.sources import Source
from tnt_flax.data.sources.storage import RetryingReader, StorageUnavailable

logger = logging.getLogger("tnt_flax")

Batch = dict[str, np.ndarray]
Samples = list[tuple[int, dict[str, np.ndarray]]]  # one element: (row of the batch, columns)
RECORDS_PER_ELEMENT = 4  # passing an element on costs a thread and the training loop 0.1 ms
MAX_REPLACEMENTS = 16  # unreadable records in a row before training gives up on the data set


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How a host reads its rows of the global batches."""

    corrupt: str = "error"  # "error" raises InputError; "skip" replaces or masks the record
    host: int = 0  # index of this host, from 0
    num_hosts: int = 1  # that share a batch
    threads: int = 4  # per process, for reading and decoding
    prefetch: int = 2  # batches to read ahead
    workers: int = 0  # processes, for which the program must guard its `__main__`; 0 uses none
    retry_seconds: float = 0  # for how long to retry while the storage is unavailable

    def rows(self, batch_size: int) -> range:
        """Returns this host's rows of a global batch. Raises InputError for an uneven split."""
        if batch_size % self.num_hosts:
            raise InputError(
                f"a batch of {batch_size} cannot be split evenly over {self.num_hosts} hosts: "
                f"choose a multiple of {self.num_hosts}"
            )
        size = batch_size // self.num_hosts
        return range(self.host * size, (self.host + 1) * size)


def train_batches(
    source: Source,
    plan: TrainPlan,
    *,
    transform: Callable[[Encoded, Sequence[np.random.Generator]], list[np.ndarray]],
    start_step: int,
    num_steps: int,
    columns: Mapping[str, Sequence[np.ndarray]] = {},
    options: ReadOptions = ReadOptions(),
) -> Iterator[Batch]:
    """Yields this host's rows of the training batches.

    Each batch is `image` uint8 [b, H, W, 3], `label` int32 [b], `replaced` bool [b] and `columns`,
    with b = plan.batch_size / options.num_hosts. With corrupt="skip" an unreadable record is
    replaced by the next readable one, and `replaced` is true.

    The iterator is a generator: unless it is exhausted, `close()` it to stop its threads and
    processes. Worker processes ignore SIGTERM and SIGINT and end with this process.

    Args:
        source, plan: the records and their order.
        transform: a `functools.partial` of `transforms.train_transform`.
        start_step, num_steps: step of the first batch, and number of batches.
        columns: further arrays, by name and record.
        options: see `ReadOptions`.

    Raises:
        InputError: at once if the hosts do not divide the batch, from `next()` for unreadable
            records.
        StorageUnavailable: from `next()`, if the storage does not come back in time.
    """
    rows = options.rows(plan.batch_size)
    reader = RetryingReader(source, options.retry_seconds)
    view = _TrainView(
        reader, options.corrupt, rows, transform, plan, start_step, num_steps, columns
    )
    return _run(view, options)


def eval_batches(
    source: Source,
    *,
    transform: Callable[[Encoded], np.ndarray],
    batch_size: int,
    options: ReadOptions = ReadOptions(),
) -> Iterator[Batch]:
    """Yields this host's rows of one pass over the source, in order, every record exactly once.

    Each batch is `image` uint8 [b, H, W, 3], `label` int32 [b] (or [b, source.max_labels]), `mask`
    bool [b] and `corrupt` bool [b], with b = batch_size / options.num_hosts. Rows with a false
    `mask` are zeros and must not count: padding of the last batch, so that all hosts get the same
    number of batches of one shape; or, with corrupt="skip", an unreadable record.

    `batch_size` is that of the global batch, over all hosts. Closing and errors are those of
    `train_batches`.
    """
    rows = options.rows(batch_size)
    image = np.zeros_like(transform(np.zeros((1, 1, 3), np.uint8)))  # for its shape
    label = np.zeros(getattr(source, "max_labels", None) or (), np.int32)
    blank = {"image": image, "label": label, "mask": np.False_, "corrupt": np.False_}
    reader = RetryingReader(source, options.retry_seconds)
    view = _EvalView(reader, options.corrupt, rows, transform, batch_size, blank)
    return _run(view, options)


# ----------------------------------------------------------------------------------------- views


@dataclasses.dataclass(frozen=True)
class _View:
    """One host's samples; an element has up to RECORDS_PER_ELEMENT records of a batch."""

    reader: RetryingReader
    corrupt: str
    rows: range  # of the global batch
    transform: Callable[..., Any]

    def refuse_or_log(self, record: int, reason: CorruptImageError | OSError) -> None:
        """Raises InputError for an unreadable record, or logs it if `corrupt` is "skip"."""
        problem = "is not a usable image"
        if isinstance(reason, OSError):  # the file vanished
            problem, reason = "cannot be read", reason.strerror or reason
        problem = f"{self.reader.source.name_of(record)} {problem}: {reason}"
        if self.corrupt == "error":
            raise InputError(f'{problem}; remove it, or set data.corrupt="skip"') from None
        logger.warning("skipped: %s", problem)


@dataclasses.dataclass(frozen=True)
class _TrainView(_View):
    plan: TrainPlan
    start_step: int
    num_steps: int
    columns: Mapping[str, Sequence[np.ndarray]]  # by record

    @functools.cached_property
    def elements_per_batch(self) -> int:
        """The maximum over all batches; smaller batches are padded with empty elements."""
        # The alignment of batches with the views of a record has a period of `repeats` steps.
        steps = range(min(self.plan.repeats, self.plan.steps_per_epoch))
        distinct = dataclasses.replace(self.plan, balance=None)  # balance only repeats records
        records = max(len(views_of_records(distinct, step, self.rows)) for step in steps)
        return -(-records // RECORDS_PER_ELEMENT)

    def __len__(self):
        return self.num_steps * self.elements_per_batch

    def __getitem__(self, index) -> Samples:
        step, i = divmod(index, self.elements_per_batch)
        records = views_of_records(self.plan, self.start_step + step, self.rows)
        samples = []
        for record, views in records[i * RECORDS_PER_ELEMENT : (i + 1) * RECORDS_PER_ELEMENT]:
            images, columns = self._read(record, [key for _, key in views])
            samples += [
                (row - self.rows.start, {"image": image, **columns})
                for (row, _), image in zip(views, images, strict=True)
            ]
        return samples

    def _read(self, record, keys):
        """Returns images and columns of the record, or of the first readable one after it."""
        for replacements in range(MAX_REPLACEMENTS + 1):
            candidate = (record + replacements) % len(self.reader.source)
            try:
                encoded, label = self.reader[candidate]
                # New generators for each candidate: the images of the replacement must not depend
                # on random numbers consumed for the unreadable record.
                images = self.transform(encoded, [sample_generator(key) for key in keys])
                columns = {"label": np.int32(label), "replaced": np.bool_(replacements > 0)}
                return images, columns | {k: x[candidate] for k, x in self.columns.items()}
            except (CorruptImageError, OSError) as reason:
                self.refuse_or_log(candidate, reason)
        raise InputError(
            f"{MAX_REPLACEMENTS + 1} records in a row cannot be read, the first is "
            f"{self.reader.source.name_of(record)}: check the data set"
        )


@dataclasses.dataclass(frozen=True)
class _EvalView(_View):
    batch_size: int
    blank: dict[str, np.ndarray]  # columns of a row that must not count

    @property
    def elements_per_batch(self) -> int:
        return -(-len(self.rows) // RECORDS_PER_ELEMENT)

    def __len__(self):
        return -(-len(self.reader.source) // self.batch_size) * self.elements_per_batch

    def __getitem__(self, index) -> Samples:
        batch, i = divmod(index, self.elements_per_batch)
        rows = self.rows[i * RECORDS_PER_ELEMENT : (i + 1) * RECORDS_PER_ELEMENT]
        return [(row - self.rows.start, self._sample(batch, row)) for row in rows]

    def _sample(self, batch, row):
        record = batch * self.batch_size + row
        if record >= len(self.reader.source):  # padding
            return self.blank
        try:
            encoded, label = self.reader[record]
            columns = {"image": self.transform(encoded), "label": np.asarray(label, np.int32)}
            return self.blank | columns | {"mask": np.True_}
        except (CorruptImageError, OSError) as reason:
            self.refuse_or_log(record, reason)
            return self.blank | {"corrupt": np.True_}


# --------------------------------------------------------------------------------------- running


def _run(view, options):
    """Returns the batches of the view, evaluated ahead of time."""
    records = grain.MapDataset.source(view)
    count, threads, prefetch = view.elements_per_batch, options.threads, options.prefetch
    make_batch = functools.partial(_make_batch, len(view.rows))
    if not options.workers:
        # Threads share records, not batches: the first batch is ready sooner, and the memory in
        # use does not grow with threads * rows.
        read_ahead = grain.ReadOptions(threads, max(threads, prefetch * count))
        batches = records.to_iter_dataset(read_ahead).batch(count, batch_fn=make_batch)
        return _iterate(batches, view.reader)
    if not flags.FLAGS.is_parsed():  # Grain's workers read flags, which only `absl.app.run` parses
        flags.FLAGS.mark_as_parsed()
    # Grain assigns elements to its processes in turn. They must be whole batches, or each process
    # would form batches of every other element.
    read_ahead = grain.ReadOptions(threads, max(threads, prefetch))
    batches = records.batch(count, batch_fn=make_batch).to_iter_dataset(read_ahead)
    processes = grain.MultiprocessingOptions(options.workers, prefetch)
    return _iterate(batches.mp_prefetch(processes, worker_init_fn=_init_worker), view.reader)


def _init_worker(worker, workers):
    """Makes a worker process ignore stop signals and end when its parent does.

    Schedulers and terminals signal every process, but the trainer needs its workers until the state
    is saved. And a trainer that is killed cannot stop its workers.
    """
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):  # Windows lacks the last two
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def exit_with_parent():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _make_batch(rows, elements):
    """Stacks the samples of a batch's elements."""
    samples = [sample for element in elements for sample in element]
    first = samples[0][1]
    batch = {name: np.empty((rows, *value.shape), value.dtype) for name, value in first.items()}
    for row, columns in samples:
        for name, value in columns.items():
            batch[name][row] = value
    return batch


def _worker_failure(error: Exception) -> str | None:
    """Explains the errors of Grain's worker processes that the machine causes."""
    exit_code = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    signal_number = -int(exit_code[1]) if exit_code else None
    number = getattr(error, "errno", None)
    # Batches are handed over in shared memory. Writing where none is left raises SIGBUS.
    if number == errno.ENOSPC or signal_number == signal.SIGBUS:
        return (
            "/dev/shm is full; give the container more (docker run --shm-size=8g or --ipc=host), "
            "or set data.workers=0"
        )
    if number == errno.EMFILE:
        return "too many open files; raise the limit (ulimit -n 65536) or reduce data.workers"
    if signal_number == signal.SIGKILL:
        return "one was killed, perhaps for lack of memory; reduce data.workers or data.threads"
    return None


def _iterate(batches, reader):
    """Yields batches; stops threads and processes at the end, on an error and on `close()`."""
    iterator = iter(batches)
    try:
        for batch in iterator:
            # Copy arrays in the shared memory of a worker process: it is freed with Grain's array
            # object even if another array still points into it.
            yield {
                name: column if type(column) is np.ndarray else np.array(column)
                for name, column in batch.items()
            }
    except (InputError, StorageUnavailable) as error:
        raise type(error)(*error.args) from None  # drop the notes that Grain adds
    except (OSError, RuntimeError) as error:
        if not (cause := _worker_failure(error)):
            raise
        raise StorageUnavailable(f"the worker processes (data.workers) failed: {cause}") from None
    finally:
        reader.closed.set()
        iterator.close()
