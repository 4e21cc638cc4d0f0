# SPDX-License-Identifier: Apache-2.0
"""The same batches with any number of hosts, threads and worker processes, and after a restart."""

import collections
import errno
import functools
import logging
import multiprocessing
import os
import pathlib
import pickle
import re
import signal
import threading
import time
import types

import numpy as np
import pytest

from tests.helpers.source_checks import wait_until
from tests.helpers.tars import write_images
from tnt_flax.core.errors import InputError
from tnt_flax.data import pipeline
from tnt_flax.data.images import decode
from tnt_flax.data.pipeline import ReadOptions, eval_batches, train_batches
from tnt_flax.data.plan import RecordsByClass, TrainPlan, sample_generator
from tnt_flax.data.randaugment import parse
from tnt_flax.data.sources import Digits, image_folder
from tnt_flax.data.sources.storage import DamagedError, StorageUnavailable
from tnt_flax.data.transforms import PILLOW, eval_transform, resampler, train_transform

AUGMENT = functools.partial(
    train_transform, size=12, scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5
)
EVALUATE = functools.partial(eval_transform, size=12, crop_fraction=0.9)
DIGITS = Digits("test")
PLAN = TrainPlan(len(DIGITS), batch_size=8, seed=11)
PUBLISHED_PLAN = TrainPlan(len(DIGITS), batch_size=16, seed=3, repeats=3, groups=4)
PUBLISHED = functools.partial(AUGMENT, randaugment=parse("rand-m9-mstd0.5-inc1", mean=(0.5,) * 3))


class Numbered:
    """A source whose record i is a grey image of level i; records in `broken` cannot be read."""

    class_names = tuple(str(i) for i in range(200))
    storage_path = "."

    def __init__(self, count, broken=(), error=None):
        self.count, self.broken, self.error = count, frozenset(broken), error

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            if self.error:
                raise self.error
            return b"broken", index
        return np.full((3, 3), index, np.uint8), index

    def name_of(self, index):
        return f"numbered record {index}"


def train(source=DIGITS, plan=PLAN, transform=AUGMENT, start_step=0, num_steps=4, **options):
    steps = dict(start_step=start_step, num_steps=num_steps)
    options = ReadOptions(**({"threads": 2} | options))
    return train_batches(source, plan, transform=transform, **steps, options=options)


published = functools.partial(train, plan=PUBLISHED_PLAN, transform=PUBLISHED)


def evaluate(source=DIGITS, batch_size=8, **options):
    options = ReadOptions(**options)
    return eval_batches(source, transform=EVALUATE, batch_size=batch_size, options=options)


def assert_equal(actual, expected):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert type(a[name]) is np.ndarray and a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def columns(batches):
    """Concatenates batches."""
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def side_by_side(streams):
    """Yields global batches: the rows of all hosts, in host order."""
    return map(columns, zip(*streams, strict=True))


def threads_of_grain(before=()):
    return {t for t in threading.enumerate() if t.name.startswith("grain")} - set(before)


# ---------------------------------------------------------------------------------------- training


def test_training_batches_follow_the_plan():
    batches = list(train(num_steps=3, start_step=40))  # 45 steps an epoch
    assert len(batches) == 3
    for step, batch in zip(range(40, 43), batches, strict=True):
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            "image": ((8, 12, 12, 3), np.uint8),
            "label": ((8,), np.int32),
            "replaced": ((8,), np.bool_),
        }
        assert batch["label"].tolist() == [DIGITS[PLAN.lookup(step, r)[0]][1] for r in range(8)]
        assert not batch["replaced"].any()


def test_augmentation_differs_between_epochs():
    plan = TrainPlan(1, batch_size=1, seed=0)
    images = [batch["image"].tobytes() for batch in train(DIGITS, plan, num_steps=10)]
    assert len(set(images)) == 10  # one record, ten epochs, ten crops


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("make", [train, published])
def test_batches_do_not_depend_on_hosts_and_restarts(make, num_hosts):
    whole = list(make(num_steps=48, threads=0))  # 45 steps an epoch, or 22
    for k in (0, 21, 44, 46):
        steps = dict(start_step=k, num_steps=48 - k, num_hosts=num_hosts)
        assert_equal(side_by_side([make(**steps, host=h) for h in range(num_hosts)]), whole[k:])


