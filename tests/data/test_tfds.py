# SPDX-License-Identifier: Apache-2.0
"""tfds data sets in both file formats: records, splits, damage, and error messages."""

import json
import pickle
import socket
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from fsspec.implementations.memory import MemoryFileSystem

from tests.helpers.source_checks import message_of, records
from tests.helpers.tars import image
from tests.helpers.tfds_files import tfrecord, write_multi_label, write_tfds
from tnt_flax.data.sources import open_source
from tnt_flax.data.sources.tfds import FORMATS, TfdsSource

PAIR = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
FEATURES = tfds.features.FeaturesDict(
    {
        "file_name": tfds.features.Text(),
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=["cat", "dog", "eel"]),
        "mask": tfds.features.Image(shape=(None, None, 1)),
        "box": tfds.features.BBoxFeature(),
    }
)
SPLITS = {"train": 11, "test": 2}  # in three shards, so one is empty


def examples(count):
    """Examples whose mask is not decodable, so that decoding it would fail."""
    box = tfds.features.BBox(0.0, 0.0, 0.5, 1.0)
    return [
        {"file_name": f"{i}", "image": image(i), "label": i % 3, "mask": b"no image", "box": box}
        for i in range(count)
    ]


def write_pets(folder, file_format="array_record", shards=1, features=FEATURES, **splits):
    splits = {split: examples(count) for split, count in splits.items()}
    options = dict(file_format=file_format, shards=shards)
    return write_tfds(folder, "pets", "1.0.0", features, splits, **options)


@pytest.fixture
def written(tmp_path):
    """A folder with the data set "pets" in each file format."""
    for file_format in FORMATS:
        write_pets(tmp_path / file_format, file_format, shards=3, **SPLITS)
    return tmp_path


def shard(written):
    return written / "tfrecord/pets/1.0.0/pets-train.tfrecord-00000-of-00003"


@pytest.mark.parametrize("split", ["train", "test", "train[:60%]", "train[3:9]", "test+train[-2:]"])
def test_both_file_formats_give_the_same_records(written, split):
    roots = [str(written / file_format) for file_format in FORMATS]
    source, other = (open_source("tfds", split, root=root, name="pets") for root in roots)
    assert records(source) == records(other) and len(source) > 1
    assert source.class_names == other.class_names == ("cat", "dog", "eel")
    assert source.name_of(1) == other.name_of(1) == f"pets/{split} record 1"
    assert [source[i] for i in (1, 0, 1)] == [other[i] for i in (1, 0, 1)]
    for one in (source, other):
        assert records(pickle.loads(pickle.dumps(one))) == records(source)
    if split == "train":
        assert records(source) == [(image(i), i % 3) for i in range(11)]


def test_the_framing_of_these_tests_is_that_of_tensorflow():
    # TensorFlow's own writer encodes b"abc" as:
    assert tfrecord(b"abc").hex() == "0300000000000000b099490e6162636e57f121"


def test_slices_share_one_index(written):
    for split in ("train", "train[:2]", "train[9:]", "train+test"):
        TfdsSource("pets", split, str(written / "tfrecord"))
    assert len(list((written / "tfrecord/pets/1.0.0").glob("*.index"))) == 2


def test_array_record_is_preferred(written):
    folder, other = written / "tfrecord/pets/1.0.0", written / "array_record/pets/1.0.0"
    for file in other.glob("*.array_record*"):
        file.rename(folder / file.name)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["alternativeFileFormats"] = ["array_record"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(TfdsSource("pets", "train", str(written / "tfrecord"))) == 11
    assert not list(folder.glob("*.index"))


def test_data_sets_of_tfds_are_read(tmp_path):
    # The real builders of these names, and files with the features of those builders.
    for name in ("cifar10", "oxford_iiit_pet", "imagenet2012"):
        info = tfds.builder(name, data_dir=tmp_path / "empty").info
        label = info.features["label"].names[7]
        box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
        values = {"image": image(9), "label": label, "id": "x", "file_name": "x", "species": 0}
        values |= {"segmentation_mask": b"not an image", "head_bbox": box}
        if name == "cifar10":
            values["image"] = image(9, 32, 32)
        example = {key: values[key] for key in info.features}
        write_tfds(tmp_path, name, str(info.version), info.features, {"train": [example]})
        source = TfdsSource(name, "train", str(tmp_path))
        assert source[0] == (values["image"], 7) and source.class_names[7] == label


def test_a_data_set_on_disk_is_opened_without_a_request(tmp_path, monkeypatch):
    """Also one whose name tfds knows, and would prepare from the network."""

    def refuse(*args):
        raise AssertionError(f"request: {args}")

    write_tfds(tmp_path, "cifar10", "3.0.2", FEATURES, {"train": examples(2)})
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(TfdsSource("cifar10", "train", str(tmp_path))) == 2


def test_multi_label_data_sets(tmp_path):
    names, images = ("cat", "dog", "eel", "fox"), [image(i) for i in range(3)]
    for file_format in FORMATS:
        folder = tmp_path / file_format
        write_multi_label(folder, "real", names, images, [[2], [], [3, 0]], file_format)
        source = TfdsSource("real", "validation", str(folder), multi_label=True)
        assert source.class_names == names and source.max_labels == 4
        found, labels = zip(*records(source), strict=True)
        assert list(found) == images
        padded = [[2, -1, -1, -1], [-1] * 4, [3, 0, -1, -1]]
        assert [label.tolist() for label in labels] == padded
        message = message_of(lambda f=folder: TfdsSource("real", "validation", str(f)))
        assert "'real' is multi-label: it can only be evaluated on, by tnt-flax eval" in message


# ----------------------------------------------------------------------------------------- damage


def test_damage_is_detected(written):
    root, path = str(written / "tfrecord"), shard(written)
    source = TfdsSource("pets", "train", root)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")

    def flip(position):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)

    for position in (*range(12, 12 + length + 4, 7), 12 + length, 12 + length + 3):
        flip(position)
        with pytest.raises(OSError, match="its checksum is wrong"):
            records(source)  # its index was made before the damage

    message = lambda: message_of(lambda: TfdsSource("pets", "train", root))
    path.write_bytes(whole[:-1])
    assert f"{path} is truncated" in message()
    for position in (0, 7, 8, 11):
        flip(position)
        assert f"{path} is damaged: no TFRecord begins at byte 0" in message()
    path.write_bytes(whole[:5])
    assert "no TFRecord begins at byte 0" in message()
    path.write_bytes(whole + tfrecord(b"one more"))
    assert "has 4 records, but dataset_info.json says 3" in message()
    path.unlink()
    assert f"cannot read {path}: No such" in message()


