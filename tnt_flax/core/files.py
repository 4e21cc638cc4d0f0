# SPDX-License-Identifier: Apache-2.0
"""Files: atomic writes, the cache folder, tables that are written row by row."""

import contextlib
import csv
import errno
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from tnt_flax.core.errors import InputError, RunError, require_extras

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
ROW_GROUP = 10_000  # rows per row group of a Parquet file


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path next to `path`; the file or folder written there replaces `path`.

    The temporary name is unique and keeps the suffix. On an error `path` stays as it was and the
    temporary file or folder is removed. After a kill `path` is the old file or the new one.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink()


def as_unicode(text: str) -> str:
    """Returns `text` with U+FFFD for what UTF-8 cannot encode: file names need not be UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_atomic(
    path: str | os.PathLike,
    content: str | bytes | Callable[[BinaryIO], object],
    *,
    fsync: bool = False,
) -> None:
    """Writes a file in one atomic step, see `atomic_path`.

    Args:
        path: the file.
        content: text (written as UTF-8), bytes, or a function that writes to the open file.
        fsync: flush the content to the disk before `path` is replaced, so that it also survives a
            power failure.
    """
    if isinstance(content, str):
        content = as_unicode(content).encode()
    with atomic_path(path) as temporary:
        with open(temporary, "xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            if fsync:
                file.flush()
                os.fsync(file.fileno())


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> pathlib.Path | None:
    """Returns $XDG_CACHE_HOME/tnt_flax, by default ~/.cache/tnt_flax; creates it if necessary.

    Returns None if the user has no home folder, as in a container, or may not write there.
    """
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = pathlib.Path(cache) / "tnt_flax"
    if cache.startswith("~"):  # not expanded: there is no home folder
        return None
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else None


@contextlib.contextmanager
def open_new(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file for atomic writing, see `atomic_path`.

    Raises:
        InputError: `path` cannot be written.
        RunError: the disk is full.
    """
    with contextlib.ExitStack() as stack:
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            temporary = stack.enter_context(atomic_path(path))
            file = open(temporary, "xb")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        try:
            with file:
                yield file
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise RunError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def open_table(
    path: pathlib.Path, columns: Mapping[str, type]
) -> Iterator[Callable[[dict[str, Any]], object]]:
    """Opens a table for atomic writing; the suffix chooses the format: .csv, .jsonl, .parquet.

    Yields `write(row)`, for rows {column: value or None}. A column missing in a row is left empty.
    Types are str, int, float, and np.ndarray for vectors of float32 (in .csv as JSON).

    Raises:
        InputError: unknown suffix, or `path` cannot be written.
        RunError: the disk is full.
    """
    suffix = path.suffix.lower()
    if suffix not in _TABLES:
        raise InputError(f"{path} is not a known kind of table: use {', '.join(_TABLES)}")
    with open_new(path) as file, _TABLES[suffix](file, columns) as write:
        yield lambda row: write({k: _storable(x) for k, x in row.items()})


def _storable(value):
    return as_unicode(value) if isinstance(value, str) else value


@contextlib.contextmanager
def _write_csv(file, columns):
    as_text = lambda x: json.dumps(_as_list(x)) if isinstance(x, np.ndarray) else x
    with open(file.fileno(), "w", encoding="utf-8", newline="", closefd=False) as text:
        writer = csv.DictWriter(text, list(columns))
        writer.writeheader()
        yield lambda row: writer.writerow({k: as_text(x) for k, x in row.items()})


def _as_list(vector):
    """Returns the shortest decimals that are the same float32 numbers."""
    return [float(str(x)) for x in vector]


@contextlib.contextmanager
def _write_json_lines(file, columns):
    def write(row):
        full = {column: row.get(column) for column in columns}
        full = {k: _as_list(x) if isinstance(x, np.ndarray) else x for k, x in full.items()}
        file.write(json.dumps(full, ensure_ascii=False).encode() + b"\n")

    yield write


@contextlib.contextmanager
def _write_parquet(file, columns):
    require_extras("a .parquet file", "train")
    import pyarrow.parquet  # a slow import that only this format needs

    types = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64()}
    types[np.ndarray] = pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    rows = []

    def write(row):
        rows.append(row)
        if len(rows) == ROW_GROUP:
            flush()

    def flush():
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
        rows.clear()

    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        yield write
        if rows:
            flush()


_TABLES = {".csv": _write_csv, ".jsonl": _write_json_lines, ".parquet": _write_parquet}
