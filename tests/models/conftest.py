# SPDX-License-Identifier: Apache-2.0
import jax
import pytest


@pytest.fixture(autouse=True)
def full_precision(request):
    """Computes in full precision. Programs compiled for TPUs keep the default of users."""
    compiles = request.node.get_closest_marker("tpu_compiler")
    with jax.default_matmul_precision(None if compiles else "highest"):
        yield