@pytest.mark.parametrize("record", [b"\xff no protobuf", b""])
def test_a_record_that_is_not_an_example_raises_oserror(tmp_path, record):
    folder = write_pets(tmp_path, "tfrecord", train=1)
    (folder / "pets-train.tfrecord-00000-of-00001").write_bytes(tfrecord(record))
    with pytest.raises(OSError):
        TfdsSource("pets", "train", str(tmp_path))[0]


def test_a_damaged_array_record_file_raises_oserror(tmp_path):
    folder = write_pets(tmp_path, train=50)
    path = folder / "pets-train.array_record-00000-of-00001"
    source = TfdsSource("pets", "train", str(tmp_path))
    data = bytearray(path.read_bytes())
    data[200:900] = bytes(700)
    path.write_bytes(data)
    with pytest.raises(OSError):
        records(source)


# ----------------------------------------------------------------------------------------- errors


def test_error_messages_tell_how_to_prepare_a_data_set(tmp_path):
    root = str(tmp_path)
    message = lambda name: message_of(lambda: TfdsSource(name, "train", root))
    build = f"`tfds build cifar10 --file_format=array_record --data_dir={root}`"
    assert f"'cifar10' is not prepared in {root}" in message("cifar10")
    assert build in message("cifar10")
    unknown = message("cifar1O")
    assert "tfds cannot open 'cifar1O' (did you mean 'cifar10'?) in" in unknown
    assert root in unknown
    assert "set data.name" in message("")
    assert "cannot open 'cifar10:9.9.9'" in message("cifar10:9.9.9")
    (write_tfds(tmp_path, "bad", "1.0.0", FEATURES, {}) / "dataset_info.json").write_text("{")
    assert "tfds cannot open 'bad'" in message("bad")
    info = tfds.builder("cifar10", data_dir=tmp_path).info
    written = tmp_path, "cifar10", str(info.version), info.features, {"train": [1]}
    write_tfds(*written, file_format="riegeli")
    assert "is prepared as riegeli, which cannot be read" in message("cifar10")
    assert build in message("cifar10")


def test_error_messages_for_splits_and_supervised_pairs(tmp_path):
    root = str(tmp_path)
    write_pets(tmp_path, train=2, test=1)
    assert len(TfdsSource("pets", "validation", root)) == 1  # the only split to evaluate on
    for split in ("extra", "train[", "train[:x%]", ""):
        message = message_of(lambda split=split: TfdsSource("pets", split, root))
        assert message == f"tfds data set 'pets' has no split {split!r}: it has train, test"
    row = {"text": "a", "image": image(1), "label": 0}
    texts = tfds.features.FeaturesDict({"text": tfds.features.Text(), **PAIR})
    for name, supervised, keys in (("alone", (), "not set"), ("words", ("text", "label"), "('te")):
        write_tfds(tmp_path, name, "1.0.0", texts, {"train": [row]}, supervised=supervised)
        message = message_of(lambda name=name: TfdsSource(name, "train", root))
        assert f"no supervised (image, label) pair: its supervised keys are {keys}" in message


class Bucket(MemoryFileSystem):
    """A stand-in for Google Cloud Storage, from which tfds also reads its metadata."""

    protocol, store, pseudo_dirs = ("gs", "gcs"), {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gs://", "memory://"))


def test_tfrecords_are_read_from_a_url(written, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for scheme in Bucket.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, Bucket)
    for file_format in FORMATS:
        for path in (written / file_format / "pets/1.0.0").iterdir():
            url = f"gs://tfds/{file_format}/pets/1.0.0/{path.name}"
            Bucket().pipe_file(url, path.read_bytes())
    source = TfdsSource("pets", "train[2:]", "gs://tfds/tfrecord")
    assert records(source) == records(TfdsSource("pets", "train[2:]", str(written / "tfrecord")))
    message = message_of(lambda: TfdsSource("pets", "train", "gs://tfds/array_record"))
    assert "is prepared as array_record, which cannot be read in gs://tfds/array_r" in message
    assert "--file_format=tfrecord --data_dir=gs://tfds/array_record" in message
    message = message_of(lambda: TfdsSource("pets", "train", "gs://tfds/nowhere"))
    assert "cannot read gs://tfds/nowhere" in message


def test_sources_import_only_the_packages_they_need(written):
    root = str(written / "tfrecord")
    sources = [TfdsSource("pets", "train", str(written / name)) for name in FORMATS]
    code = f"""if True:
        import pickle, sys
        from tnt_flax.data.sources import open_source
        for source in pickle.loads({pickle.dumps(sources)!r}):  # as in a worker process
            assert source[10] == ({image(10)!r}, 1)
        assert not {{"tensorflow", "sklearn", "jax"}} & set(sys.modules)
        open_source("tfds", "train", name="pets", root={root!r})[0]
        assert "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
