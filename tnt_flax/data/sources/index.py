# SPDX-License-Identifier: Apache-2.0
"""Where each record of some large files begins and how long it is, so that any can be read.

An index is made once and kept beside the data, or in a cache folder if that cannot be written to.
It is a safetensors file, 16 bytes a record: `start` int64 [n] and `size` uint32 [n] in bytes,
`text` uint32 [n], a number in `texts` (JSON as uint8: what the records say about their labels),
and `first` int64 [files + 1]: file k has the records first[k], ..., first[k + 1] - 1. Its metadata
hold name, size and modification time of every file: if one changes, the index is made again.
"""

import array
import bisect
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import safetensors.numpy
import tqdm

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import storage

VERSION = "tnt_flax index 1"
SAVE_EVERY = 10  # seconds; a killed run loses no more of the work than that
THREADS = 8  # parts that are scanned at a time
TICK = 256  # records between two updates of the progress bar


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes [start, end) of file number `file`: what is scanned as a whole."""

    file: int
    start: int
    end: int
    text: str = ""  # about the labels of all its records, where the scan needs it


Record = tuple[int, int, str]  # start, size, text


class Index:
    """Any record of some files. The columns are mapped, not loaded: processes share the memory."""

    def __init__(self, path: str, files: tuple[str, ...], identity: dict[str, int] | None = None):
        header, columns = _read(path)
        if identity and identity != header["checksums"]:
            raise InputError(f"the index {path} was replaced while it was in use: start again")
        self.path, self.files, self.identity = path, files, header["checksums"]
        self.text, self._columns = columns["text"], columns
        self._first = columns["first"].tolist()

    def __reduce__(self):
        return Index, (self.path, self.files, self.identity)

    def __len__(self) -> int:
        return len(self.text)

    def texts(self) -> list[str]:
        """What the numbers in `text` mean."""
        return json.loads(self._columns["texts"].tobytes())

    def place(self, record: int) -> tuple[str, int, int]:
        """Path, start and size in bytes."""
        file = self.files[bisect.bisect_right(self._first, record) - 1]
        return file, int(self._columns["start"][record]), int(self._columns["size"][record])

    def read(self, record: int) -> bytes:
        """The bytes of a record. Raises OSError if its file has gone or become shorter."""
        return storage.read(*self.place(record))

    def rows_of(self, file: int) -> range:
        """The numbers of the records that lie in a file."""
        return range(self._first[file], self._first[file + 1])


def open_index(
    kind: str,
    files: Iterable[str],
    cut: Callable[[list[int]], list[Part]],
    scan: Callable[[storage.Read, Part], Iterator[Record]],
) -> Index:
    """The index of these files: the one that there is, if it still fits, or else a new one.

    `kind` names the way of indexing. `cut` turns the sizes of the files into parts, in the order of
    the records; `scan` yields the records of a part. Several parts are scanned at a time, and an
    index that was begun and killed is continued. Progress and reasons go to stderr.

    Raises:
        InputError: a file cannot be read; nothing can be written; whatever `cut` and `scan` raise.
    """
    files = tuple(files)
    versions = storage.versions(files)
    wanted = {
        "format": f"{VERSION} {kind}",
        "files": [[storage.base(f), *v] for f, v in zip(files, versions, strict=True)],
    }
    places = _places(files, kind)
    for path in places:
        if _usable(path, wanted):
            return Index(path, files)
    path = _first_writable(places, files[0])
    parts = cut([size for size, _ in versions])
    work = _Work(path, wanted)
    if os.path.exists(work.partial) and _usable(work.partial, wanted):
        work.resume()
    try:
        _scan_all(files, parts, scan, work)
    except BaseException:
        if work.done:
            with contextlib.suppress(OSError):  # the first error is the one to tell about
                work.save(work.partial)
        raise
    if not len(work.columns["start"]):
        raise InputError(f"{files[0]}: no records in it{' and the others' * (len(files) > 1)}")
    try:
        work.save(path)
        with contextlib.suppress(FileNotFoundError):
            os.remove(work.partial)
    except OSError as error:
        raise InputError(f"cannot write the index {path}: {error.strerror}") from None
    return Index(path, files)


# ---------------------------------------------------------------------------------------- making


class _Work:
    """An index in the making: the columns of the first `done` parts."""

    def __init__(self, path, wanted):
        self.path, self.partial, self.wanted = path, f"{path}.partial", wanted
        self.done = 0
        self.columns = {"start": array.array("q"), "size": array.array("I")}
        self.columns |= {"text": array.array("I"), "file": array.array("I")}
        self.numbers = {}  # of the texts

    def add(self, part, starts, sizes, texts):
        self.columns["start"] += starts
        self.columns["size"] += sizes
        numbers = (self.numbers.setdefault(text, len(self.numbers)) for text in texts)
        self.columns["text"].extend(numbers)
        self.columns["file"].extend([part.file] * len(starts))
        self.done += 1

    def save(self, path):
        _write(path, self.wanted, self.done, self.columns, list(self.numbers))

    def resume(self):
        header, columns = _read(self.partial)
        for name in ("start", "size", "text"):
            self.columns[name].frombytes(columns[name].tobytes())
        counts = np.diff(columns["first"])
        files = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
        self.columns["file"].frombytes(files.tobytes())
        texts = json.loads(columns["texts"].tobytes())
        self.numbers = {text: number for number, text in enumerate(texts)}
        self.done = header["done"]


def _scan_all(files, parts, scan, work):
    lock, stop = threading.Lock(), threading.Event()
    size_of = lambda some_parts: sum(part.end - part.start for part in some_parts)
    bar = tqdm.tqdm(
        total=size_of(parts),
        initial=size_of(parts[: work.done]),
        desc=f"indexing {storage.base(files[0])}{' ...' * (len(files) > 1)}, once",
        unit="B",
        unit_scale=True,
        mininterval=1,
        file=sys.stderr,
    )

    def scan_one(part):
        starts, sizes, texts, seen = array.array("q"), array.array("I"), [], part.start
        with storage.opened(files[part.file]) as read:
            for start, size, text in scan(read, part):
                if size >= 2**32:
                    raise InputError(f"{files[part.file]}: a record of {size} bytes is no image")
                starts.append(start)
                sizes.append(size)
                texts.append(text)
                if len(starts) % TICK == 0:
                    if stop.is_set():
                        break
                    with lock:
                        bar.update(start - seen)
                    seen = start
        with lock:
            bar.update(part.end - seen)
        return part, starts, sizes, texts

    saved = time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    try:
        for result in pool.map(scan_one, parts[work.done :]):
            work.add(*result)
            if time.monotonic() - saved > SAVE_EVERY:
                work.save(work.partial)
                saved = time.monotonic()
    except OSError as error:
        raise InputError(f"cannot index {files[0]}: {error.strerror or error}") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()


# ------------------------------------------------------------------------------------- the file


def _places(files, kind):
    """Where an index of these files may lie, best place first."""
    names = "\n".join([kind, *map(storage.base, files)])  # not the folder: it may be moved
    name = f"{storage.base(files[0])}.{hashlib.sha256(names.encode()).hexdigest()[:8]}.index"
    folder = storage.parent(files[0])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    remote = storage.is_remote(folder)
    owner = folder if remote else os.path.abspath(folder)
    owner = hashlib.sha256(owner.encode()).hexdigest()[:16]
    cached = os.path.join(cache, "tnt_flax", owner, name)
    return [cached] if remote else [os.path.join(folder, name), cached]


def _first_writable(places, file):
    for path in places:
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with tempfile.TemporaryFile(dir=os.path.dirname(path) or "."):
                return path
        except OSError as error:
            reason = error.strerror
    raise InputError(
        f"cannot write an index of {file} to {os.path.dirname(places[-1])}: {reason}; set "
        "XDG_CACHE_HOME to a folder that can be written to"
    )


def _write(path: str, wanted: dict[str, Any], done: int, columns, texts) -> None:
    """Writes all or nothing, whoever else does the same at the same time."""
    first = np.searchsorted(columns["file"], np.arange(len(wanted["files"]) + 1))
    tensors = {
        "start": np.frombuffer(columns["start"], np.int64),
        "size": np.frombuffer(columns["size"], np.uint32),
        "text": np.frombuffer(columns["text"], np.uint32),
        "first": first.astype(np.int64),
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
    }
    checksums = {name: zlib.crc32(tensor) for name, tensor in tensors.items()}
    about = json.dumps({"wanted": wanted, "done": done, "checksums": checksums})
    metadata = {"about": f"{zlib.crc32(about.encode())} {about}"}
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:
            file.write(safetensors.numpy.save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # others read the data, too; mkstemp lets nobody
        os.replace(temporary, path)
    except BaseException:
        os.remove(temporary)
        raise


def _read(path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and mapped columns. Raises OSError, ValueError or KeyError for a damaged file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 2**30:
            raise ValueError("its header is too long")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    dtypes = {"start": np.int64, "size": np.uint32, "text": np.uint32}
    dtypes |= {"first": np.int64, "texts": np.uint8}
    columns = {}
    for name, dtype in dtypes.items():
        begin, end = header[name]["data_offsets"]
        if not 0 <= begin <= end <= len(data):
            raise ValueError("it is truncated")
        columns[name] = np.asarray(data[begin:end]).view(dtype)
    checksum, _, about = header["__metadata__"]["about"].partition(" ")
    if int(checksum) != zlib.crc32(about.encode()):
        raise ValueError("the checksum of its metadata differs")
    return json.loads(about), columns


def _usable(path: str, wanted: dict[str, Any]) -> bool:
    """Whether the index at `path` is whole and still describes these files; if not, says why."""
    try:
        header, columns = _read(path)
        if {name: zlib.crc32(column) for name, column in columns.items()} != header["checksums"]:
            raise ValueError("its checksums differ")
        theirs = header["wanted"]
        if theirs["format"] != wanted["format"]:
            raise ValueError(f"it is of another kind, {theirs['format']}")
        changed = [n for n, o in zip(wanted["files"], theirs["files"], strict=True) if n != o]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        print(f"the index {path} is damaged ({reason}): indexing again", file=sys.stderr)
        return False
    if changed:
        print(f"{changed[0][0]} has changed since {path}: indexing again", file=sys.stderr)
    return not changed
