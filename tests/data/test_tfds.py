# SPDX-License-Identifier: Apache-2.0
"""tfds' TFRecord files give what its ArrayRecord files give; damage is noticed and named."""

import json
import pickle
import subprocess
import sys

import google_crc32c
import pytest
import tensorflow_datasets as tfds
from fsspec.implementations.memory import MemoryFileSystem

from tests.helpers.source_checks import message_of, records
from tests.helpers.tars import image
from tests.helpers.tfds_files import crc32c, tfrecord, write_tfds
from tnt_flax.data.sources import tfds as tfds_records
from tnt_flax.data.sources.tfds import TfdsSource

FEATURES = tfds.features.FeaturesDict(
    {
        "file_name": tfds.features.Text(),
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=["cat", "dog", "eel"]),
        "mask": tfds.features.Image(shape=(None, None, 1)),
        "box": tfds.features.BBoxFeature(),
    }
)
SPLITS = {"train": 11, "test": 4}


def examples(count):
    box = tfds.features.BBox(0.0, 0.0, 0.5, 1.0)
    return [
        {"file_name": f"{i}", "image": image(i), "label": i % 3, "mask": b"no image", "box": box}
        for i in range(count)
    ]


@pytest.fixture
def written(tmp_path):
    for form in ("tfrecord", "array_record"):
        splits = {split: examples(count) for split, count in SPLITS.items()}
        write_tfds(tmp_path / form, "pets", "1.0.0", FEATURES, splits, file_format=form, shards=3)
    return tmp_path


def shard(written, k=0):
    return written / f"tfrecord/pets/1.0.0/pets-train.tfrecord-{k:05}-of-00003"


def test_the_checksum_is_crc32c():
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"123456789") == 0xE3069283  # RFC 3720
    assert crc32c(b"any bytes") == google_crc32c.value(b"any bytes")
    # What TensorFlow's own writer makes of b"abc".
    assert tfrecord(b"abc").hex() == "0300000000000000b099490e6162636e57f121"


@pytest.mark.parametrize("split", ["train", "test", "train[:60%]", "train[3:9]", "test+train[-2:]"])
def test_both_forms_give_the_same_records(written, split):
    source, other = (TfdsSource("pets", split, str(written / f)) for f in tfds_records.FORMATS)
    assert records(source) == records(other) and len(source) > 1
    assert source.class_names == other.class_names == ("cat", "dog", "eel")
    assert source.name_of(1) == other.name_of(1) == f"pets/{split} record 1"
    assert [source[i] for i in (1, 0, 1)] == [other[i] for i in (1, 0, 1)]
    for one in (source, other):
        assert records(pickle.loads(pickle.dumps(one))) == records(source)
    if split == "train":
        assert records(source) == [(image(i), i % 3) for i in range(11)]


def test_slices_share_one_index(written):
    for split in ("train", "train[:2]", "train[9:]", "train+test"):
        TfdsSource("pets", split, str(written / "tfrecord"))
    assert len(list((written / "tfrecord/pets/1.0.0").glob("*.index"))) == 2


def test_an_empty_shard_is_no_obstacle(tmp_path):
    splits = {"train": examples(2)}
    write_tfds(tmp_path, "pets", "1.0.0", FEATURES, splits, file_format="tfrecord", shards=3)
    assert records(TfdsSource("pets", "train", str(tmp_path))) == [(image(0), 0), (image(1), 1)]


