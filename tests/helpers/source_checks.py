# SPDX-License-Identifier: Apache-2.0
"""Helpers for the tests of data sources."""

import time

import pytest

from tnt_flax.core.errors import InputError


def records(source):
    """Returns all records of a source."""
    return [source[i] for i in range(len(source))]


def message_of(make):
    """Returns the message of the InputError that `make` raises, after checking it is one line."""
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def wait_until(condition, seconds=30):
    """Waits for a condition and returns whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()
