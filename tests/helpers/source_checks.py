# SPDX-License-Identifier: Apache-2.0
"""What the tests of all data sources ask."""

import pytest

from tnt_flax.core.errors import InputError


def records(source):
    return [source[i] for i in range(len(source))]


def message_of(make):
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert message and "\n" not in message
    return message
