# SPDX-License-Identifier: Apache-2.0
"""Start-up of several processes, and checks that they are consistent."""

import re
import socket
import subprocess
import sys

import jax
import pytest

from tests.helpers.processes import finish, free_port, start
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.runtime import processes


@pytest.fixture
def initialize(monkeypatch):
    """Returns the calls of `jax.distributed.initialize`, which is replaced."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    for name in ("SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_single_process_does_not_initialize_distributed(initialize):
    processes.start()
    processes.start(num_processes=1)
    processes.start("10.0.0.1:8476", 1, 0)
    assert not initialize
    assert processes.is_main_process() and processes.hosts() == [socket.gethostname()]
    assert processes.all_gather_strings("x", "y", 1) == ["y"]
    assert processes.sum_over_processes(3) == 3
    assert processes.run_on_main("x", lambda: 5) == 5


@pytest.mark.parametrize(
    "given, message",
    [
        (("10.0.0.1:8476", None, None), "also needs --num-processes and --process-id"),
        ((None, 2, 1), "also needs --coordinator"),
        (("10.0.0.1", 2, 1), "--coordinator=10.0.0.1 is not HOST:PORT"),
        (("10.0.0.1:http", 2, 1), "--coordinator=10.0.0.1:http is not HOST:PORT"),
        (("10.0.0.1:70000", 2, 1), "is not HOST:PORT"),
        (("10.0.0.1:8476", 2, 2), "--process-id=2 is not in 0 to 1"),
    ],
)
def test_incomplete_or_invalid_flags(initialize, given, message):
    with pytest.raises(InputError, match=message):
        processes.start(*given)
    assert not initialize


@pytest.mark.parametrize(
    "host, environment, expected",
    [
        ("10.0.0.1", {}, "10.0.0.1"),
        ("localhost", {}, "127.0.0.1"),
        ("node1", {"SLURM_STEP_NUM_NODES": "1"}, "127.0.0.1"),
        ("node1", {"SLURM_STEP_NUM_NODES": "2"}, "node1"),
        ("node1", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "127.0.0.1"),
    ],
)
def test_a_single_host_binds_the_loopback_interface(
    initialize, monkeypatch, caplog, host, environment, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    caplog.set_level("INFO", "tnt_flax")
    processes.start(f"{host}:8476", 2, 1, timeout=7)
    ((arguments, options),) = initialize
    address = f"{expected}:8476"
    assert arguments == (address, 2, 1)
    bind_address = address if expected == "127.0.0.1" else None
    assert options["coordinator_bind_address"] == bind_address
    assert caplog.messages == [
        f"process 1 of 2: waiting up to 7 s for the other processes at {address}"
    ]


# The variables that `srun` of Slurm sets on the second of two hosts.
SLURM = {"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_STEP_NUM_NODES": "2"}


@pytest.fixture
def slurm(monkeypatch):
    """Function that sets the variables of a Slurm process."""

    def set_variables(tasks, process, local, gpus=""):
        numbers = {"SLURM_NTASKS": tasks, "SLURM_PROCID": process, "SLURM_LOCALID": local}
        variables = SLURM | {name: str(number) for name, number in numbers.items()}
        for name, value in (variables | {"CUDA_VISIBLE_DEVICES": gpus}).items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    "tasks, process, local, gpus, expected",
    [
        (2, 1, 0, "0,1,2,3", None),  # one process per host: all cards
        (8, 6, 2, "0,1,2,3", [2]),  # one process per card; each sees all cards
        (8, 6, 2, "0", None),  # one per card, which is all it sees: --gpus-per-task=1
        (4, 3, 1, "", [1]),  # no GPUs, or all of the host
    ],
)
def test_a_process_of_slurm_gets_its_gpus(initialize, slurm, tasks, process, local, gpus, expected):
    slurm(tasks, process, local, gpus)
    processes.start()
    ((arguments, options),) = initialize
    assert arguments == ("node01:62344", tasks, process)
    assert options["local_device_ids"] == expected


def test_more_processes_than_gpus_on_a_host(initialize, slurm):
    slurm(16, 14, 6, "0,1,2,3")
    with pytest.raises(InputError, match="no GPU is left for process 6 of this host: 4 are"):
        processes.start()


def test_a_single_process_of_slurm_is_not_distributed(initialize, slurm):
    slurm(1, 0, 0)
    processes.start()
    assert not initialize


def test_a_launcher_with_missing_variables(initialize, monkeypatch):
    from jax._src.clusters import ClusterEnv

    def fail(*args):
        raise KeyError("SLURM_NTASKS")

    monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", fail)
    with pytest.raises(RunError, match="settings of this process's launcher: KeyError"):
        processes.start()


def test_the_program_digest_covers_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "__file__", str(tmp_path / "runtime" / "processes.py"))
    digests = set()
    for text in ("a", "b"):
        (tmp_path / "x.py").write_text(text)
        digests.add(processes._source_digest())
    assert len(digests) == 2


def run_two_processes(root, folder, *arguments):
    """Runs tests/helpers/multiprocess.py twice; returns the exit codes, stdouts and stderrs."""
    script, port = root / "tests" / "helpers" / "multiprocess.py", str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, script, folder, port, "2", str(process), *arguments],
            cwd=root,
            env={"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    return zip(*finish(started, 120), strict=True)


@pytest.mark.slow
def test_two_processes_compare_their_values(root, tmp_path):
    codes, outs, errs = run_two_processes(root, tmp_path)
    assert codes == (0, 0), errs
    first, second = (
        dict(line.split(": ", 1) for line in out.splitlines() if not line.startswith("[Gloo]"))
        for out in outs
    )
    host = first["not shared"].split("process 1 (")[1].split(")")[0]
    for result in (first, second):
        assert result["program"] == result["same"] == result["shared"] == "None", errs
        assert result["different"] == (
            f"InputError: process 1 ({host}) differs from process 0 ({host}) in its config: "
            "a.b: 0 -> 1"
        )
        assert f"process 1 ({host}) does not see the workdir {tmp_path}/" in result["not shared"]
        assert result["main fails"] == "RunError: the disk is full"
        assert result["sum"] == "3"
        assert result["main returns"] == "done"
    timed_out = f"timed out after 1 s waiting for process 1 ({host}) to report its value"
    assert first["late"] == f"RunError: {timed_out}"
    assert second["late"] == "['x', 'x']"


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, code, message, cause",
    [
        ("input", 2, "error: bad", "InputError: bad"),
        ("bug", 1, "ZeroDivisionError: bug", "ZeroDivisionError: bug"),
        ("memory", 1, "RESOURCE_", "RESOURCE_"),
        (
            "connection",
            75,
            "error: the connection to another process broke after step 4; it may be dead: see its",
            "the connection to another process broke after step 4",
        ),
    ],
)
def test_a_failure_in_one_process_ends_all(root, tmp_path, error, code, message, cause):
    codes, outs, errs = run_two_processes(root, tmp_path, error)
    assert codes == (code, code), errs
    assert message in errs[1]
    assert re.search(rf"^error: process 1 \(\S+\) ended the run: .*{cause}", errs[0], re.MULTILINE)
    assert errs[0].count("ended the run") == 1


@pytest.mark.slow
def test_the_start_timeout_lists_the_missing_processes(root, tmp_path):
    (process, _) = started = start(root, tmp_path, ["--start-timeout=4"], 2, 1)
    started[1].kill()
    ((code, out, err),) = finish([process])
    finish(started[1:])
    assert (code, out) == (1, "")
    assert "error: timed out after 4 s waiting for 2 processes at localhost:" in err
    assert f": process 1 did not start or does not see {tmp_path}" in err
    assert "Traceback" not in err
