# SPDX-License-Identifier: Apache-2.0
"""Image folders: order, labels, held-out images, and error messages."""

import dataclasses
import os
import pickle

import pytest

from tests.helpers.source_checks import message_of
from tests.helpers.tars import image, write_images
from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import Holdout, image_folder, labels_of, open_source
from tnt_flax.data.sources.names import ClassOptions, Names, natural_key, read_lines
from tnt_flax.training.experiment import Experiment

FIFTH = Holdout(0.2, "train", "validation")


def write_classes(folder, **counts):
    write_images(folder, *(f"{name}/{i}.png" for name in counts for i in range(counts[name])))


def paths_of(source, root):
    return [os.path.relpath(source.name_of(i), root) for i in range(len(source))]


def test_classes_and_files_are_in_natural_order(tmp_path):
    files = ["10/a.png", "9/img10.png", "9/img9.png", "2/b.png", "B/c.png"]
    write_images(tmp_path / "train", *files)
    source = image_folder(tmp_path, "train")
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
    source = image_folder(tmp_path, "train")
    assert source.class_names == ("x",)
    assert set(paths_of(source, tmp_path / "train/x")) == {*wanted, "i.webp"}


def test_class_list_orders_the_labels(tmp_path):
    write_images(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/ant/c.png")
    (tmp_path / "classes.txt").write_text("dog\nant\r\n\n cat \n")
    classes = str(tmp_path / "classes.txt")
    source = open_source("folder", "train", root=str(tmp_path), classes=ClassOptions(classes))
    assert source.class_names == ("dog", "ant", "cat")
    assert paths_of(source, tmp_path / "train") == ["dog/b.png", "ant/c.png", "cat/a.png"]
    assert [source[i][1] for i in range(3)] == labels_of(source).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "classes, expected",
    [
        (b"cat\n", "has the class 'dog', which is not in the class list"),
        (b"cat\ndog\nfox\n", "names 'fox', which is not one of the 2 classes"),
        (b"cat\ndog\ncat\n", "names 'cat' more than once"),
        (None, "cannot read the class list"),
        (b"caf\xe9", "line 1 is not UTF-8: save the file as UTF-8"),
    ],
)
def test_class_list_must_match_the_folders(tmp_path, classes, expected):
    write_images(tmp_path, "train/cat/a.png", "train/dog/b.png")
    path = tmp_path / "classes.txt"
    if classes is not None:
        path.write_bytes(classes)
    assert expected in message_of(lambda: image_folder(tmp_path, "train", ClassOptions(str(path))))


def test_error_messages_name_the_expected_folders(tmp_path):
    def message(root, split="train"):
        return message_of(lambda: image_folder(root, split))

    missing = tmp_path / "nowhere"
    assert f"cannot read the data set root {missing}: No such" in message(missing)
    assert "set data.root" in message_of(lambda: open_source("folder", "train"))
    assert "not gs://b/imagenet" in message("gs://b/imagenet")
    (tmp_path / "file").write_text("")
    assert "Not a directory" in message(tmp_path / "file")

    root = tmp_path / "root"
    root.mkdir()
    assert f"{root}: it holds no folders" in message(root)
    write_images(root, "extra/x/a.png")
    assert "no folder 'validation' in" in message(root, "validation")
    assert "it holds extra" in message(root, "validation")

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
    assert "Permission denied" in message_of(lambda: image_folder(tmp_path, "train"))


# ---------------------------------------------------------------------------------------- holdout


def held_out_paths(root, split):
    source = image_folder(root, split, holdout=FIFTH)
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
        f"{tmp_path / below} has no split 'validation': holding out a fixed set of 5 images"
    )


def test_added_images_hardly_change_the_holdout(tmp_path):
    write_classes(tmp_path, cat=100)
    before = set(held_out_paths(tmp_path, "validation"))
    write_classes(tmp_path, cat=110)
    after = set(held_out_paths(tmp_path, "validation"))
    assert (len(before), len(after)) == (20, 22) and len(before & after) >= 16


