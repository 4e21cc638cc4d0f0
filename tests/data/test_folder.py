# SPDX-License-Identifier: Apache-2.0
"""Image folders: order, labels, held-out images, and error messages."""

import os

import pytest

from tests.helpers.source_checks import message_of
from tests.helpers.tars import image, write_images
from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import Holdout, ImageFolder, labels_of, open_source
from tnt_flax.data.sources.names import natural_key
from tnt_flax.training.experiment import Experiment

FIFTH = Holdout(0.2, "train", "validation")


def write_classes(folder, **counts):
    write_images(folder, *(f"{name}/{i}.png" for name in counts for i in range(counts[name])))


def paths_of(source, root):
    return [os.path.relpath(source.name_of(i), root) for i in range(len(source))]


def test_classes_and_files_are_in_natural_order(tmp_path):
    files = ["10/a.png", "9/img10.png", "9/img9.png", "2/b.png", "B/c.png"]
    write_images(tmp_path / "train", *files)
    source = ImageFolder(tmp_path, "train")
    assert source.class_names == ("2", "9", "10", "B")
    expected = ["2/b.png", "9/img9.png", "9/img10.png", "10/a.png", "B/c.png"]
    assert paths_of(source, tmp_path / "train") == expected
    assert [source[i][1] for i in range(5)] == [0, 1, 1, 2, 3]
    assert source[2][0] == image(1)


def test_natural_key_orders_like_timm_and_breaks_ties():
    names = ["n10", "N9", "n9", "x", "10", "9", "010", "²"]
    expected = ["9", "010", "10", "N9", "n9", "n10", "x", "²"]
    assert sorted(names, key=natural_key) == sorted(names[::-1], key=natural_key) == expected


def test_images_are_found_at_any_depth_by_suffix(tmp_path):
    wanted = ["a.JPEG", "b.jpg", "deep/er/c.PNG", "d.ppm", "e.bmp", "f.pgm", "g.tif", "h.tiff"]
    others = ["notes.txt", "i.npy", ".hidden.jpg", "._mac.png", ".cache/j.jpg", "k.jpg.part"]
    write_images(tmp_path / "train/x", *wanted, "i.webp", *others)
    write_images(tmp_path, "train/.git/z.png", "train/loose.png")
    source = ImageFolder(tmp_path, "train")
    assert source.class_names == ("x",)
    assert set(paths_of(source, tmp_path / "train/x")) == {*wanted, "i.webp"}


@pytest.mark.parametrize("folder", ["val", "validation"])
def test_val_and_validation_are_synonyms(tmp_path, folder):
    write_images(tmp_path, f"{folder}/x/a.png")
    for split in ("val", "validation"):
        assert ImageFolder(tmp_path, split).storage_path == str(tmp_path / folder)


def test_class_list_orders_the_labels(tmp_path):
    write_images(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/ant/c.png")
    (tmp_path / "classes.txt").write_text("dog\nant\r\n\n cat \n")
    classes = str(tmp_path / "classes.txt")
    source = open_source("folder", "train", root=str(tmp_path), class_list=classes)
    assert source.class_names == ("dog", "ant", "cat")
    assert paths_of(source, tmp_path / "train") == ["dog/b.png", "ant/c.png", "cat/a.png"]
    assert [source[i][1] for i in range(3)] == labels_of(source).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "classes, expected",
    [
        (b"cat\n", "'dog' is only in "),
        (b"cat\ndog\nfox\n", "'fox' is only in "),
        (b"cat\ndog\ncat\n", "names 'cat' more than once"),
        (None, "cannot read the class list"),
        (b"\xff\xfe\xfa", "can't decode byte 0xff"),
    ],
)
def test_class_list_must_match_the_folders(tmp_path, classes, expected):
    write_images(tmp_path, "train/cat/a.png", "train/dog/b.png")
    path = tmp_path / "classes.txt"
    if classes is not None:
        path.write_bytes(classes)
    assert expected in message_of(lambda: ImageFolder(tmp_path, "train", str(path)))


