# SPDX-License-Identifier: Apache-2.0
"""Local and remote files, and retries while the storage is unavailable."""

import errno
import functools
import os
import pathlib
import pickle
import subprocess
import sys
import threading

import fsspec
import numpy as np
import pytest

from tests.helpers.source_checks import wait_until
from tests.helpers.tars import write_images
from tnt_flax.core.errors import InputError
from tnt_flax.data.pipeline import ReadOptions, eval_batches, train_batches
from tnt_flax.data.plan import TrainPlan
from tnt_flax.data.sources import image_folder, storage
from tnt_flax.data.sources.storage import RetryingReader, StorageUnavailable
from tnt_flax.data.transforms import train_transform

TRANSFORM = functools.partial(train_transform, size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)


# ------------------------------------------------------------------------------------------ files


def test_unsupported_urls_are_refused(monkeypatch):
    with pytest.raises(InputError, match="cannot read nonsense://a/b: .* nonsense"):
        storage.file_versions(["nonsense://a/b"])

    def missing(url):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError, match=r'cannot read gs://bucket/imagenet: pip install "tnt_fl'):
        storage.list_folder("gs://bucket/imagenet")


def test_listings_exclude_the_folder_and_errors_become_oserrors(monkeypatch):
    class Bucket:
        async_impl = True

        def ls(self, path, detail):
            return ["b/folder/", "b/folder/x.tar", "b/folder/sub/"]  # as in object stores

        def cat_file(self, *_):
            raise RuntimeError("503\nservice unavailable")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Bucket(), "b/folder/"))
    assert storage.list_folder("gs://b/folder/") == ["sub", "x.tar"]
    with pytest.raises(OSError, match="gs://b/x: RuntimeError: 503$"):
        storage.read("gs://b/x", 0, 5)


def test_paths_and_urls_are_joined():
    assert storage.join("gs://b/data/", "x.tar") == "gs://b/data/x.tar"
    assert storage.join("/data", "gs://b/x.tar") == "gs://b/x.tar"
    assert storage.join("/data", "/x.tar") == "/x.tar"
    assert storage.join("~", "x.tar") == os.path.expanduser("~/x.tar")


# ---------------------------------------------------------------------------------------- retries


@pytest.fixture
def mount(tmp_path):
    """A folder with a data set of two classes; renaming it makes the storage unavailable."""
    names = (f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(4))
    write_images(tmp_path / "mount", *names)
    return tmp_path / "mount"


@pytest.fixture
def source(mount):
    return image_folder(str(mount), "train")


@pytest.mark.parametrize(
    "error, unavailable",
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (ConnectionError("503"), True),
        (storage.DamagedError("its checksum is wrong"), False),
        (FileNotFoundError(errno.ENOENT, "gone"), False),  # one file of a reachable folder
        (PermissionError(errno.EACCES, "no"), False),
    ],
    ids=str,
)
def test_errors_that_mean_unavailable_storage(error, unavailable, tmp_path):
    assert storage.is_unavailable(error, str(tmp_path)) == unavailable
    missing = isinstance(error, FileNotFoundError | PermissionError)
    assert storage.is_unavailable(error, str(tmp_path / "mount")) == (unavailable or missing)
    assert storage.is_unavailable(error, "gs://bucket/shard.tar") == unavailable


def test_a_short_interruption_does_not_change_the_batches(mount, source, caplog):
    plan = TrainPlan(8, batch_size=4, seed=0)
    arguments = {"transform": TRANSFORM, "start_step": 0, "num_steps": 6}
    options = ReadOptions(threads=3, retry_seconds=60)
    train = lambda: [b["image"] for b in train_batches(source, plan, **arguments, options=options)]
    expected = train()
    os.rename(mount, f"{mount}.away")

    def restore():
        wait_until(lambda: "retrying" in caplog.text)
        os.rename(f"{mount}.away", mount)

    threading.Thread(target=restore).start()
    np.testing.assert_array_equal(train(), expected)
    assert caplog.text.count("retrying for up to 60 s") == 1 and "No such file" in caplog.text
    assert "can read its data again" in caplog.text


@pytest.mark.parametrize("corrupt", ["error", "skip"])
def test_retries_end_after_the_budget(mount, source, corrupt):
    """Unavailable storage must not count as corrupt images, which evaluation would mask out."""
    os.rename(mount, f"{mount}.away")
    options = ReadOptions(corrupt=corrupt, retry_seconds=0.1)
    batches = eval_batches(source, transform=np.asarray, batch_size=4, options=options)
    with pytest.raises(StorageUnavailable, match=r"cannot be read: No such file.* 0.1 s \(data"):
        next(batches)


def test_a_missing_file_is_not_retried(mount, source):
    (mount / "train" / "dog" / "3.png").unlink()
    options = ReadOptions(retry_seconds=10_000)
    batches = eval_batches(source, transform=np.asarray, batch_size=8, options=options)
    with pytest.raises(InputError, match="dog/3.png cannot be read: No such file"):
        next(batches)


def test_closing_ends_the_retries(mount, source):
    reader = RetryingReader(source, 10_000)
    os.rename(mount, f"{mount}.away")
    threading.Timer(0.1, reader.closed.set).start()
    with pytest.raises(StorageUnavailable):
        reader[0]
    assert not pickle.loads(pickle.dumps(reader)).closed.is_set()


TRAINER = """
import os, time
from multiprocessing import shared_memory
from tests.data.test_storage import TRANSFORM
from tnt_flax.data.pipeline import ReadOptions, train_batches
from tnt_flax.data.plan import TrainPlan
from tnt_flax.data.sources import Digits
shared_memory._SHM_NAME_PREFIX = os.environ["SEGMENTS"]  # in the worker, too
if __name__ == "__main__":
    batches = train_batches(Digits("train"), TrainPlan(1437, 48, 0), transform=TRANSFORM,
        start_step=0, num_steps=1_000_000, options=ReadOptions(workers=1))
    next(batches)
    print("ready", flush=True)
    time.sleep(1000)
"""


def children(pid):
    files = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for file in files for child in file.read_text().split()}


def command_line(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="inspects Linux' shared memory")
def test_workers_end_with_a_killed_trainer(root, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    prefix = f"t{os.getpid()}_"  # short; other tests have segments at the same time
    segments = lambda: [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]
    env = os.environ | {"PYTHONPATH": str(root), "SEGMENTS": f"/{prefix}"}
    trainer = subprocess.Popen(
        [sys.executable, str(script)], cwd=root, env=env, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout.readline() == "ready\n"
    family = children(trainer.pid)
    workers = [pid for pid in family if "spawn_main" in command_line(pid)]
    assert len(workers) == 1 and segments()
    trainer.kill()
    trainer.communicate()
    assert wait_until(lambda: not any(command_line(pid) for pid in family))
    assert not segments()
