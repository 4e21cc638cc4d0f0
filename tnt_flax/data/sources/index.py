# SPDX-License-Identifier: Apache-2.0
"""Random access to the records of large files by an index of their positions.

An index is built once and stored next to the data, or in a cache folder if that is not writable.
It is a safetensors file with 20 bytes per record:

* `file` uint32 [n], the number of the record's file, in ascending order;
* `start` int64 [n] and `size` uint32 [n], in bytes;
* `text` uint32 [n], an index into `texts` (JSON as uint8), the labels as the records spell them.

Its metadata holds name, size and modification time of every file. If one of them changes, the index
is rebuilt.
"""

import array
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import tqdm

from tnt_flax.core.errors import InputError
from tnt_flax.core.files import cache_folder, write_atomic
from tnt_flax.data.sources import storage

logger = logging.getLogger("tnt_flax")

VERSION = "tnt_flax index 2"
COLUMNS = {"file": "I", "start": "q", "size": "I", "text": "I"}  # type codes of `array` and numpy
SAVE_EVERY = 10  # seconds between two saves of a partial index
THREADS = 8  # parts that are scanned concurrently
TICK = 256  # records between two updates of the progress bar


class Part(NamedTuple):
    """A unit of scanning: bytes [start, end) of file number `file`."""

    file: int
    start: int
    end: int
    text: str = ""  # label shared by all its records, if the scan needs one


Record = tuple[int, int, str]  # start, size, text


class Index:
    """Random access to the records of some files.

    The columns are memory-mapped, so processes share the memory. Pickles as its path; unpickling
    raises InputError if the index was replaced in the meantime.
    """

    def __init__(self, path: str, files: tuple[str, ...], identity: dict[str, int] | None = None):
        header, columns = _read(path)
        if identity and identity != header["checksums"]:
            raise InputError(
                f"the index {path} was replaced while it was in use: start the run again"
            )
        self.path, self.files, self.identity = path, files, header["checksums"]
        self.text, self._columns = columns["text"], columns

    def __reduce__(self):
        return Index, (self.path, self.files, self.identity)

    def __len__(self) -> int:
        return len(self.text)

    def texts(self) -> list[str]:
        """Returns the labels as spelled; `text` holds indices into this list."""
        return json.loads(self._columns["texts"].tobytes())

    def locate(self, record: int) -> tuple[str, int, int]:
        """Returns the path of a record's file and the record's start and size in bytes."""
        file, start, size = (int(self._columns[name][record]) for name in ("file", "start", "size"))
        return self.files[file], start, size

    def read(self, record: int) -> bytes:
        """Returns the bytes of a record. Raises OSError if its file is missing or truncated."""
        return storage.read(*self.locate(record))

    def rows_of(self, file: int) -> range:
        """Returns the indices of the records in a file."""
        # In the column's dtype, or searchsorted would convert the whole column.
        return range(*np.searchsorted(self._columns["file"], np.uint32([file, file + 1])))


def _whole_files(files: Sequence[str], sizes: Sequence[int]) -> list[Part]:
    return [Part(file, 0, size) for file, size in enumerate(sizes)]


def open_index(
    kind: str,
    files: Iterable[str],
    scan: Callable[[storage.Read, Part, str], Iterator[Record]],
    cut: Callable[[Sequence[str], Sequence[int]], list[Part]] = _whole_files,
) -> Index:
    """Opens the index of `files`, and builds it if there is none or a file has changed.

    Several parts are scanned concurrently. Partial work is saved, and a killed process leaves it
    for the next one to continue. Shows a progress bar on stderr and logs why an index is rebuilt.

    Args:
        kind: name of the scan; files scanned in two ways have two indexes.
        files: paths or URLs.
        scan: called with (read, part, path of its file); yields (start, size, text) of its records.
        cut: turns files and their sizes into parts, in the order of the records; by default a file
            is a part.

    Raises:
        InputError: a file cannot be read, no folder is writable, or `cut` or `scan` raised it.
    """
    files = tuple(files)
    versions = storage.file_versions(files)
    wanted = {
        "format": f"{VERSION} {kind}",
        "files": [[storage.basename(f), *v] for f, v in zip(files, versions, strict=True)],
    }
    candidates = _candidate_paths(files, kind)
    for path in candidates:
        if _usable(path, wanted):
            return Index(path, files)
    path = _first_writable(candidates, files[0])
    partial = f"{path}.partial"
    parts = cut(files, [size for size, _ in versions])
    work = _Columns(wanted)
    if _usable(partial, wanted):
        work.load(partial)
    try:
        _scan_all(files, parts, scan, work, partial)
    except BaseException:
        if work.done:
            with contextlib.suppress(OSError):  # report the first error, not this one
                work.save(partial)
        raise
    if not work.columns["start"]:
        raise InputError(f"{files[0]}{' ...' * (len(files) > 1)}: no records found")
    with storage.as_input_error(f"cannot write the index {path}"):
        work.save(path)
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
    return Index(path, files)


