# SPDX-License-Identifier: Apache-2.0
"""What a run computes on: versions and devices, which it leaves in its workdir when it starts."""

import contextlib
import datetime
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import jax

from tnt_flax.core.files import write_atomic
from tnt_flax.runtime import processes

FILE = "environment.json"
PACKAGES = (
    "tnt_flax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
)


def describe() -> dict[str, Any]:
    """This run's environment, as process 0 sees it. All processes must ask."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a mere checkout
            versions[name] = importlib.metadata.version(name)
    return versions | {
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "hosts": len(set(processes.hosts())),
        "machine": platform.platform(),
    }


def record(workdir: pathlib.Path, step: int, environment: dict[str, Any]) -> None:
    """Writes down that the run goes on from `step` in `environment`, where that is another one.

    Steps that are done again count for the environment that does them again.
    """
    starts = [start for start in read(workdir) if start["step"] < step]
    if not starts or starts[-1]["environment"] != environment:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        starts.append({"step": step, "time": now, "environment": environment})
    write_atomic(workdir / FILE, json.dumps(starts, indent=1), fsync=True)


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What `record` wrote, by step; empty for a run that has left nothing that can be read."""
    try:
        return json.loads((workdir / FILE).read_text())
    except (OSError, ValueError):
        return []
