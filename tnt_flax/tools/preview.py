# SPDX-License-Identifier: Apache-2.0
"""Plots training samples as the network sees them: cropped, augmented, mixed, erased.

    tnt-flax preview --config=configs/digits.py --out=samples.png
    tnt-flax preview --config=configs/tnt_s.py --config.data.root=IMAGENET \\
        --out=samples.png --rows=4 --columns=8

The samples are those of the first training step; a batch much larger than the sheet is reduced. The
last line on stdout is one JSON object. Exit code 1 means that the file could not be written, 2 that
the input was wrong.
"""

import argparse
import contextlib
import logging
import pathlib
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.tools.command_line import Parser, positive

logger = logging.getLogger(__name__)
MAX_BATCH = 256  # a larger batch is reduced to what the sheet needs
MAX_LETTERS = 24  # per line of a caption


class Samples(NamedTuple):
    """A batch after augmentation."""

    images: np.ndarray  # float32 [B, H, W, 3], normalized
    weights: np.ndarray  # float32 [B, classes], targets without label smoothing
    class_names: tuple[str, ...]
    config: ConfigDict  # with the reduced batch size


def add_arguments(parser: Parser) -> None:
    parser.add_config()
    parser.add_argument("--out", metavar="FILE", help="PNG file to write")
    parser.add_argument("--rows", type=positive, default=4, metavar="N", help="rows of images")
    parser.add_argument(
        "--columns", type=positive, default=8, metavar="N", help="columns of images"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    return preview(args.config, args.out, args.rows, args.columns)


def preview(config: ConfigDict, out: str | None, rows: int, columns: int) -> dict[str, Any]:
    """Writes the sheet; returns the JSON object of the last line.

    Raises:
        InputError: the config, the data or `out` is wrong.
        RunError: the file cannot be written.
    """
    from tnt_flax.tools import figures

    if not out or pathlib.Path(out).suffix.lower() != ".png":
        raise InputError(f"--out={out or ''} is not a PNG file: use --out=FILE.png")
    path = pathlib.Path(out).expanduser()
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for --out={out}")
    samples = first_samples(config, rows * columns)
    shown = spread(len(samples.images), groups_of(samples.config), rows * columns)
    weights = samples.weights[shown]
    of_two_classes = int((weights.max(axis=1) < 1).sum())
    title = (
        f"{config.model.name}: {len(shown)} of the {len(samples.images)} images of a step, "
        f"{of_two_classes} of two classes (before label smoothing)"
    )
    try:
        figures.plot_samples(
            to_pixels(samples.images[shown], config.data.mean, config.data.std),
            [caption(row, samples.class_names) for row in weights],
            title,
            path,
            columns=min(columns, len(shown)),
        )
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    return {
        "out": str(path),
        "images": len(shown),
        "of_two_classes": of_two_classes,
        "batch_size": len(samples.images),
        "classes": len(samples.class_names),
    }


def first_samples(config: ConfigDict, wanted: int) -> Samples:
    """Returns the first training batch, perhaps of a reduced size, after the step's augmentation.

    Raises:
        InputError: the config or the data is wrong.
    """
    import jax

    from tnt_flax.training import step
    from tnt_flax.training.experiment import Experiment

    config = config.copy_and_resolve_references()
    source = Experiment(config).train_source
    batch_size = smaller_batch(config, wanted, len(source))
    if batch_size < config.batch_size:
        logger.info(
            f"batch size {batch_size} instead of {config.batch_size}: same distribution, but not "
            "the images of the first training step"
        )
        config.batch_size = batch_size
    config.augment.label_smoothing = 0.0  # the pixels do not depend on it
    experiment = Experiment(config)
    experiment.train_source = source  # opened once
    with contextlib.closing(experiment.train_batches(0, 1)) as batches:
        batch = next(batches)
    _, step_key = experiment.make_keys()
    _, mix_key, erase_key = step.step_keys(step_key, 0)
    augment = jax.jit(experiment.make_augment(len(source.class_names)))
    inputs = {name: batch[name] for name in ("image", "label")}
    images, weights = jax.device_get(augment(inputs, mix_key, erase_key))
    return Samples(images, weights, tuple(source.class_names), config)


def smaller_batch(config: ConfigDict, wanted: int, num_records: int) -> int:
    """Returns the batch size of the run, or if that is large, `wanted` rounded up to whole groups.

    With fewer records than that, the largest possible number of whole groups.
    """
    unit = 2 * groups_of(config)
    most = num_records // unit * unit
    if config.batch_size <= min(num_records, max(MAX_BATCH, wanted)) or not most:
        return config.batch_size
    return min(-(-wanted // unit) * unit, most, config.batch_size)


def groups_of(config: ConfigDict) -> int:
    """Number of groups of rows in a batch that mix images among themselves or repeat records."""
    options = config.augment
    grouped = options.mixup_alpha or options.cutmix_alpha or options.repeats > 1
    return options.mix_groups if grouped else 1


def spread(batch_size: int, groups: int, wanted: int) -> np.ndarray:
    """Returns `wanted` rows, one of each group in turn, so that repeats are adjacent."""
    return np.arange(batch_size).reshape(groups, -1).T.ravel()[:wanted]


def to_pixels(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Converts normalized images to uint8 pixels; noise of erased areas is clipped."""
    pixels = (images * np.float32(std) + np.float32(mean)) * 255
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def caption(weights: np.ndarray, class_names: tuple[str, ...]) -> str:
    """Formats weights of classes: "cat 0.63 + dog 0.37", on two lines if long, or "cat"."""
    first, second = np.argsort(-weights, kind="stable")[:2] if len(weights) > 1 else (0, 0)
    share = round(float(weights[first]), 2)
    if share == 1:
        return shorten(class_names[first], MAX_LETTERS)
    parts = [
        f"{shorten(class_names[label], MAX_LETTERS - 7)} {part:.2f}"
        for label, part in ((first, share), (second, 1 - share))
    ]
    one_line = " + ".join(parts)
    return one_line if len(one_line) <= MAX_LETTERS else "\n+ ".join(parts)


def shorten(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
