# SPDX-License-Identifier: Apache-2.0
"""Plots a network's attention and features on an image.

    tnt-flax visualize tnt_s_81.5.pth.tar cat.jpg --out=figures
    tnt-flax visualize runs/digits three.png --out=figures --patches 0,1 1,1

Writes into the folder: outer_attention.png (of the class token, by block and head), rollout.png,
inner_attention.png (within some patches; by default those with the largest rollout), positions.png
(similarity of the position embeddings) and features.png (principal components of sentences and
words by block). PyramidTNT has no class token: the figures show its mean-pooled sentence. The last
line on stdout is one JSON object. Exit code 1 means that a figure could not be written, 2 that the
input was wrong.
"""

import argparse
import logging
import pathlib
import re
from typing import Any

import numpy as np

from tnt_flax.core.errors import InputError, as_input_error, as_run_error
from tnt_flax.data.labels import display_names
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser, policy_arguments, read_weights
from tnt_flax.weights.read import LoadedWeights

logger = logging.getLogger(__name__)
ON_INTERRUPT = "some figures may be missing"
PATCHES = 3  # default number of patches in inner_attention.png


def add_arguments(parser: Parser) -> None:
    parser.add_weights()
    add = parser.add_argument
    add("image", metavar="IMAGE", help="an image file")
    add("--out", type=pathlib.Path, required=True, help="folder for the figures")
    add("--patches", nargs="+", metavar="ROW,COLUMN", help="of inner_attention.png")
    parser.add_policy()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the figures; returns the JSON object of the last line.

    Raises:
        InputError: the weights, the image, the patches or the folder are wrong.
        RunError: a figure cannot be written.
    """
    from tnt_flax.inference.preprocess import Preprocessor
    from tnt_flax.tools import attention, figures

    host.cache_compilations()
    found = read_weights(args)
    preprocessor = Preprocessor(found, **policy_arguments(args))
    grid = found.network.grid
    patches = [parse_patch(patch, grid) for patch in args.patches or ()]
    pixels = preprocessor.read(args.image)
    with as_input_error(f"cannot make the folder {args.out}"):
        args.out.mkdir(parents=True, exist_ok=True)
    logger.info(f"plotting {found.summary()}")
    (trace,) = attention.trace_attention(found, pixels[None])
    sentences, words = (np.asarray(found.params[f"{of}_pos"][0]) for of in ("sentence", "word"))
    positions = sentences[-grid[0] * grid[1] :], words  # without the class token's
    patches = patches or attention.most_attended(trace, PATCHES)
    plots = {
        "outer_attention": lambda path: figures.plot_outer_attention(trace, path),
        "rollout": lambda path: figures.plot_rollout(trace, path),
        "inner_attention": lambda path: figures.plot_inner_attention(trace, patches, path),
        "positions": lambda path: figures.plot_positions(*positions, grid, path),
        "features": lambda path: figures.plot_features(trace, path),
    }
    if not trace.inner_attention:
        del plots["inner_attention"]
    paths = {name: args.out / f"{name}.png" for name in plots}
    for name, plot in plots.items():
        with as_run_error(f"cannot write {paths[name]}"):
            plot(paths[name])
    result = {"out": str(args.out), "figures": [path.name for path in paths.values()]}
    return result | top_class(found, trace.probabilities)


def top_class(found: LoadedWeights, probabilities: np.ndarray | None) -> dict[str, Any]:
    """Returns the most probable class and its probability; empty without a head."""
    if probabilities is None:
        return {}
    best = int(probabilities.argmax())
    names = display_names(found.class_names, len(probabilities))
    return {"class": names[best], "probability": round(float(probabilities[best]), 4)}


def parse_patch(text: str, grid: tuple[int, int]) -> int:
    """Parses "ROW,COLUMN" into the index of a sentence. Raises InputError."""
    match = re.fullmatch(r"(\d+),(\d+)", text)
    row, column = map(int, match.groups()) if match else grid
    if row >= grid[0] or column >= grid[1]:
        raise InputError(
            f"--patches {text}: write ROW,COLUMN, from 0,0 to {grid[0] - 1},{grid[1] - 1}"
        )
    return row * grid[1] + column
