# SPDX-License-Identifier: Apache-2.0
"""`tnt_flax.load_classifier`: from files, PIL images or arrays to class names and probabilities."""

import collections
import concurrent.futures
import itertools
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from tnt_flax.core.errors import InputError
from tnt_flax.data.labels import display_names
from tnt_flax.data.sources.names import read_class_list
from tnt_flax.data.transforms import CorruptImageError, eval_transform
from tnt_flax.runtime import sharding
from tnt_flax.training import step
from tnt_flax.weights.read import LoadedWeights, read_checkpoint

Input = str | os.PathLike | bytes | Image.Image | np.ndarray


class Answer(NamedTuple):
    """One of the classes that an image may be of."""

    label: str  # in words where they are known, else the number
    probability: float
    index: int  # of the class, as the network numbers them


class Outcome(NamedTuple):
    """What became of one image: its answers, the best first, or why it could not be read."""

    answers: list[Answer]
    error: str | None = None


def load_classifier(
    path: str | pathlib.Path,
    name: str | None = None,
    *,
    weights: str = "ema",
    checkpoint: str = "best",
    class_list: str | None = None,
    **overrides: Any,
) -> "Classifier":
    """Loads weights of any system as a classifier of images; says on stderr what they were.

    Args:
        path, name, weights, checkpoint, overrides: as of `tnt_flax.load`.
        class_list: a file with the name of a class on each line, for weights that bring none. Ours
            do; published ones of 1,000 classes get ImageNet's names.

    Raises:
        InputError: as of `tnt_flax.load`; also weights without a head, of images that are not
            square or not of three channels, or a class list of another length.
    """
    found = read_checkpoint(path, name, weights=weights, checkpoint=checkpoint, **overrides)
    classifier = Classifier(found, read_class_list(class_list) if class_list else None)
    print("; ".join([f"loaded {found.summary()}", *found.notes]), file=sys.stderr)
    return classifier


class Classifier:
    """A network with the preprocessing and the class names that belong to its weights.

    Attributes:
        model, variables: for `model.apply(variables, images)`, as `tnt_flax.load` returns them.
        class_names: one name per class, in words.
        image_size: pixels, each side.
        crop_fraction: the share of the resized image that the central crop keeps.
        mean, std: per channel, on the scale 0..1.
    """

    def __init__(self, found: LoadedWeights, class_names: Sequence[str] | None = None):
        network = found.network
        self.model = network.model
        classes = self.model.num_classes
        if not classes:
            raise InputError(f"{found.path} has no head, only features: it cannot classify")
        if network.grid is None or network.channels != 3:
            raise InputError(
                f"{found.path} takes images of {network.sentences} patches and {network.channels} "
                "channels; a classifier needs square images of 3 channels"
            )
        if class_names is None:
            class_names = display_names(found.class_names, classes)
        if len(class_names) != classes:
            raise InputError(
                f"{len(class_names)} class names for the {classes} classes of {found.path}"
            )
        self.class_names = tuple(class_names)
        self.image_size = network.image_size
        self.crop_fraction = found.preprocessing["crop_fraction"]
        self.mean, self.std = map(tuple, (found.preprocessing[key] for key in ("mean", "std")))
        self._mesh = sharding.make_mesh(jax.local_devices())
        everywhere = sharding.replicated(self._mesh)
        self.variables = jax.device_put(found.variables, everywhere)
        predict_step = step.make_predict_step(self.model, mean=self.mean, std=self.std)
        rows = sharding.batch_sharding(self._mesh)
        self._predict_step = jax.jit(
            sharding.on_mesh(predict_step, self._mesh), in_shardings=(everywhere, rows)
        )

    def predict(
        self, images: Input | Iterable[Input], top: int = 5, batch_size: int = 64
    ) -> list[list[Answer]]:
        """The `top` likeliest classes of each image, the likeliest first.

        `images` is one image or several: paths, encoded bytes, PIL images, uint8 arrays [H, W] or
        [H, W, C], or one array [B, H, W, C]. They are prepared as in evaluating these weights.

        Raises:
            InputError: an image cannot be read; see `outcomes`, which goes on with the next.
        """
        if isinstance(images, str | os.PathLike | bytes | Image.Image):
            images = [images]
        elif isinstance(images, np.ndarray) and images.ndim < 4:
            images = [images]
        predicted = []
        for outcome in self.outcomes(images, top, batch_size):
            if outcome.error:
                raise InputError(outcome.error)
            predicted.append(outcome.answers)
        return predicted

    def outcomes(
        self, images: Iterable[Input], top: int = 5, batch_size: int = 64, threads: int = 8
    ) -> Iterator[Outcome]:
        """The same for any number of images, one by one in their order, while others are read.

        `images` may be a generator; two batches are held at a time. On several devices each takes
        its share of a batch. An image that cannot be read has an `error` instead of answers.
        """
        for name, value in dict(top=top, batch_size=batch_size, threads=threads).items():
            if value < 1:
                raise InputError(f"{name}={value} is less than 1")
        numbered, rows = enumerate(images), 0
        ahead: collections.deque[list[concurrent.futures.Future]] = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            while True:
                batch = list(itertools.islice(numbered, batch_size))
                ahead.append([pool.submit(self._read, *image) for image in batch])
                if len(ahead) == 2:  # the next batch is being read while this one is computed
                    read = [future.result() for future in ahead.popleft()]
                    rows = max(rows, len(read))  # a last, smaller batch is padded, not compiled for
                    yield from self._answer(read, top, rows)
                if not batch:
                    return

    def _read(self, number: int, image: Input) -> np.ndarray | str:
        """Pixels for the network, or what is wrong with the image."""
        what = f"image {number}"
        try:
            if isinstance(image, str | os.PathLike):
                what = os.fspath(image)
                with open(image, "rb") as file:
                    image = file.read()
            elif not isinstance(image, bytes | Image.Image | np.ndarray):
                kind = type(image).__name__
                return f"{what} is of type {kind}: give paths, PIL images or uint8 arrays"
            return eval_transform(image, size=self.image_size, crop_fraction=self.crop_fraction)
        except CorruptImageError as error:
            return f"{what} is not a usable image: {error}"
        except OSError as error:
            return f"{what} cannot be read: {error.strerror or error}"

    def _answer(self, read: Sequence[np.ndarray | str], top: int, rows: int) -> Iterator[Outcome]:
        devices = self._mesh.size
        pixels = np.zeros((-(-rows // devices) * devices, *[self.image_size] * 2, 3), np.uint8)
        for row, image in enumerate(read):
            if not isinstance(image, str):
                pixels[row] = image
        probabilities = np.asarray(self._predict_step(self.variables, pixels))
        for image, row in zip(read, probabilities, strict=False):
            if isinstance(image, str) or not np.isfinite(row).all():
                yield Outcome([], image if isinstance(image, str) else "its answer is not finite")
                continue
            best = np.argsort(-row, kind="stable")[:top]
            yield Outcome([Answer(self.class_names[i], float(row[i]), int(i)) for i in best])
