# SPDX-License-Identifier: Apache-2.0
"""Converts TNT weights between frameworks, or describes a weights file.

    tnt-flax convert tnt_s_81.5.pth.tar tnt_s.safetensors
    tnt-flax convert runs/tnt_s tnt_s.pth --to=timm --checkpoint=last --weights=raw
    tnt-flax convert --check tnt_b_pets.ckpt --names
    tnt-flax convert --check tnt_s_81.5.pth.tar --against=timm

The last line on stdout is one JSON object. Exit code 1 means that the file could not be written or,
with --against, that the outputs differ by more than rounding; 2 that the input was wrong.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import fingerprint
from tnt_flax.data.transforms import height_width
from tnt_flax.tools.command_line import Parser, read_weights
from tnt_flax.weights import names, write
from tnt_flax.weights.identify import variant_of
from tnt_flax.weights.load import adapt
from tnt_flax.weights.names import join_collections
from tnt_flax.weights.read import LoadedWeights

TOLERANCE = 5e-5  # for float32 logits with a standard deviation around 1


def add_arguments(parser: Parser) -> None:
    parser.add_weights()
    add = parser.add_argument
    add("destination", nargs="?", metavar="DESTINATION", type=pathlib.Path, help="file to write")
    add("--to", choices=list(write.SUFFIXES), help="framework (default: from the extension)")
    add("--no-head", action="store_true", help="leave out the head, of one layer or several")
    add("--check", action="store_true", help="describe CHECKPOINT and convert nothing")
    add("--against", choices=["timm"], help="compare logits with timm's (needs torch)")
    add("--names", action="store_true", help="list the source and target name of every tensor")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Converts or checks weights; returns the JSON object of the last line.

    Raises:
        InputError: the weights, the destination or the combination of options is wrong.
        RunError: the destination cannot be written.
    """
    if args.check == (args.destination is not None):
        raise InputError("give a destination, or --check and none")
    if not args.check:
        framework = write.check_destination(args.destination, args.to)
    try:
        found = read_weights(args, other_head=args.no_head)
    except InputError as error:
        for line in error.details if args.names else ():
            print(line)
        raise
    if args.no_head:
        remove_head(found)
    result = print_facts(found, list_names=args.names)
    if not args.check:
        target = write.to_framework(found, framework)
        write.write(args.destination, framework, target, found)
        size = args.destination.stat().st_size
        print_row("written", f"{args.destination} for {framework}, {size / 1e6:.1f} MB")
        for note in target.notes:
            print_row("note", note)
        result |= {
            "destination": str(args.destination),
            "to": framework,
            "same_function": not target.notes,
        }
    if args.against:
        result["against_timm"] = compare_with_timm(found)
        print_row("max |timm - ours|", f"{result['against_timm']:.1e}")
    return result


def remove_head(found: LoadedWeights) -> None:
    """Removes the head and the class names of weights, in place."""
    found.network = dataclasses.replace(found.network, model=adapt(found, num_classes=0))
    found.inputs = dataclasses.replace(found.inputs, class_names=None)


def compare_with_timm(found: LoadedWeights) -> float:
    """Returns the largest difference of float32 logits between timm and tnt_flax.

    Both networks get the same random images.

    Raises:
        InputError: torch or timm is not installed, or timm has no such network.
    """
    try:
        import timm.models.tnt
        import torch
    except ImportError as error:
        raise InputError(f"--against=timm needs torch and timm: {error}") from error
    target = write.to_framework(found, "timm")
    arguments = write.timm_arguments(target, found)
    network = timm.models.tnt.TNT(**arguments).eval()
    state = {name: torch.from_numpy(x) for name, x in names.export("timm", target.params)}
    network.load_state_dict(state, strict=True)

    shape = (2, *height_width(arguments["img_size"]), found.network.channels)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    with torch.no_grad():
        theirs = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(found.network.model.apply)(found.variables, images)
    return float(np.abs(np.asarray(ours) - theirs).max())


def failed(result: dict[str, Any]) -> bool:
    return not result.get("against_timm", 0) <= TOLERANCE  # NaN fails


def print_facts(found: LoadedWeights, *, list_names: bool) -> dict[str, Any]:
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
        "image_size": found.network.image_size,  # None: unknown
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
    for theirs, ours in found.renamed.items() if list_names else ():
        print_row(theirs.ljust(width), ours)
    return facts | {"notes": found.notes}


def print_row(key: str, value: Any) -> None:
    print(f"{key:<14} {value}")
