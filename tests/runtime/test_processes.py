# SPDX-License-Identifier: Apache-2.0
"""Processes find each other or say whom they miss, and agree or say who differs."""

import socket
import subprocess
import sys

import jax
import pytest

from tests.helpers.processes import finish, free_port, start
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.runtime import agreement, processes


@pytest.fixture
def initialize(monkeypatch):
    """What JAX is asked to start, which it does not."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    for name in ("SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_one_process_starts_nothing(initialize):
    processes.start()
    processes.start(num_processes=1)
    processes.start("10.0.0.1:8476", 1, 0)
    assert not initialize
    assert processes.is_main() and processes.hosts() == [socket.gethostname()]
    assert processes.exchange("x", "y", 1) == ["y"]
    assert processes.total(3) == 3
    assert processes.on_main("x", lambda: 5) == 5


@pytest.mark.parametrize(
    "given, message",
    [
        (("10.0.0.1:8476", None, None), "also needs --num-processes and --process-id"),
        ((None, 2, 1), "also needs --coordinator"),
        (("10.0.0.1", 2, 1), "--coordinator=10.0.0.1 is not HOST:PORT"),
        (("10.0.0.1:http", 2, 1), "--coordinator=10.0.0.1:http is not HOST:PORT"),
        (("10.0.0.1:70000", 2, 1), "is not HOST:PORT"),
        (("10.0.0.1:8476", 2, 2), "--process-id=2 is not one of 0 to 1"),
    ],
)
def test_incomplete_flags(initialize, given, message):
    with pytest.raises(InputError, match=message):
        processes.start(*given)
    assert not initialize


@pytest.mark.parametrize(
    "host, environment, address, bind",
    [
        ("10.0.0.1", {}, "10.0.0.1:8476", None),
        ("localhost", {}, "127.0.0.1:8476", "127.0.0.1:8476"),
        ("node1", {"SLURM_STEP_NUM_NODES": "1"}, "127.0.0.1:8476", "127.0.0.1:8476"),
        ("node1", {"SLURM_STEP_NUM_NODES": "2"}, "node1:8476", None),
        (
            "node1",
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            "127.0.0.1:8476",
            "127.0.0.1:8476",
        ),
    ],
)
def test_on_one_host_only_loopback_listens(
    initialize, monkeypatch, capsys, host, environment, address, bind
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start(f"{host}:8476", 2, 1, timeout=7)
    ((arguments, options),) = initialize
    assert arguments == (address, 2, 1)
    assert options["coordinator_bind_address"] == bind
    assert capsys.readouterr().err == (
        f"process 1 of 2 waits for the others at {address}, at most 7 s\n"
    )


def test_a_launcher_that_jax_knows(initialize, monkeypatch):
    """The variables are those of Slurm, as `srun` sets them."""
    for name, value in {
        "SLURM_JOB_ID": "5000",
        "SLURM_STEP_NODELIST": "node[01-02]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    processes.start()
    ((arguments, options),) = initialize
    assert arguments == ("node01:62344", 2, 1) and options["local_device_ids"] == [0]
    monkeypatch.setenv("SLURM_NTASKS", "1")  # an interactive shell, for instance
    processes.start()
    assert len(initialize) == 1


def test_what_a_launcher_says_wrong(initialize, monkeypatch):
    from jax._src.clusters import ClusterEnv

    def fail(*args):
        raise KeyError("SLURM_NTASKS")

    monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", fail)
    with pytest.raises(RunError, match="launcher of this process cannot be understood: KeyError"):
        processes.start()


def test_an_error_of_the_main_process_is_everybodys():
    def fail():
        raise InputError("no room")

    with pytest.raises(InputError, match="no room"):
        processes.on_main("room", fail)


def test_the_source_is_part_of_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "__file__", str(tmp_path / "runtime" / "agreement.py"))
    digests = set()
    for text in ("a", "b"):
        (tmp_path / "x.py").write_text(text)
        digests.add(agreement._source_digest())
    assert len(digests) == 2


@pytest.mark.slow
def test_two_processes_agree_or_say_who_differs(root, tmp_path):
    port, script = free_port(), root / "tests" / "agreeing.py"
    started = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, str(port), "2", str(process)],
            cwd=root,
            env={"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    results = finish(started, 120)
    said = [
        dict(line.split(" ", 1) for line in out.splitlines() if not line.startswith("[Gloo]"))
        for _, out, _ in results
    ]
    host = said[0]["apart"].split("process 1 (")[1].split(")")[0]
    for both in said:
        assert both["program"] == both["same"] == both["shared"] == "None", results
        assert both["other"] == (
            f"InputError: process 1 ({host}) differs from process 0 ({host}) in its config: "
            "a.b: 0 -> 1"
        )
        assert f"process 1 ({host}) does not see the workdir {tmp_path}/" in both["apart"]
        assert both["fails"] == "RunError: the disk is gone"
        assert both["total"] == "3"
        assert both["without"] == "['é', 'éé']"
    assert [both["does"] for both in said] == ["done", "None"]
    assert said[0]["late"] == f"RunError: process 1 ({host}) did not tell its late within 1 s"
    assert said[1]["late"] == "['x', 'x']"


@pytest.mark.slow
def test_who_waits_in_vain_says_for_whom(root, tmp_path):
    (process, _) = started = start(root, tmp_path, ["--start-timeout=4"], 2, 1)
    started[1].kill()
    ((code, out, err),) = finish([process])
    finish(started[1:])
    assert (code, out) == (1, "")
    assert "error: not all 2 processes met at localhost:" in err
    assert f"within 4 s: process 1 did not start, or does not see {tmp_path}" in err
    assert "Traceback" not in err
