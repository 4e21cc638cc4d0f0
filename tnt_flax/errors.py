# SPDX-License-Identifier: Apache-2.0
"""The ways a command ends early. Each message is one line: what, where, and what to do."""

from collections.abc import Sequence


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
