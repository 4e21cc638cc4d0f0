# SPDX-License-Identifier: Apache-2.0
"""Runs of two processes, disturbed: all end, alike and with the cause, and go on to the same end.

tests/helpers/chaos.py tries more of them, and single processes.
"""

import json
import re

import pytest

from tests.helpers.processes import finish, start
from tnt_flax.runtime import checkpoints
from tnt_flax.training.metrics import read_metrics_file

KEYS = {"eval.every": "10 steps", "checkpoint.every": "8 steps", "eval.batch_size": 60}


@pytest.fixture
def run(root, smoke_flags):
    """Returns a function: the exit codes, last lines and stderr of a run in `workdir`.

    That is by two processes of a device, or as `layout` says."""
    flags = [*smoke_flags, *[f"--config.{key}={value}" for key, value in KEYS.items()]]

    def run(workdir, fault=None, more=(), layout=(2, 1)):
        env = {"FAULT": json.dumps(fault)}
        started = start(root, workdir, [*flags, *more], *layout, "tests/helpers/faulty.py", env)
        codes, outs, errs = zip(*finish(started), strict=True)
        return list(codes), outs, errs

    return run


@pytest.mark.soak
def test_two_processes_stop_fail_and_go_on_as_one(run, tmp_path):
    codes, outs, errs = run(tmp_path / "whole")
    assert codes == [0, 0], errs
    whole = json.loads(outs[0].splitlines()[-1])

    # One process of two devices, which share what is stored: two numbers have but one sum.
    codes, outs, errs = run(tmp_path / "alone", more=["--config.mesh.fsdp=2"], layout=(1, 2))
    assert codes == [0], errs
    assert json.loads(outs[0].splitlines()[-1])["fingerprint"] == whole["fingerprint"]

    # A notice to one of them, in an evaluation: both save its step and leave.
    codes, outs, errs = run(tmp_path / "run", {"process": 1, "at": "batch 2 ", "do": "SIGTERM"})
    assert codes == [42, 42], errs
    last = checkpoints.find_checkpoint(tmp_path / "run" / "checkpoints", "last").name
    assert 10 <= int(last) < 20
    for err in errs:
        assert f"stopped: step {last} is saved; the same command goes on from there" in err

    # A bug in one of them: both end and say so, none waits for the other.
    codes, outs, errs = run(tmp_path / "run", {"process": 1, "at": "step 22 ", "do": "raise"})
    assert codes == [1, 1], errs
    assert "Traceback" in errs[1] and "ZeroDivisionError: an injected bug" in errs[1]
    assert re.search(r"error: process 1 \(\S+\) ended the run: ZeroDivisionError: an", errs[0])

    # The last checkpoint is damaged: one finds out, both take the one before.
    last = checkpoints.find_checkpoint(tmp_path / "run" / "checkpoints", "last")
    array = max((last / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    array.write_bytes(array.read_bytes()[:-1])
    codes, outs, errs = run(tmp_path / "run")
    assert codes == [0, 0], errs
    assert f"{last} is damaged" in errs[0] and "damaged" not in errs[1]
    assert json.loads(outs[0].splitlines()[-1]) == whole
    lines = read_metrics_file(tmp_path / "run" / "metrics.jsonl")
    assert [m["step"] for m in lines if "eval/top1" in m] == [10, 20, 29]