def test_where_both_forms_are_the_better_one_is_read(written):
    folder, other = written / "tfrecord/pets/1.0.0", written / "array_record/pets/1.0.0"
    for file in other.glob("*.array_record*"):
        file.rename(folder / file.name)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["alternativeFileFormats"] = ["array_record"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(TfdsSource("pets", "train", str(written / "tfrecord"))) == 11
    assert not list(folder.glob("*.index"))


def test_images_of_several_classes(tmp_path):
    """As imagenet2012_real has them."""
    one = tfds.features.ClassLabel(names=["cat", "dog", "eel", "fox"])
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "original_label": one,
            "real_label": tfds.features.Sequence(one),
            "file_name": tfds.features.Text(),
        }
    )
    labels = [[2], [], [3, 0]]
    rows = [
        {"image": image(i), "original_label": 1, "real_label": of_one, "file_name": "a.JPEG"}
        for i, of_one in enumerate(labels)
    ]
    for form in tfds_records.FORMATS:
        options = dict(file_format=form, supervised=("image", "real_label"))
        write_tfds(tmp_path / form, "real", "1.0.0", features, {"validation": rows}, **options)
        source = TfdsSource("real", "validation", str(tmp_path / form), multi_label=True)
        assert source.class_names == ("cat", "dog", "eel", "fox") and source.max_labels == 4
        assert [source[i][0] for i in range(3)] == [image(i) for i in range(3)]
        padded = [[2, -1, -1, -1], [-1] * 4, [3, 0, -1, -1]]
        assert [source[i][1].tolist() for i in range(3)] == padded
        message = message_of(
            lambda form=form: TfdsSource("real", "validation", str(tmp_path / form))
        )
        assert (
            "'real' is multi-label: it can only be evaluated on, by main.py --mode=eval" in message
        )


def test_damage_is_noticed(written):
    root, path = str(written / "tfrecord"), shard(written)
    source = TfdsSource("pets", "train", root)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for position in (*range(12, 12 + length + 4, 7), 12 + length, 12 + length + 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="its checksum is wrong"):
            records(source)  # its index was made before the damage
    path.write_bytes(whole[:-1])
    assert f"{path} is truncated" in message_of(lambda: TfdsSource("pets", "train", root))
    for position in (0, 7, 8, 11):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        message = message_of(lambda: TfdsSource("pets", "train", root))
        assert f"{path} is damaged: no TFRecord begins at byte 0" in message
    path.write_bytes(whole[:5])
    assert "no TFRecord begins at byte 0" in message_of(lambda: TfdsSource("pets", "train", root))
    path.write_bytes(whole + tfrecord(b"one more"))
    message = message_of(lambda: TfdsSource("pets", "train", root))
    assert "has 4 records, but dataset_info.json says 3" in message
    path.unlink()
    assert f"cannot read {path}: No such" in message_of(lambda: TfdsSource("pets", "train", root))


@pytest.mark.parametrize("record", [b"\xff no protobuf", b"", FEATURES["label"].__doc__.encode()])
def test_a_record_that_is_no_example_is_an_oserror(tmp_path, record):
    folder = write_tfds(
        tmp_path, "pets", "1.0.0", FEATURES, {"train": examples(1)}, file_format="tfrecord"
    )
    (folder / "pets-train.tfrecord-00000-of-00001").write_bytes(tfrecord(record))
    with pytest.raises(OSError):
        TfdsSource("pets", "train", str(tmp_path))[0]


class Bucket(MemoryFileSystem):
    """As if memory was Google's storage: tfds reads its metadata from there, too."""

    protocol, store, pseudo_dirs = ("gs", "gcs"), {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gs://", "memory://"))


def test_tfrecords_are_read_from_an_address(written, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for scheme in Bucket.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, Bucket)
    for form in ("tfrecord", "array_record"):
        for path in (written / form / "pets/1.0.0").iterdir():
            Bucket().pipe_file(f"gs://tfds/{form}/pets/1.0.0/{path.name}", path.read_bytes())
    source = TfdsSource("pets", "train[2:]", "gs://tfds/tfrecord")
    assert records(source) == records(TfdsSource("pets", "train[2:]", str(written / "tfrecord")))
    message = message_of(lambda: TfdsSource("pets", "train", "gs://tfds/array_record"))
    assert "is prepared as array_record, which cannot be read there" in message
    assert "--file_format=tfrecord --data_dir=gs://tfds/array_record" in message
    message = message_of(lambda: TfdsSource("pets", "train", "gs://tfds/nowhere"))
    assert "cannot read gs://tfds/nowhere" in message


def test_reading_imports_neither_tensorflow_nor_tfds(written):
    data = pickle.dumps(TfdsSource("pets", "train", str(written / "tfrecord")))
    code = (
        f"import pickle, sys\nassert len(pickle.loads({data!r})[10][0]) > 50\n"
        "assert not {'tensorflow', 'tensorflow_datasets', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
