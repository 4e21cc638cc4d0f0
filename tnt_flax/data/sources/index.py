# SPDX-License-Identifier: Apache-2.0
"""Random access to the records of large files by an index of their positions.

An index is built once and stored next to the data, or in a cache folder if that is not writable.
It is a line of JSON, after its checksum, followed by an array of RECORD. The JSON has name, size
and modification time of every file. If one of them changes, the index is rebuilt.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tnt_flax.core.errors import InputError, as_input_error
from tnt_flax.core.files import cache_folder, write_atomic
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.names import LEFT_OUT

logger = logging.getLogger("tnt_flax")

VERSION = "tnt_flax index 4"
RECORD = np.dtype(
    [
        ("start", "<i8"),  # in bytes
        ("size", "<i8"),
        ("file", "<u4"),  # number of the record's file, in ascending order
        ("text", "<u4"),  # number of its label in "texts" of the JSON
        # Records in a compressed block: bytes [start, start + size) expand to `expanded` bytes, in
        # which the record begins at `skip` with its length in four bytes.
        ("codec", "u1"),  # position in CODECS; 0 is not compressed
        ("expanded", "<u4"),
        ("skip", "<u4"),
    ]
)
CODECS = ("", "snappy", "gzip", "brotli", "zstd", "lz4_raw")  # as pyarrow names them
SAVE_EVERY = 10  # seconds between two saves of a partial index
LENGTH = 4  # bytes
THREADS = 8  # parts that are scanned concurrently


class Part(NamedTuple):
    """A unit of scanning: bytes [start, end) of file number `file`."""

    file: int
    start: int
    end: int
    text: str = ""  # label shared by all its records, if the scan needs one


class Index:
    """Random access to the records of some files.

    The records are memory-mapped, so processes share the memory. Pickles as its path; unpickling
    raises InputError if the index was replaced in the meantime.
    """

    def __init__(self, path: str, files: tuple[str, ...], checksum: int | None = None):
        header, self._records = _read(path)
        self.path, self.files, self.checksum = path, files, header["checksum"]
        self.texts: list[str] = header["texts"]  # the labels as spelled
        self.text = self._records["text"]  # index into `texts` of each record
        if checksum not in (None, self.checksum):
            raise InputError(
                f"the index {path} was replaced while it was in use: start the run again"
            )

    def __reduce__(self):
        return Index, (self.path, self.files, self.checksum)

    def __len__(self) -> int:
        return len(self._records)

    def locate(self, record: int) -> tuple[str, int, int]:
        """Returns the path of a record's file and the record's start and size in bytes."""
        start, size, file = self._records[record].item()[:3]
        return self.files[file], start, size

    def read(self, record: int) -> bytes:
        """Returns the bytes of a record. Raises OSError if its file is missing or truncated."""
        start, size, file, _, codec, expanded, skip = self._records[record].item()
        if not codec:
            return storage.read(self.files[file], start, size)
        data = _read_block(self.files[file], start, size, CODECS[codec], expanded)
        length = int.from_bytes(data[skip : skip + LENGTH], "little")
        return data[skip + LENGTH : skip + LENGTH + length]

    def rows_per_file(self) -> list[range]:
        """Returns the indices of the records in each file."""
        ends = np.bincount(self._records["file"], minlength=len(self.files)).cumsum().tolist()
        return [range(*pair) for pair in itertools.pairwise([0, *ends])]


@functools.lru_cache(maxsize=8)  # consecutive records share blocks
def _read_block(path, start, size, codec, expanded):
    import pyarrow

    data = storage.read(path, start, size)
    if codec == "snappy":  # a block is a part of a snappy stream: prepend the length of the part
        data = snappy_length(expanded) + data
    try:
        return pyarrow.decompress(data, expanded, codec, asbytes=True)
    except OSError as error:
        raise storage.DamagedError(f"{path} is damaged near byte {start}: {error}") from None


def snappy_length(length: int) -> bytes:
    """Returns the beginning of a snappy stream of this length: a varint."""
    data = bytearray()
    while length >= 128:
        data.append(length & 127 | 128)
        length >>= 7
    return bytes([*data, length])


class IndexedImages:
    """A source of the images in `index`; `labels[k]` is the label of records with text number k.

    The source has `rows` of the index, by default all, without those of the label LEFT_OUT.
    """

    def __init__(
        self,
        index: Index,
        class_names: tuple[str, ...],
        labels: Sequence[int],
        rows: np.ndarray | None = None,
    ):
        self.index, self.class_names = index, class_names
        self.storage_path = index.files[0]
        self._labels = np.asarray(labels, np.int32)
        self._rows = rows  # None is all
        if rows is None and (self._labels == LEFT_OUT).any():
            self._rows = np.flatnonzero(self._labels[index.text] != LEFT_OUT)

    @property
    def labels(self) -> np.ndarray:
        """The label of every record, int32 [records]."""
        return self._labels[self.index.text if self._rows is None else self.index.text[self._rows]]

    def __len__(self) -> int:
        return len(self.index) if self._rows is None else len(self._rows)

    def _row(self, index: int) -> int:
        return index if self._rows is None else int(self._rows[index])

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        row = self._row(index)
        return self.index.read(row), int(self._labels[self.index.text[row]])

    def locate(self, index: int) -> tuple[str, int, int]:
        return self.index.locate(self._row(index))

    def key_of(self, index: int) -> str:
        """Returns what identifies a record, wherever the data are."""
        return str(self._row(index))

    def select(self, rows: np.ndarray) -> "IndexedImages":
        """Returns the records of these rows."""
        rows = rows if self._rows is None else self._rows[rows]
        return type(self)(self.index, self.class_names, self._labels, rows)

    def name_of(self, index: int) -> str:
        path, start, _ = self.locate(index)
        return f"{path}: image {index} (near byte {start})"


def _whole_files(files: Sequence[str], sizes: Sequence[int]) -> list[Part]:
    return [Part(file, 0, size) for file, size in enumerate(sizes)]


def open_index(
    kind: str,
    files: Iterable[str],
    scan: Callable[[BinaryIO, Part, str], Iterator[tuple]],
    cut: Callable[[Sequence[str], Sequence[int]], list[Part]] = _whole_files,
) -> Index:
    """Opens the index of `files`, and builds it if there is none or a file has changed.

    Several parts are scanned concurrently. Partial work is saved, and a killed process leaves it
    for the next one to continue. Shows a progress bar on stderr and logs why an index is rebuilt.

    Args:
        kind: name of the scan; files scanned in two ways have two indexes.
        files: paths or URLs.
        scan: called with (open file, part, path of the file); yields (start, size, text) of each
            record of the part, followed by (codec, expanded, skip) if it is compressed.
        cut: turns files and their sizes into parts, in the order of the records; by default a file
            is a part.

    Raises:
        InputError: a file cannot be read, no folder is writable, or `cut` or `scan` raised it.
    """
    files = tuple(files)
    versions = storage.file_versions(files)
    described = [
        [os.path.basename(file), *version] for file, version in zip(files, versions, strict=True)
    ]
    candidates = _candidate_paths(files, kind)
    for path in candidates:
        if _usable(path, described):
            return Index(path, files)
    path = _first_writable(candidates)
    work = _Work(described, f"{path}.partial")
    _scan_all(files, cut(files, [size for size, _ in versions]), scan, work)
    if not sum(map(len, work.records)):
        raise InputError(f"{files[0]}{' ...' * (len(files) > 1)}: no records found")
    with as_input_error(f"cannot write the index {path}"):
        work.save(path)
        with contextlib.suppress(FileNotFoundError):
            os.remove(work.partial)
    return Index(path, files)


# -------------------------------------------------------------------------------------- building


class _Work:
    """The records of the first `done` parts, continued from the index at `partial` if possible."""

    def __init__(self, files, partial):
        self.files, self.partial = files, partial
        self.done, texts, self.records = 0, [], []
        if _usable(partial, files):
            header, records = _read(partial)
            self.done, texts, self.records = header["done"], header["texts"], [records]
        self.numbers = {text: number for number, text in enumerate(texts)}

    def add(self, part, rows):
        number = lambda text: self.numbers.setdefault(text, len(self.numbers))
        records = [(a, size, part.file, number(text), *b) for a, size, text, *b in rows]
        plain = ((*record, 0, 0, 0)[: len(RECORD)] for record in records)
        self.records.append(np.array(list(plain), RECORD))
        self.done += 1

    def save(self, path):
        """Writes an index atomically, also if other processes write it at the same time."""
        header = {"files": self.files, "done": self.done, "texts": list(self.numbers)}
        about, records = json.dumps(header).encode(), np.concatenate(self.records).tobytes()
        checksum = zlib.crc32(records, zlib.crc32(about))
        write_atomic(path, b"%d %b\n%b" % (checksum, about, records), fsync=True)


def _scan_all(files, parts, scan, work):
    """Scans the parts that `work` lacks, in order, and saves it from time to time."""
    import tqdm

    stop = threading.Event()

    def scan_one(part):
        rows = []
        with storage.open_sequential(files[part.file]) as file:
            for row in scan(file, part, files[part.file]):
                if stop.is_set():
                    break
                rows.append(row)
        return part, rows

    saved = time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    what = f"indexing {os.path.basename(files[0])}{' ...' * (len(files) > 1)}, once"
    bar = tqdm.tqdm(total=len(parts), initial=work.done, desc=what, unit="part", file=sys.stderr)
    try:
        for result in pool.map(scan_one, parts[work.done :]):
            work.add(*result)
            bar.update()
            if time.monotonic() - saved > SAVE_EVERY:
                work.save(work.partial)
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
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()
    # Without folders, which may move.
    names = "\n".join([VERSION, kind, *map(os.path.basename, files)])
    name = f"{os.path.basename(files[0])}.{digest(names)[:8]}.index"
    folder = os.path.dirname(files[0])
    remote = storage.is_remote(folder)
    folder = folder if remote else os.path.abspath(folder)
    paths = [] if remote else [os.path.join(folder, name)]
    if cache := cache_folder():
        paths.append(str(cache / digest(folder)[:16] / name))
    return paths


def _first_writable(paths):
    for path in paths:
        folder = os.path.dirname(path)
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            return path
    where = os.path.dirname(paths[0]) if paths else "a cache folder"
    raise InputError(f"cannot write an index to {where}: set XDG_CACHE_HOME to a writable folder")


def _read(path: str) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the JSON and the memory-mapped records; raises OSError or ValueError if damaged."""
    with open(path, "rb") as file:
        checksum, _, about = file.readline().rstrip(b"\n").partition(b" ")
        records = np.asarray(np.memmap(file, RECORD, "r", offset=file.tell()))
    if int(checksum) != zlib.crc32(records, zlib.crc32(about)):
        raise ValueError("its checksum differs")
    return json.loads(about) | {"checksum": int(checksum)}, records


def _usable(path: str, files: list[list[Any]]) -> bool:
    """True if the index at `path` is intact and matches the files; logs the reason otherwise."""
    try:
        stored = _read(path)[0]["files"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        logger.warning("the index %s is damaged (%s): indexing again", path, error)
        return False
    changed = [new for new, old in zip(files, stored, strict=True) if new != old]
    if changed:
        logger.warning("%s has changed since %s: indexing again", changed[0][0], path)
    return not changed
