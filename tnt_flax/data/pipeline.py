# SPDX-License-Identifier: Apache-2.0
"""Plan, source and transform joined by Grain: batches of numpy arrays, made by worker threads.

A view says what each record of the run gives to its batch, by its number; Grain evaluates the view
ahead of time. A record that is shown several times in a batch is read and decoded once.
There is no iterator state to save. Host h of H owns the contiguous rows [h * b, (h + 1) * b) of
every global batch of H * b, so batches put together in host order never depend on H, and how many
threads or processes evaluate the view changes nothing.
"""

import dataclasses
import functools
import logging
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator

import grain
import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.data.plan import EvalPlan, SampleKey, TrainPlan, sample_generator
from tnt_flax.data.sources import Source
from tnt_flax.data.sources.outage import Outage, PatientReader
from tnt_flax.data.transforms import CorruptImageError, Encoded, decode

Batch = dict[str, np.ndarray]
Samples = list[tuple[int, dict[str, np.ndarray]]]  # of one element: (row of the batch, columns)
PER_ELEMENT = 4  # records: handing an element over costs a thread, and the training loop, 0.1 ms
MAX_REPLACEMENTS = 16  # unreadable records in a row before training gives up on the data set


def train_batches(
    source: Source,
    plan: TrainPlan,
    *,
    transform: Callable[[Encoded, np.random.Generator], np.ndarray],
    start_step: int,
    num_steps: int,
    corrupt: str = "error",
    host: int = 0,
    num_hosts: int = 1,
    threads: int = 4,
    prefetch: int = 2,
    workers: int = 0,
    retry_seconds: float = 0,
) -> Iterator[Batch]:
    """This host's part of the global batches start_step, ..., start_step + num_steps - 1.

    Each is `image` uint8 [b, H, W, 3], `label` int32 [b] and `replaced` bool [b], where
    b = plan.batch_size / num_hosts. `transform` is a `functools.partial` of `train_transform`.
    `corrupt` says what to do about a record that cannot be read: "error" raises InputError from
    `next()`, "skip" takes the next readable record instead and sets `replaced`.

    `threads` read and decode, `prefetch` batches ahead. With `workers` > 0 that many processes do
    the work, each with its own `threads`; the program must then guard its `__main__`. The iterator
    is a generator: `close()` it, if it was not exhausted, to stop threads and processes. The
    processes ignore notices to stop and end with this one, however it ends.

    Where the storage of the data is away, reading is tried again for `retry_seconds`, and then
    `next()` raises `outage.Outage`.
    Raises InputError at once for rows that the hosts cannot share evenly and for bad options.
    """
    rows = _rows_per_host(plan.batch_size, host, num_hosts)
    _check_corrupt(corrupt)
    reader = PatientReader(source, retry_seconds)
    view = _TrainView(reader, plan, transform, corrupt, start_step, num_steps, host * rows, rows)
    return _run(view, rows, threads, prefetch, workers)


def eval_batches(
    source: Source,
    *,
    transform: Callable[[Encoded], np.ndarray],
    batch_size: int,
    corrupt: str = "error",
    host: int = 0,
    num_hosts: int = 1,
    threads: int = 4,
    prefetch: int = 2,
    workers: int = 0,
    retry_seconds: float = 0,
) -> Iterator[Batch]:
    """This host's part of one pass over the source, in order: every record exactly once.

    `batch_size` counts the rows of all hosts. Each batch is `image` uint8 [b, H, W, 3], `label`
    int32 [b] (or [b, source.most_labels]), `mask` bool [b] and `corrupt` bool [b],
    b = batch_size / num_hosts. Where `mask` is
    False the row is zeros and must not count: padding of the last batch, so that all hosts see
    equally many batches of one shape, or, with corrupt="skip", a record that cannot be read.
    The other arguments and the errors are those of `train_batches`.
    """
    rows = _rows_per_host(batch_size, host, num_hosts)
    _check_corrupt(corrupt)
    blank = np.zeros_like(transform(np.zeros((1, 1, 3), np.uint8)))  # for its shape
    plan = EvalPlan(len(source), batch_size)
    reader = PatientReader(source, retry_seconds)
    view = _EvalView(reader, plan, transform, corrupt, host * rows, rows, blank)
    return _run(view, rows, threads, prefetch, workers)


