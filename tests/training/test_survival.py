# SPDX-License-Identifier: Apache-2.0
"""Failures in runs of two processes: all processes end with the cause, and resume bit-identical.

`python tests/helpers/chaos.py` injects more faults, in runs of one and two processes.
"""

import pytest

from tests.helpers import chaos


@pytest.mark.soak
def test_two_processes_stop_or_fail_and_resume_together():
    """One undisturbed run serves all faults."""
    faults = ("SIGTERM at batch 2 of", "a bug in process 1", "truncate a file")
    rows = chaos.try_all("|".join(f"{fault}, 2" for fault in faults))
    assert [row["bit_identical"] for row in rows] == [True] * len(faults), rows


@pytest.mark.soak
def test_two_processes_equal_one_process_of_two_devices(tmp_path):
    """Other meshes agree up to rounding, see tests/runtime/test_sharding.py."""
    two = chaos.Run(tmp_path / "two", 2).result()
    one = chaos.Run(tmp_path / "one", devices=2).result()
    assert one["fingerprint"] == two["fingerprint"]
