# SPDX-License-Identifier: Apache-2.0
"""The ways a command ends early. Each message is one line: what, where, and what to do."""

import sys
import traceback
from collections.abc import Sequence

# Exit codes. A launcher starts the same command again after STOPPED and STALLED.
FAILED = 1  # the run failed: a NaN, data or disk that went away; or a bug
BAD_INPUT = 2
STOPPED = 42  # told to stop (SIGTERM, Ctrl-C); the state is saved
STALLED = 75  # something hangs, or another process is gone; EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # Ctrl-C where nothing is saved: a second one, or in another command


class InputError(ValueError):
    """The user's input is wrong: a path, a key, a file, a size. Commands exit with code 2.

    `details` are lines that a command may print below the message, such as all tensors of a misfit
    of which the message names the first.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = tuple(details)


class RunError(RuntimeError):
    """The run itself failed: a NaN, a full disk. Commands exit with code 1."""


class Stopped(RuntimeError):
    """The run was told to stop, and the same command goes on. Commands exit with code 42."""


def one_line(error: BaseException) -> str:
    """Another library's error as part of our message: its type and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def listed(items: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    """The first few of many as part of a message, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def print_error(error: BaseException) -> int:
    """Prints why a command ends to stderr, a bug with its traceback; returns the exit code."""
    if isinstance(error, Stopped):
        print(f"stopped: {error}", file=sys.stderr)
        return STOPPED
    if isinstance(error, InputError | RunError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return BAD_INPUT if isinstance(error, InputError) else FAILED
