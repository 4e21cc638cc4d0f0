# SPDX-License-Identifier: Apache-2.0
"""ImageNet's original tars and webdataset shards: records, labels, and error messages."""

import gzip
import io
import json
import os
import pickle
import tarfile

import fsspec
import numpy as np
import pytest
import scipy.io

from tests.helpers.source_checks import message_of, records
from tests.helpers.tars import SYNSETS, image, tar, write_imagenet
from tnt_flax.data.sources import labels_of, open_source, with_classes
from tnt_flax.data.sources.archives import _SHARD
from tnt_flax.data.sources.label_lists import read_labels
from tnt_flax.data.sources.names import ClassOptions, expand_braces, find_files

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def imagenet(root, split, **options):
    return open_source("imagenet_tars", split, root=str(root), **options)


def webdataset(root, split, **options):
    return open_source("webdataset", split, root=str(root), **options)


def refused(function, *args, **options):
    return message_of(lambda: function(*args, **options))


@pytest.fixture
def tars(tmp_path):
    write_imagenet(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------- ImageNet's original tars


def test_training_images_are_those_that_tarfile_reads(tars):
    source = imagenet(tars, "train")
    expected = []
    with tarfile.open(tars / TRAIN) as outer:
        for member in outer:
            label = sorted(SYNSETS).index(member.name.removesuffix(".tar"))
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                images = [m for m in inner if m.name.endswith(".JPEG")]
                expected += [(inner.extractfile(m).read(), label) for m in images]
    assert source.class_names == SYNSETS[:3] and len(expected) == 6
    assert [source[i] for i in (5, 0, 3, 1, 4, 2)] == [expected[i] for i in (5, 0, 3, 1, 4, 2)]
    assert source.name_of(2).startswith(f"{tars / TRAIN}: n01443537_0.JPEG (at byte ")
    assert records(pickle.loads(pickle.dumps(source))) == expected
    (tars / TRAIN).write_bytes(b"short")
    with pytest.raises(OSError, match="ends before byte"):
        source[0]
    assert f"{TRAIN}: ? (at byte" in source.name_of(0)


@pytest.mark.parametrize("split", ["val", "validation"])
def test_validation_labels_come_from_a_list(tars, split):
    source = imagenet(tars, split)
    # The images of the tar have lines 3, 1, 2, 4 of the list.
    assert records(source) == [(image(103), 1), (image(101), 2), (image(102), 0), (image(104), 0)]
    assert "ILSVRC2012_val_00000003.JPEG" in source.name_of(0)
    assert with_classes(source, imagenet(tars, "train").class_names) is source


def devkit(synsets, truth):
    """Returns a file like ILSVRC2012_devkit_t12.tar.gz, with unsorted classes and a parent node."""
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    table = np.empty((len(synsets) + 1, 1), kinds)
    for k, synset in enumerate([*synsets, "n00001740"]):
        table[k, 0] = (k + 1, synset, "some, words", 0)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": table})
    files = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
    folder = "ILSVRC2012_devkit_t12/data"
    return gzip.compress(tar({f"{folder}/{name}": data for name, data in files.items()}))


def test_all_label_files_give_the_same_labels(tars):
    expected = records(imagenet(tars, "val"))
    assert labels_of(imagenet(tars, "val")).tolist() == [label for _, label in expected]
    synsets = (tars / "imagenet_2012_validation_synset_labels.txt").read_text().split()
    rows = [(f"ILSVRC2012_val_{k:08}", synset) for k, synset in enumerate(synsets, 1)]
    order = (SYNSETS[1], SYNSETS[2], SYNSETS[0])
    truth = "".join(f"{order.index(synset) + 1}\n" for synset in synsets)
    contents = {
        "names.csv": "".join(f"{n}.JPEG,{s}\n" for n, s in rows[::-1]),
        "windows.txt": "\ufeff" + "\r\n".join(synsets),
        "columns.txt": "".join(f"val/{n}.JPEG {s}\n" for n, s in rows),
        "LOC_val_solution.csv": "ImageId,PredictionString\n"
        + "".join(f"{n},{s} 1 2 3 4 {s} 5 6 7 8\n" for n, s in rows[::-1]),
        "more.csv": "".join(f"{n}\t{s}\n" for n, s in [*rows, ("other", SYNSETS[0])]),
        "ILSVRC2012_devkit_t12.tar.gz": devkit(order, truth.encode()),
    }
    for file, content in contents.items():
        (tars / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert records(imagenet(tars, "val", eval_labels=file)) == expected, file
    absolute = str(tars / "names.csv")
    assert records(imagenet(tars, "val", eval_labels=absolute)) == expected
    (tars / "imagenet_2012_validation_synset_labels.txt").write_text("not read")
    assert records(imagenet(tars, "val")) == expected  # the devkit takes precedence


@pytest.mark.parametrize(
    "content, expected",
    [
        ("n01440764\n" * 3, "has 3 labels for 4 images"),
        ("n01440764\n" * 5, "has 5 labels for 4 images"),
        ("", "has 0 labels for 4 images"),
        ("n01440764\ntench\n", "label 2 is 'tench', not a synset"),
        ("1\n2\n3\n4\n", "label 1 is '1', not a synset such as n01440764; for numbers, set "),
        ("a.JPEG,n01440764\n", "no label for i1, i2 and 2 more"),
        ("i1,n01440764\ni2\n", "label 2 is 'i2', not a synset"),
        (b"n\xe9e", "cannot read the labels"),
        (b"\x1f\x8b damaged", "is not ImageNet's devkit"),
        (devkit(SYNSETS, b"1\n2\n9\n"), "is not ImageNet's devkit"),
        (devkit(SYNSETS, b"1\n2\n4\n"), "has 3 labels for 4 images"),
    ],
)
def test_invalid_labels_are_refused(tmp_path, content, expected):
    path = tmp_path / "labels"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(read_labels, str(path), ["i1", "i2", "i3", "i4"])
    assert expected in message and str(path) in message


def test_class_list_orders_the_synsets(tars):
    classes = tars / "classes.txt"
    classes.write_text("\n".join(SYNSETS[2::-1]))
    for split in ("train", "val"):
        source = imagenet(tars, split, classes=ClassOptions(str(classes)))
        labels = [2 - label for _, label in records(imagenet(tars, split))]
        assert source.class_names == SYNSETS[2::-1]
        assert [label for _, label in records(source)] == labels
    classes.write_text("\n".join(SYNSETS[:2]))
    message = refused(imagenet, tars, "train", classes=ClassOptions(str(classes)))
    assert f"{tars / TRAIN} has the class {SYNSETS[2]!r}, which is not in the class" in message
    for split in ("train", "val"):
        source = imagenet(tars, split, classes=ClassOptions(str(classes), subset=True))
        expected = [(x, k) for x, k in records(imagenet(tars, split)) if k < 2]
        assert source.class_names == SYNSETS[:2] and records(source) == expected
    classes.write_text("\n".join(SYNSETS))
    message = refused(imagenet, tars, "train", classes=ClassOptions(str(classes)))
    assert f"the class list {classes} names {SYNSETS[3]!r}" in message


FULL = tar({"n01440764.tar": tar({"a.JPEG": b"1"})})


@pytest.mark.parametrize(
    "content, expected",
    [
        (FULL[: len(FULL) // 2], "is truncated"),
        (tar({"n01440764.tar": tar({"notes.txt": b"1"})}), "n01440764.tar in"),
        (tar({"n01440764.tar": tar({"a.JPEG": b"1"})[:1024]}), "n01440764.tar in"),
        (tar({"n01440764.tar.gz": b"1"}), "holds no tars: expected one per class"),
        (FULL.replace(b"a.JPEG", b"b.JPEG"), "n01440764.tar in"),
    ],
)
def test_damaged_tars_are_refused(tmp_path, content, expected):
    (tmp_path / TRAIN).write_bytes(content)
    message = refused(imagenet, tmp_path, "train")
    assert expected in message and TRAIN in message
    (tmp_path / TRAIN).write_bytes(FULL)
    assert len(imagenet(tmp_path, "train")) == 1


def test_missing_tars_and_labels_are_refused(tars):
    assert "set data.root" in refused(imagenet, "", "train")
    assert "cannot read /nowhere/ILSVRC2012_img_train.tar: No" in refused(
        imagenet, "/nowhere", "train"
    )
    assert "no split 'test': choose" in refused(imagenet, tars, "test")
    (tars / "imagenet_2012_validation_synset_labels.txt").unlink()
    assert "no labels for ILSVRC2012_img_val.tar in" in refused(imagenet, tars, "val")
    message = refused(imagenet, tars, "val", eval_labels="nowhere.txt")
    assert f"cannot read the labels {tars}/nowhere.txt: No such file" in message
    (tars / VALIDATION).write_bytes(tar({}))
    message = refused(imagenet, tars, "val", eval_labels="x")
    assert message == f"{tars / VALIDATION} has no images: download the tar again"


# ------------------------------------------------------------------------------ webdataset shards


def sample(key, value, extension="png", **texts):
    files = {f"{key}.{name}": text.encode() for name, text in texts.items()}
    return {f"{key}.{extension}": image(value)} | files


def write_shard(path, *samples, file_format=tarfile.USTAR_FORMAT):
    files = {name: data for files in samples for name, data in files.items()}
    path.write_bytes(tar(files, file_format))


def write_shards(folder):
    """Writes two shards of the split "train" and one of "val", as webdataset's ShardWriter does."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [sample(f"s{k:04}", k, cls=f"{k % 3}", txt="a caption") for k in range(7)]
    for name, part in {"train-0": rows[:4], "train-1": rows[4:], "val-0": rows[:1]}.items():
        write_shard(folder / f"data-{name}.tar", *part, file_format=tarfile.PAX_FORMAT)


def test_shards_are_read_in_order(tmp_path):
    write_shards(tmp_path)
    source = webdataset(tmp_path, "train")
    assert records(source) == [(image(k), k % 3) for k in range(7)]
    assert source.class_names == ("0", "1", "2")
    assert source.name_of(5).startswith(f"{tmp_path}/data-train-1.tar: s0005.png (at byte")
    assert records(pickle.loads(pickle.dumps(source)))[6] == (image(6), 0)
    assert len(webdataset(tmp_path, "validation")) == len(webdataset(tmp_path, "val")) == 1
    for pattern in ("data-train-{0..1}.tar", "data-tr*.tar", "data-train*", "data-train-[01].tar"):
        assert records(webdataset(tmp_path, pattern)) == records(source), pattern
    (tmp_path / "data-val-0.tar").rename(tmp_path / "data-val-0.TAR")
    assert len(webdataset(tmp_path, "val")) == 1
    assert len(webdataset("/nowhere", f"{tmp_path}/data-train-1.tar")) == 3


def test_labels_are_numbers_or_names_in_cls_or_json(tmp_path):
    def read(*rows, **options):
        write_shard(tmp_path / "x.tar", *rows)
        source = webdataset(tmp_path, "x.tar", **options)
        return source.class_names, [label for _, label in records(source)]

    as_json = lambda label: json.dumps({"label": label, "height": 5})
    rows = [sample("a", 1, "jpg", json=as_json(2)), sample("b", 2, "JPEG", json=as_json("0"))]
    assert read(*rows) == (("0", "1", "2"), [2, 0])
    assert read(sample("a", 1, cls="1\n", json=as_json(0))) == (("0", "1"), [1])
    words = [sample("1/a", 1, cls="dog 10"), sample("2/a", 2, cls="Dog 9"), sample("b", 3, cls="ä")]
    assert read(*words) == (("Dog 9", "dog 10", "ä"), [1, 0, 2])
    extra = {"__meta__.json": b"{}", "README": b"", "._a.png": b"", "a.seg.png": image(0)}
    assert read(extra, sample("a", 1, cls="0")) == (("0",), [0])

    classes = tmp_path / "classes.txt"
    classes.write_text("ä\ndog 10\nDog 9\n")
    names = ("ä", "dog 10", "Dog 9")
    assert read(*words, classes=ClassOptions(str(classes))) == (names, [1, 2, 0])
    assert read(*rows, classes=ClassOptions(str(classes))) == (names, [2, 0])
    classes.write_text("2\n1\n0\n")
    # Names take precedence over numbers.
    assert read(*rows, classes=ClassOptions(str(classes))) == (("2", "1", "0"), [0, 2])
    classes.write_text("dog\n7\n")
    some = ClassOptions(str(classes), subset=True)
    assert read(*words, sample("c", 4, cls="dog"), classes=some) == (("dog", "7"), [0])
    for texts, wrong in ((["cat"], "cat"), (["2"], "2"), (["-1"], "-1"), (["0", "7"], "7")):
        rows = [sample(text, 1, cls=text) for text in texts]
        message = refused(read, *rows, classes=ClassOptions(str(classes)))
        assert f"has the class {wrong!r}, which is not in the class list" in message


@pytest.mark.parametrize(
    "files, expected",
    [
        (sample("a", 1), "sample 'a' has no label: expected a .cls file"),
        (sample("a", 1, cls=""), "sample 'a' has no label"),
        (sample("a", 1, json="[1]"), "sample 'a' has no label"),
        (sample("a", 1, json='{"class": 1}'), "sample 'a' has no label"),
        (sample("a", 1, json="{"), "sample 'a' has no label"),
        ({"a.cls": b"1"}, "sample 'a' has no image"),
        (sample("a", 1, cls="0", jpg="x"), "sample 'a' has two images"),
        # Files of a sample that are not consecutive are two incomplete samples.
        ({"a.png": b"1", "b.png": b"2", "a.cls": b"0"}, "sample 'a' has no label"),
        ({"README": b"x", "notes.md": b"x"}, "x.tar: no records found"),
    ],
)
def test_incomplete_samples_are_refused(tmp_path, files, expected):
    write_shard(tmp_path / "x.tar", files)
    message = refused(webdataset, tmp_path, "*.tar")
    assert expected in message and f"{tmp_path}/x.tar" in message


def test_shards_are_found_by_split_and_pattern(tmp_path):
    assert expand_braces("a-{08..11}.tar") == [f"a-{k}.tar" for k in ("08", "09", "10", "11")]
    assert expand_braces("{1..2}/{0..1}") == ["1/0", "1/1", "2/0", "2/1"]

    for name in ("in-train-9.tar", "in-train-10.tar", "constrained.tar", "trained-1.tar", "x.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "in-train-9.tar.1234abcd.index").write_bytes(b"")
    found = lambda split: [
        os.path.relpath(p, tmp_path) for p in find_files(str(tmp_path), split, _SHARD)
    ]
    assert found("train") == ["in-train-9.tar", "in-train-10.tar"]  # natural order, no "trained"
    assert found("in-train-*") == ["in-train-9.tar", "in-train-10.tar"]
    (tmp_path / "train").mkdir()
    assert found("train") == ["in-train-9.tar", "in-train-10.tar"]  # empty folders are ignored
    (tmp_path / "train/b.tar").write_bytes(b"")
    (tmp_path / "train/.a.tar").write_bytes(b"")
    assert found("train") == ["train/b.tar"]
    for split in ("validation", "nothing*"):
        message = refused(find_files, str(tmp_path), split, _SHARD)
        assert split in message and "which holds constrained.tar, in-train-10.tar, " in message
    (tmp_path / "Mine").mkdir()
    (tmp_path / "Mine/c.tar").write_bytes(b"")
    assert found("Mine") == ["Mine/c.tar"]
    assert "set data.root" in refused(webdataset, "", "train")
    assert "cannot read /nowhere: No such" in refused(webdataset, "/nowhere", "train")
    assert "cannot read" in refused(webdataset, tmp_path, "x-{0..1}.tar")


def test_compressed_shards_are_refused(tmp_path):
    for name, start in (("train-0.tar.gz", b""), ("val-0.tar", b"\x1f\x8b"), ("dev.tar", b"BZh")):
        (tmp_path / name).write_bytes(start + bytes(100))
        message = refused(webdataset, tmp_path, name.partition(".")[0].partition("-")[0] + "*")
        assert f"{name} is compressed and has no random access" in message


# ------------------------------------------------------------------------------------------ common


def test_archives_are_read_from_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "i").mkdir()
    write_imagenet(tmp_path / "i")
    write_shards(tmp_path / "w")
    memory = fsspec.filesystem("memory")
    for path in tmp_path.glob("[iw]/*"):
        memory.pipe_file(f"memory://archives/{path.parent.name}/{path.name}", path.read_bytes())
    url = "memory://archives"
    for split in ("train", "val"):
        for kind, folder in (("imagenet_tars", "i"), ("webdataset", "w")):
            local = open_source(kind, split, root=str(tmp_path / folder))
            remote = open_source(kind, split, root=f"{url}/{folder}/")
            assert records(remote) == records(local) and remote.class_names == local.class_names
            assert remote.name_of(0) == local.name_of(0).replace(str(tmp_path), url)
    assert len(webdataset(f"{url}/w", "data-train-{0..1}.tar")) == 7
