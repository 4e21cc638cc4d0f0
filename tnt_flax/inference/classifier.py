# SPDX-License-Identifier: Apache-2.0
"""`tnt_flax.load_classifier`: from files, PIL images or arrays to class names and probabilities."""

import collections
import concurrent.futures
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from tnt_flax.core.errors import InputError
from tnt_flax.data.images import CorruptImageError
from tnt_flax.data.labels import display_names
from tnt_flax.data.sources.names import read_class_list
from tnt_flax.data.transforms import eval_transform
from tnt_flax.runtime import sharding
from tnt_flax.training.mixup import normalize
from tnt_flax.weights.read import LoadedWeights, read_checkpoint

Input = str | os.PathLike | bytes | Image.Image | np.ndarray


class Prediction(NamedTuple):
    """One class of an image, with its probability."""

    label: str  # name of the class if known, else its index
    probability: float
    index: int  # index of the class in the logits


class Outcome(NamedTuple):
    """Result for one image: predictions by decreasing probability, or an error."""

    predictions: list[Prediction]
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
    """Loads weights of any framework as an image classifier. Logs a summary of the weights.

    Args:
        path, name, weights, checkpoint, overrides: see `tnt_flax.load`.
        class_list: file with one class name per line. By default, names are those stored with the
            weights, or ImageNet's for 1,000 classes.

    Raises:
        InputError: see `tnt_flax.load`; also if the network has no head or does not take square
            images of three channels, or if the class list has another length.
    """
    found = read_checkpoint(path, name, weights=weights, checkpoint=checkpoint, **overrides)
    classifier = Classifier(found, read_class_list(class_list) if class_list else None)
    found.log_notes(found.summary())
    return classifier


class Classifier:
    """A network with the preprocessing and class names of its weights.

    Attributes:
        model, variables: for `model.apply(variables, images)`; see `tnt_flax.load`.
        class_names: one name per class.
        image_size: pixels, each side.
        crop_fraction: the share of the resized image that the central crop keeps.
        mean, std: per channel, on the scale 0..1.
    """

    def __init__(self, found: LoadedWeights, class_names: Sequence[str] | None = None):
        network = found.network
        self.model = network.model
        classes = self.model.num_classes
        if not classes:
            raise InputError(f"{found.path} has no head: it cannot classify")
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
        rows = sharding.batch_sharding(self._mesh)
        self._predict_step = jax.jit(
            sharding.on_mesh(self._probabilities, self._mesh), in_shardings=(everywhere, rows)
        )

    def _probabilities(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Evaluates uint8 images [B, S, S, 3]; returns probabilities [B, classes]."""
        logits = self.model.apply(variables, normalize(images, self.mean, self.std))
        return jax.nn.softmax(logits)

    def predict(
        self, images: Input | Iterable[Input], top: int = 5, batch_size: int = 64
    ) -> list[list[Prediction]]:
        """Returns the `top` most probable classes of each image, by decreasing probability.

        `images` is one image or several: paths, encoded bytes, PIL images, uint8 arrays [H, W] or
        [H, W, C], or one array [B, H, W, C]. The preprocessing is that of the evaluation.

        Raises:
            InputError: an image cannot be read; `outcomes` yields an error instead.
        """
        if isinstance(images, str | os.PathLike | bytes | Image.Image):
            images = [images]
        elif isinstance(images, np.ndarray) and images.ndim < 4:
            images = [images]
        predicted = []
        for outcome in self.outcomes(images, top, batch_size):
            if outcome.error:
                raise InputError(outcome.error)
            predicted.append(outcome.predictions)
        return predicted

    def outcomes(
        self, images: Iterable[Input], top: int = 5, batch_size: int = 64, threads: int = 8
    ) -> Iterator[Outcome]:
        """Yields an `Outcome` for each image in order, reading ahead in `threads` threads.

        `images` may be a generator; two batches are held in memory. Batches are split over all
        local devices. An unreadable image has an `error` and no predictions.
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
                    yield from self._classify(read, top, rows)
                if not batch:
                    return

    def _read(self, number: int, image: Input) -> np.ndarray | str:
        """Returns preprocessed pixels, or an error message."""
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

    def _classify(self, read: Sequence[np.ndarray | str], top: int, rows: int) -> Iterator[Outcome]:
        devices = self._mesh.size
        pixels = np.zeros((-(-rows // devices) * devices, *[self.image_size] * 2, 3), np.uint8)
        for row, image in enumerate(read):
            if not isinstance(image, str):
                pixels[row] = image
        probabilities = np.asarray(self._predict_step(self.variables, pixels))
        for image, row in zip(read, probabilities, strict=False):
            if isinstance(image, str) or not np.isfinite(row).all():
                error = image if isinstance(image, str) else "its prediction is not finite"
                yield Outcome([], error)
                continue
            best = np.argsort(-row, kind="stable")[:top]
            yield Outcome([Prediction(self.class_names[i], float(row[i]), int(i)) for i in best])
