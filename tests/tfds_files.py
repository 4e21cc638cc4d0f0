# SPDX-License-Identifier: Apache-2.0
"""Writes a small data set as tfds prepares it on disk, without TensorFlow and without a builder."""

import json
import pathlib

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
) -> pathlib.Path:
    """One shard per split below data_dir/name/version; images in the examples are encoded bytes.

    With another `file_format` only the metadata is written: no reader gets as far as the records.
    """
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    features.save_config(folder)
    described = []
    for split, examples in splits.items():
        if file_format == "array_record":
            shard = folder / f"{name}-{split}.array_record-00000-of-00001"
            writer = ArrayRecordWriter(str(shard), "group_size:1")
            for example in examples:
                writer.write(features.serialize_example(example))
            writer.close()
        described.append(
            {
                "name": split,
                "shardLengths": [str(len(examples))],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": version, "fileFormat": file_format, "splits": described}
    if supervised:
        info["supervisedKeys"] = {"tuple": {"items": [{"featureKey": key} for key in supervised]}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder
