# SPDX-License-Identifier: Apache-2.0
"""Training step compiled for TPUs with each implementation of its blocks. Nothing is executed.

    python -m benchmarks compile --topology=v5e:2x2
    python -m benchmarks compile --implementations pallas --images-per-chip=512

Runs `tnt-flax compile-check` once per implementation: memory, FLOPs and collectives according
to the TPU compiler, which takes some minutes per step. Results depend on the libtpu version.
"""

import argparse
import contextlib
import sys
from typing import Any

from benchmarks import harness
from tnt_flax.core.errors import InputError
from tnt_flax.tools.command_line import positive, read_config

CLASSES = 1000
IMPLEMENTATIONS = {  # fields of config.model
    "reference": {"inner_impl": "reference", "outer_impl": "reference"},
    "lanes": {"inner_impl": "lanes", "outer_impl": "reference"},
    "pallas": {"inner_impl": "pallas", "outer_impl": "pallas"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--topology", default="v5e:2x2", help="TPU kind and chips along each axis")
    add("--config", default="configs/tnt_s.py", help="config of the compiled step")
    add("--images-per-chip", type=positive, default=128, help="images per step and chip")
    names = list(IMPLEMENTATIONS)
    add("--implementations", nargs="+", choices=names, default=names, help="default: all")


def measure_compile(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles the step with each implementation; returns the JSON result.

    Raises:
        InputError: the config or the topology is wrong, the config's network is not a TNT, or
            libtpu is not installed.
    """
    from tnt_flax.tools.compile_check import compile_check, tpu_devices

    config = read_config(args.config)
    if config.model.name.startswith("ptnt_"):
        raise InputError(f"--config={args.config}: {config.model.name} has no implementations")
    config.batch_size = args.images_per_chip * len(tpu_devices(args.topology))
    results = {}
    for name in args.implementations:
        print(name, file=sys.stderr)
        config.model.update(IMPLEMENTATIONS[name])
        with contextlib.redirect_stdout(sys.stderr):  # the last line of stdout is the result
            results[name] = compile_check(config, args.topology, CLASSES)
    return {**results, "versions": harness.versions("jax", "jaxlib", "libtpu")}