def test_folders_that_cannot_be_divided_are_refused(tmp_path):
    write_classes(tmp_path / "one", cat=1, dog=1)
    with pytest.raises(InputError, match="no class in .* has two images, so none can be held out"):
        image_folder(tmp_path / "one", "validation", holdout=FIFTH)
    write_classes(tmp_path / "odd" / "test", cat=5)  # a split, not a class called test
    with pytest.raises(InputError, match="no folder 'train' in .* it holds test; .*train_spl"):
        image_folder(tmp_path / "odd", "train", holdout=FIFTH)
    write_classes(tmp_path / "plain", cat=5)
    for holdout in (None, FIFTH._replace(share=0.0)):
        with pytest.raises(InputError, match="or data.holdout=0.2 to evaluate on a fifth"):
            image_folder(tmp_path / "plain", "validation", holdout=holdout)
    with pytest.raises(InputError, match="no folder 'test'"):  # neither training nor evaluation
        image_folder(tmp_path / "plain", "test", holdout=FIFTH)


def test_config_sets_the_holdout(smoke_config, tmp_path):
    write_classes(tmp_path, cat=10)
    folder = dict(data__source="folder", data__root=str(tmp_path), data__eval_split="validation")
    assert len(Experiment(smoke_config(**folder, data__holdout=0.3)).data.train_source) == 7


# ------------------------------------------------------------------------ what people bring


@pytest.mark.parametrize("name", ["valid", "val", "validation", "dev", "test", "Testing", "VAL"])
def test_evaluation_splits_are_found_and_disable_the_holdout(tmp_path, caplog, name):
    write_classes(tmp_path / "Train", cat=9)
    write_classes(tmp_path / name, cat=3)
    assert len(image_folder(tmp_path, "train", holdout=FIFTH)) == 9
    caplog.clear()
    assert len(image_folder(tmp_path, "validation", holdout=FIFTH)) == 3
    reported = f"{tmp_path} has no split 'validation': reading {name!r}"
    assert caplog.messages == ([] if name == "validation" else [reported])


def test_evaluation_splits_are_preferred_in_order(tmp_path):
    for name in ("test", "validation", "val", "valid"):
        write_images(tmp_path, f"{name}/x/a.png")
        assert image_folder(tmp_path, "dev").storage_path == str(tmp_path / name)
        if name == "validation":
            assert image_folder(tmp_path, "val").storage_path == str(tmp_path / name)
    assert image_folder(tmp_path, "test").storage_path == str(tmp_path / "test")
    assert image_folder(tmp_path, "validation").storage_path == str(tmp_path / "validation")


def test_an_evaluation_split_may_lack_classes(tmp_path, smoke_config):
    write_classes(tmp_path / "train", ant=2, bee=2, cat=2)
    write_classes(tmp_path / "val", bee=1, cat=1)
    (tmp_path / "val/ant").mkdir()
    (tmp_path / "classes.txt").write_text("cat\nbee\nant\n")
    options = dict(data__source="folder", data__root=str(tmp_path), data__eval_split="val")
    for class_list, names in (("", "ant bee cat"), (str(tmp_path / "classes.txt"), "cat bee ant")):
        for empty in (True, False):
            if not empty:
                (tmp_path / "val/ant").rmdir()
            experiment = Experiment(smoke_config(**options, data__class_list=class_list))
            source = experiment.data.eval_source
            assert source.class_names == experiment.data.class_names == tuple(names.split())
            labels = {source.name_of(i).split("/")[-2]: source[i][1] for i in range(2)}
            assert labels == {name: names.split().index(name) for name in ("bee", "cat")}
            (tmp_path / "val/ant").mkdir(exist_ok=True)
    write_classes(tmp_path / "val", dog=1)
    experiment = Experiment(smoke_config(**options))
    assert "has the class 'dog', which is not one of the 3 of training" in message_of(
        lambda: experiment.data.eval_source
    )


def test_a_class_list_may_name_a_subset(tmp_path, caplog):
    write_classes(tmp_path / "train", ant=1, bee=2, cat=3)
    (tmp_path / "two.txt").write_bytes("\ufeffcat\r\nant\r\n".encode())
    options = ClassOptions(str(tmp_path / "two.txt"), subset=True)
    source = image_folder(tmp_path, "train", options)
    assert source.class_names == ("cat", "ant") and source.labels.tolist() == [0, 0, 0, 1]
    assert caplog.messages == [f"{tmp_path}/train: left out 1 of 3 classes"]
    whole = dataclasses.replace(options, subset=False)
    message = message_of(lambda: image_folder(tmp_path, "train", whole))
    assert "has the class 'bee'" in message and "set data.subset=true" in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_are_read_in_any_encoding_of_windows(encoding, end):
    assert read_lines(end.join(["ä", "", "b c"]).encode(encoding)) == ["ä", "b c"]