@pytest.mark.parametrize("threads, prefetch", [(0, 2), (1, 1), (4, 1), (4, 3), (9, 0)])
def test_batches_do_not_depend_on_threads_and_prefetch(threads, prefetch):
    options = dict(threads=threads, prefetch=prefetch)
    assert_equal(train(**options, num_steps=6), train(num_steps=6))
    assert_equal(evaluate(**options), evaluate())
    opencv = functools.partial(PUBLISHED, resampler=resampler("opencv"))
    assert_equal(train(transform=opencv, **options), train(transform=opencv))


# -------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("batch_size, num_hosts", [(4, 1), (4, 2), (8, 4), (32, 1), (32, 4)])
def test_evaluation_has_every_image_once(count, batch_size, num_hosts):
    make = functools.partial(evaluate, Numbered(count), batch_size, num_hosts=num_hosts)
    hosts = [list(make(host=h)) for h in range(num_hosts)]
    # Equal numbers of batches, or a collective would hang; none is only padding.
    assert {len(host) for host in hosts} == {-(-count // batch_size)}
    shapes = {(b["image"].shape, b["label"].shape) for host in hosts for b in host}
    assert shapes == {((batch_size // num_hosts, 12, 12, 3), (batch_size // num_hosts,))}
    rows = columns(side_by_side(hosts))
    assert rows["mask"].tolist() == [True] * count + [False] * (len(rows["mask"]) - count)
    assert rows["label"][rows["mask"]].tolist() == list(range(count))
    assert (rows["image"][rows["mask"]] == np.arange(count)[:, None, None, None]).all()
    assert not rows["image"][~rows["mask"]].any() and not rows["corrupt"].any()
    assert (rows["label"].dtype, rows["mask"].dtype) == (np.int32, np.bool_)


# ---------------------------------------------------------------------------- the published recipe


@pytest.mark.parametrize("num_hosts, threads", [(1, 0), (1, 5), (2, 2), (4, 3), (16, 0)])
def test_a_record_is_read_and_decoded_once_for_all_its_views(num_hosts, threads):
    read, decoded = collections.Counter(), collections.Counter()

    class Counted(Digits):
        def __getitem__(self, index):
            read[index] += 1
            return super().__getitem__(index)

    def count(image, policy):
        decoded["images"] += 1
        return decode(image, policy)

    transform = functools.partial(PUBLISHED, resampler=PILLOW._replace(open=count))
    for host in range(num_hosts):
        read.clear()
        decoded.clear()
        step = dict(start_step=7, num_steps=1, host=host, num_hosts=num_hosts)
        (batch,) = published(source=Counted("test"), threads=threads, transform=transform, **step)
        rows = range(16 // num_hosts * host, 16 // num_hosts * (host + 1))
        plans = [PUBLISHED_PLAN.lookup(7, row) for row in rows]
        assert read == dict.fromkeys((record for record, _ in plans), 1)
        assert decoded["images"] == len(read)
        for i, (record, key) in enumerate(plans):  # the images are those of single reads
            image, label = DIGITS[record]
            (alone,) = PUBLISHED(image, [sample_generator(key)])
            np.testing.assert_array_equal(batch["image"][i], alone)
            assert batch["label"][i] == label


def test_balanced_batches_repeat_a_small_class_for_any_number_of_hosts():
    labels = np.array([0] * 19 + [1])
    plan = TrainPlan(20, batch_size=12, seed=1, balance=RecordsByClass(labels))
    plan = pickle.loads(pickle.dumps(plan))  # as worker processes get it
    whole = list(train(Numbered(20), plan, start_step=3))
    for batch in whole:
        assert np.count_nonzero(batch["label"] == 19) == 6  # six views of the only record
    halves = [list(train(Numbered(20), plan, start_step=3, host=h, num_hosts=2)) for h in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for name, column in batch.items():
            np.testing.assert_array_equal(column, np.concatenate([part[name] for part in parts]))


# ------------------------------------------------------------------------------- unreadable records


def error_of(stream):
    with pytest.raises(InputError) as caught:
        list(stream)
    assert type(caught.value) is InputError
    assert not getattr(caught.value, "__notes__", None)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert "\n" not in str(caught.value)
    return str(caught.value)


REMEDY = '; remove it, or set data.corrupt="skip"'


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("make", [train, evaluate])
def test_corrupt_images_and_missing_files_raise_one_line(tmp_path, make, threads):
    write_images(tmp_path, *(f"train/a/{i}.png" for i in range(8)))
    bad = tmp_path / "train/a/bad.jpg"
    bad.write_bytes(b"no image")
    source = image_folder(tmp_path, "train")
    options = {"plan": TrainPlan(len(source), 3, 0)} if make is train else {"batch_size": 3}
    assert error_of(make(source, threads=threads, **options)) == (
        f"{bad} is not a usable image: not an image format that PIL reads{REMEDY}"
    )
    bad.unlink()
    assert error_of(make(source, threads=threads, **options)) == (
        f"{bad} cannot be read: No such file or directory{REMEDY}"
    )


@pytest.mark.parametrize("error", [None, DamagedError("cut short"), FileNotFoundError(2, "gone")])
def test_training_replaces_unreadable_records(error, caplog):
    plan = TrainPlan(10, batch_size=10, seed=0)
    source = Numbered(10, broken={4, 5, 9}, error=error)
    with caplog.at_level(logging.WARNING, logger="tnt_flax"):
        (batch,) = train(source, plan, num_steps=1, corrupt="skip")
    records = np.array([plan.lookup(0, row)[0] for row in range(10)])
    replacement = {4: 6, 5: 6, 9: 0}  # the next readable record, cyclically
    assert batch["label"].tolist() == [replacement.get(r, r) for r in records]
    assert batch["image"][:, 0, 0, 0].tolist() == batch["label"].tolist()
    assert batch["replaced"].tolist() == [r in replacement for r in records]
    assert "skipped: numbered record 9 " in caplog.text
    skip = functools.partial(train, source, plan, num_steps=3, corrupt="skip")
    assert_equal(side_by_side([skip(host=h, num_hosts=2) for h in (0, 1)]), skip())


def test_a_replacement_uses_the_random_numbers_of_its_row():
    plan = TrainPlan(2, batch_size=2, seed=0)

    class FirstBroken(Numbered):
        def __getitem__(self, index):
            return (b"", 0) if index in self.broken else DIGITS[1]

    (whole,) = train(FirstBroken(2), plan, num_steps=1)
    (patched,) = train(FirstBroken(2, {0}), plan, num_steps=1, corrupt="skip")
    np.testing.assert_array_equal(patched["image"], whole["image"])
    assert sorted(patched["replaced"]) == [False, True]


def test_training_fails_after_many_unreadable_records_in_a_row():
    source = Numbered(100, broken=range(100))
    message = error_of(train(source, TrainPlan(100, 4, 0), corrupt="skip"))
    assert message.startswith("17 records in a row cannot be read, the first is numbered record ")


def test_evaluation_masks_out_unreadable_records():
    rows = columns(evaluate(Numbered(7, broken={2, 6}), 4, corrupt="skip"))
    assert rows["mask"].tolist() == [True, True, False, True, True, True, False, False]
    assert rows["corrupt"].tolist() == [False, False, True, False, False, False, True, False]
    assert rows["label"].tolist() == [0, 1, 0, 3, 4, 5, 0, 0]
    assert not rows["image"][~rows["mask"]].any()


def test_multi_label_batches():
    class Several(Numbered):
        max_labels = 3

        def __getitem__(self, index):
            return super().__getitem__(index)[0], np.array([index, 9, -1])

    labels = columns(evaluate(Several(5, broken={0}), 3, corrupt="skip"))["label"]
    assert labels.dtype == np.int32
    assert labels.tolist() == [[0, 0, 0], *([i, 9, -1] for i in range(1, 5)), [0, 0, 0]]


# ------------------------------------------------------------------------------------------ running


def read_until_an_error(stream):
    with pytest.raises(InputError):
        list(stream)


@pytest.mark.parametrize("end", [lambda s: s.close(), list, read_until_an_error])
def test_streams_leave_no_threads(end):
    class Broken(Digits):
        def __getitem__(self, index):
            bad = end is read_until_an_error and index == PLAN.lookup(20, 0)[0]
            return (b"no image", 0) if bad else super().__getitem__(index)

    before = threads_of_grain()
    stream = train(Broken("test"), threads=3, num_steps=100)
    next(stream)
    assert len(threads_of_grain(before)) == 3
    end(stream)
    assert wait_until(lambda: not threads_of_grain(before))
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("make", [train, evaluate])
def test_a_batch_that_hosts_cannot_share_is_refused_at_once(make):
    with pytest.raises(InputError, match="a batch of 8 cannot be split evenly over 3 hosts"):
        make(num_hosts=3)


@pytest.mark.slow
@pytest.mark.parametrize("make", [train, published])
def test_worker_processes_give_the_same_batches(make):
    assert_equal(make(workers=2, num_steps=5), make(num_steps=5))
    assert wait_until(lambda: not multiprocessing.active_children())


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_memory_of_a_worker_process():
    """A worker has Grain, numpy, Pillow and some batches, but no jax; `-s` prints the figures."""
    began = time.perf_counter()
    stream = published(workers=2, num_steps=50)
    next(stream)
    print(f"\nthe first batch came after {time.perf_counter() - began:.1f} s")
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    for process in processes:
        memory = pathlib.Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        mebibytes = int(re.search(r"^Pss: +(\d+) kB$", memory, re.MULTILINE)[1]) / 1024
        print(f"a worker process has {mebibytes:.0f} MiB, including its share of shared memory")
        assert mebibytes < 200
    stream.close()


@pytest.mark.slow
def test_worker_processes_ignore_the_signals_that_stop_a_run():
    """A closed terminal and Slurm signal all processes; the trainer needs its workers to save."""
    stream = train(workers=2, num_steps=9)
    for _ in range(2):  # one of each worker
        next(stream)
    for process in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(process.pid, number)
    assert len(list(stream)) == 7


@pytest.mark.slow
def test_worker_processes_evaluate_the_same_and_raise_the_same_error(tmp_path):
    write_images(tmp_path, *(f"val/a/{i}.png" for i in range(9)))
    source = image_folder(tmp_path, "val")
    expected = list(evaluate(source, 4))
    os.remove(source.name_of(8))
    stream = evaluate(source, 4, workers=2)
    assert_equal([next(stream), next(stream)], expected[:2])
    message = error_of(stream)
    assert message == f"{source.name_of(8)} cannot be read: No such file or directory{REMEDY}"
    assert wait_until(lambda: not multiprocessing.active_children())


@pytest.mark.parametrize(
    "error, advice",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm is full; .* --shm-size"),
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -7."),
            "shm is full",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -9."),
            "was killed",
        ),
    ],
)
def test_worker_processes_without_shared_memory_files_or_memory(error, advice):
    class Failing:
        def __iter__(self):
            return self

        def __next__(self):
            raise error

        def close(self):
            pass

    reader = types.SimpleNamespace(closed=threading.Event())
    with pytest.raises(StorageUnavailable, match=rf"\(data.workers\) failed: .*{advice}"):
        next(pipeline._iterate(Failing(), reader))
    assert reader.closed.is_set()
