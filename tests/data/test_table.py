# SPDX-License-Identifier: Apache-2.0
"""Tables of images: CSV, JSON lines, lists, and Parquet with paths or with the images inside."""

import json
import pickle

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from PIL import Image

from tests.helpers.parquet import NAMES, hugging_face, write_shards
from tests.helpers.photos import encoded
from tests.helpers.source_checks import message_of, records
from tests.helpers.tars import image, write_images
from tnt_flax.data.sources import ClassOptions, Holdout, open_source
from tnt_flax.data.sources.parquet import snappy_blocks

FIFTH = Holdout(0.2, "train", "validation")


def table(root, split="train", image="", label="", mark="", **options):
    return open_source("table", split, root=str(root), columns=(image, label, mark), **options)


def names_and_labels(source):
    names = [source.name_of(i).rpartition("/")[2] for i in range(len(source))]
    return {name: source.class_names[source[i][1]] for i, name in enumerate(names)}


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path, *(f"images/{k}.png" for k in range(6)))
    return tmp_path


ROWS = [(f"images/{k}.png", ("cat", "dog")[k % 2]) for k in range(6)]
EXPECTED = {f"{k}.png": ("cat", "dog")[k % 2] for k in range(6)}


def as_csv(rows, header="path,label", delimiter=",", end="\n"):
    lines = [header, *(delimiter.join(map(str, row)) for row in rows)]
    return end.join(lines) + end


@pytest.mark.parametrize(
    "name, text",
    [
        ("train.csv", as_csv(ROWS)),
        ("train.csv", "\ufeff" + as_csv(ROWS, end="\r\n")),
        ("train.csv", as_csv([(f'"{a}"', b) for a, b in ROWS], "Filename,Class")),
        ("train.tsv", as_csv(ROWS, "image\tspecies", "\t")),
        ("train.csv", as_csv(ROWS, "path;label", ";")),
        ("train.csv", as_csv(ROWS, "path\tlabel", "\t")),
        ("train.csv", as_csv([(a.replace("/", "\\"), b) for a, b in ROWS])),
        ("train.jsonl", "\n".join(json.dumps({"file_name": a, "label": b}) for a, b in ROWS)),
        ("train.json", json.dumps([{"file": a, "category": b} for a, b in ROWS])),
        ("train.txt", "\n".join(f"{a} {b}" for a, b in ROWS)),
    ],
)
def test_text_tables(images, name, text):
    (images / name).write_bytes(text.encode())
    source = table(images)
    assert source.class_names == ("cat", "dog") and names_and_labels(source) == EXPECTED
    assert source[3] == (image(3), 1) and source.labels.tolist() == [0, 1] * 3
    assert records(pickle.loads(pickle.dumps(source))) == records(source)


def test_repeated_images_are_reported(images, caplog):
    (images / "train.csv").write_text(as_csv([*ROWS, (ROWS[0][0], "dog")]))
    assert len(table(images)) == 7 and "1 rows repeat a path" in caplog.text


def test_numbers_with_gaps_are_reported(images, caplog):
    (images / "train.csv").write_text(as_csv([(f"images/{k}.png", k + 1) for k in (0, 2)]))
    assert table(images).class_names == ("0", "1", "2", "3")
    assert "no image has the label 0, 2, so 2 of 4 classes are empty: to leave" in caplog.text
    (images / "classes.txt").write_text("1\n3\n")  # as the message says
    source = table(images, classes=ClassOptions(str(images / "classes.txt")))
    assert source.class_names == ("1", "3") and source.labels.tolist() == [0, 1]
    (images / "train.csv").write_text(as_csv([("images/0.png", 80331)] * 2 + [(ROWS[1][0], 10**8)]))
    message = message_of(lambda: table(images))
    assert "has the label 100000000, but labels that are numbers count from 0" in message


def test_numbers_are_labels_or_positions_in_a_class_list(images):
    (images / "train.csv").write_text(as_csv([(f"images/{k}.png", k) for k in (0, 2)]))
    assert table(images).class_names == ("0", "1", "2")
    (images / "classes.txt").write_text("ant\nbee\ncat\n")
    options = ClassOptions(str(images / "classes.txt"))
    assert names_and_labels(table(images, classes=options)) == {"0.png": "ant", "2.png": "cat"}
    (images / "names.csv").write_text(as_csv(ROWS))
    (images / "classes.txt").write_text("dog\n")
    options = ClassOptions(str(images / "classes.txt"), subset=True)
    source = table(images, "names.csv", classes=options)
    assert len(source) == 3 and set(names_and_labels(source).values()) == {"dog"}


def test_columns_can_be_named_and_paths_built_from_them(images):
    (images / "train.csv").write_text(as_csv([(k, "a", f"c{k % 2}") for k in range(6)], "id,x,y"))
    source = table(images, image="images/{id}.png", label="y")
    assert names_and_labels(source) == {f"{k}.png": f"c{k % 2}" for k in range(6)}
    for options, message in [
        ({}, "has no column of images, but id, x, y: name the columns"),
        (dict(image="id"), "has no column of labels, but id, x, y: name the columns"),
        (dict(image="ids", label="y"), "has no column 'ids' (did you mean 'id'?), but id, x, y"),
        (dict(image="id", label="y"), "its first image '0' is not in "),
    ]:
        assert message in message_of(lambda options=options: table(images, **options))


