# SPDX-License-Identifier: Apache-2.0
"""A training run of a few steps, for benchmarks: any config, on photographs made for it."""

import argparse
import pathlib
import runpy
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tnt_flax.core.errors import InputError, one_line
from tnt_flax.tools import command_line

# Generated files: ImageNet's usual sizes, and about as large as its files, 110 kB on average.
SIDES, QUALITY = ((500, 375), (500, 333), (375, 500)), 97


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", default="configs/tnt_s.py", help="whose run it is")
    add("--batch-size", type=int, default=16, help="images in a step")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the config")
    add("--rounds", type=int, default=3, help="timed rounds")
    add("--cores", type=int, default=1, help="to which the run is pinned")


def read_config(path: str) -> ConfigDict:
    """The config of the file at `path`.

    Raises:
        InputError: there is none.
    """
    try:
        return runpy.run_path(path)["get_config"]()
    except (OSError, ImportError, KeyError) as error:
        raise InputError(f"--config={path} is no config to read: {one_line(error)}") from None


def settings(args: argparse.Namespace, folder: pathlib.Path, steps: int) -> dict[str, Any]:
    """The keys to change in the config of `args`, as {"data.root": ..., ...}.

    Where it leaves open which folder of images it reads, `folder` gets enough for `steps` steps.

    Raises:
        InputError: no such config, or `args.set` is not KEY=VALUE.
    """
    config, batch = read_config(args.config), args.batch_size
    found = {"batch_size": batch, "eval.batch_size": batch}
    given = command_line.parse_settings(args.set)
    if config.data.source == "folder" and not config.data.root and "data.root" not in given:
        for split, count in (("train", steps * batch), ("val", batch)):
            generate_photos(folder / split / "photographs", count)
        found["data.root"] = str(folder)
    return found | given


def generate_photos(folder: pathlib.Path, count: int) -> None:
    """Writes crops of the two photographs of scikit-learn (640 x 427)."""
    import sklearn.datasets

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in sklearn.datasets.load_sample_images().images]
    for i in range(count):
        photo, (width, height) = photos[i % len(photos)], SIDES[i % len(SIDES)]
        scale = max(1.0, height / photo.height)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
        left = int(generator.integers(photo.width - width, endpoint=True))
        top = int(generator.integers(photo.height - height, endpoint=True))
        crop = photo.crop((left, top, left + width, top + height))
        crop.save(folder / f"{i:07d}.jpg", quality=QUALITY)
