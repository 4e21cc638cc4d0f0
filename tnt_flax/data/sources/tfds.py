# SPDX-License-Identifier: Apache-2.0
"""Data sets prepared by tfds, with random access and without TensorFlow.

ArrayRecord files have an index of their own; TFRecord files, the default of tfds, get one from
`sources.index`. Records of both file formats are tf.train.Example protos.
"""

import bisect
import itertools
import os

import google_crc32c
import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from tnt_flax.core.errors import InputError, did_you_mean, listed, one_line
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.index import Index, open_index
from tnt_flax.data.sources.names import find_split, report_split

FORMATS = ("array_record", "tfrecord")  # in order of preference: tfrecord needs an index
_LENGTH, _CRC = 8, 4  # bytes; a TFRecord is length, crc of the length, data, crc of the data


class TfdsSource:
    """A source of a data set that tfds prepared as ArrayRecord or TFRecord files.

    Image and label are the data set's supervised pair; images stay encoded.

    A data set whose images have several classes, or none, such as "imagenet2012_real", is
    multi-label: its labels are int32 [max_labels], padded with -1. It is refused unless
    `multi_label` is true.

    `name` is a name in tfds, optionally with a version ("imagenet2012:5.1.0"); `split` may have
    slices ("train[:90%]"); `data_dir` is "" for tfds' default, ~/tensorflow_datasets.
    """

    def __init__(self, name: str, split: str, data_dir: str = "", *, multi_label: bool = False):
        builder = _prepared_builder(name, data_dir)
        keys, label, several = _supervised_pair(builder, multi_label)
        self._image_key, self._label_key = keys
        self.class_names = tuple(label.names)
        self.max_labels = len(self.class_names) if several else None
        self._records = _open_split(builder, split)
        self.storage_path = os.fspath(builder.data_path)
        self._name = f"{name}/{split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            example = tf_example_pb2.Example.FromString(self._records[index])
            image = example.features.feature[self._image_key].bytes_list.value[0]
            labels = example.features.feature[self._label_key].int64_list.value
            if self.max_labels is None:
                return image, labels[0]
            padded = np.full(self.max_labels, -1, np.int32)
            padded[: len(labels)] = labels
            return image, padded
        # array_record and protobuf report damaged files by these errors; OSError is ours.
        except (RuntimeError, ValueError, LookupError, DecodeError) as error:
            what = " ".join(str(error).split())
            kind = storage.DamagedError if os.path.exists(self.storage_path) else OSError
            raise kind(what) from None

    def name_of(self, index: int) -> str:
        return f"{self._name} record {index}"


# --------------------------------------------------------------------------------- tfds metadata


def _prepared_builder(name, data_dir):
    if not name:
        raise InputError("a tfds data set needs its name: set data.name, for example to cifar10")
    where = os.path.expanduser(data_dir) or tfds.core.constants.DATA_DIR
    readable = FORMATS
    if storage.is_remote(where):
        storage.list_folder(where)  # its error for a missing folder is clearer than that of tfds
        readable = ("tfrecord",)  # array_record opens local files only
    advice = f"prepare it with `tfds build {name} --file_format={readable[0]} --data_dir={where}`"
    try:
        builder = tfds.builder(name, data_dir=where)
    except Exception as error:  # an unknown name or config, damaged metadata, a missing package...
        guess = did_you_mean(name, tfds.list_builders(with_community_datasets=False))
        raise InputError(
            f"tfds cannot open {name!r}{guess} in {where}: {one_line(error)}; {advice}"
        ) from error
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    chosen = next((file_format for file_format in readable if file_format in formats), None)
    if not builder.info.splits:
        raise InputError(f"tfds data set {name!r} is not prepared in {where}: {advice}")
    if not chosen:
        raise InputError(
            f"tfds data set {name!r} is prepared as {', '.join(sorted(formats))}, which cannot be "
            f"read in {where}: {advice}, after removing the old files"
        )
    if builder.info.file_format.value != chosen:
        builder.info.set_file_format(chosen, override=True, override_if_initialized=True)
    return builder