def test_error_messages_name_the_expected_folders(tmp_path):
    def message(root, split="train"):
        return message_of(lambda: ImageFolder(root, split))

    missing = tmp_path / "nowhere"
    assert f"cannot read the data set root {missing}: No such" in message(missing)
    assert "set data.root" in message_of(lambda: open_source("folder", "train"))
    assert "not gs://b/imagenet" in message("gs://b/imagenet")
    (tmp_path / "file").write_text("")
    assert "Not a directory" in message(tmp_path / "file")

    root = tmp_path / "root"
    root.mkdir()
    assert f"{root}: it holds no folders" in message(root)
    write_images(root, "test/x/a.png", "extra/x/a.png")
    assert "no folder 'validation' or 'val'" in message(root, "validation")
    assert "it holds extra, test" in message(root, "validation")

    write_images(root, "train/loose.png")
    assert f"no class folders in {root}/train" in message(root)
    write_images(root, "train/full/a.png", "train/empty/readme.txt")
    assert f"class folder {root}/train/empty has no images" in message(root)


@pytest.mark.parametrize("locked", ["train/b/deep", "train", "."])
def test_unreadable_folders_are_refused(tmp_path, monkeypatch, locked):
    write_images(tmp_path, "train/a/x.png", "train/b/deep/y.png")
    scandir = os.scandir

    def refuse(path):
        if os.path.normpath(path) == str(tmp_path / locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "Permission denied" in message_of(lambda: ImageFolder(tmp_path, "train"))


# ---------------------------------------------------------------------------------------- holdout


def held_out_paths(root, split):
    source = ImageFolder(root, split, holdout=FIFTH)
    paths = paths_of(source, root)
    labels = [source.class_names[source[i][1]] for i in range(len(source))]
    assert labels == [os.path.basename(os.path.dirname(path)) for path in paths]
    return paths


@pytest.mark.parametrize("below", ["", "train"])
def test_holdout_divides_the_images_of_each_class(tmp_path, caplog, below):
    write_classes(tmp_path / below, cat=20, dog=2, emu=1)
    rest, held_out = held_out_paths(tmp_path, "train"), held_out_paths(tmp_path, "validation")
    assert not set(rest) & set(held_out) and len(rest) + len(held_out) == 23
    count = {name: sum(name in path for path in held_out) for name in ("cat", "dog", "emu")}
    assert count == {"cat": 4, "dog": 1, "emu": 0}  # a single image stays in training
    assert held_out == held_out_paths(tmp_path, "validation")
    (message,) = set(caplog.messages)
    assert message == (
        f"{tmp_path} has no split 'validation': holding out a fixed set of 5 images of "
        f"{tmp_path / below}"
    )


def test_added_images_hardly_change_the_holdout(tmp_path):
    write_classes(tmp_path, cat=100)
    before = set(held_out_paths(tmp_path, "validation"))
    write_classes(tmp_path, cat=110)
    after = set(held_out_paths(tmp_path, "validation"))
    assert (len(before), len(after)) == (20, 22) and len(before & after) >= 16


def test_an_existing_evaluation_split_disables_the_holdout(tmp_path, caplog):
    write_classes(tmp_path / "train", cat=9)
    write_classes(tmp_path / "val", cat=3)
    assert len(held_out_paths(tmp_path, "train")) == 9
    assert len(held_out_paths(tmp_path, "validation")) == 3
    assert not caplog.messages


def test_folders_that_cannot_be_divided_are_refused(tmp_path):
    write_classes(tmp_path / "one", cat=1, dog=1)
    with pytest.raises(InputError, match="no class in .* has two images, so none can be held out"):
        ImageFolder(tmp_path / "one", "validation", holdout=FIFTH)
    write_classes(tmp_path / "odd" / "Training", cat=5)  # a split, not a class called Training
    with pytest.raises(InputError, match="no folder 'train' in .* it holds Training; .*train_spl"):
        ImageFolder(tmp_path / "odd", "train", holdout=FIFTH)
    write_classes(tmp_path / "plain", cat=5)
    for holdout in (None, FIFTH._replace(share=0.0)):
        with pytest.raises(InputError, match="or data.holdout=0.2 to evaluate on a fifth"):
            ImageFolder(tmp_path / "plain", "validation", holdout=holdout)
    with pytest.raises(InputError, match="no folder 'test'"):  # neither training nor evaluation
        ImageFolder(tmp_path / "plain", "test", holdout=FIFTH)


def test_config_sets_the_holdout(smoke_config, tmp_path):
    write_classes(tmp_path, cat=10)
    folder = dict(data__source="folder", data__root=str(tmp_path), data__eval_split="validation")
    assert len(Experiment(smoke_config(**folder, data__holdout=0.3)).train_source) == 7