@pytest.mark.parametrize(
    "header, mark",
    [
        ("path,label,split", lambda k: "valid" if k > 3 else "train"),
        ("path,label,data set", lambda k: "Test" if k > 3 else "Train"),
        ("path,label,is_valid", lambda k: k > 3),
    ],
)
def test_one_table_with_all_splits(images, header, mark):
    rows = [(*row, mark(k)) for k, row in enumerate(ROWS)]
    (images / "all.csv").write_text(as_csv(rows, header))
    for root in (images, images / "all.csv"):
        assert len(table(root)) == 4
        assert names_and_labels(table(root, "validation")) == {"4.png": "cat", "5.png": "dog"}
    message = message_of(lambda: table(images, "mine"))
    assert (
        "has no rows of the split 'mine': set data.split_column (its columns are path," in message
    )


@pytest.mark.parametrize("name", ["labels.csv", "train.csv"])
def test_one_table_without_splits_is_divided(images, caplog, name):
    (images / name).write_text(as_csv(ROWS))
    message = message_of(lambda: table(images, "validation"))
    assert f"{name} has no rows of the split 'validation': set data.split_column" in message
    train, val = (table(images, split, holdout=FIFTH) for split in ("train", "validation"))
    assert (len(train), len(val)) == (4, 2) and sorted(val.labels) == [0, 1]
    both = names_and_labels(train) | names_and_labels(val)
    assert both == EXPECTED
    assert "holding out a fixed set of 2 images" in caplog.messages[0]


def test_layouts_of_other_libraries(tmp_path):
    # Hugging Face's imagefolder: metadata beside the images, or above with the split in the path.
    for root in (tmp_path / "beside", tmp_path / "above"):
        write_images(root, "train/1.png", "train/2.png", "test/3.png")
    for split, files in {"train": ("1.png", "2.png"), "test": ("3.png",)}.items():
        rows = [(file, "cat") for file in files]
        (tmp_path / "beside" / split / "metadata.csv").write_text(as_csv(rows, "file_name,label"))
    rows = [(file, "cat") for file in ("train/1.png", "train/2.png", "test/3.png")]
    (tmp_path / "above/metadata.csv").write_text(as_csv(rows, "file_name,label"))
    # mmpretrain: lists in meta/, images in train/ and val/.
    write_images(tmp_path / "mm", "train/a/1.png", "train/2.png", "val/3.png")
    (tmp_path / "mm/meta").mkdir()
    (tmp_path / "mm/meta/train.txt").write_text("a/1.png 0\n2.png 0\n")
    (tmp_path / "mm/meta/val.txt").write_text("3.png 0\n")
    for name in ("beside", "above", "mm"):
        train, val = (table(tmp_path / name, split) for split in ("train", "validation"))
        assert list(names_and_labels(train)) == ["1.png", "2.png"], name
        assert list(names_and_labels(val)) == ["3.png"], name


