# SPDX-License-Identifier: Apache-2.0
"""The file of a check that can be stopped: findings, and lines that say how far it was.

The first line says of which data set the file is. What follows the last line with "checked" was cut
off by a kill; it is dropped and checked again, so that every finding is in the file once.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from tnt_flax.core.errors import InputError, RunError, one_line

KEY = "findings_of"  # of the first line


class FindingsFile:
    """Lines of JSON for each split, kept in the file at `path`; nowhere if that is None.

    A file of `data`, a description to compare, is taken up; one of other data begins anew.

    Raises:
        InputError: it cannot be written, or it exists and is another kind of file.
    """

    def __init__(self, path: str | None, data: dict[str, Any]):
        self.path = pathlib.Path(path).expanduser() if path else None
        self._file, self._end = None, 0
        if self.path is None:
            return
        try:
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise InputError(f"cannot write --out={path}: {error.strerror}") from None
        first = _encode({KEY: data})
        self._file.seek(0)
        found = self._file.readline()
        if found == first:
            self._end = self._last_checked()
        elif not first.startswith(found):  # else the file is new, or was killed in its first line
            if not found.startswith(first[: first.index(b":")]):
                self.close()
                raise InputError(f"--out={path} exists and holds no findings: choose another file")
            print(f"{self.path} is of another data set or config: starting anew", file=sys.stderr)
        self._file.truncate(self._end)
        if not self._end:
            self._append(first)

    def read(self, split: str) -> Iterator[dict[str, Any]]:
        """The lines of `split` that were there when the file was taken up."""
        if not self._end:
            return
        self._file.seek(0)
        self._file.readline()
        while self._file.tell() < self._end:
            line = json.loads(self._file.readline())
            if line.pop("split") == split:
                yield line

    def write(self, split: str, lines: list[dict[str, Any]]) -> None:
        """Adds lines, of which the last says how far the check is.

        Raises:
            RunError: the disk is full, or gone.
        """
        if self._file is not None:
            self._append(b"".join(_encode({"split": split} | line) for line in lines))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, text):
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {one_line(error)}") from None

    def _last_checked(self):
        """Where the last line ends that says how far the check was, or else the first line."""
        end = self._file.tell()
        while (line := self._file.readline()).endswith(b"\n"):
            if b'"checked": ' in line and "checked" in json.loads(line):
                end = self._file.tell()
        return end


def _encode(line):
    return (json.dumps(line, ensure_ascii=False) + "\n").encode()