# ------------------------------------------------------------------------------- the two views


@dataclasses.dataclass(frozen=True)
class _TrainView:
    """The records of one host as a sequence, PER_ELEMENT of a step to an element."""

    reader: PatientReader
    plan: TrainPlan
    transform: Callable[[Encoded, np.random.Generator], np.ndarray]
    corrupt: str
    start_step: int
    num_steps: int
    first_row: int
    rows: int

    @functools.cached_property
    def elements_per_batch(self) -> int:
        """The most there are. A batch with fewer is filled up with elements without samples."""
        most = self.plan.most_records(range(self.first_row, self.first_row + self.rows))
        return -(-most // PER_ELEMENT)

    def __len__(self):
        return self.num_steps * self.elements_per_batch

    def __getitem__(self, index) -> Samples:
        step, i = divmod(index, self.elements_per_batch)
        shown = _shown(self.plan, self.start_step + step, self.first_row, self.rows)
        samples = []
        for record, views in shown[i * PER_ELEMENT : (i + 1) * PER_ELEMENT]:
            images, label, replaced = self._read(record, [key for _, key in views])
            columns = {"label": np.int32(label), "replaced": np.bool_(replaced)}
            samples += [
                (row - self.first_row, {"image": image, **columns})
                for (row, _), image in zip(views, images, strict=True)
            ]
        return samples

    def _read(self, record, keys):
        """The views of the record, or those of the first readable one after it."""
        for replacements in range(MAX_REPLACEMENTS + 1):
            candidate = (record + replacements) % len(self.reader.source)
            try:
                encoded, label = self.reader[candidate]
                image = decode(encoded)
                # A fresh generator each time: the replacement must not depend on how far the
                # transform of the unreadable record came.
                images = [self.transform(image, sample_generator(key)) for key in keys]
                return images, label, replacements > 0
            except (CorruptImageError, OSError) as reason:
                _refuse_or_log(self.reader.source, candidate, reason, self.corrupt)
        raise InputError(
            f"{MAX_REPLACEMENTS + 1} records in a row cannot be read, the first is "
            f"{self.reader.source.name_of(record)}: check the data set"
        )


@dataclasses.dataclass(frozen=True)
class _EvalView:
    """The samples of one host as a sequence, PER_ELEMENT of a batch to an element."""

    reader: PatientReader
    plan: EvalPlan
    transform: Callable[[Encoded], np.ndarray]
    corrupt: str
    first_row: int
    rows: int
    blank: np.ndarray

    @property
    def elements_per_batch(self) -> int:
        return -(-self.rows // PER_ELEMENT)

    def __len__(self):
        return self.plan.num_batches * self.elements_per_batch

    def __getitem__(self, index) -> Samples:
        batch, i = divmod(index, self.elements_per_batch)
        rows = range(i * PER_ELEMENT, min((i + 1) * PER_ELEMENT, self.rows))
        return [(row, self._sample(batch, row)) for row in rows]

    def _sample(self, batch, row):
        record = self.plan.plan(batch, self.first_row + row)
        if record is None:
            return self._columns(self.blank)
        try:
            encoded, label = self.reader[record]
            return self._columns(self.transform(encoded), label, mask=True)
        except (CorruptImageError, OSError) as reason:
            _refuse_or_log(self.reader.source, record, reason, self.corrupt)
            return self._columns(self.blank, corrupt=True)

    def _columns(self, image, label=None, *, mask=False, corrupt=False):
        if label is None:
            most = getattr(self.reader.source, "most_labels", None)
            label = np.zeros(() if most is None else most)
        return {
            "image": image,
            "label": np.asarray(label, np.int32),
            "mask": np.bool_(mask),
            "corrupt": np.bool_(corrupt),
        }


def _shown(plan, step, first_row, rows) -> tuple[tuple[int, list[tuple[int, SampleKey]]], ...]:
    """The records in these rows of the batch of `step`, with their (row, key)s."""
    with _SHOWN_LOCK:  # many threads ask at once when a batch begins: compute it once
        return _shown_once(plan, step, first_row, rows)


# As many as there can be batches begun and not finished.
@functools.lru_cache(maxsize=16)
def _shown_once(plan, step, first_row, rows):
    return tuple(plan.views(step, range(first_row, first_row + rows)).items())


# Of the module, not of the view, so that a view pickles into a worker process.
_SHOWN_LOCK = threading.Lock()


def _refuse_or_log(source, record, reason, corrupt):
    """Reports an unreadable record: as the error that ends the run, or as a line of the log."""
    if isinstance(reason, CorruptImageError):
        problem = f"{source.name_of(record)} is not a usable image: {reason}"
    else:  # the file vanished
        problem = f"{source.name_of(record)} cannot be read: {reason.strerror or reason}"
    if corrupt == "error":
        raise InputError(f'{problem}; remove it, or set data.corrupt="skip"') from None
    logging.getLogger(__name__).warning("skipped: %s", problem)


# --------------------------------------------------------------------------------------- running


def _run(view, rows, threads, prefetch, workers):
    """Batches of the view, evaluated ahead of time."""
    records = grain.MapDataset.source(view)
    count, put_together = view.elements_per_batch, functools.partial(_put_together, rows)
    if not workers:
        # Threads share records, not batches: the first batch comes sooner, and the memory in
        # flight does not grow with threads * rows.
        options = grain.ReadOptions(threads, max(threads, prefetch * count))
        batches = records.to_iter_dataset(options).batch(count, batch_fn=put_together)
        return _iterate(batches, view.reader)
    # Grain deals the elements below the prefetch to its processes in turn. They must be whole
    # batches, or each process would batch its own every-other record.
    _parse_absl_flags()
    options = grain.ReadOptions(threads, max(threads, prefetch))
    batches = records.batch(count, batch_fn=put_together).to_iter_dataset(options)
    processes = grain.MultiprocessingOptions(workers, prefetch)
    return _iterate(batches.mp_prefetch(processes, worker_init_fn=_serve), view.reader)


def _serve(worker, workers):
    """Begins a worker process: it ends with its trainer, and with nothing else.

    Schedulers and terminals send a notice to stop to every process, but the trainer still needs
    this one until its state is saved. And a trainer that is killed cannot stop its workers.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_trainer():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_trainer, daemon=True).start()


def _put_together(rows, records):
    """A batch of the samples of its records."""
    samples = [sample for record in records for sample in record]
    first = samples[0][1]
    batch = {name: np.empty((rows, *value.shape), value.dtype) for name, value in first.items()}
    for row, columns in samples:
        for name, value in columns.items():
            batch[name][row] = value
    return batch


def _iterate(batches, reader):
    """A generator, so that the end, an error and `close()` all stop the threads and processes."""
    iterator = iter(batches)
    try:
        for batch in iterator:
            # A copy of what lies in the shared memory of a worker process, which is freed with
            # Grain's array while someone may still hold a pointer into it.
            yield {
                name: column if type(column) is np.ndarray else np.array(column)
                for name, column in batch.items()
            }
    except (InputError, Outage) as error:
        raise type(error)(*error.args) from None  # without Grain's notes about its tracebacks
    finally:
        reader.closed.set()
        iterator.close()


def _parse_absl_flags():
    # Grain's worker processes read absl flags, which are unparsed outside `absl.app.run`.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _rows_per_host(batch_size, host, num_hosts):
    if not 0 <= host < num_hosts:
        raise InputError(f"host {host} of {num_hosts}: hosts are numbered from 0")
    if batch_size % num_hosts:
        raise InputError(
            f"a batch of {batch_size} cannot be split evenly over {num_hosts} hosts: choose a "
            f"multiple of {num_hosts}"
        )
    return batch_size // num_hosts


def _check_corrupt(corrupt):
    if corrupt not in ("error", "skip"):
        raise InputError(f"data.corrupt is {corrupt!r}: choose 'error' or 'skip'")
