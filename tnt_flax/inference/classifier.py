# SPDX-License-Identifier: Apache-2.0
"""`tnt_flax.load_classifier`: from files, PIL images or arrays to classes or feature vectors."""

import collections
import concurrent.futures
import itertools
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from tnt_flax.core.errors import InputError
from tnt_flax.data.labels import display_names
from tnt_flax.data.sources.names import read_class_list
from tnt_flax.inference.preprocess import Input, Preprocessor
from tnt_flax.runtime import sharding
from tnt_flax.training.mixup import normalize
from tnt_flax.weights.read import LoadedWeights, read_checkpoint


class Prediction(NamedTuple):
    """One class of an image, with its probability."""

    label: str  # name of the class if known, else its index
    probability: float
    index: int  # index of the class in the logits


class Outcome(NamedTuple):
    """Result for one image: predictions by decreasing probability, or an error."""

    predictions: list[Prediction]
    error: str | None = None


class VectorOutcome(NamedTuple):
    """Result for one image: its logits or features, float32, or an error."""

    vector: np.ndarray | None
    error: str | None = None


def load_classifier(
    path: str | pathlib.Path,
    name: str | None = None,
    *,
    weights: str = "ema",
    checkpoint: str = "best",
    class_list: str | None = None,
    exif: bool | None = None,
    background: tuple[int, int, int] | None = None,
    deep_pixels: str | tuple[float, float] | None = None,
    max_pixels: int | None = None,
    **overrides: Any,
) -> "Classifier":
    """Loads weights of any framework as an image classifier. Logs a summary of the weights.

    Args:
        path, name, weights, checkpoint, overrides: see `tnt_flax.load`.
        class_list: file with one class name per line. By default, names are those stored with the
            weights, or ImageNet's for 1,000 classes.
        exif, background, deep_pixels, max_pixels: see `data.images.Policy`. None is what the
            weights were trained with; for foreign weights, as timm does.

    Raises:
        InputError: see `tnt_flax.load`; also if the network does not take images of three channels
            and known size, or if the class list has another length.
    """
    found = read_checkpoint(path, name, weights=weights, checkpoint=checkpoint, **overrides)
    policy = dict(exif=exif, background=background, deep_pixels=deep_pixels, max_pixels=max_pixels)
    names = read_class_list(class_list) if class_list else None
    classifier = Classifier(found, names, **policy)
    found.log_notes(found.summary())
    return classifier


