# SPDX-License-Identifier: Apache-2.0
"""Small images, image folders, and tar files written by the standard library."""

import io
import pathlib
import tarfile

import numpy as np

from tests.helpers.photos import png

SYNSETS = ("n01440764", "n01443537", "n02102040", "n09999999")


def tar(files: dict[str, bytes], file_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Returns a tar of these files, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=file_format) as writer:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            writer.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def image(value: int, height: int = 5, width: int = 7) -> bytes:
    """Returns a PNG file with all pixels of this value."""
    return png(np.full((height, width, 3), value, np.uint8))


def write_images(folder: pathlib.Path, *paths: str) -> None:
    """Writes `image(k)` at the k-th of these paths below the folder."""
    for value, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(image(value))


def write_imagenet(folder: pathlib.Path, counts=(3, 1, 2)) -> None:
    """Writes both tars, with unsorted classes and images and other files, and a list of labels."""
    inner, value = {}, 0
    for synset, count in list(zip(SYNSETS, counts, strict=False))[::-1]:
        images = {f"{synset}_{k}.JPEG": image(value + k) for k in range(count)}
        inner[f"{synset}.tar"] = tar({"README": b"no image"} | images)
        value += count
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    names = [f"ILSVRC2012_val_{k:08}.JPEG" for k in (3, 1, 2, 4)]
    images = {name: image(100 + int(name[-6])) for name in names}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar({"._x.JPEG": b"no image"} | images))
    labels = [SYNSETS[k] for k in (2, 0, 1, 0)]
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(labels) + "\n")