@pytest.mark.parametrize(
    "text, expected",
    [
        ("path,label\nimages/0.png,\n", "the label ''"),
        ("path,label\n", "cannot read"),
        ("path,label\nimages/0.png,cat,dog\n", "cannot read"),
        ("", "cannot read"),
        ('path,label\n"images/0.png,cat\nimages/1.png,dog\n', "cannot read"),
        ("path,label\nimages/0.png,NaN\n", "the label 'NaN'"),
        ("images/0.png,cat\nimages/1.png,dog\n", "name the columns in its first line"),
        (b"path,label\nimages/0.png,caf\xe9\n", "line 2 is not UTF-8: save the file as UTF-8"),
    ],
)
def test_invalid_tables_are_refused(images, text, expected):
    (images / "train.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in message_of(lambda: table(images))


# ----------------------------------------------------------------------------------- Parquet files


def photo(seed, side):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


# Some larger than a block of snappy; a few equal, which share a place in a dictionary.
PHOTOS = [photo(k, 200 if k % 5 == 0 else 12) for k in range(20)]
PHOTOS[9] = PHOTOS[3]


@pytest.mark.parametrize(
    "options",
    [
        {},  # pyarrow's defaults: snappy, and a dictionary with all images
        dict(use_dictionary=False),
        dict(compression="none"),
        dict(compression="none", use_dictionary=False),
        dict(data_page_version="2.0"),
        dict(compression="zstd"),
        dict(compression="gzip", data_page_version="2.0", use_dictionary=False),
        dict(compression="lz4", use_dictionary=False, data_page_size=1000, write_batch_size=2),
    ],
)
def test_images_in_parquet_are_read_one_by_one(tmp_path, options):
    write_shards(tmp_path, PHOTOS, **options)
    source = table(tmp_path)
    expected = [(x, k % 3) for k, x in enumerate(PHOTOS)]
    assert source.class_names == NAMES and records(source) == expected
    again = pickle.loads(pickle.dumps(source))
    assert [again[k] for k in range(19, -1, -1)] == expected[::-1]
    assert again.labels.tolist() == [label for _, label in expected]
    if options.get("compression", "snappy") in ("none", "snappy"):
        sizes = [source.locate(k)[2] for k in range(20)]
        assert max(sizes) < 200_000 and sizes[1] < 70_000  # a row group has 400 kB


def test_names_of_parquet_classes_and_class_lists(tmp_path):
    write_shards(tmp_path, PHOTOS, names=None)
    assert table(tmp_path).class_names == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("n2\nn3\n")
    write_shards(tmp_path / "named", PHOTOS, "val")
    options = ClassOptions(str(tmp_path / "classes.txt"), subset=True)
    source = table(tmp_path / "named", "validation", classes=options)
    assert source.class_names == ("n2", "n3") and len(source) == 13
    assert source[0] == (PHOTOS[0], 1) and source[1] == (PHOTOS[2], 0)
    binary = pa.table({"img": pa.array(PHOTOS, pa.binary()), "label": ["a", "b"] * 10})
    pq.write_table(binary, tmp_path / "test.parquet")
    assert records(table(tmp_path, "test.parquet"))[1] == (PHOTOS[1], 1)


@pytest.mark.parametrize("folder", ["data", "."])
def test_parquet_without_an_evaluation_split_is_divided(tmp_path, folder):
    write_shards(tmp_path, PHOTOS, count=1 if folder == "." else 2)
    root = tmp_path / "data" if folder == "." else tmp_path
    assert len(table(root)) == 20
    train, val = (table(root, split, holdout=FIFTH) for split in ("train", "validation"))
    assert (len(train), len(val)) == (17, 3) and sorted(val.labels) == [0, 1, 2]
    both = records(train) + records(val)
    assert sorted(both) == sorted((x, k % 3) for k, x in enumerate(PHOTOS))
    write_shards(tmp_path, PHOTOS[:2], "test", count=1)
    assert len(table(root, holdout=FIFTH)) == 20
    assert len(table(root, "validation", holdout=FIFTH)) == 2


@pytest.mark.parametrize(
    "written, expected",
    [
        (lambda: hugging_face(PHOTOS[:2], labels=[-1, -1]), "has the label '-1'"),
        (lambda: hugging_face(PHOTOS[:2], labels=[0, 7]), "numbers from 0 to 2"),
        (lambda: hugging_face(PHOTOS[:2], labels=[0, None]), "1 rows without a label"),
        (lambda: hugging_face([PHOTOS[0], None]), "1 rows have no image: remove them"),
        (lambda: pa.table({"image": [[b"x"]], "label": ["a"]}), "has images of type list"),
        (lambda: pa.table({"image": [{"url": "x"}], "label": ["a"]}), "has images of type struct"),
        (lambda: hugging_face(PHOTOS[:2]).drop_columns("label"), "has no column of labels"),
    ],
)
def test_invalid_parquet_is_refused(tmp_path, written, expected):
    pq.write_table(written(), tmp_path / "train.parquet")
    assert expected in message_of(lambda: table(tmp_path))


def test_damaged_parquet(tmp_path):
    write_shards(tmp_path, PHOTOS, count=1)
    source, path = table(tmp_path), tmp_path / "data/train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(OSError, match="ends before byte"):
        source[0]
    path.write_bytes(bytes(len(content)))
    with pytest.raises(OSError, match="is damaged near byte"):
        source[0]
    assert "cannot read" in message_of(lambda: table(tmp_path))


def test_snappy_blocks_begin_every_64_kib():
    data = np.random.default_rng(0).bytes(150_000) + bytes(50_000)
    stream = pa.compress(data, codec="snappy", asbytes=True)
    blocks = snappy_blocks(stream)
    assert len(blocks) == 5 and blocks[-1] == len(stream)
    assert snappy_blocks(b"\x08\x04ab\x15\x02") is not None
    assert snappy_blocks(b"\x05\x00a\x01\x05") is None  # a copy from before the beginning


class Hub(MemoryFileSystem):
    """The hub's file system, in memory."""

    protocol = "hf"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("hf://").strip("/")


@pytest.mark.parametrize("url", ["memory://hub", "hf://datasets/OWNER/NAME"])
def test_remote_data_sets(tmp_path, monkeypatch, url):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(_registry, "hf", Hub)
    write_shards(tmp_path / "local", PHOTOS)
    write_shards(tmp_path / "local", PHOTOS[:5], "validation", count=1)
    filesystem, folder = fsspec.url_to_fs(url)
    for path in (tmp_path / "local/data").glob("*.parquet"):
        filesystem.pipe_file(f"{folder}/data/{path.name}", path.read_bytes())
    for split in ("train", "val"):
        assert records(table(url, split)) == records(table(tmp_path / "local", split))
