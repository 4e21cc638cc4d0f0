# SPDX-License-Identifier: Apache-2.0
"""How fast this is: the network, its training step and run, the input pipeline; beside timm's.

    python -m tnt_flax.tools.benchmark input
    python -m tnt_flax.tools.benchmark forward --against=timm
    python -m tnt_flax.tools.benchmark step --against=timm
    python -m tnt_flax.tools.benchmark inference --against=timm
    python -m tnt_flax.tools.benchmark start --config=configs/tnt_s.py
    python -m tnt_flax.tools.benchmark loop --config=configs/digits.py
    python -m tnt_flax.tools.benchmark compile --topology=v5e:2x2

Each has a --help that says what it measures. `compile` runs nothing: it asks the TPU compiler.

The last line on stdout is one JSON object; every round is on stderr. Exit code 1 is a failure of
one side, 2 is bad input.
"""

import json
import sys

from tnt_flax.command import Parser
from tnt_flax.errors import InputError, RunError
from tnt_flax.tools import (
    benchmark_compile,
    benchmark_inference,
    benchmark_input,
    benchmark_loop,
    benchmark_model,
    benchmark_start,
)


def make_parser() -> Parser:
    parser = Parser("python -m tnt_flax.tools.benchmark", __doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module, measure, text in (
        ("input", benchmark_input, benchmark_input.measure_input, "the input pipeline"),
        ("forward", benchmark_model, benchmark_model.measure_model, "the network's forward pass"),
        ("step", benchmark_model, benchmark_model.measure_model, "the training step"),
        (
            "inference",
            benchmark_inference,
            benchmark_inference.measure_inference,
            "single images and batches of any size",
        ),
        ("start", benchmark_start, benchmark_start.measure_start, "from main.py to its first step"),
        ("loop", benchmark_loop, benchmark_loop.measure_loop, "the training loop to its bare step"),
        ("compile", benchmark_compile, benchmark_compile.measure_compile, "the step on a TPU"),
    ):
        command = commands.add_parser(name, doc=module.__doc__, help=text)
        module.add_arguments(command)
        command.set_defaults(measure=measure)
    return parser


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    try:
        args = make_parser().parse_args(argv)
        result = args.measure(args)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
