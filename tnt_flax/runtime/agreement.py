# SPDX-License-Identifier: Apache-2.0
"""What all processes of a run must have in common before it begins, and who has not."""

import contextlib
import hashlib
import json
import pathlib
import time
import uuid
from typing import Any

import jax

from tnt_flax.core.errors import InputError, listed
from tnt_flax.core.files import write_atomic
from tnt_flax.runtime.processes import PATIENCE, exchange, is_main, name_of
from tnt_flax.runtime.workdir import differences


def agree(what: str, values: dict[str, Any], timeout: float = PATIENCE) -> None:
    """Every process must say the same `values`, which are nested dictionaries of JSON values.

    Raises:
        InputError: on every process alike, with who differs from process 0, and in what.
        RunError: see `distributed.exchange`.
    """
    answers = [json.loads(answer) for answer in exchange(what, json.dumps(values), timeout)]
    for process, answer in enumerate(answers):
        if found := differences(answers[0], answer):
            raise InputError(
                f"process {name_of(process)} differs from process {name_of(0)} in its {what}: "
                f"{listed(found, separator='; ')}"
            )


def agree_on_program(timeout: float = PATIENCE) -> None:
    """All processes run the same code on as many devices of the same kind. Raises as `agree`."""
    devices = jax.local_devices()
    program = {
        "tnt_flax": _source_digest(),
        "jax": jax.__version__,
        "devices": f"{len(devices)} {devices[0].device_kind}",
    }
    agree("program", program, timeout)


def _source_digest() -> str:
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_shared(workdir: pathlib.Path, timeout: float = PATIENCE) -> None:
    """All hosts see the same folder `workdir`, which process 0 has made.

    Raises:
        InputError: on every process alike, naming who does not see it.
        RunError: see `distributed.exchange`.
    """
    token = workdir / ".token"
    if is_main():
        write_atomic(token, uuid.uuid4().hex)
    mine = token.read_text() if is_main() else ""
    expected = exchange("workdir token", mine, timeout)[0]
    seen = _wait_for(token, expected, timeout)
    answers = exchange("view of the workdir", "yes" if seen else "no", 2 * timeout)
    blind = [name_of(process) for process, answer in enumerate(answers) if answer == "no"]
    if blind:
        raise InputError(
            f"process {listed(blind)} does not see the workdir {workdir} of process {name_of(0)}: "
            "it must be a folder that all hosts share"
        )


def _wait_for(path: pathlib.Path, text: str, timeout: float) -> bool:
    """Does a file come to hold `text`? Network file systems show what others write with delay."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return True
        time.sleep(0.1)
    return False
