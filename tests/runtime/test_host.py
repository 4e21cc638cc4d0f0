# SPDX-License-Identifier: Apache-2.0
"""Settings of the process; tested in subprocesses because they cannot be undone."""

import fnmatch
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.runtime import host


@pytest.mark.parametrize(
    "platforms, device, expected",
    [
        ("cpu", "/dev/accel0", True),
        ("tpu", "/dev/null", False),
        (None, "/dev/null", True),
        (None, "/dev/accel0", False),
        (None, "/dev/vfio/3", False),
        (None, "/dev/vfio/vfio", True),
        (None, "/dev/nvidia1", False),
        (None, "/dev/nvidiactl", True),
    ],
)
def test_runs_on_cpu(platforms, device, expected, monkeypatch):
    monkeypatch.setattr(host.glob, "glob", lambda pattern: fnmatch.filter([device], pattern))
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert host.runs_on_cpu() == expected
    finally:
        jax.config.update("jax_platforms", before)


RESIDENT = """
import numpy as np
from tnt_flax.runtime import host

def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

{call}
before = resident_megabytes()
array = np.ones(25_000_000)  # 200 MB
del array
print(round(resident_megabytes() - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
@pytest.mark.parametrize("call, low, high", [("", 0, 50), ("assert host.keep_memory()", 150, 250)])
def test_freed_memory_stays_with_the_process(root, call, low, high):
    run = [sys.executable, "-c", RESIDENT.format(call=call)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run(run, cwd=root, env=environment, capture_output=True, check=True)
    assert low <= int(out.stdout) <= high


def test_compiled_programs_are_cached(root, tmp_path):
    code = "from tnt_flax.runtime import host; host.cache_compilations(); import jax; "
    code += "import jax.numpy as jnp; "
    code += "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0); "
    code += "print(jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3)))"
    for own in ({}, {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}):
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        run = [sys.executable, "-c", code]
        subprocess.run(run, cwd=root, env=environment | own, capture_output=True, check=True)
    assert list((tmp_path / "cache" / "tnt_flax" / "compiled").iterdir())
    assert list((tmp_path / "own").iterdir())


def test_no_home_folder_means_no_cache_and_one_line(monkeypatch, caplog):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(host, "cache_folder", lambda: None)
    before = jax.config.jax_compilation_cache_dir
    host.cache_compilations()
    assert jax.config.jax_compilation_cache_dir == before
    (line,) = caplog.messages
    assert line.startswith("compiled programs are not cached: ") and "XDG_CACHE_HOME" in line


def test_out_of_memory_names_the_keys_that_help():
    with pytest.raises(RunError) as error, host.explain_device_errors():
        jax.block_until_ready(jax.jit(lambda: jnp.zeros(2**45))())
    text = str(error.value)
    assert text.startswith("out of memory on the device (JaxRuntimeError: RESOURCE_EXHAUSTED")
    assert "\n" not in text
    for key in ("batch_size", "accumulate", "model.remat", "mesh.fsdp", "eval.batch_size"):
        assert key in text
    for message, known in (
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in hbm", True),
        ("INTERNAL: CUDA error: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        ("RESOURCE_EXHAUSTED: Received message larger than max (5 vs. 4)", False),
    ):
        with pytest.raises(RunError if known else jax.errors.JaxRuntimeError):
            with host.explain_device_errors():
                raise jax.errors.JaxRuntimeError(message)
    with pytest.raises(InputError, match="deterministic=True needs another version of jaxlib"):
        with host.explain_device_errors():
            jax.jit(lambda: 0, compiler_options={"xla_gpu_no_such_option": True})()
    with pytest.raises(ZeroDivisionError), host.explain_device_errors():
        raise ZeroDivisionError


def test_compilations_are_kept_in_a_folder_and_the_settings_restored(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with host.keep_compilations(tmp_path / "compiled"):
        jax.jit(lambda x: jnp.cos(x) - 3)(1.0)
    assert list((tmp_path / "compiled").iterdir())
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize(
    "device, platforms, warns",
    [("/dev/nvidia0", None, True), ("/dev/nvidia0", "cpu", False), ("/dev/kvm", None, False)],
)
def test_an_unused_gpu_is_a_warning(device, platforms, warns, monkeypatch, caplog):
    monkeypatch.setattr(host.glob, "glob", lambda pattern: fnmatch.filter([device], pattern))
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        host.warn_of_unused_gpu()
    finally:
        jax.config.update("jax_platforms", before)
    assert ('pip install "tnt_flax[cuda]"' in caplog.text) == warns
