# SPDX-License-Identifier: Apache-2.0
"""Storage that goes away for a while is waited for; a broken file is not."""

import errno
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tnt_flax.core.errors import InputError
from tnt_flax.data import pipeline
from tnt_flax.data.pipeline import ReadOptions
from tnt_flax.data.plan import TrainPlan
from tnt_flax.data.sources import ImageFolder, storage
from tnt_flax.data.sources.storage import RetryingReader, StorageUnavailable
from tnt_flax.data.transforms import train_transform

TRANSFORM = functools.partial(train_transform, size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)


@pytest.fixture
def mount(tmp_path):
    """A folder that holds a data set of two classes, and that can be renamed away."""
    for name in ("cat", "dog"):
        (tmp_path / "mount" / "train" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.full((10, 10, 3), 20 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "mount" / "train" / name / f"{i}.png")
    return tmp_path / "mount"


@pytest.mark.parametrize(
    "error, away",
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (ConnectionError("503"), True),
        (storage.DamagedError("its checksum is wrong"), False),
        (FileNotFoundError(errno.ENOENT, "gone"), False),  # one file, of a folder that is there
        (PermissionError(errno.EACCES, "no"), False),
    ],
    ids=lambda x: str(x),
)
def test_what_may_come_back(error, away, tmp_path):
    assert storage.is_unavailable(error, str(tmp_path)) == away
    missing = isinstance(error, FileNotFoundError | PermissionError)
    assert storage.is_unavailable(error, str(tmp_path / "mount")) == (away or missing)
    assert storage.is_unavailable(error, "gs://bucket/shard.tar") == away


def test_a_mount_that_comes_back_costs_nothing_but_time(mount, caplog):
    plan = TrainPlan(8, batch_size=4, seed=0)
    source = ImageFolder(str(mount), "train")

    def train():
        arguments = {"transform": TRANSFORM, "start_step": 0, "num_steps": 6}
        options = ReadOptions(threads=3, retry_seconds=60)
        return pipeline.train_batches(source, plan, **arguments, options=options)

    expected = [batch["image"] for batch in train()]
    os.rename(mount, f"{mount}.away")
    threading.Timer(0.8, os.rename, [f"{mount}.away", mount]).start()
    np.testing.assert_array_equal([batch["image"] for batch in train()], expected)
    assert caplog.text.count("retrying for up to 60 s") == 1 and "No such file" in caplog.text
    assert "can read its data again" in caplog.text


@pytest.mark.parametrize("corrupt", ["error", "skip"])
def test_patience_ends(mount, corrupt, monkeypatch):
    """An outage is no corrupt image: it does not mask out the whole evaluation."""
    source = ImageFolder(str(mount), "train")
    os.rename(mount, f"{mount}.away")
    transform = lambda image: np.zeros((2, 2, 3), np.uint8)
    batches = pipeline.eval_batches(
        source,
        transform=transform,
        batch_size=4,
        options=ReadOptions(corrupt=corrupt, retry_seconds=0.6),
    )
    with pytest.raises(
        StorageUnavailable, match=r"cannot be read: No such file.* for 0.6 s \(data"
    ):
        next(batches)


def test_a_missing_file_is_no_outage(mount):
    source = ImageFolder(str(mount), "train")
    (mount / "train" / "dog" / "3.png").unlink()
    batches = pipeline.eval_batches(
        source, transform=np.asarray, batch_size=8, options=ReadOptions(retry_seconds=10_000)
    )
    with pytest.raises(InputError, match="dog/3.png cannot be read: No such file"):
        next(batches)


def test_closing_ends_the_waiting(mount):
    source = ImageFolder(str(mount), "train")
    reader = RetryingReader(source, 10_000)
    os.rename(mount, f"{mount}.away")
    threading.Timer(0.2, reader.closed.set).start()
    with pytest.raises(StorageUnavailable):
        reader[0]
    assert not pickle.loads(pickle.dumps(reader)).closed.is_set()


def test_pauses_grow_up_to_a_limit(mount, monkeypatch):
    reader, pauses = RetryingReader(ImageFolder(str(mount), "train"), 100), []
    os.rename(mount, f"{mount}.away")
    now = 0.0

    class Clock:
        @staticmethod
        def monotonic():
            return now

    def wait(pause):
        nonlocal now
        now += pause
        pauses.append(pause)

    monkeypatch.setattr(storage, "time", Clock)
    monkeypatch.setattr(reader.closed, "wait", wait)
    with pytest.raises(StorageUnavailable):
        reader[0]
    assert pauses == [0.5, 1, 2, 4, 8, 15, 15, 15, 15, 15]


WORKERS = """
import functools, sys, time
from tnt_flax.data import pipeline
from tnt_flax.data.pipeline import ReadOptions
from tnt_flax.data.plan import TrainPlan
from tnt_flax.data.sources import Digits
from test_storage import TRANSFORM
if __name__ == "__main__":
    batches = pipeline.train_batches(Digits("train"), TrainPlan(1437, 48, 0), transform=TRANSFORM,
        start_step=0, num_steps=1_000_000, options=pipeline.ReadOptions(workers=1))
    next(batches)
    print("ready", flush=True)
    time.sleep(1000)
"""


def children(pid):
    found = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as f:
            found |= {int(child) for child in f.read().split()}
    return found


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as f:
            return f.read()
    except OSError:
        return ""


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="looks at Linux' shared memory")
def test_workers_and_shared_memory_end_with_a_killed_trainer(root, tmp_path):
    """And not with a notice to stop, which schedulers send to every process."""
    script = tmp_path / "trainer.py"
    script.write_text(WORKERS)
    env = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    before = set(os.listdir("/dev/shm"))
    trainer = subprocess.Popen(
        [sys.executable, str(script)], cwd=root, env=env, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout.readline() == "ready\n"
    family = children(trainer.pid)
    workers = [pid for pid in family if "spawn_main" in command_line(pid)]
    assert len(workers) == 1 and set(os.listdir("/dev/shm")) - before
    os.kill(workers[0], signal.SIGTERM)
    os.kill(workers[0], signal.SIGINT)
    time.sleep(0.3)
    assert "spawn_main" in command_line(workers[0])
    trainer.kill()
    trainer.communicate()
    assert wait_until(lambda: not any(command_line(pid) for pid in family))
    assert not set(os.listdir("/dev/shm")) - before
