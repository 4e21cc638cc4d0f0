# SPDX-License-Identifier: Apache-2.0
"""Data sets that tfds prepared, read at random and without TensorFlow, in either of two forms.

ArrayRecord files have an index of their own; TFRecord files, tfds' default, get one from
`data.index`. The records are the same: tf.train.Example, of which an image and a label are used.
"""

import bisect
import difflib
import functools
import itertools
import os
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.index import Index, Part, open_index
from tnt_flax.data.sources.names import some

FORMATS = ("array_record", "tfrecord")  # the better one first: the other needs an index
_LENGTH, _CRC = 8, 4  # bytes: a TFRecord is length, crc of the length, data, crc of the data


class TfdsSource:
    """A data set that tfds prepared as ArrayRecord or TFRecord files.

    `name` is a tfds name ("cifar10", "oxford_iiit_pet", "imagenet2012:5.1.0"), `split` a tfds
    split, slices such as "train[:90%]" included, `data_dir` tfds' directory ("" for its default,
    ~/tensorflow_datasets). Image and label are the data set's supervised pair; images stay encoded.

    Of a data set whose images are of several classes, or of none, such as "imagenet2012_real", the
    label is int32 [most_labels], padded with -1. Only who says `several_labels` gets these.
    """

    def __init__(self, name: str, split: str, data_dir: str = "", *, several_labels: bool = False):
        builder = _prepared_builder(name, data_dir)
        keys, label, several = _supervised_pair(builder, several_labels)
        self._image_key, self._label_key = keys
        self.class_names = tuple(label.names)
        self.most_labels = len(self.class_names) if several else None
        self._records = _open_split(builder, split)
        self.place = os.fspath(builder.data_path)
        self._name = f"{name}/{split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            example = _example_class().FromString(self._records[index])
            values = {feature.key: feature.value for feature in example.features.feature}
            image = values[self._image_key].bytes_list.value[0]
            labels = values[self._label_key].int64_list.value
            if self.most_labels is None:
                return image, labels[0]
            padded = np.full(self.most_labels, -1, np.int32)
            padded[: len(labels)] = labels
            return image, padded
        # How array_record and protobuf report damaged files; OSError is ours.
        except (RuntimeError, ValueError, LookupError, message.DecodeError) as error:
            what = " ".join(str(error).split())
            kind = storage.DamagedError if os.path.exists(self.place) else OSError
            raise kind(what) from None

    def name_of(self, index: int) -> str:
        return f"{self._name} record {index}"


