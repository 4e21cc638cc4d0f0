# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the network, its training step and run, of data sets and the input pipeline.

    python -m benchmarks input
    python -m benchmarks sources
    python -m benchmarks forward --against=timm
    python -m benchmarks step --against=timm
    python -m benchmarks inference --against=timm
    python -m benchmarks start --config=configs/tnt_s.py
    python -m benchmarks loop --config=configs/digits.py
    python -m benchmarks compile --device=v5e:2x2

`python -m benchmarks COMMAND --help` describes what is measured. Run them in the checkout.

The last line on stdout is one JSON object; progress goes to stderr. Exit code 1 means that a
contender failed, 2 that the input was wrong.
"""

import sys

from benchmarks import compile, harness, input, model, run, sources
from tnt_flax.tools.command_line import Parser
from tnt_flax.tools.command_line import run as run_command

COMMANDS = {  # name: (module, arguments, function, help)
    "input": (input, input.add_arguments, input.measure_input, "input pipeline"),
    "sources": (
        sources,
        sources.add_arguments,
        sources.measure_sources,
        "start and memory of large data sets",
    ),
    "forward": (model, model.add_arguments, model.measure_model, "forward pass"),
    "step": (model, model.add_arguments, model.measure_model, "training step"),
    "inference": (
        model,
        model.add_inference_arguments,
        model.measure_inference,
        "latency of one image, throughput of batches",
    ),
    "start": (run, harness.add_run_arguments, run.measure_start, "from main.py to its first step"),
    "loop": (run, run.add_loop_arguments, run.measure_loop, "training loop relative to its step"),
    "compile": (
        compile,
        compile.add_arguments,
        compile.measure_compile,
        "step compiled for GPUs or TPUs",
    ),
}


def make_parser() -> Parser:
    parser = Parser("python -m benchmarks", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, add_arguments, _, text) in COMMANDS.items():
        add_arguments(commands.add_parser(name, doc=module.__doc__, help=text))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark, prints its JSON result, and returns the exit code."""
    return run_command(make_parser(), lambda args: COMMANDS[args.command][2](args), argv)


if __name__ == "__main__":
    sys.exit(main())
