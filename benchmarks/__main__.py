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
    python -m benchmarks gpu
    python -m benchmarks demo

`python -m benchmarks COMMAND --help` describes what is measured. Run them in the checkout.

The last line on stdout is one JSON object; progress goes to stderr. Exit code 1 means that a
contender failed, 2 that the input was wrong.
"""

import importlib
import sys
from typing import Any, NamedTuple

from tnt_flax.tools.command_line import Parser
from tnt_flax.tools.command_line import run as run_command


class Command(NamedTuple):
    module: str
    measure: str  # its function that measures
    help: str
    add_arguments: str = "add_arguments"  # its function that adds the arguments


COMMANDS = {
    "input": Command("input", "measure_input", "input pipeline"),
    "sources": Command("sources", "measure_sources", "start and memory of large data sets"),
    "forward": Command("model", "measure_model", "forward pass"),
    "step": Command("model", "measure_model", "training step"),
    "inference": Command(
        "model",
        "measure_inference",
        "latency of one image, throughput of batches",
        "add_inference_arguments",
    ),
    "start": Command("run", "measure_start", "from main.py to its first step"),
    "loop": Command(
        "run", "measure_loop", "training loop relative to its step", "add_loop_arguments"
    ),
    "compile": Command("compile", "measure_compile", "step compiled for GPUs or TPUs"),
    "gpu": Command("gpu", "measure_gpu", "forward pass and training step on a GPU"),
    "demo": Command("demo", "measure_demo", "load on the local page of tnt-flax demo"),
}


def make_parser(command: str = "") -> Parser:
    """Returns the parser; only `command` has its options.

    The modules of other commands are not imported: they need packages that it does not.
    """
    parser = Parser("python -m benchmarks", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, entry in COMMANDS.items():
        module = _module(entry) if name == command else None
        options = commands.add_parser(name, doc=module.__doc__ if module else "", help=entry.help)
        if module:
            getattr(module, entry.add_arguments)(options)
    return parser


def measure(args: Any, **options: Any) -> dict[str, Any]:
    """Runs the benchmark of parsed arguments and returns its JSON result."""
    entry = COMMANDS[args.command]
    return getattr(_module(entry), entry.measure)(args, **options)


def _module(entry):
    return importlib.import_module(f"benchmarks.{entry.module}")


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark, prints its JSON result, and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(make_parser(*argv[:1]), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