def test_classes_in_the_order_of_torchvision(tmp_path):
    write_classes(tmp_path / "train", **{"1": 1, "2": 1, "10": 1, "apple": 1, "Banana": 1})
    source = image_folder(tmp_path, "train", ClassOptions(order="string"))
    assert source.class_names == ("1", "10", "2", "Banana", "apple")
    assert source.labels.tolist() == [0, 1, 2, 3, 4]


def test_loops_links_and_folders_of_file_servers(tmp_path):
    write_images(tmp_path, "train/x/a.png", "train/x/deep/b.png", "train/x/@eaDir/t.png")
    write_images(tmp_path, "train/@eaDir/x/t.png", "train/x/.ipynb_checkpoints/t.png")
    write_images(tmp_path, "train/__MACOSX/t.png", "elsewhere/c.png")
    for link, target in (("loop", "."), ("again", "deep"), ("more", "../../elsewhere")):
        (tmp_path / "train/x" / link).symlink_to(target)
    (tmp_path / "train/x/self").symlink_to("self")
    source = image_folder(tmp_path, "train")
    assert source.class_names == ("x",)
    assert paths_of(source, tmp_path / "train/x") == ["a.png", "deep/b.png", "more/c.png"]


KAGGLE = "ILSVRC/Data/CLS-LOC"


@pytest.mark.parametrize("root", ["", KAGGLE])
def test_the_layout_of_kaggles_imagenet(tmp_path, root):
    write_images(tmp_path / KAGGLE, "train/n01440764/a.JPEG", "train/n01443537/b.JPEG")
    images = [f"ILSVRC2012_val_{k:08}" for k in (1, 2, 3)]
    write_images(tmp_path / KAGGLE, *(f"val/{name}.JPEG" for name in images), "test/x.JPEG")
    rows = [f"{images[0]},n01443537 1 2 3 4 n01443537 5 6 7 8", f"{images[1]},n01440764 1 2 3 4"]
    rows += [f"{images[2]},n01443537 1 2 3 4"]
    solution = tmp_path / "LOC_val_solution.csv"
    solution.write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))
    train, val = (image_folder(str(tmp_path / root), s) for s in ("train", "validation"))
    assert val.class_names == train.class_names == ("n01440764", "n01443537")
    assert val.labels.tolist() == [1, 0, 1] and val[0] == (image(0), 1)
    solution.unlink()
    message = message_of(lambda: image_folder(str(tmp_path / root), "val"))
    assert "no class folders in" in message and "put ILSVRC2012_devkit_t12.tar.gz or LOC" in message
    (tmp_path / "labels.txt").write_text("n01440764\n" * 3)
    val = image_folder(str(tmp_path), "val", eval_labels=str(tmp_path / "labels.txt"))
    assert val.class_names == ("n01440764",) and len(val) == 3


def test_a_root_one_folder_above_the_data_is_named(tmp_path):
    write_images(tmp_path, "pets/train/x/a.png")
    message = message_of(lambda: image_folder(str(tmp_path), "train"))
    assert f"set data.root={tmp_path}/pets" in message


def test_pipes_are_passed_over(tmp_path, caplog):
    write_classes(tmp_path / "train", x=1, y=1)
    os.mkfifo(tmp_path / "train/x/pipe.jpg")
    os.symlink("pipe.jpg", tmp_path / "train/x/link.jpg")
    assert len(image_folder(tmp_path, "train")) == 2
    assert "2 .jpg (a pipe or device)" in caplog.text


@pytest.mark.parametrize(
    "name, expected",
    [
        ("train/all/x/1.png", "one class folder, 'all', with the folders x: if those are splits"),
        ("archive/set/train/x/1.png", "set data.root=.*/archive; if they are classes"),
        ("train/x/file", "train/x has no images: Pillow decodes none of 1 without suffix"),
    ],
)
def test_folders_at_another_depth_are_refused(tmp_path, name, expected):
    write_images(tmp_path, name)
    with pytest.raises(InputError, match=expected):
        image_folder(tmp_path, "train", holdout=FIFTH)


def test_names_of_files_take_one_array(tmp_path):
    names = Names([["a/ä.png"], [], ["b/\udcff.png", ""]])
    assert list(pickle.loads(pickle.dumps(names))) == ["a/ä.png", "b/\udcff.png", ""]
