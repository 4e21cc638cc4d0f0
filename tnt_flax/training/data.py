# SPDX-License-Identifier: Apache-2.0
"""The data of an experiment: both splits, the order of the training images, and batches."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from tnt_flax.data import images, pipeline, randaugment, sources, transforms
from tnt_flax.data.labels import split_names
from tnt_flax.data.plan import RecordsByClass, TrainPlan
from tnt_flax.data.stored_logits import RecordLogits, is_logits_file

Batches = Iterator[dict[str, np.ndarray]]


class ExperimentData:
    """The data that a config describes. Splits are opened on first use, which may raise InputError.

    Args:
        config: see `configs/default.py`.
        host_rows: returns the index of this host and the number of hosts that share a batch; called
            for batches only.
    """

    def __init__(
        self, config: ConfigDict, host_rows: Callable[[], tuple[int, int]] = lambda: (0, 1)
    ):
        self.config, self._host_rows = config, host_rows

    def open_source(self, split: str, **options: bool) -> sources.Source:
        """Opens the records of a split; for `options` see `sources.open_split`."""
        return sources.open_split(self.config.data, split, **options)

    def is_multi_label(self, source: sources.Source) -> bool:
        """True if `loss.name` is "bce" and the source stores several labels per image."""
        return self._uses_bce and sources.stores_several_labels(source)

    @functools.cached_property
    def train_source(self) -> sources.Source:
        """The training split; with "bce", class names such as "a|b" become several labels."""
        source = self.open_source(self.config.data.train_split, multi_label=self._uses_bce)
        return split_names(source) if self._uses_bce else source

    @functools.cached_property
    def eval_source(self) -> sources.Source:
        """The evaluation split, with the classes of training; it may lack some of them."""
        split = self.config.data.eval_split
        source = self.open_source(split, evaluation=True, multi_label=self._uses_bce)
        if self.is_multi_label(self.train_source):
            source = split_names(source, self.class_names)
        return sources.with_classes(source, self.class_names)

    @property
    def _uses_bce(self) -> bool:
        return self.config.loss.name == "bce"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the training data, in the order of the labels."""
        return tuple(self.train_source.class_names)

    @functools.cached_property
    def plan(self) -> TrainPlan:
        """The order of the training images, in every epoch."""
        source, augment = self.train_source, self.config.augment
        balance = RecordsByClass(sources.labels_of(source)) if self.config.data.balanced else None
        return TrainPlan(
            len(source),
            self.config.batch_size,
            self.config.seed,
            repeats=augment.repeats,
            groups=augment.mix_groups,  # the views of an image are mixed in different groups
            balance=balance,
        )

    @functools.cached_property
    def columns(self) -> dict[str, RecordLogits]:
        """Further columns of training batches: `teacher_logits` if `distill.teacher` has them."""
        path = self.config.distill.teacher
        if not is_logits_file(path):
            return {}
        names = [self.train_source.name_of(i) for i in range(len(self.train_source))]
        return {"teacher_logits": RecordLogits(path, names, self.class_names)}

    @functools.cached_property
    def randaugment(self) -> randaugment.RandAugment | None:
        text = self.config.augment.randaugment
        return randaugment.parse(text, self.config.data.mean) if text else None

    @property
    def policy(self) -> images.Policy:
        """How images become 8-bit RGB."""
        return images.Policy.of(self.config.data)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the network's images in pixels."""
        return transforms.height_width(self.config.data.image_size)

    @property
    def normalization(self) -> dict[str, tuple[float, ...]]:
        """`mean` and `std` of each channel, for pixels in [0, 1]."""
        return dict(mean=tuple(self.config.data.mean), std=tuple(self.config.data.std))

    def train_batches(self, start_step: int, num_steps: int) -> Batches:
        """Yields this process's rows of the batches of `num_steps` steps from `start_step` on.

        A batch of b rows has `image` uint8 [b, H, W, 3]; `label` int32 [b], or [b, L] with the
        classes of an image, padded with -1; `replaced` bool [b], True where the next readable image
        replaces an unreadable one; and the rows of each of `columns`.

        Raises:
            InputError: an image cannot be read (with data.corrupt="error").
            StorageUnavailable: the storage failed for `data.retry_seconds`.
        """
        options, on_host = self.config.augment, self.config.augment.randaugment_on == "host"
        transform = functools.partial(
            transforms.train_transform,
            size=self.config.data.image_size,
            scale=options.scale,
            ratio=options.ratio,
            flip=options.flip,
            interpolation=options.interpolation,
            three_augments=options.three_augment,
            jitter=0.0 if self.randaugment else options.color_jitter,
            randaugment=self.randaugment if on_host else None,
            resampler=transforms.resampler(options.resampling),
            policy=self.policy,
        )
        return pipeline.train_batches(
            self.train_source,
            self.plan,
            transform=transform,
            start_step=start_step,
            num_steps=num_steps,
            columns=self.columns,
            options=self._read_options(),
        )

    @property
    def eval_transform(self) -> Callable[[images.Encoded], np.ndarray]:
        """Preprocesses an image for evaluation, see `transforms.eval_transform`."""
        return functools.partial(
            transforms.eval_transform,
            size=self.config.data.image_size,
            crop_fraction=self.config.data.crop_fraction,
            policy=self.policy,
        )

    def eval_batches(
        self, source: sources.Source | None = None, interpolation: str = "bicubic"
    ) -> Batches:
        """Yields this process's rows of the evaluation batches: every image once, then padding.

        A batch of b rows has `image` uint8 [b, H, W, 3], `label` as in training, `mask` bool
        [b], False for padding and unreadable images, and `corrupt` bool [b], True for unreadable
        images. `source` defaults to `eval_source`. `interpolation`, which is no key of the config,
        is that of `transforms.eval_transform`. Raises as `train_batches`.
        """
        return pipeline.eval_batches(
            self.eval_source if source is None else source,
            transform=functools.partial(self.eval_transform, interpolation=interpolation),
            batch_size=self.config.eval.batch_size,
            options=self._read_options(),
        )

    def _read_options(self) -> pipeline.ReadOptions:
        host, num_hosts = self._host_rows()
        keys = ("corrupt", "threads", "workers", "retry_seconds")
        options = {key: self.config.data[key] for key in keys}
        return pipeline.ReadOptions(host=host, num_hosts=num_hosts, **options)
