# SPDX-License-Identifier: Apache-2.0
"""Compiles the training step of a config for a TPU pod, without a TPU: does it fit, what is sent?

    python -m tnt_flax.tools.compile_check --config=configs/tnt_b.py --topology=v5e:16x16
    python -m tnt_flax.tools.compile_check --config=configs/tnt_s.py --topology=v5p:2x2x1 \\
        --config.batch_size=512

Needs `pip install "tnt_flax[tpu]"`, reads no data, and takes a minute or two. What it prints is
what the compiler says: nothing runs. The last line on stdout is one JSON object. Exit code 1 means
that the step does not fit into the chips' memory, 2 is bad input.
"""

import os
import sys
from typing import Any

from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError
from tnt_flax.tools.command_line import Parser, positive, run
from tnt_flax.training.config import check_config


def make_parser() -> Parser:
    parser = Parser("python -m tnt_flax.tools.compile_check", __doc__, takes_config=True)
    parser.add_argument("--topology", help="kind of TPU and chips along each axis, such as v5e:4x4")
    parser.add_argument("--classes", type=positive, default=1000, metavar="N", help="classes")
    return parser


def main(argv: list[str] | None = None) -> int:
    def command(args):
        os.environ["JAX_PLATFORMS"] = "cpu"  # on a TPU machine, too: its chips are left alone
        return compile_check(args.config, args.topology, args.classes)

    return run(make_parser(), command, argv, failed=lambda result: not result["fits"])


def compile_check(config: ConfigDict, topology: str | None, classes: int = 1000) -> dict[str, Any]:
    """Prints what the compiler says of the step; returns what the JSON line says.

    Raises:
        InputError: the config or the topology is wrong, or libtpu is not installed.
    """
    from tnt_flax.tools import hlo, tpu_compiler

    if not topology:
        raise InputError("--topology=KIND:CHIPS is missing, for instance --topology=v5e:4x4")
    check_config(config)
    chip, chips = tpu_compiler.devices(topology)
    images, rest = divmod(config.batch_size, len(chips))
    print(
        f"{config.model.name}, {config.data.image_size} pixels, {config.batch_size} images a step "
        f"on {len(chips)} chips of {topology}: {images} each" + (" and a rest" if rest else ""),
        file=sys.stderr,
    )
    found = tpu_compiler.compile_train_step(config, classes, topology)
    exchanges = hlo.collectives(found.hlo) if found.hlo else []
    flops = tpu_compiler.train_step_flops(config, classes) / len(chips)
    held = "?" if found.arguments_gib is None else f"{found.arguments_gib:.2f}"
    print(f"memory of a chip      {chip.gib:g} GiB, of which a program gets {chip.usable_gib:g}")
    print(f"  state and batch     {held} GiB")
    print(f"  temporaries         {found.temporaries_gib:.2f} GiB")
    print(f"  so it               {'fits' if found.fits else 'DOES NOT FIT'}")
    print(f"operations of a chip  {flops / 1e12:.3f} TFLOP a step (matrix products alone)")
    for each in exchanges:
        print(
            f"{each.kind:<22}{each.bytes / 1e6:.2f} MB of {each.dtype} a step, in {each.executed} "
            f"exchanges ({each.instructions} instructions, {each.in_loops} of them in loops)"
        )
    print(f"compile time          {found.compile_s:.0f} s here")
    return {
        "fits": found.fits,
        "temporaries_gib": round(found.temporaries_gib, 3),
        "arguments_gib": found.arguments_gib and round(found.arguments_gib, 3),
        "chip_gib": chip.gib,
        "usable_gib": chip.usable_gib,
        "chips": len(chips),
        "images_per_chip": images,
        "flops": flops,
        "collectives": [each._asdict() for each in exchanges],
        "compile_s": round(found.compile_s, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