@functools.cache
def _example_class() -> Any:
    """tf.train.Example (tensorflow/core/example), as far as it is needed here, for protobuf.

    A map is a list of pairs to protobuf, and is declared as one here.
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="e", syntax="proto3")
    for name, fields in {
        "BytesList": [("value", 1, field.TYPE_BYTES, "repeated")],
        "Int64List": [("value", 1, field.TYPE_INT64, "repeated")],
        "Feature": [("bytes_list", 1, "BytesList", ""), ("int64_list", 3, "Int64List", "")],
        "Entry": [("key", 1, field.TYPE_STRING, ""), ("value", 2, "Feature", "")],
        "Features": [("feature", 1, "Entry", "repeated")],
        "Example": [("features", 1, "Features", "")],
    }.items():
        described = file.message_type.add(name=name)
        for key, number, kind, repeated in fields:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            added = described.field.add(name=key, number=number, label=label)
            if isinstance(kind, str):
                added.type, added.type_name = field.TYPE_MESSAGE, f".e.{kind}"
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("e.Example"))


# ------------------------------------------------------------------------------- what tfds knows


def _prepared_builder(name, data_dir):
    import tensorflow_datasets as tfds

    if not name:
        raise InputError("a tfds data set needs its name: set data.name, for example to cifar10")
    where = os.path.expanduser(data_dir) or tfds.core.constants.DATA_DIR
    readable = FORMATS
    if storage.is_remote(where):
        storage.list_folder(where)  # says what is missing more clearly than tfds would
        readable = ("tfrecord",)  # array_record opens files on disks only
    advice = f"prepare it with `tfds build {name} --file_format={readable[0]} --data_dir={where}`"
    try:
        builder = tfds.builder(name, data_dir=where)
    except tfds.core.DatasetNotFoundError:
        guess = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
        known = f"did you mean {guess[0]!r}? Otherwise " if guess else ""
        raise InputError(
            f"tfds knows no data set {name!r} and finds none in {where}: {known}{advice}"
        ) from None
    except Exception as error:  # an unknown config, damaged metadata, a package that is missing...
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"tfds cannot open {name!r} in {where}: {first_line}") from error
    if not builder.info.splits:
        raise InputError(f"tfds data set {name!r} is not prepared in {where}: {advice}")
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    chosen = next((file_format for file_format in readable if file_format in formats), None)
    if not chosen:
        raise InputError(
            f"tfds data set {name!r} in {where} is prepared as {', '.join(sorted(formats))}, which "
            f"cannot be read there: {advice} (another data_dir, or remove the old files)"
        )
    if builder.info.file_format.value != chosen:
        builder.info.set_file_format(chosen, override=True, override_if_initialized=True)
    return builder


def _supervised_pair(builder, several_labels):
    """The keys of image and label, the ClassLabel, and whether an image has a sequence of these."""
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys or ()
    image, label = (features[key] for key in keys) if len(keys) == 2 else (None, None)
    several = isinstance(label, tfds.features.Sequence)
    label = label.feature if several else label
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise InputError(
            f"tfds data set {builder.name!r} has no supervised (image, label) pair: its supervised "
            f"keys are {keys or 'not set'}; choose an image classification data set"
        )
    if several and not several_labels:
        raise InputError(
            f"an image of tfds data set {builder.name!r} is of several classes or of none: it is "
            "for main.py --mode=eval alone"
        )
    return keys, label, several


def _open_split(builder, split):
    """The serialized examples of a split: a sequence of bytes."""
    splits = builder.info.splits
    try:
        instructions = splits[split].file_instructions
    except (ValueError, KeyError, AssertionError):
        raise InputError(
            f"tfds data set {builder.name!r} has no split {split!r}: it has {some(list(splits))}"
        ) from None
    if builder.info.file_format.value == "array_record":
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(instructions)
    # Slices share the index of their whole split.
    shards = {name: [os.fspath(p) for p in splits[name].filepaths] for name in splits}
    split_of = {path: (name, k) for name, paths in shards.items() for k, path in enumerate(paths)}
    indexes, ranges = {}, []
    for instruction in instructions:
        name, shard = split_of[os.fspath(instruction.filename)]
        if name not in indexes:
            scan = functools.partial(_scan_tfrecord, shards[name])
            indexes[name] = open_index("tfrecord", shards[name], _cut, scan)
        rows = indexes[name].rows_of(shard)
        if len(rows) != instruction.examples_in_shard:
            raise InputError(
                f"{instruction.filename} has {len(rows)} records, but dataset_info.json says "
                f"{instruction.examples_in_shard}: copy the data set again"
            )
        ranges.append((name, rows[instruction.skip : instruction.skip + instruction.take]))
    return _TfRecords(indexes, ranges)


# -------------------------------------------------------------------------------- TFRecord files


class _TfRecords:
    """The records of some TFRecord files: ranges of rows of one or more indexes."""

    def __init__(self, indexes: dict[str, Index], ranges: list[tuple[str, range]]):
        self._indexes, self._ranges = indexes, ranges
        self._ends = list(itertools.accumulate(len(rows) for _, rows in ranges))

    def __len__(self):
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, record):
        k = bisect.bisect_right(self._ends, record)
        name, rows = self._ranges[k]
        data = self._indexes[name].read(rows[record - self._ends[k]])  # from the end of its range
        data, crc = data[:-_CRC], data[-_CRC:]
        if crc != _masked_crc(data):
            raise storage.DamagedError("its checksum is wrong")
        return data


def _cut(sizes):
    return [Part(file, 0, size) for file, size in enumerate(sizes)]


def _scan_tfrecord(files, read, part):
    """Start and size of each record, its checksum included (tensorflow/core/lib/io)."""
    position, what = 0, files[part.file]
    while position < part.end:
        header = read(position, _LENGTH + _CRC)
        start, length = position + len(header), header[:_LENGTH]
        if header[_LENGTH:] != _masked_crc(length):
            raise InputError(f"{what} is damaged: no TFRecord begins at byte {position}")
        position = start + int.from_bytes(length, "little") + _CRC
        if position > part.end:
            raise InputError(f"{what} is truncated: a record should end at byte {position}")
        yield start, position - start, ""


def _masked_crc(data: bytes) -> bytes:
    """A crc32c as TFRecord files store it: rotated and shifted."""
    crc = google_crc32c.value(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")
