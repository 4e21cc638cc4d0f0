# SPDX-License-Identifier: Apache-2.0
"""Tables that are written row by row, as .csv, .jsonl or .parquet, and are there whole or not."""

import contextlib
import csv
import errno
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from tnt_flax.core.errors import InputError, RunError

FULL = (errno.ENOSPC, errno.EDQUOT)
GROUP = 10_000  # rows that Parquet compresses together


@contextlib.contextmanager
def open_table(path: pathlib.Path, columns: Mapping[str, type]) -> Iterator[Any]:
    """Yields what has `write(row)`, for rows {column: value or None}; at the end `path` is there.

    It is written beside its place and moved there; after an error nothing is left. A column that a
    row lacks is empty.

    Raises:
        InputError: the name ends otherwise, or the place cannot be written.
        RunError: the disk is full.
    """
    if path.suffix not in _KINDS:
        raise InputError(f"{path} ends with none of {', '.join(_KINDS)}: name the table so")
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        file = open(temporary, "wb")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    try:
        with file, contextlib.closing(_KINDS[path.suffix](file, columns)) as table:
            yield table
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RunError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


class _Csv:
    def __init__(self, file, columns):
        self._text = open(file.fileno(), "w", encoding="utf-8", newline="", closefd=False)
        self._writer = csv.DictWriter(self._text, list(columns))
        self._writer.writeheader()

    def write(self, row):
        self._writer.writerow(row)

    def close(self):
        self._text.close()


class _JsonLines:
    def __init__(self, file, columns):
        self._file, self._columns = file, columns

    def write(self, row):
        full = {column: row.get(column) for column in self._columns}
        self._file.write(json.dumps(full, ensure_ascii=False).encode() + b"\n")

    def close(self):
        pass


class _Parquet:
    def __init__(self, file, columns):
        import pyarrow.parquet  # slow to import, and this alone needs it

        self._arrow = pyarrow
        types = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64()}
        self._schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema)
        self._rows = []

    def write(self, row):
        self._rows.append(row)
        if len(self._rows) == GROUP:
            self._flush()

    def _flush(self):
        if self._rows:
            self._writer.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
            self._rows = []

    def close(self):
        self._flush()
        self._writer.close()


_KINDS = {".csv": _Csv, ".jsonl": _JsonLines, ".parquet": _Parquet}
