# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from tnt_flax.core.errors import InputError
from tnt_flax.weights.formats import torch


@pytest.fixture
def read(tmp_path):
    """Reads a file with these bytes."""

    def run(content: bytes):
        path = tmp_path / "x.pth"
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return torch.read(path)

    return run


@pytest.fixture
def refused(read, tmp_path):
    """The file is refused, in one line that begins with its name and then says `why`."""

    def check(content: bytes, why: str):
        with pytest.raises(InputError) as error:
            read(content)
        message = str(error.value)
        assert "\n" not in message and len(message) < 400 + len(str(tmp_path))
        assert message.startswith(str(tmp_path / "x.pth") + " ") and re.search(why, message)

    return check
