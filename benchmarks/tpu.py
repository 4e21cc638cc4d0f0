# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler says of TNT-S's training step, with each implementation of its blocks.

    python -m benchmarks compile --topology=v5e:2x2
    python -m benchmarks compile --implementations pallas

A whole step takes the compiler some minutes, that of the plain form the most. Nothing runs: these
are estimates, of two kinds that must not be mixed. `estimated_cycles` are the whole step's and have
nothing for kernels written in Pallas: `kernel_calls` says how often a step starts one, and
`kernel_bundles` how many instructions a chip issues in them, without waits. `inner_bundles` are
those of the forward pass of one inner block, in whatever it is written. See
`tnt_flax.tools.tpu_compiler`.
"""

import argparse
import functools
import sys
from typing import Any

from ml_collections import ConfigDict

from benchmarks.synthetic_run import read_config
from tnt_flax.core.errors import InputError

IMAGES, MANY = 128, 512  # on each chip
CLASSES = 1000
# Fields of TNT. Of them "auto" is what a TPU gets by itself.
IMPLEMENTATIONS = {
    "reference": {"inner": "reference", "outer": "reference"},
    "lanes": {"inner": "lanes", "outer": "auto"},
    "pallas": {"inner": "pallas", "outer": "auto"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", default="v5e:2x2", help="TPU kind and chips, as v5e:2x2")
    parser.add_argument("--config", default="configs/tnt_s.py", help="whose step is compiled")
    names = list(IMPLEMENTATIONS)
    parser.add_argument("--implementations", nargs="+", choices=names, default=names)


def measure_compile(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles the step with these implementations; returns what the JSON line says.

    Raises:
        InputError: no such config or topology, no TNT, or libtpu is not installed.
    """
    from tnt_flax.tools import tpu_compiler

    network = read_config(args.config).model.name
    if network.startswith("ptnt_"):
        raise InputError(f"--config={args.config}: {network} has no implementations to compare")
    chips = len(tpu_compiler.devices(args.topology)[1])
    found = {}
    for name in args.implementations:
        fields = IMPLEMENTATIONS[name]
        step = compile_step(args, fields, IMAGES * chips)
        print(f"{name}: {step}", file=sys.stderr)
        count = functools.partial(tpu_compiler.count_bundles, topology=args.topology)
        make = functools.partial(make_forward, args.config, fields)
        bundles = {"inner_bundles": count(make, within="/inner/"), "kernel_bundles": 0}
        if step["kernel_calls"]:
            make = functools.partial(make_step, args.config, fields)
            bundles["kernel_bundles"] = count(make, within="/pallas_call")
        print(f"{name}: {bundles}", file=sys.stderr)
        found[name] = step | bundles
    many = compile_step(args, fields, MANY * chips)  # with the last, by default the best one
    print(f"{name} with {MANY} images a chip: {many}", file=sys.stderr)
    return {
        **found,
        f"fits_{MANY}": many["fits"],
        "topology": args.topology,
        "images_per_chip": IMAGES,
    }


def compile_step(args: argparse.Namespace, fields: dict[str, str], images: int) -> dict[str, Any]:
    from tnt_flax.tools import hlo, tpu_compiler

    config = make_config(args.config, fields, images)
    compiled = tpu_compiler.compile_train_step(config, CLASSES, args.topology)
    return {
        "fits": compiled.fits,
        "temporaries_gib": round(compiled.temporaries_gib, 3),
        "estimated_cycles": compiled.hlo and hlo.estimated_cycles(compiled.hlo),
        "kernel_calls": compiled.hlo and hlo.kernel_calls(compiled.hlo),
        "compile_s": round(compiled.compile_s, 1),
    }


def make_forward(path: str, fields: dict[str, str]):
    """The forward pass of a network of one block, and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp

    from tnt_flax.core.trees import split
    from tnt_flax.training import experiment

    config = make_config(path, fields | {"depth": 1}, IMAGES)
    model = experiment.build_model(config, CLASSES)
    params = jax.eval_shape(experiment.init_params(model, config), jax.random.key(0))
    size = config.data.image_size
    images = jax.ShapeDtypeStruct((IMAGES, size, size, 3), jnp.float32)
    return (lambda params, images: model.apply(split(params), images)), (params, images)


def make_step(path: str, fields: dict[str, str]):
    """The training step of one chip, and the shapes of its arguments."""
    from tnt_flax.tools import tpu_compiler

    return tpu_compiler.train_step(make_config(path, fields, IMAGES), CLASSES)


def make_config(path: str, fields: dict[str, Any], images: int) -> ConfigDict:
    """The config of the file at `path` with other fields of the network and another batch."""
    config = read_config(path)
    config.batch_size = images
    with config.unlocked():
        config.model.update(fields)
    return config
