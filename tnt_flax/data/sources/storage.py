# SPDX-License-Identifier: Apache-2.0
"""Byte ranges of local and remote files, and reads that are retried while the storage is down.

A path is a local path or a URL that fsspec reads, such as gs://BUCKET/FOLDER. No file stays open
between reads, so objects that hold paths pickle into worker processes.
"""

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from tnt_flax.core.errors import InputError, RunError, as_input_error, one_line

logger = logging.getLogger("tnt_flax")

REMOTE_BLOCK = 2**23  # bytes per request during a sequential read of a remote file
VERSION_KEYS = ("etag", "ETag", "generation", "blob_id", "mtime", "updated", "LastModified")
VERSION_KEYS += ("created",)
SCHEME_EXTRAS = {"gs": "gcs", "gcs": "gcs", "hf": "hub"}  # what reads a URL
MAX_PAUSE = 15.0  # seconds between two attempts; the first pause is half a second


class DamagedError(OSError):
    """The content of a file is wrong, so reading it again would not help."""


class StorageUnavailable(RunError):
    """The storage did not come back within the retry budget."""


# ----------------------------------------------------------------------------------------- paths


def is_remote(path: str) -> bool:
    return "://" in path


def join(root: str, name: str) -> str:
    """Joins two paths and expands ~. An absolute `name`, or one that is a URL, replaces `root`."""
    if is_remote(name):
        return name
    return os.path.join(os.path.expanduser(root), os.path.expanduser(name))


# --------------------------------------------------------------------------------------- reading


def read(path: str, start: int, size: int) -> bytes:
    """Reads bytes [start, start + size) of a file; raises DamagedError if it is shorter."""
    if is_remote(path):
        with _filesystem(path) as (filesystem, name):
            # Other file systems open a file that would read ahead by megabytes.
            options = {} if filesystem.async_impl else {"cache_type": "none"}
            data = filesystem.cat_file(name, start, start + size, **options)
    else:
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(size)
    if len(data) != size:
        raise DamagedError(f"{path} ends before byte {start + size}")
    return data


def read_file(path: str) -> bytes:
    """Reads a whole (small) file. Raises OSError if that fails."""
    if not is_remote(path):
        with open(os.path.expanduser(path), "rb") as file:
            return file.read()
    with _filesystem(path) as (filesystem, name):
        return filesystem.cat_file(name)


@contextlib.contextmanager
def open_sequential(path: str) -> Iterator[BinaryIO]:
    """Opens a file for many small reads from front to back.

    A remote file is fetched in blocks of 8 MiB, because a request costs as much time as
    transferring megabytes.
    """
    with _filesystem(path) as (filesystem, name):
        options = dict(block_size=REMOTE_BLOCK, cache_type="readahead")
        with filesystem.open(name, "rb", **options) as file:
            yield file


def list_folder(folder: str) -> list[str]:
    """Returns the sorted names in a folder. Raises InputError if it cannot be read."""
    with as_input_error(f"cannot read {folder}"), _filesystem(folder) as (filesystem, name):
        entries = {entry.rstrip("/") for entry in filesystem.ls(name, detail=False)}
        # Some object stores list the folder itself.
        return sorted(os.path.basename(entry) for entry in entries - {name.rstrip("/")})


def is_folder(path: str) -> bool:
    with _filesystem(path) as (filesystem, name):
        return filesystem.isdir(name)


def file_versions(paths: Iterable[str]) -> list[tuple[int, str]]:
    """Returns (bytes, version) of each file; the version changes whenever the file does.

    Raises InputError for a missing file.
    """
    found, listed = [], set()
    for path in paths:
        with as_input_error(f"cannot read {path}"), _filesystem(path) as (filesystem, name):
            folder = os.path.dirname(name)
            if is_remote(path) and folder not in listed:  # one request per folder, not per file
                listed.add(folder)
                filesystem.ls(folder, detail=True)
            info = filesystem.info(name)
        version = next(filter(None, map(info.get, VERSION_KEYS)), "")
        found.append((int(info["size"]), str(version)))
    return found


@contextlib.contextmanager
def _filesystem(url):
    """Yields fsspec's file system and the path on it; turns the errors of both into OSError."""
    import fsspec

    try:
        try:
            filesystem, path = fsspec.core.url_to_fs(url)  # cached per process
        except (ImportError, ValueError) as error:  # the scheme needs a package, or is unknown
            extra = SCHEME_EXTRAS.get(url.partition("://")[0])
            advice = f'pip install "tnt_flax[{extra}]"' if extra else one_line(error)
            raise InputError(f"cannot read {url}: {advice}") from None
        yield filesystem, path
    except (OSError, InputError):
        raise
    except Exception as error:
        raise ConnectionError(f"{url}: {one_line(error)}") from error


# --------------------------------------------------------------------------------------- retrying


def is_unavailable(error: OSError, storage_path: str) -> bool:
    """True if the storage failed and may come back; False if a single file or record is bad.

    `storage_path` exists as long as the storage is reachable: the data set's folder, or a file
    with many records.
    """
    if isinstance(error, DamagedError):
        return False
    if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        return not is_remote(storage_path) and not os.path.exists(storage_path)
    return True  # an I/O error, a stale handle, a network failure


@dataclasses.dataclass(frozen=True, eq=False)
class RetryingReader:
    """Reads records of `source` and retries for `seconds` while its storage is unavailable.

    See `is_unavailable`. Errors of a single record are raised at once. Setting `closed` ends the
    retries.
    """

    source: Any  # a data.sources.Source
    seconds: float
    # Events belong to one process: a pickled reader gets new ones in the worker.
    closed: threading.Event = dataclasses.field(default_factory=threading.Event, repr=False)
    failing: threading.Event = dataclasses.field(default_factory=threading.Event, repr=False)

    def __reduce__(self):
        return RetryingReader, (self.source, self.seconds)

    def __getitem__(self, record: int) -> tuple[bytes | np.ndarray, int]:
        """Returns image and label of a record; raises the source's OSError for a bad record.

        Raises StorageUnavailable if the retry budget is exhausted.
        """
        start, pause = time.monotonic(), 0.5
        while True:
            try:
                found = self.source[record]
            except OSError as error:
                if not is_unavailable(error, self.source.storage_path):
                    raise
                name, reason = self.source.name_of(record), error.strerror or error
                if self.closed.is_set() or time.monotonic() - start + pause > self.seconds:
                    raise StorageUnavailable(
                        f"{name} cannot be read: {reason}, for {self.seconds:g} s "
                        "(data.retry_seconds); check the storage, then run the same command again"
                    ) from None
                if not self.failing.is_set():  # one warning, not one per thread
                    self.failing.set()
                    message = "%s cannot be read: %s; retrying for up to %g s"
                    logger.warning(message, name, reason, self.seconds)
                self.closed.wait(pause)
                pause = min(2 * pause, MAX_PAUSE)
                continue
            if self.failing.is_set():
                self.failing.clear()
                logger.warning("process %d can read its data again", os.getpid())
            return found
