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

`python -m benchmarks COMMAND --help` describes what is measured. Run them in the checkout.

The last line on stdout is one JSON object; progress goes to stderr. Exit code 1 means that a
contender failed, 2 that the input was wrong.
"""

import importlib
import sys
from typing import Any

from tnt_flax.tools.command_line import Parser
from tnt_flax.tools.command_line import run as run_command

COMMANDS = {  # name: (module, its functions that add arguments and that measure, help)
    "input": ("input", "add_arguments", "measure_input", "input pipeline"),
    "sources": (
        "sources",
        "add_arguments",
        "measure_sources",
        "start and memory of large data sets",
    ),
    "forward": ("model", "add_arguments", "measure_model", "forward pass"),
    "step": ("model", "add_arguments", "measure_model", "training step"),
    "inference": (
        "model",
        "add_inference_arguments",
        "measure_inference",
        "latency of one image, throughput of batches",
    ),
    "start": ("run", "add_arguments", "measure_start", "from main.py to its first step"),
    "loop": ("run", "add_loop_arguments", "measure_loop", "training loop relative to its step"),
    "compile": ("compile", "add_arguments", "measure_compile", "step compiled for GPUs or TPUs"),
    "gpu": ("gpu", "add_arguments", "measure_gpu", "forward pass and training step on a GPU"),
}


def make_parser(command: str = "") -> Parser:
    """Returns the parser; only `command` has its options.

    The modules of other commands are not imported: they need packages that it does not.
    """
    parser = Parser("python -m benchmarks", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, add_arguments, _, text) in COMMANDS.items():
        module = importlib.import_module(f"benchmarks.{module}") if name == command else None
        options = commands.add_parser(name, doc=module.__doc__ if module else "", help=text)
        if module:
            getattr(module, add_arguments)(options)
    return parser


def measure(args: Any, **options: Any) -> dict[str, Any]:
    """Runs the benchmark of parsed arguments and returns its JSON result."""
    module, _, function, _ = COMMANDS[args.command]
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)(args, **options)


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark, prints its JSON result, and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(make_parser(*argv[:1]), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
