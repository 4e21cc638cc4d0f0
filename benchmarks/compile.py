# SPDX-License-Identifier: Apache-2.0
"""A training step compiled for GPUs or TPUs with each implementation. Nothing is executed.

    python -m benchmarks compile --device=v5e:2x2
    python -m benchmarks compile --device=h100 --implementations reference gpu

Runs `tnt-flax compile-check` once per implementation: figures of the compiler, which
takes some minutes per step. They depend on the versions of libtpu, jax and its CUDA plugin.
"""

import argparse
import contextlib
import sys
from typing import Any

from benchmarks import harness
from tnt_flax.tools.command_line import positive, read_config

CLASSES = 1000
IMPLEMENTATIONS = {  # fields of config.model
    "reference": {"inner_impl": "reference", "outer_impl": "reference"},
    "gpu": {"inner_impl": "gpu", "outer_impl": "gpu"},
    "lanes": {"inner_impl": "lanes", "outer_impl": "reference"},
    "pallas": {"inner_impl": "pallas", "outer_impl": "pallas"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="v5e:2x2", help="see tnt-flax compile-check")
    add("--config", default="configs/tnt_s.py", help="config of the compiled step")
    add("--images", type=positive, default=128, help="images per step and device")
    names = list(IMPLEMENTATIONS)
    default = ["reference", "lanes"]
    add("--implementations", nargs="+", choices=names, default=default, help=" ".join(default))


def measure_compile(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles the step with each implementation; returns the JSON result.

    Raises:
        InputError: the config or the device is wrong, the config's network has no such
            implementation, or the compiler is not installed.
    """
    from tnt_flax.tools.compile_check import compile_check
    from tnt_flax.tools.targets import find_target

    config = read_config(args.config)
    target = find_target(args.device)
    config.batch_size = args.images * len(target.devices)
    results = {}
    for name in args.implementations:
        print(name, file=sys.stderr)
        config.model.update(IMPLEMENTATIONS[name])
        with contextlib.redirect_stdout(sys.stderr):  # the last line of stdout is the result
            results[name] = compile_check(config, target, classes=CLASSES)
    return {**results, "versions": harness.versions("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")}