def _supervised_pair(builder, multi_label):
    """Returns the keys of image and label, the ClassLabel, and whether labels are sequences."""
    features, keys = builder.info.features, builder.info.supervised_keys or ()
    image, label = (features[key] for key in keys) if len(keys) == 2 else (None, None)
    several = isinstance(label, tfds.features.Sequence)
    label = label.feature if several else label
    kinds = tfds.features.Image, tfds.features.ClassLabel
    if not all(map(isinstance, (image, label), kinds)):
        raise InputError(
            f"tfds data set {builder.name!r} has no supervised (image, label) pair: its supervised "
            f"keys are {keys or 'not set'}; choose an image classification data set"
        )
    if several and not multi_label:
        raise InputError(
            f"tfds data set {builder.name!r} is multi-label: it can only be evaluated on, by "
            "tnt-flax eval"
        )
    return keys, label, several


def _open_split(builder, split):
    """Returns the serialized examples of a split as a sequence of bytes."""
    splits = builder.info.splits
    if found := find_split(split, splits):
        report_split(split, found, builder.name)
        split = found
    try:
        instructions = splits[split].file_instructions
    except (ValueError, KeyError, AssertionError):
        raise InputError(
            f"tfds data set {builder.name!r} has no split {split!r}: it has {listed(list(splits))}"
        ) from None
    if builder.info.file_format.value == "array_record":
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(instructions)
    paths_of = {name: [os.fspath(path) for path in splits[name].filepaths] for name in splits}
    split_of = {path: name for name, paths in paths_of.items() for path in paths}
    rows_of = {}  # path -> index and its rows; all slices of a split share one index
    for name in {split_of[os.fspath(instruction.filename)] for instruction in instructions}:
        index = open_index("tfrecord", paths_of[name], _scan_tfrecord)
        for path, rows in zip(paths_of[name], index.rows_per_file(), strict=True):
            rows_of[path] = index, rows
    ranges = []
    for instruction in instructions:
        index, rows = rows_of[os.fspath(instruction.filename)]
        if len(rows) != instruction.examples_in_shard:
            raise InputError(
                f"{instruction.filename} has {len(rows)} records, but dataset_info.json says "
                f"{instruction.examples_in_shard}: copy the data set again"
            )
        ranges.append((index, rows[instruction.skip : instruction.skip + instruction.take]))
    return _TfRecords(ranges)


# -------------------------------------------------------------------------------- TFRecord files


class _TfRecords:
    """Records of TFRecord files: ranges of rows of one or more indexes."""

    def __init__(self, ranges: list[tuple[Index, range]]):
        self._ranges = ranges
        self._ends = list(itertools.accumulate(len(rows) for _, rows in ranges))

    def __len__(self):
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, record):
        k = bisect.bisect_right(self._ends, record)
        index, rows = self._ranges[k]
        data = index.read(rows[record - self._ends[k]])  # from the end of its range
        data, crc = data[:-_CRC], data[-_CRC:]
        if crc != _masked_crc(data):
            raise storage.DamagedError("its checksum is wrong")
        return data


def _scan_tfrecord(file, part, path):
    """Yields start and size of each record, including its checksum (tensorflow/core/lib/io)."""
    position = 0
    while position < part.end:
        file.seek(position)
        header = file.read(_LENGTH + _CRC)
        start, length = position + len(header), header[:_LENGTH]
        if header[_LENGTH:] != _masked_crc(length):
            raise InputError(f"{path} is damaged: no TFRecord begins at byte {position}")
        position = start + int.from_bytes(length, "little") + _CRC
        if position > part.end:
            raise InputError(f"{path} is truncated: a record should end at byte {position}")
        yield start, position - start, ""


def _masked_crc(data: bytes) -> bytes:
    """Returns the crc32c as TFRecord files store it, rotated and with an offset."""
    crc = google_crc32c.value(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")
