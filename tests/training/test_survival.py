# SPDX-License-Identifier: Apache-2.0
"""Failures in runs of two processes: all processes end with the cause, and resume bit-identical.

tests/helpers/chaos.py injects more faults, in runs of one and two processes.
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
    """Function that returns exit codes, stdout and stderr of all processes of a run.

    `layout` is (processes, devices per process).
    """
    flags = [*smoke_flags, *[f"--config.{key}={value}" for key, value in KEYS.items()]]

    def run(workdir, fault=None, more=(), layout=(2, 1)):
        env = {"FAULT": json.dumps(fault)}
        started = start(root, workdir, [*flags, *more], *layout, "tests/helpers/faulty.py", env)
        codes, outs, errs = zip(*finish(started), strict=True)
        return list(codes), outs, errs

    return run


@pytest.mark.soak
def test_two_processes_stop_fail_and_resume_together(run, tmp_path):
    codes, outs, errs = run(tmp_path / "undisturbed")
    assert codes == [0, 0], errs
    expected = json.loads(outs[0].splitlines()[-1])

    # One process of two devices runs the same program. Other meshes agree up to rounding, see
    # tests/runtime/test_sharding.py.
    codes, outs, errs = run(tmp_path / "alone", layout=(1, 2))
    assert codes == [0], errs
    assert json.loads(outs[0].splitlines()[-1])["fingerprint"] == expected["fingerprint"]

    # A signal to one process, in an evaluation: both save that step and exit.
    codes, outs, errs = run(tmp_path / "run", {"process": 1, "at": "batch 2 ", "do": "SIGTERM"})
    assert codes == [42, 42], errs
    last = checkpoints.find_checkpoint(tmp_path / "run" / "checkpoints", "last").name
    assert 10 <= int(last) < 20
    for err in errs:
        assert f"stopped: step {last} is saved; the same command resumes from there" in err

    # A bug in one process: both exit with the cause, and neither waits for the other.
    codes, outs, errs = run(tmp_path / "run", {"process": 1, "at": "step 22 ", "do": "raise"})
    assert codes == [1, 1], errs
    assert "Traceback" in errs[1] and "ZeroDivisionError: an injected bug" in errs[1]
    assert re.search(r"error: process 1 \(\S+\) ended the run: ZeroDivisionError: an", errs[0])

    # The last checkpoint is damaged: process 0 finds out, both take the one before.
    last = checkpoints.find_checkpoint(tmp_path / "run" / "checkpoints", "last")
    array = max((last / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    array.write_bytes(array.read_bytes()[:-1])
    codes, outs, errs = run(tmp_path / "run")
    assert codes == [0, 0], errs
    assert f"{last} is damaged" in errs[0] and "damaged" not in errs[1]
    assert json.loads(outs[0].splitlines()[-1]) == expected
    lines = read_metrics_file(tmp_path / "run" / "metrics.jsonl")
    assert [m["step"] for m in lines if "eval/top1" in m] == [10, 20, 29]
