# SPDX-License-Identifier: Apache-2.0
"""How fast this is: the network, its training step and run, the input pipeline; beside timm's.

    python -m benchmarks input
    python -m benchmarks forward --against=timm
    python -m benchmarks step --against=timm
    python -m benchmarks inference --against=timm
    python -m benchmarks start --config=configs/tnt_s.py
    python -m benchmarks loop --config=configs/digits.py
    python -m benchmarks compile --topology=v5e:2x2

Each has a --help that says what it measures. `compile` runs nothing: it asks the TPU compiler.

The last line on stdout is one JSON object; every round is on stderr. Exit code 1 is a failure of
one side, 2 is bad input.
"""

import json
import sys

from benchmarks import inference, input, model, run, start, tpu
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.tools.command_line import Parser


def make_parser() -> Parser:
    parser = Parser("python -m benchmarks", __doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module, measure, text in (
        ("input", input, input.measure_input, "the input pipeline"),
        ("forward", model, model.measure_model, "the network's forward pass"),
        ("step", model, model.measure_model, "the training step"),
        (
            "inference",
            inference,
            inference.measure_inference,
            "single images and batches of any size",
        ),
        ("start", start, start.measure_start, "from main.py to its first step"),
        ("loop", run, run.measure_loop, "the training loop to its bare step"),
        ("compile", tpu, tpu.measure_compile, "the step on a TPU"),
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
