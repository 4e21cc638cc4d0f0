# SPDX-License-Identifier: Apache-2.0
"""Plots training samples as the network sees them: cropped, augmented, mixed, erased.

    tnt-flax preview --config=digits --out=samples.png
    tnt-flax preview --config=tnt_s --config.data.root=IMAGENET \\
        --out=samples.png --rows=4 --columns=8

The samples are those of the first training step. With a smaller --config.batch_size the command is
faster and takes other samples. The last line on stdout is one JSON object. Exit code 1 means that
the file could not be written, 2 that the input was wrong.
"""

import argparse
import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from tnt_flax.core.errors import InputError, as_run_error
from tnt_flax.tools.command_line import Parser, positive
from tnt_flax.training import plots

MAX_LETTERS = 24  # per line of a caption
MIN_WIDTH = 160  # pixels: narrower samples are enlarged
GAP, HEAD = 12, 44  # pixels: between images, and for the title


def add_arguments(parser: Parser) -> None:
    parser.add_config()
    parser.add_argument("--out", metavar="FILE", help="PNG file to write")
    parser.add_argument("--rows", type=positive, default=4, metavar="N", help="rows of images")
    parser.add_argument(
        "--columns", type=positive, default=8, metavar="N", help="columns of images"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the sheet; returns the JSON object of the last line.

    Raises:
        InputError: the config, the data or `out` is wrong.
        RunError: the file cannot be written.
    """
    config, out, columns = args.config, args.out, args.columns
    if not out or pathlib.Path(out).suffix.lower() != ".png":
        raise InputError(f"--out={out or ''} is not a PNG file: use --out=FILE.png")
    path = pathlib.Path(out).expanduser()
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for --out={out}")
    images, weights, class_names = first_samples(config)
    batch_size, classes = weights.shape
    shown = spread(batch_size, groups_of(config), args.rows * columns)
    weights = weights[shown]
    of_two_classes = int((weights.max(axis=1) < 1).sum())
    title = (
        f"{config.model.name}: {len(shown)} of the {batch_size} images of a step, "
        f"{of_two_classes} of two classes (before label smoothing)"
    )
    sheet = draw_sheet(
        to_pixels(images[shown], config.data.mean, config.data.std),
        [caption(row, class_names) for row in weights],
        title,
        columns=min(columns, len(shown)),
    )
    with as_run_error(f"cannot write {path}"):
        sheet.save(path)
    return {
        "out": str(path),
        "images": len(shown),
        "of_two_classes": of_two_classes,
        "batch_size": batch_size,
        "classes": classes,
    }


def first_samples(config: ConfigDict) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Returns the first training batch after the step's augmentation.

    Returns:
        Normalized images, float32 [B, H, W, 3]; targets without label smoothing, float32
        [B, classes]; class names.

    Raises:
        InputError: the config or the data is wrong.
    """
    import jax

    from tnt_flax.training import step
    from tnt_flax.training.experiment import Experiment

    config = config.copy_and_resolve_references()
    config.augment.label_smoothing = 0.0  # the pixels do not depend on it
    experiment = Experiment(config)
    with contextlib.closing(experiment.data.train_batches(0, 1)) as batches:
        batch = next(batches)
    _, step_key = experiment.split_seed()
    _, mix_key, erase_key = step.step_keys(step_key, 0)
    class_names = tuple(experiment.data.train_source.class_names)
    augment = jax.jit(experiment.make_augment(len(class_names)))
    inputs = {name: batch[name] for name in ("image", "label")}
    images, weights = jax.device_get(augment(inputs, mix_key, erase_key, 0))
    return images, weights, class_names


def groups_of(config: ConfigDict) -> int:
    """Number of groups of rows in a batch that mix images among themselves or repeat records."""
    options = config.augment
    grouped = options.mixup_alpha or options.cutmix_alpha or options.repeats > 1
    return options.mix_groups if grouped else 1


def spread(batch_size: int, groups: int, wanted: int) -> np.ndarray:
    """Returns `wanted` rows, one of each group in turn, so that repeats are adjacent."""
    return np.arange(batch_size).reshape(groups, -1).T.ravel()[:wanted]


def draw_sheet(images: np.ndarray, captions: list[str], title: str, columns: int) -> Image.Image:
    """Returns a sheet of images uint8 [B, H, W, 3], enlarged by an integer factor if small.

    Captions have one or two lines of at most MAX_LETTERS characters.
    """
    fonts = plots.fonts_for(frozenset(title + "".join(captions)))
    zoom = -(-MIN_WIDTH // images.shape[2])
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = images.shape[1:3]
    size = min(15, 3 * width // (2 * MAX_LETTERS))  # pixels: a caption is as wide as its image
    row_height = height + 3 * size + GAP
    rows = -(-len(images) // columns)
    across = max(GAP + columns * (width + GAP), 760)  # the width of the title
    sheet = Image.new("RGB", (across, HEAD + rows * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, HEAD // 2), title, "black", font_of(fonts, title, 15), anchor="lm")
    for i, (image, text) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + i % columns * (width + GAP), HEAD + i // columns * row_height
        sheet.paste(Image.fromarray(image), (left, top))
        draw.text((left, top + height + 4), text, "black", font_of(fonts, text, size))
    return sheet


def font_of(fonts: Sequence[Any], text: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns the one of `fonts` that has most characters of a text."""
    best = max(fonts, key=lambda font: len(set(text) & plots.characters_of(font.fname)))
    return ImageFont.truetype(best.fname, size)


def to_pixels(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Converts normalized images to uint8 pixels; noise of erased areas is clipped."""
    pixels = (images * np.float32(std) + np.float32(mean)) * 255
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def caption(weights: np.ndarray, class_names: tuple[str, ...]) -> str:
    """Formats the classes of a sample: "cat", or "cat 0.63" and "dog 0.37" on two lines."""
    first, *second = np.argsort(-weights, kind="stable")[:2]
    share = round(float(weights[first]), 2)
    if share == 1:
        return plots.shorten(class_names[first], MAX_LETTERS)
    shares = {first: share, second[0]: 1 - share}
    return "\n".join(
        f"{plots.shorten(class_names[i], MAX_LETTERS - 5)} {x:.2f}" for i, x in shares.items()
    )
