# SPDX-License-Identifier: Apache-2.0
"""Records whose storage goes away for a while: a mount that vanishes, a network that fails."""

import dataclasses
import os
import sys
import threading
import time
from typing import Any

import numpy as np

from tnt_flax.core.errors import RunError
from tnt_flax.data.sources import storage

LONGEST_PAUSE = 15.0  # seconds between two attempts; the first is half a second


class Outage(RunError):
    """The storage did not come back in time."""


@dataclasses.dataclass(frozen=True, eq=False)
class PatientReader:
    """Reads records of `source`, for up to `seconds` again and again while its storage is away.

    Whether it is: see `storage.is_away`. Other errors, of a record alone, are raised at once.
    """

    source: Any  # a data.sources.Source
    seconds: float
    # Of this process: they do not go along when the reader is pickled into a worker.
    closed: threading.Event = dataclasses.field(default_factory=threading.Event, repr=False)
    said: threading.Event = dataclasses.field(default_factory=threading.Event, repr=False)

    def __reduce__(self):
        return PatientReader, (self.source, self.seconds)

    def __getitem__(self, record: int) -> tuple[bytes | np.ndarray, int]:
        """Raises Outage when the patience is at its end; OSError as the source does."""
        began, pause = time.monotonic(), 0.5
        while True:
            try:
                found = self.source[record]
            except OSError as error:
                if not storage.is_away(error, self.source.place):
                    raise
                where, why = self.source.name_of(record), error.strerror or error
                if self.closed.is_set() or time.monotonic() - began + pause > self.seconds:
                    raise Outage(
                        f"{where} cannot be read: {why}, for {self.seconds:g} s "
                        "(data.retry_seconds); see to the storage, then start the same command"
                    ) from None
                if not self.said.is_set():  # once, not for each of many threads
                    self.said.set()
                    print(
                        f"warning: {where} cannot be read: {why}; trying again, for "
                        f"{self.seconds:g} s at most",
                        file=sys.stderr,
                    )
                self.closed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if self.said.is_set():
                self.said.clear()
                print(f"process {os.getpid()} reads its data again", file=sys.stderr)
            return found
