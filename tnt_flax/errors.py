# SPDX-License-Identifier: Apache-2.0
"""The two ways a command ends badly. Each message is one line: what, where, and what to do."""


class InputError(ValueError):
    """The user's input is wrong: a path, a key, a file, a size. Commands exit with code 2."""


class RunError(RuntimeError):
    """The run itself failed: a NaN, a full disk. Commands exit with code 1."""
