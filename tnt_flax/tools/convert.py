# SPDX-License-Identifier: Apache-2.0
"""Converts TNT weights between frameworks, or describes a weights file.

    python -m tnt_flax.tools.convert tnt_s_81.5.pth.tar tnt_s.safetensors
    python -m tnt_flax.tools.convert runs/tnt_s tnt_s.pth --to=timm --checkpoint=last --weights=raw
    python -m tnt_flax.tools.convert --check tnt_b_pets.ckpt --names
    python -m tnt_flax.tools.convert --check tnt_s_81.5.pth.tar --against=timm

The last line on stdout is one JSON object. Exit code 1 means that the file could not be written or,
with --against, that the outputs differ by more than rounding; 2 that the input was wrong.
"""

import argparse
import pathlib
import sys
from typing import Any

from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import fingerprint
from tnt_flax.tools.command_line import Parser, add_weights_options, read_weights, run
from tnt_flax.weights import write
from tnt_flax.weights.identify import variant_of
from tnt_flax.weights.names import join_collections
from tnt_flax.weights.read import LoadedWeights

TOLERANCE = 5e-5  # for float32 logits with a standard deviation around 1


def make_parser() -> Parser:
    parser = Parser("python -m tnt_flax.tools.convert", __doc__)
    add_weights_options(parser)
    add = parser.add_argument
    add("destination", nargs="?", type=pathlib.Path, help="file to write")
    add(
        "--to",
        choices=list(write.SUFFIXES),
        help="framework (default: from the extension)",
    )
    add("--check", action="store_true", help="describe CHECKPOINT and convert nothing")
    add("--against", choices=["timm"], help="compare the outputs with timm's (needs torch)")
    add("--names", action="store_true", help="list the source and target name of every tensor")
    return parser


def main(argv: list[str] | None = None) -> int:
    def differs(result):
        return not result.get("against_timm", {"head": 0})["head"] <= TOLERANCE

    return run(make_parser(), convert, argv, failed=differs)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Converts or checks weights; returns the JSON object of the last line.

    Raises:
        InputError: the weights, the destination or the combination of options is wrong.
        RunError: the destination cannot be written.
    """
    if args.check == (args.destination is not None):
        raise InputError("give a destination, or --check and none")
    if not args.check:
        system = args.to or write.default_framework(args.destination)
        write.check_destination(args.destination, system)
    try:
        found = read_weights(args)
    except InputError as error:
        raise InputError("\n  ".join([str(error), *error.details])) from None
    result = print_facts(found, names=args.names)
    if not args.check:
        target = write.to_framework(found, system)
        write.write(args.destination, system, target, found)
        size = args.destination.stat().st_size
        print_row("written", f"{args.destination} for {system}, {size / 1e6:.1f} MB")
        for note in target.notes:
            print_row("note", note)
        result |= {
            "destination": str(args.destination),
            "to": system,
            "same_function": target.same_function,
        }
    if args.against:
        from tnt_flax.tools import compare_timm

        differences = compare_timm.compare_with_timm(found)
        for place, difference in differences.items():
            print_row(f"|timm - ours| {place}", f"{difference:.1e}")
        result["against_timm"] = differences
    return result


def print_facts(found: LoadedWeights, *, names: bool) -> dict[str, Any]:
    """Prints a table about the weights; returns it for the JSON object."""
    model = found.network.model
    facts = {
        "source": found.path,
        "file_format": found.file_format,
        "names": found.naming,
        "network": found.name,  # None: no published size
        "variant": variant_of(model),
        "weights": found.weights,  # None: unknown
        "parameters": found.num_params,
        "image_size": found.network.image_size,  # None: not square
        "channels": found.network.channels,
        "num_classes": model.num_classes,
        **found.preprocessing,
        "digest": fingerprint(join_collections(found.variables)),
    }
    for key, value in facts.items():
        print_row(key, "-" if value is None else f"{value:,}" if isinstance(value, int) else value)
    for note in found.notes:
        print_row("note", note)
    width = max(map(len, found.renamed), default=0)
    for theirs, ours in found.renamed.items() if names else ():
        print_row(theirs.ljust(width), ours)
    return facts | {"notes": found.notes}


def print_row(key: str, value: Any) -> None:
    print(f"{key:<14} {value}")


if __name__ == "__main__":
    sys.exit(main())
