# SPDX-License-Identifier: Apache-2.0
"""Folder, tfds and digits give the same kind of records, and every mistake one clear line."""

import collections
import functools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.helpers.photos import png
from tests.helpers.source_checks import message_of
from tests.helpers.tfds_files import write_tfds
from tnt_flax.data.pipeline import eval_batches
from tnt_flax.data.sources import Digits, ImageFolder, check_same_classes, open_source
from tnt_flax.data.sources.names import natural_key
from tnt_flax.data.sources.tfds import TfdsSource
from tnt_flax.data.transforms import eval_transform

FEATURES = tfds.features.FeaturesDict(
    {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
)


def image(value, height=5, width=7):
    return png(np.full((height, width, 3), value, np.uint8))


def write_images(folder, paths):
    for value, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(image(value))


def examples(count):
    return [{"image": image(5 * i), "label": i % 2} for i in range(count)]


# ------------------------------------------------------------------------------------------ folder


def test_folder_sorts_classes_and_files_naturally(tmp_path):
    write_images(
        tmp_path,
        [
            "train/10/a.png",
            "train/9/img10.png",
            "train/9/img9.png",
            "train/2/b.png",
            "train/B/c.png",
        ],
    )
    source = ImageFolder(tmp_path, "train")
    assert source.class_names == ("2", "9", "10", "B")
    names = [os.path.relpath(source.name_of(i), tmp_path / "train") for i in range(len(source))]
    assert names == ["2/b.png", "9/img9.png", "9/img10.png", "10/a.png", "B/c.png"]
    assert [source[i][1] for i in range(5)] == [0, 1, 1, 2, 3]
    assert source[2][0] == image(1)  # 9/img10.png was written second


def test_natural_key_orders_like_timm_and_breaks_ties():
    names = ["n10", "N9", "n9", "x", "10", "9", "010", "²"]
    expected = ["9", "010", "10", "N9", "n9", "n10", "x", "²"]
    assert sorted(names, key=natural_key) == sorted(names[::-1], key=natural_key) == expected


def test_folder_finds_nested_images_of_every_suffix_and_nothing_else(tmp_path):
    wanted = ["a.JPEG", "b.jpg", "deep/er/c.PNG", "d.ppm", "e.bmp", "f.pgm", "g.tif", "h.tiff"]
    others = ["notes.txt", "i.npy", ".hidden.jpg", "._mac.png", ".cache/j.jpg", "k.jpg.part"]
    write_images(tmp_path / "train/x", [*wanted, "i.webp", *others])
    write_images(tmp_path, ["train/.git/z.png", "train/loose.png"])
    source = ImageFolder(tmp_path, "train")
    assert source.class_names == ("x",)
    found = {os.path.relpath(source.name_of(i), tmp_path / "train/x") for i in range(len(source))}
    assert found == {*wanted, "i.webp"}


@pytest.mark.parametrize("folder", ["val", "validation"])
@pytest.mark.parametrize("split", ["val", "validation"])
def test_both_names_of_the_evaluation_folder(tmp_path, folder, split):
    write_images(tmp_path, [f"{folder}/x/a.png"])
    assert ImageFolder(tmp_path, split).folder == str(tmp_path / folder)


def test_class_list_gives_the_labels(tmp_path):
    write_images(tmp_path, ["train/cat/a.png", "train/dog/b.png", "train/ant/c.png"])
    (tmp_path / "classes.txt").write_text("dog\nant\r\n\n cat \n")
    source = open_source(
        "folder", "train", root=str(tmp_path), class_list=str(tmp_path / "classes.txt")
    )
    assert source.class_names == ("dog", "ant", "cat")
    assert [(source.name_of(i)[-9:], source[i][1]) for i in range(3)] == [
        ("dog/b.png", 0),
        ("ant/c.png", 1),
        ("cat/a.png", 2),
    ]


@pytest.mark.parametrize(
    "classes, expected",
    [
        ("cat\n", "dog is not in the class list"),
        ("cat\ndog\nfox\n", "names 'fox': "),
        ("cat\ndog\ncat\n", "names 'cat' more than once"),
        (None, "cannot read the class list"),
        (b"\xff\xfe\xfa", "not UTF-8"),
    ],
)
def test_a_class_list_must_match_the_folders(tmp_path, classes, expected):
    write_images(tmp_path, ["train/cat/a.png", "train/dog/b.png"])
    path = tmp_path / "classes.txt"
    if classes is not None:
        path.write_bytes(classes if isinstance(classes, bytes) else classes.encode())
    assert expected in message_of(lambda: ImageFolder(tmp_path, "train", str(path)))


def test_folder_errors_say_what_was_looked_for(tmp_path):
    missing = tmp_path / "nowhere"
    assert f"cannot read the data set root {missing}: No such" in message_of(
        lambda: ImageFolder(missing, "train")
    )
    assert "set data.root" in message_of(lambda: open_source("folder", "train"))
    assert "not gs://b/imagenet" in message_of(lambda: ImageFolder("gs://b/imagenet", "train"))
    (tmp_path / "file").write_text("")
    assert "Not a directory" in message_of(lambda: ImageFolder(tmp_path / "file", "train"))

    root = tmp_path / "root"
    root.mkdir()
    assert f"{root}: it holds no folders" in message_of(lambda: ImageFolder(root, "train"))
    write_images(root, ["test/x/a.png", "extra/x/a.png"])
    message = message_of(lambda: ImageFolder(root, "validation"))
    assert "no folder 'validation' or 'val'" in message and "it holds extra, test" in message

    (root / "train").mkdir()
    write_images(root, ["train/loose.png"])
    assert f"no class folders in {root}/train" in message_of(lambda: ImageFolder(root, "train"))
    write_images(root, ["train/full/a.png", "train/empty/readme.txt"])
    assert f"class folder {root}/train/empty has no images" in message_of(
        lambda: ImageFolder(root, "train")
    )


def test_an_unreadable_folder_is_named(unprivileged_folder):
    tmp_path = unprivileged_folder
    write_images(tmp_path, ["train/a/x.png", "train/b/deep/y.png"])
    for locked in ("train/b/deep", "train", "."):
        (tmp_path / locked).chmod(0)
        assert "Permission denied" in message_of(lambda: ImageFolder(tmp_path, "train"))
        (tmp_path / locked).chmod(0o700)


def test_a_vanished_file_is_an_oserror(tmp_path):
    write_images(tmp_path, ["train/a/x.png"])
    source = ImageFolder(tmp_path, "train")
    os.remove(source.name_of(0))
    with pytest.raises(FileNotFoundError):
        source[0]


# -------------------------------------------------------------------------------------------- tfds


def test_tfds_reads_a_prepared_data_set(tmp_path):
    write_tfds(tmp_path, "pets", "1.0.0", FEATURES, {"train": examples(5), "test": examples(2)})
    source = open_source("tfds", "train", root=str(tmp_path), name="pets")
    assert (len(source), source.class_names) == (5, ("cat", "dog"))
    assert [source[i] for i in range(5)] == [(image(5 * i), i % 2) for i in range(5)]
    assert source.name_of(3) == "pets/train record 3"
    assert len(TfdsSource("pets", "train[:60%]", str(tmp_path))) == 3
    assert pickle.loads(pickle.dumps(source))[4] == source[4]


def test_tfds_reads_the_named_data_sets(tmp_path):
    # The real builders of these names, on files with the features that those builders have.
    for name in ("cifar10", "oxford_iiit_pet", "imagenet2012"):
        info = tfds.builder(name, data_dir=tmp_path / "empty").info
        label = info.features["label"].names[7]
        pixels = image(9, 32, 32)
        extra = {
            "cifar10": {"id": "x"},
            "imagenet2012": {"file_name": "x.JPEG"},
            "oxford_iiit_pet": {
                "species": 0,
                "file_name": "x.jpg",
                # Never decoded: it would be an error if it was.
                "segmentation_mask": b"not an image",
                "head_bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
            },
        }[name]
        example = {"image": pixels, "label": label, **extra}
        example = {key: example[key] for key in info.features if key in example}
        assert set(example) == set(info.features)
        write_tfds(tmp_path, name, str(info.version), info.features, {"train": [example]})
        source = TfdsSource(name, "train", str(tmp_path))
        assert source[0] == (pixels, 7) and source.class_names[7] == label


def test_tfds_errors_tell_how_to_prepare(tmp_path):
    directory = str(tmp_path)
    build = f"`tfds build cifar10 --file_format=array_record --data_dir={directory}`"
    message = message_of(lambda: TfdsSource("cifar10", "train", directory))
    assert f"'cifar10' is not prepared in {directory}" in message and build in message

    message = message_of(lambda: TfdsSource("cifar1O", "train", directory))
    assert "tfds knows no data set 'cifar1O'" in message and "did you mean 'cifar10'" in message
    assert directory in message
    assert "set data.name" in message_of(lambda: open_source("tfds", "train"))
    assert "cannot open 'cifar10:9.9.9'" in message_of(
        lambda: TfdsSource("cifar10:9.9.9", "train", directory)
    )

    (write_tfds(tmp_path, "bad", "1.0.0", FEATURES, {}) / "dataset_info.json").write_text("{")
    assert "tfds cannot open 'bad'" in message_of(lambda: TfdsSource("bad", "train", directory))

    cifar = tfds.builder("cifar10", data_dir=tmp_path).info
    write_tfds(
        tmp_path,
        "cifar10",
        str(cifar.version),
        cifar.features,
        {"train": [1]},
        file_format="riegeli",
    )
    message = message_of(lambda: TfdsSource("cifar10", "train", directory))
    assert "is prepared as riegeli, which cannot be read" in message and build in message


def test_tfds_split_and_pair_errors(tmp_path):
    directory = str(tmp_path)
    write_tfds(tmp_path, "pets", "1.0.0", FEATURES, {"train": examples(2), "test": examples(1)})
    for split in ("valid", "train[", "train[:x%]", ""):
        message = message_of(lambda split=split: TfdsSource("pets", split, directory))
        assert message == f"tfds data set 'pets' has no split {split!r}: it has train, test"

    write_tfds(tmp_path, "alone", "1.0.0", FEATURES, {"train": examples(2)}, supervised=())
    assert "no supervised (image, label) pair: its supervised keys are not set" in message_of(
        lambda: TfdsSource("alone", "train", directory)
    )
    texts = tfds.features.FeaturesDict({"text": tfds.features.Text(), **FEATURES})
    rows = [{"text": "a", **examples(1)[0]}]
    write_tfds(tmp_path, "words", "1.0.0", texts, {"train": rows}, supervised=("text", "label"))
    assert "no supervised (image, label) pair" in message_of(
        lambda: TfdsSource("words", "train", directory)
    )


def test_a_damaged_record_file_is_an_oserror(tmp_path):
    folder = write_tfds(tmp_path, "pets", "1.0.0", FEATURES, {"train": examples(50)})
    shard = folder / "pets-train.array_record-00000-of-00001"
    source = TfdsSource("pets", "train", str(tmp_path))
    data = bytearray(shard.read_bytes())
    data[200:900] = bytes(700)
    shard.write_bytes(data)
    with pytest.raises(OSError):
        [source[i] for i in range(50)]


# ------------------------------------------------------------------------------------------ digits


def test_digits_are_split_without_overlap():
    train, test = Digits("train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == test.class_names == tuple("0123456789")
    images = [source[i][0].tobytes() for source in (train, test) for i in range(len(source))]
    assert len(set(images)) == 1797  # no digit is in both: all 1,797 are different
    pixels, label = train[0]
    assert (pixels.dtype, pixels.shape, type(label)) == (np.uint8, (8, 8), int)
    assert max(train[i][0].max() for i in range(50)) == 255


def test_digits_are_balanced_and_reproducible():
    test = Digits("test")
    counts = collections.Counter(test[i][1] for i in range(len(test)))
    assert len(counts) == 10 and min(counts.values()) >= 24 and max(counts.values()) <= 48
    again = Digits("validation")
    assert all((test[i][0] == again[i][0]).all() for i in range(360))
    other = Digits("test", seed=1)
    assert any((test[i][0] != other[i][0]).any() for i in range(360))
    assert [test[i][1] for i in range(12)] == [0, 5, 1, 6, 2, 2, 9, 9, 0, 5, 0, 8]
    assert test.name_of(12) == "digits test image 12"


def test_digits_errors():
    assert "no split 'valid'" in message_of(lambda: Digits("valid"))


# ------------------------------------------------------------------------------------------ common


def test_folder_and_tfds_give_the_same_batches(tmp_path):
    rows = examples(5)
    write_tfds(tmp_path, "pets", "1.0.0", FEATURES, {"test": rows})
    for i, row in enumerate(rows):
        path = tmp_path / "images/test" / ("cat", "dog")[row["label"]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"])
    transform = functools.partial(eval_transform, size=8, crop_fraction=0.9)
    of_kind = {}
    for kind, arguments in (
        ("folder", {"root": str(tmp_path / "images")}),
        ("tfds", {"root": str(tmp_path), "name": "pets"}),
    ):
        source = open_source(kind, "test", **arguments)
        batches = list(eval_batches(source, transform=transform, batch_size=2))
        of_kind[kind] = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    folder, prepared = of_kind["folder"], of_kind["tfds"]
    describe = lambda batch: {name: (a.shape, a.dtype) for name, a in batch.items()}
    assert describe(folder) == describe(prepared)
    order = [0, 2, 4, 1, 3]  # the folder lists all cats first
    np.testing.assert_array_equal(folder["image"][:5], prepared["image"][order])
    np.testing.assert_array_equal(folder["label"][:5], prepared["label"][order])


@pytest.mark.parametrize(
    "kind, guess", [("fodler", "folder"), ("TFDS", "tfds"), ("digit", "digits")]
)
def test_an_unknown_kind_gets_a_suggestion(kind, guess):
    assert f"did you mean {guess!r}?): choose one of folder, " in message_of(
        lambda: open_source(kind, "train")
    )


def test_a_class_list_without_folders_is_refused():
    message = message_of(lambda: open_source("digits", "train", class_list="x.txt"))
    assert "not for kind 'digits'" in message


def test_splits_must_have_the_same_classes():
    named = lambda *names: type("Named", (), {"class_names": names})
    check_same_classes(named("a", "b"), named("a", "b"))
    assert message_of(lambda: check_same_classes(named("a", "b", "c"), named("a", "c"))) == (
        "training and evaluation splits differ (3 and 2 classes): "
        "label 1 is 'b' in training and 'c' in evaluation"
    )
    assert message_of(lambda: check_same_classes(named("a"), named("a", "b"))) == (
        "training and evaluation splits differ (1 and 2 classes): 'b' is only in evaluation"
    )


def test_no_source_imports_tensorflow(tmp_path):
    write_tfds(tmp_path, "pets", "1.0.0", FEATURES, {"train": examples(1)})
    code = (
        "import sys\n"
        "from tnt_flax.data.sources import open_source\n"
        "light = {'tensorflow_datasets', 'sklearn'} & set(sys.modules)\n"
        f"open_source('tfds', 'train', name='pets', root={str(tmp_path)!r})[0]\n"
        "assert not light, light\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
