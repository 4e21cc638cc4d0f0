# SPDX-License-Identifier: Apache-2.0
"""Every test runs on eight virtual CPU devices, with jax's silent conveniences turned off."""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The same small steps are compiled again and again, by this process and by those that it starts.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tnt_flax_compiled_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

from tests.helpers.smoke import SMOKE

jax.config.update("jax_num_cpu_devices", 8)
# Most of a test's time is compiling. The commands that tests start, and the oracle's, optimize.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def smoke_config():
    """Returns a function: the digits config, shrunk, with overrides such as data__threads=1."""
    from configs import digits

    def make(**overrides):
        config = digits.get_config()
        config.update_from_flattened_dict(
            SMOKE | {k.replace("__", "."): v for k, v in overrides.items()}
        )
        return config

    return make


@pytest.fixture
def smoke_flags():
    """The same as command-line flags."""
    return [f"--config.{key}={value}" for key, value in SMOKE.items()]


@pytest.fixture
def root() -> pathlib.Path:
    return pathlib.Path(__file__).parents[1]