class Classifier:
    """A network with the preprocessing and class names of its weights.

    All methods may be called from several threads. Batches are padded to a power of two, so that a
    service with batches of any size compiles a few programs, each once.

    Attributes:
        model, variables: for `model.apply(variables, images)`; see `tnt_flax.load`.
        class_names: one name per class, for display; empty without a head.
        stored_class_names: those in the weights file, such as synsets; None without any.
        image_size: pixels of each side, or (height, width).
        crop_fraction: the share of the resized image that the central crop keeps.
        mean, std: per channel, on the scale 0..1.
    """

    def __init__(
        self, found: LoadedWeights, class_names: Sequence[str] | None = None, **policy: Any
    ):
        self._path = found.path
        self._loss = ((found.info.get("config") or {}).get("loss") or {}).get("name")
        self.model = found.network.model
        classes = self.model.num_classes
        self._preprocessor = Preprocessor(found, **policy)
        if class_names is None:
            class_names = display_names(found.class_names, classes) if classes else ()
        if len(class_names) != classes:
            raise InputError(
                f"{len(class_names)} class names for the {classes} classes of {found.path}"
            )
        self.class_names = tuple(class_names)
        self.stored_class_names = found.class_names
        self.image_size = found.network.image_size
        self.crop_fraction = self._preprocessor.crop_fraction
        self.mean, self.std = map(tuple, (found.preprocessing[key] for key in ("mean", "std")))
        self._mesh = sharding.make_mesh(jax.local_devices())
        self.variables = jax.device_put(found.variables, sharding.replicated(self._mesh))
        self._programs: dict[tuple[str, int], Any] = {}  # (function, rows) -> compiled
        self._compiling = threading.Lock()

    def predict(
        self,
        images: Input | Iterable[Input],
        top: int = 5,
        batch_size: int = 64,
        threshold: float | None = None,
    ) -> list[list[Prediction]]:
        """Returns the `top` most probable classes of each image, by decreasing probability.

        With `threshold`, for multi-label weights, returns all classes, possibly none, whose own
        probability, the sigmoid of their logit, is greater.

        `images` is one image or several: paths, encoded bytes, PIL images, uint8 arrays [H, W] or
        [H, W, C], or one array [B, H, W, C]. The preprocessing is that of the evaluation.

        Raises:
            InputError: the network has no head, or was trained with a softmax although there is a
                threshold; or an image cannot be read, for which `outcomes` yields an error instead.
        """
        outcomes = self.outcomes(_several(images), top, batch_size, threshold=threshold)
        return [outcome.predictions for outcome in _without_errors(outcomes)]

    def features(self, images: Input | Iterable[Input], batch_size: int = 64) -> np.ndarray:
        """Returns the head's input for each image, float32 [B, D], for search or clustering.

        It is the class token after the last norm, or for PyramidTNT the mean of the sentences.
        `images` is what `predict` takes. Raises InputError if an image cannot be read.
        """
        outcomes = self.feature_outcomes(_several(images), batch_size)
        rows = [outcome.vector for outcome in _without_errors(outcomes)]
        return np.stack(rows) if rows else np.zeros((0, self.model.num_features), np.float32)

    def outcomes(
        self,
        images: Iterable[Input],
        top: int = 5,
        batch_size: int = 64,
        threads: int = 8,
        threshold: float | None = None,
    ) -> Iterator[Outcome]:
        """Yields an `Outcome` for each image in order, reading ahead in `threads` threads.

        `images` may be a generator; two batches are held in memory. Batches are split over all
        local devices. An unreadable image has an `error` and no predictions. For `threshold` and
        errors see `predict`.
        """
        self.check_head()
        _check_positive(top=top, batch_size=batch_size, threads=threads)
        function = self._probabilities
        if threshold is not None:
            self._check_threshold(threshold)
            function = self._class_probabilities
        for row, error in self._evaluate(function, images, batch_size, threads):
            yield self._outcome(row, error, top, threshold)

    def preprocess(self, image: Input) -> np.ndarray:
        """Returns the network's input before normalization, uint8 [H, W, 3].

        Raises InputError if the image cannot be read, see `Preprocessor.read`.
        """
        return self._preprocessor.read(image)

    def classify(self, pixels: Sequence[np.ndarray], top: int = 5) -> list[Outcome]:
        """Returns an `Outcome` for each result of `preprocess`; all are evaluated in one batch."""
        rows = 1 << (len(pixels) - 1).bit_length()
        evaluated = self._evaluate_batch(self._probabilities, pixels, rows)
        return [self._outcome(row, error, top) for row, error in evaluated]

    def feature_outcomes(
        self, images: Iterable[Input], batch_size: int = 64, threads: int = 8
    ) -> Iterator[VectorOutcome]:
        """Yields the features of each image in order; otherwise as `outcomes`."""
        _check_positive(batch_size=batch_size, threads=threads)
        for row, error in self._evaluate(self._features, images, batch_size, threads):
            yield VectorOutcome(row, error)

    def logit_outcomes(
        self, images: Iterable[Input], batch_size: int = 64, threads: int = 8
    ) -> Iterator[VectorOutcome]:
        """Yields the logits of each image in order; otherwise as `outcomes`."""
        self.check_head()
        _check_positive(batch_size=batch_size, threads=threads)
        for row, error in self._evaluate(self._logits, images, batch_size, threads):
            yield VectorOutcome(row, error)

    def check_head(self) -> None:
        """Raises InputError if the network has no head."""
        if not self.model.num_classes:
            raise InputError(
                f"{self._path} has no head, so it cannot classify: use features (--features)"
            )

    def _check_threshold(self, threshold):
        if not 0 <= threshold < 1:
            raise InputError(f"threshold={threshold} is outside [0, 1)")
        if self._loss == "softmax":
            raise InputError(
                f"{self._path} was trained with loss.name='softmax', so its classes exclude each "
                "other: a threshold needs weights trained with 'bce'"
            )

    # ------------------------------------------------------------------------------- evaluation

    def _outcome(self, row, error, top, threshold=None):
        if error:
            return Outcome([], error)
        best = np.argsort(-row, kind="stable")
        best = best[:top] if threshold is None else best[row[best] > threshold]
        return Outcome([Prediction(self.class_names[i], float(row[i]), int(i)) for i in best])

    # All evaluate uint8 images [B, H, W, 3].

    def _logits(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Returns logits [B, classes]."""
        return self.model.apply(variables, normalize(images, self.mean, self.std))

    def _probabilities(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Returns probabilities [B, classes] of classes that exclude each other."""
        return jax.nn.softmax(self._logits(variables, images))

    def _class_probabilities(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Returns the probability of each class, [B, classes], whatever the others are."""
        return jax.nn.sigmoid(self._logits(variables, images))

    def _features(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Returns features [B, D]."""
        body = self.model.clone(num_classes=0)
        return body.apply(variables, normalize(images, self.mean, self.std)).astype(np.float32)

    def _evaluate(self, function, images, batch_size, threads):
        """Yields (row of the function's result, None) or (None, error) for each image in order."""
        numbered, rows = enumerate(images), 0
        ahead: collections.deque[list[concurrent.futures.Future]] = collections.deque()
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        try:
            while True:
                batch = list(itertools.islice(numbered, batch_size))
                ahead.append([pool.submit(self._read, *image) for image in batch])
                if len(ahead) == 2:  # the next batch is being read while this one is computed
                    read = [future.result() for future in ahead.popleft()]
                    bucket = min(1 << (len(read) - 1).bit_length(), batch_size)
                    rows = max(rows, bucket)  # a last, smaller batch needs no other program
                    yield from self._evaluate_batch(function, read, rows)
                if not batch:
                    return
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, number: int, image: Input) -> np.ndarray | str:
        """Returns preprocessed pixels, or an error message."""
        try:
            return self._preprocessor.read(image, f"image {number}")
        except InputError as error:
            return str(error)

    def _evaluate_batch(self, function, read, rows):
        rows = -(-rows // self._mesh.size) * self._mesh.size
        pixels = np.zeros((rows, *self._preprocessor.image_size, 3), np.uint8)
        for row, image in enumerate(read):
            if not isinstance(image, str):
                pixels[row] = image
        results = np.asarray(self._compiled(function, rows)(self.variables, pixels))
        for image, row in zip(read, results, strict=False):
            if isinstance(image, str):
                yield None, image
            elif not np.isfinite(row).all():
                yield None, "its result is not finite"
            else:
                yield row, None

    def _compiled(self, function, rows):
        """Returns the function for batches of `rows`, compiled once."""
        key = function.__name__, rows
        with self._compiling:
            if key not in self._programs:
                where = sharding.replicated(self._mesh), sharding.batch_sharding(self._mesh)
                jitted = jax.jit(sharding.on_mesh(function, self._mesh), in_shardings=where)
                shape = (rows, *self._preprocessor.image_size, 3)
                images = jax.ShapeDtypeStruct(shape, np.uint8)
                self._programs[key] = jitted.lower(self.variables, images).compile()
        return self._programs[key]


def _several(images):
    """Returns an iterable of images for one image or several."""
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        return [images]
    return [images] if isinstance(images, np.ndarray) and images.ndim < 4 else images


def _without_errors(outcomes):
    for outcome in outcomes:
        if outcome.error:
            raise InputError(outcome.error)
        yield outcome


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name}={value} is less than 1")
