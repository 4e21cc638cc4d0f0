# SPDX-License-Identifier: Apache-2.0
import jax
import pytest


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield
