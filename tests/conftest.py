# SPDX-License-Identifier: Apache-2.0
"""Tests run on eight virtual CPU devices and raise on implicit rank promotion.

With TNT_FLAX_NO_SKIPS=1, as in CI, a skipped test is a failure.
"""

import atexit
import json
import logging
import os
import pathlib
import shutil
import signal
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile for TPUs in several processes at once; libtpu would lock out all but one.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Shared by this process and the processes that it starts: they compile the same small steps.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tnt_flax_compiled_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import PIL.Image
import pytest

from tests.helpers.smoke import SMOKE
from tnt_flax.tools.command_line import setup_logging

jax.config.update("jax_num_cpu_devices", 8)
# Compilation takes most of the time. Commands started by tests, and oracle tests, do optimize.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
setup_logging()  # log messages go to stderr, as in the commands
logging.getLogger("tnt_flax").propagate = True  # and to caplog


signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests send it; nohup ignores it

NO_SKIPS = os.environ.get("TNT_FLAX_NO_SKIPS") == "1"


def _fail_if_skipped(report):
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped although TNT_FLAX_NO_SKIPS=1: {report.longrepr[-1]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _fail_if_skipped((yield))


@pytest.fixture
def smoke_config():
    """Function that returns the shrunk digits config, with overrides such as data__threads=1."""
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
    """Command-line flags of the shrunk digits config."""
    return [f"--config.{key}={value}" for key, value in SMOKE.items()]


@pytest.fixture
def record_property(record_property):
    """Records NumPy's numbers as Python's, because pytest-xdist cannot send them."""
    plain = lambda value: json.loads(json.dumps(value, default=lambda x: x.item()))
    return lambda name, value: record_property(name, plain(value))


@pytest.fixture
def unprivileged_folder():
    """Temporary folder and effective user other than root, to whom every file is readable."""
    PIL.Image.init()  # imports its plugins, from folders that the other user may not read
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(65534)  # nobody
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)
    finally:
        if privileged:
            os.seteuid(0)


@pytest.fixture
def root() -> pathlib.Path:
    """Folder of the checkout."""
    return pathlib.Path(__file__).parents[1]


@pytest.fixture
def cuda_plugin():
    """Environment of a process that finds the plugin, which `make test-all` installs apart."""
    folder = pathlib.Path(sys.prefix) / "cuda"
    if not folder.is_dir():
        pytest.skip("JAX's CUDA plugin is not installed: make test-all")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
