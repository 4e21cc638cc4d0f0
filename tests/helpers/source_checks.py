# SPDX-License-Identifier: Apache-2.0
"""Helpers for the tests of data sources."""

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