# -------------------------------------------------------------------------------------- building


class _Columns:
    """The columns of an index of the first `done` parts."""

    def __init__(self, wanted):
        self.wanted, self.done = wanted, 0
        self.columns = {name: array.array(code) for name, code in COLUMNS.items()}
        self.numbers = {}  # text -> its number

    def add(self, part, starts, sizes, texts):
        self.columns["file"].extend([part.file] * len(starts))
        self.columns["start"] += starts
        self.columns["size"] += sizes
        numbers = (self.numbers.setdefault(text, len(self.numbers)) for text in texts)
        self.columns["text"].extend(numbers)
        self.done += 1

    def load(self, path):
        header, columns = _read(path)
        for name, column in self.columns.items():
            column.frombytes(columns[name].tobytes())
        texts = json.loads(columns["texts"].tobytes())
        self.numbers = {text: number for number, text in enumerate(texts)}
        self.done = header["done"]

    def save(self, path):
        """Writes an index atomically, also if other processes write it at the same time."""
        tensors = {name: np.frombuffer(self.columns[name], code) for name, code in COLUMNS.items()}
        tensors["texts"] = np.frombuffer(json.dumps(list(self.numbers)).encode(), np.uint8)
        checksums = {name: zlib.crc32(tensor) for name, tensor in tensors.items()}
        about = json.dumps({"wanted": self.wanted, "done": self.done, "checksums": checksums})
        metadata = {"about": f"{zlib.crc32(about.encode())} {about}"}
        write_atomic(path, safetensors.numpy.save(tensors, metadata), fsync=True)


def _scan_all(files, parts, scan, work, partial):
    lock, stop = threading.Lock(), threading.Event()
    size_of = lambda some_parts: sum(part.end - part.start for part in some_parts)
    bar = tqdm.tqdm(
        total=size_of(parts),
        initial=size_of(parts[: work.done]),
        desc=f"indexing {storage.basename(files[0])}{' ...' * (len(files) > 1)}, once",
        unit="B",
        unit_scale=True,
        mininterval=1,
        file=sys.stderr,
    )

    def scan_one(part):
        starts, sizes, texts, seen = array.array("q"), array.array("I"), [], part.start
        path = files[part.file]
        with storage.open_sequential(path) as read:
            for start, size, text in scan(read, part, path):
                if size >= 2**32:
                    raise InputError(f"{path}: a record of {size} bytes is too large")
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
                work.save(partial)
                saved = time.monotonic()
    except OSError as error:
        raise InputError(f"cannot index {files[0]}: {error.strerror or error}") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()


# ----------------------------------------------------------------------------------------- files


def _candidate_paths(files, kind):
    """Returns the paths at which the index may be stored, in order of preference."""
    names = "\n".join([kind, *map(storage.basename, files)])  # without folders, which may move
    name = f"{storage.basename(files[0])}.{hashlib.sha256(names.encode()).hexdigest()[:8]}.index"
    folder = storage.dirname(files[0])
    remote = storage.is_remote(folder)
    folder = folder if remote else os.path.abspath(folder)
    owner = hashlib.sha256(folder.encode()).hexdigest()[:16]
    cached = str(cache_folder() / owner / name)
    return [cached] if remote else [os.path.join(folder, name), cached]


def _first_writable(paths, file):
    for path in paths:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tempfile.TemporaryFile(dir=os.path.dirname(path)):
                return path
        except OSError as error:
            reason = error.strerror
    raise InputError(
        f"cannot write an index of {file} to {os.path.dirname(paths[-1])}: {reason}; set "
        "XDG_CACHE_HOME to a writable folder"
    )


def _read(path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns metadata and memory-mapped columns.

    Raises OSError, ValueError or KeyError for a damaged file.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 2**30:
            raise ValueError("its header is too long")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    columns = {}
    for name, dtype in {**COLUMNS, "texts": "B"}.items():
        begin, end = header[name]["data_offsets"]
        if not 0 <= begin <= end <= len(data):
            raise ValueError("it is truncated")
        columns[name] = np.asarray(data[begin:end]).view(dtype)
    checksum, _, about = header["__metadata__"]["about"].partition(" ")
    if int(checksum) != zlib.crc32(about.encode()):
        raise ValueError("the checksum of its metadata differs")
    return json.loads(about), columns


def _usable(path: str, wanted: dict[str, Any]) -> bool:
    """True if the index at `path` is intact and matches the files; logs the reason otherwise."""
    try:
        header, columns = _read(path)
        if {name: zlib.crc32(column) for name, column in columns.items()} != header["checksums"]:
            raise ValueError("its checksums differ")
        stored = header["wanted"]
        if stored["format"] != wanted["format"]:
            raise ValueError(f"its format is {stored['format']}")
        changed = [n for n, o in zip(wanted["files"], stored["files"], strict=True) if n != o]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        logger.warning("the index %s is damaged (%s): indexing again", path, reason)
        return False
    if changed:
        logger.warning("%s has changed since %s: indexing again", changed[0][0], path)
    return not changed
