# SPDX-License-Identifier: Apache-2.0
"""`check_data` finds every kind of unusual image, and resumes after an interruption."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.helpers.photos import all_photos, encoded, jpeg, png
from tnt_flax.__main__ import main
from tnt_flax.core.errors import InputError
from tnt_flax.data.images import TIMM
from tnt_flax.tools import check_data
from tnt_flax.tools.check_data import inspect_image, open_findings


def exif(orientation=6):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


PLAIN, RED = Image.new("RGB", (40, 40)), Image.new("RGB", (40, 40), "red")
DEEP = np.full((40, 40), 40000, np.uint16)
FILES = {
    "cat/fine.jpg": (jpeg("china"), []),
    "cat/truncated.jpg": (jpeg("china")[:20000], ["corrupt"]),
    "cat/page.jpg": (b"<html>404</html>", ["corrupt"]),
    "cat/empty.png": (b"", ["corrupt", "empty"]),
    "cat/bomb.png": (encoded(Image.new("1", (10000, 10000))), ["corrupt", "huge"]),
    "cat/cmyk.jpg": (encoded(Image.new("CMYK", (40, 40)), "JPEG"), ["cmyk"]),
    "dog/upright.jpg": (encoded(PLAIN, "JPEG", exif=exif(1)), []),
    "dog/rotated.jpg": (encoded(PLAIN, "JPEG", exif=exif()), ["rotated"]),
    "dog/rotated.png": (encoded(PLAIN, exif=exif()), ["rotated"]),
    "dog/rotated.webp": (encoded(PLAIN, "WEBP", exif=exif()), ["rotated"]),
    "dog/rotated.tif": (encoded(PLAIN, "TIFF", exif=exif()), []),  # Pillow rotates it
    "dog/moves.webp": (encoded(PLAIN, "WEBP", save_all=True, append_images=[RED]), ["animated"]),
    "dog/pages.tif": (encoded(PLAIN, "TIFF", save_all=True, append_images=[RED]), ["animated"]),
    "fox/deep.png": (png(DEEP), ["16-bit", "grey"]),
    "fox/deep.tif": (encoded(Image.fromarray(DEEP), "TIFF"), ["16-bit", "grey"]),
    "fox/palette.png": (encoded(PLAIN.convert("P")), ["palette"]),
    "fox/shows.png": (encoded(PLAIN.convert("P"), transparency=0), ["palette", "alpha"]),
    "fox/rgba.png": (encoded(Image.new("RGBA", (40, 40))), ["alpha"]),
    "fox/grey.png": (all_photos()["grey"], ["grey"]),
    "fox/thin.png": (all_photos()["thin"], ["small"]),
}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    files = {f"train/{name}": data for name, (data, _) in FILES.items()}
    for name, data in {**files, "val/ant/1.png": png(DEEP)}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture
def config(folder, smoke_config):
    return smoke_config(data__source="folder", data__root=str(folder), data__eval_split="val")


def findings(out):
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return [line for line in lines if "finding" in line]


@pytest.mark.parametrize("name", FILES)
def test_findings_of_files(name):
    image, expected = FILES[name]
    assert sorted(inspect_image(image)) == sorted(expected)


def test_color_images_of_16_bits():
    """Pillow writes none: the header of an 8-bit PNG is changed, and its pixels are doubled."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(40 * 3 * 2)) * 40)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    assert inspect_image(b"\x89PNG\r\n\x1a\n" + parts) == {"16-bit": "mode RGB"}


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((40, 40, 3), []),
        ((40, 40), ["grey"]),
        ((40, 40, 1), ["grey"]),
        ((40, 8, 4), ["alpha", "small"]),
        ((0, 4, 3), ["corrupt", "empty"]),
    ],
)
def test_findings_of_arrays(shape, expected):
    assert sorted(inspect_image(np.zeros(shape, np.uint8))) == expected


def test_table_and_findings_file(config, tmp_path, capsys):
    out = tmp_path / "findings.jsonl"
    result = check_data.check_data(config, "train", str(out))
    expected = [(name, kind) for name, (_, kinds) in FILES.items() for kind in kinds]
    found = [(line["name"].partition("/train/")[2], line["finding"]) for line in findings(out)]
    assert sorted(found) == sorted(expected)
    assert all(line["name"].split("/")[-2] == line["class"] for line in findings(out))
    for kind in check_data.MEANING:
        assert result[kind] == sum(k == kind for _, k in expected) > 0
    assert result["images"] == len(FILES) and result["classes"] == 3
    assert result["classes_with_few"] == 3 and result["classes_with_none"] == 0
    table = capsys.readouterr().out
    assert table.startswith("train: 20 images, 3 classes\n")
    assert "corrupt           4  stops training" in table
    assert "cat/empty.png: the file is empty" in table
    assert "fewest images: cat 6, dog 7, fox 7" in table


