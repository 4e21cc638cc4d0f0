# SPDX-License-Identifier: Apache-2.0
"""Writes small data sets in the layout of tfds, without TensorFlow and without a builder."""

import json
import pathlib

import google_crc32c
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter


def write_tfds(
    data_dir: pathlib.Path,
    name: str,
    version: str,
    features: tfds.features.FeaturesDict,
    splits: dict[str, list[dict]],
    *,
    file_format: str = "array_record",
    supervised: tuple[str, ...] = ("image", "label"),
    shards: int = 1,
) -> pathlib.Path:
    """Writes shards of each split below data_dir/name/version and returns that folder.

    Images in the examples are encoded bytes. With a `file_format` other than array_record and
    tfrecord only the metadata is written.
    """
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    features.save_config(folder)
    described = []
    for split, examples in splits.items():
        lengths = []
        for k in range(shards):
            shard = folder / f"{name}-{split}.{file_format}-{k:05}-of-{shards:05}"
            part = examples[k * len(examples) // shards : (k + 1) * len(examples) // shards]
            lengths.append(str(len(part)))
            if file_format == "array_record":
                writer = ArrayRecordWriter(str(shard), "group_size:1")
                for example in part:
                    writer.write(features.serialize_example(example))
                writer.close()
            elif file_format == "tfrecord":
                records = [features.serialize_example(example) for example in part]
                shard.write_bytes(b"".join(map(tfrecord, records)))
        described.append(
            {
                "name": split,
                "shardLengths": lengths,
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": version, "fileFormat": file_format, "splits": described}
    if supervised:
        info["supervisedKeys"] = {"tuple": {"items": [{"featureKey": key} for key in supervised]}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def write_multi_label(data_dir, name, names, images, labels, file_format) -> None:
    """Writes a validation split with the features of imagenet2012_real and classes `names`."""
    one = tfds.features.ClassLabel(names=names)
    features = {"image": tfds.features.Image(encoding_format="jpeg"), "original_label": one}
    features |= {"real_label": tfds.features.Sequence(one), "file_name": tfds.features.Text()}
    rows = [
        {"image": image, "original_label": 1, "real_label": row, "file_name": "a.JPEG"}
        for image, row in zip(images, labels, strict=True)
    ]
    options = dict(file_format=file_format, supervised=("image", "real_label"))
    described = tfds.features.FeaturesDict(features)
    write_tfds(data_dir, name, "1.0.0", described, {"validation": rows}, **options)


def tfrecord(data: bytes) -> bytes:
    """Returns a record in the framing of TensorFlow's RecordWriter."""
    length = len(data).to_bytes(8, "little")
    return length + _masked(length) + data + _masked(data)


def _masked(data):
    crc = google_crc32c.value(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32).to_bytes(4, "little")
