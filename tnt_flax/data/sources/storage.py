# SPDX-License-Identifier: Apache-2.0
"""Byte ranges of files, on a disk or behind an address such as gs://BUCKET/FOLDER (by fsspec).

Nothing stays open between reads, so whoever holds a path may be pickled into another process.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator

from tnt_flax.core.errors import InputError, one_line

REMOTE_BLOCK = 2**23  # bytes of a request while a remote file is read from front to back

Read = Callable[[int, int], bytes]  # (start, size) -> the bytes, fewer at the end of the file


class DamagedError(OSError):
    """What is in a file is wrong; to read it again would be of no use."""


def is_away(error: OSError, place: str) -> bool:
    """Is the storage at fault, which may come back, and not one file or record?

    `place` is what is there as long as the data set can be reached: its folder, or a file that
    holds many records.
    """
    if isinstance(error, DamagedError):
        return False
    if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        return not is_remote(place) and not os.path.exists(place)
    return True  # an I/O error, a stale handle, a network that fails


def is_remote(path: str) -> bool:
    return "://" in path


def join(root: str, name: str) -> str:
    """`name` below `root`, unless it is an absolute path or an address itself; ~ is expanded."""
    if is_remote(name):
        return name
    if is_remote(root):
        return f"{root.rstrip('/')}/{name}"
    return os.path.join(os.path.expanduser(root), os.path.expanduser(name))


def parent(path: str) -> str:
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def base(path: str) -> str:
    return path.rpartition("/")[2] if is_remote(path) else os.path.basename(path)


def read(path: str, start: int, size: int) -> bytes:
    """Bytes [start, start + size) of a file. Raises OSError if they are not to be had."""
    if is_remote(path):
        with _as_oserror(path):
            filesystem, name = _filesystem(path)
            data = filesystem.cat_file(name, start, start + size)
    else:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, start)
            while 0 < len(data) < size:  # the system may give less than it was asked for
                more = os.pread(file.fileno(), size - len(data), start + len(data))
                if not more:
                    break
                data += more
    if len(data) != size:
        raise DamagedError(f"{path} ends before byte {start + size}")
    return data


def read_file(path: str) -> bytes:
    """A whole (small) file. Raises OSError if it cannot be read."""
    if not is_remote(path):
        with open(os.path.expanduser(path), "rb") as file:
            return file.read()
    with _as_oserror(path):
        filesystem, name = _filesystem(path)
        return filesystem.cat_file(name)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Read]:
    """For many small reads from front to back. A remote file is fetched in large blocks, because
    a request costs as much time as millions of bytes."""
    if not is_remote(path):
        with open(path, "rb", buffering=0) as file:
            yield lambda start, size: os.pread(file.fileno(), size, start)
        return
    with _as_oserror(path):
        filesystem, name = _filesystem(path)
        with filesystem.open(name, "rb", block_size=REMOTE_BLOCK, cache_type="readahead") as stream:

            def read_at(start: int, size: int) -> bytes:
                stream.seek(start)
                return stream.read(size)

            yield read_at


def list_folder(folder: str) -> list[str]:
    """The names in a folder, sorted. Raises InputError if it cannot be read."""
    try:
        if not is_remote(folder):
            return sorted(os.listdir(os.path.expanduser(folder)))
        with _as_oserror(folder):
            filesystem, name = _filesystem(folder)
            name = name.rstrip("/")
            entries = {entry.rstrip("/") for entry in filesystem.ls(name, detail=False)}
            return sorted(base(entry) for entry in entries - {name})  # some list the folder, too
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror or error}") from None


def versions(paths: Iterable[str]) -> list[tuple[int, str]]:
    """(bytes, what changes when the file does) of each. Raises InputError for a missing file."""
    found, listed = [], set()
    for path in paths:
        try:
            if not is_remote(path):
                status = os.stat(path)
                found.append((status.st_size, str(status.st_mtime_ns)))
                continue
            with _as_oserror(path):
                filesystem, name = _filesystem(path)
                if parent(path) not in listed:  # one request for a folder, and not one for a file
                    listed.add(parent(path))
                    filesystem.ls(parent(name), detail=True)
                found.append(_version(filesystem.info(name)))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return found


def _version(info):
    keys = ("etag", "ETag", "generation", "mtime", "updated", "LastModified", "created")
    return int(info["size"]), str(next((info[key] for key in keys if info.get(key)), ""))


def _filesystem(url):
    """fsspec's file system (it keeps one per process) and the path on it."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        known = {"gs": "gcs", "gcs": "gcs"}.get(scheme)
        advice = f'pip install "tnt_flax[{known}]"' if known else one_line(error)
        raise InputError(f"{scheme}:// paths need one more package: {advice}") from None
    except ValueError:
        raise InputError(f"{url}: no way to read {scheme}:// paths is known") from None


@contextlib.contextmanager
def _as_oserror(path):
    """Every file system of fsspec has its own exceptions for a network that fails."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        raise ConnectionError(f"{path}: {one_line(error)}") from error