def test_an_interrupted_check_resumes(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_data, "CHUNK", 4)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    expected = check_data.check_data(config, "both", str(whole))
    assert expected["images"] == len(FILES) + 1 and expected["16-bit"] == 3
    tables = capsys.readouterr().out
    assert "val: 1 images, 1 classes" in tables
    original, read, stop = check_data.check_record, [], 10

    def interrupted(source, policy, index):
        if index == stop:
            raise KeyboardInterrupt
        read.append(index)
        return original(source, policy, index)

    monkeypatch.setattr(check_data, "check_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_data.check_data(config, "both", str(out))
    with open(out, "a") as file:  # as after a kill in the middle of a chunk
        file.write('{"split": "train", "index": 9, "finding": "grey"}\n{"split": "tra')
    read.clear()
    stop = None
    capsys.readouterr()
    result = check_data.check_data(config, "both", str(out))
    assert sorted(read) == sorted([*range(8, len(FILES)), 0])
    assert result | {"out": str(whole)} == expected
    assert capsys.readouterr().out == tables
    assert out.read_bytes() == whole.read_bytes()

    read.clear()  # a complete check reads nothing again
    assert check_data.check_data(config, "both", str(out)) == result
    assert not read and out.read_bytes() == whole.read_bytes()


def test_a_changed_data_set_restarts(config, folder, tmp_path, caplog):
    caplog.set_level("INFO", "tnt_flax")
    out = tmp_path / "out.jsonl"
    check_data.check_data(config, "train", str(out))
    (folder / "train/cat/more.jpg").write_bytes(b"")
    assert "restarting" not in caplog.text
    assert check_data.check_data(config, "train", str(out))["empty"] == 2
    assert "out.jsonl is of another data set or config: restarting" in caplog.text
    assert len([line for line in findings(out) if line["finding"] == "empty"]) == 2
    caplog.clear()
    config.data.threads = 3
    check_data.check_data(config, "train", str(out))
    assert "restarting" not in caplog.text


def test_unusable_findings_files(tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("mine\n")
    with pytest.raises(InputError, match="notes.txt exists and has no findings"):
        open_findings(str(other), {"records": 1})
    assert other.read_text() == "mine\n"
    with pytest.raises(InputError, match="cannot write --out=.*No such file or directory"):
        open_findings(str(tmp_path / "no" / "out.jsonl"), {})
    cut = tmp_path / "cut"
    cut.write_text('{"findings')  # interrupted in its first line
    file, earlier = open_findings(str(cut), {"records": 1})
    file.close()
    assert not earlier and json.loads(cut.read_text()) == {"findings_of": {"records": 1}}


def test_a_file_that_vanishes_is_corrupt(config, folder):
    from tnt_flax.training.experiment import Experiment

    source = Experiment(config).data.train_source
    (folder / "train/cat/bomb.png").unlink()
    label, (line,) = check_data.check_record(source, TIMM, 0)
    assert label is None and line["finding"] == "corrupt"
    assert line["detail"] == "cannot be read: No such file or directory"


def test_tables_are_checked(folder, smoke_config, capsys, caplog):
    rows = [
        f"{split}/{file}"
        for split, file in (
            ("train", "cat/fine.jpg"),
            ("train", "cat/page.jpg"),
            ("train", "dog/rotated.jpg"),
        )
    ]
    (folder / "train.csv").write_text("path,label\n" + "\n".join(f"{r},{r[6:9]}" for r in rows))
    (folder / "val.csv").write_text("path,label\nval/ant/1.png,ant\n")
    config = smoke_config(data__source="table", data__root=str(folder), data__eval_split="val")
    found = check_data.check_data(config)
    assert (found["images"], found["corrupt"], found["rotated"]) == (3, 1, 1)
    assert f"{folder}/train/cat/page.jpg" in capsys.readouterr().out
    check_data.check_data(config, "both")
    assert "the evaluation split has the class 'ant'" in caplog.text


def test_names_that_are_not_utf_8(folder, config, tmp_path, capsysbinary):
    os.rename(folder / "train/cat/page.jpg", os.fsencode(folder / "train/cat") + b"/caf\xe9.jpg")
    check_data.check_data(config, "train", str(tmp_path / "out.jsonl"))
    assert "cat/caf\ufffd.jpg" in (tmp_path / "out.jsonl").read_text("utf-8")
    assert "cat/caf\ufffd.jpg: not an image".encode() in capsysbinary.readouterr().out


class Source(list):
    class_names = ("many", "one", "none")


def test_classes_with_few_images(capsys):
    lines = [{"checked": 21, "labels": {"0": 20, "1": 1}}]
    result = check_data.summarize(lines, Source(range(21)), "train")
    assert (result["classes_with_none"], result["classes_with_few"]) == (1, 1)
    assert capsys.readouterr().out.endswith(
        "\nclasses without images: 1\nclasses with fewer than 10 images: 1\n"
        "fewest images: none 0, one 1, many 20\nmost images: many 20, one 1, none 0\n\n"
    )


@pytest.mark.parametrize("source, code, corrupt", [("folder", 1, 4), ("digits", 0, 0)])
def test_exit_code_is_1_if_an_image_is_corrupt(folder, root, source, code, corrupt, capsys):
    settings = {"data.source": source, "data.root": str(folder), "data.eval_split": "val"}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    assert main(["check-data", f"--config={root}/configs/digits.py", *flags]) == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["corrupt"] == corrupt
