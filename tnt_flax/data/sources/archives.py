# SPDX-License-Identifier: Apache-2.0
"""Images in uncompressed tar files, read in place: ImageNet's original tars and webdataset shards.

Compressed tars and sparse members cannot be read in place and are refused.
"""

import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from tnt_flax.core.errors import InputError
from tnt_flax.data.images import image_suffixes, is_image
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.index import IndexedImages, Part, open_index
from tnt_flax.data.sources.label_lists import find_labels, image_stem, number_images
from tnt_flax.data.sources.names import (
    BY_NAME,
    ClassOptions,
    find_files,
    natural_key,
    number_classes,
    split_names,
)

LABELS = ("cls", "json")  # suffixes of files with the label of a sample
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


def members(file: BinaryIO, start: int, end: int, what: str) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of the tar in bytes [start, end) of a file, from their headers.

    Raises InputError, with `what` as the tar's name, if it is compressed, truncated, damaged or
    sparse.
    """
    file.seek(start)
    if file.read(6).startswith(COMPRESSED):
        raise InputError(f"{what} is compressed and has no random access: decompress it")
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in iter(tar.next, None):
                if member.issparse():
                    raise InputError(f"{what}: {member.name} is sparse: pack it without --sparse")
                if tar.offset > end:
                    break
                if member.isfile():
                    yield member
                tar.members.clear()  # or tarfile would keep all of them
            position = tar.offset
            file.seek(position)
            if position + tarfile.BLOCKSIZE <= end and not any(file.read(tarfile.BLOCKSIZE)):
                return  # the end mark
    except tarfile.TarError:
        position = file.tell()
    raise InputError(
        f"{what} is truncated or damaged near byte {position}: copy or download it again"
    )


class TarImages(IndexedImages):
    """A source of images in tar files."""

    def name_of(self, index: int) -> str:
        path, start, _ = self.locate(index)
        try:  # the index stores no names; the header before the contents has the (short) name
            header = storage.read(path, start - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
        except (OSError, tarfile.HeaderError):
            name = "?"
        return f"{path}: {name} (at byte {start})"


# ------------------------------------------------------------------------- ImageNet's original tars

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def imagenet_tars(
    root: str, split: str, eval_labels: str = "", classes: ClassOptions = BY_NAME
) -> TarImages:
    """Opens ImageNet's training or validation tar as downloaded.

    `ILSVRC2012_img_train.tar` holds one tar per class, named by its synset (n01440764.tar);
    `ILSVRC2012_img_val.tar` holds images, and their labels are in another file: `eval_labels`, see
    `label_lists.read_labels`, or "" for the first of LABEL_FILES in `root`. Classes are sorted by
    synset, as in torchvision and timm, unless a class list names them in another order.

    Raises InputError if a file is missing or damaged, or if labels do not match the images.
    """
    if split == "train":
        path = storage.join(root, TRAIN)
        index = open_index("imagenet train", [path], _scan_images, _cut_classes)
        return TarImages(index, *number_classes(index.texts, classes, path, exact=True))
    if "val" not in split_names(split):
        raise InputError(f"ImageNet's tars have no split {split!r}: choose train or validation")
    index = open_index("imagenet val", [storage.join(root, VALIDATION)], _scan_images)
    file = storage.join(root, eval_labels) if eval_labels else find_labels([root], VALIDATION)
    names, label_of = number_images(file, sorted(index.texts, key=natural_key), classes)
    return TarImages(index, names, [label_of[image] for image in index.texts])


def _cut_classes(files, sizes):
    """Returns one part per inner tar."""
    path, parts = files[0], []
    with storage.open_sequential(path) as file:
        for member in members(file, 0, sizes[0], path):
            start, end = member.offset_data, member.offset_data + member.size
            if stem := re.fullmatch(r"(?:.*/)?([^/.][^/]*)\.tar", member.name):
                parts.append(Part(0, start, end, stem[1]))
    if not parts:
        raise InputError(f"{path} holds no tars: expected one per class, such as n01440764.tar")
    return parts


def _scan_images(file, part, path):
    """Yields start and size of each image, and the name of its inner tar or else its own."""
    what, found = f"{part.text}.tar in {path}" if part.text else path, False
    for member in members(file, part.start, part.end, what):
        if is_image(member.name):
            found = True
            yield member.offset_data, member.size, part.text or image_stem(member.name)
    if not found:
        raise InputError(f"{what} has no images: download the tar again")


# ------------------------------------------------------------------------------ webdataset shards

# Compressed shards are matched too, so that they are refused instead of overlooked.
_SHARD = re.compile(r"[^.].*\.(tar|tar\.(gz|bz2|xz|zst)|tgz)", re.IGNORECASE)


def webdataset(root: str, split: str, classes: ClassOptions = BY_NAME) -> TarImages:
    """Opens all shards of a split of a webdataset, as one sequence of samples.

    The consecutive files of a shard that share a key are one sample. The key is the path up to the
    first dot of the file name: `shard/0017.jpg` and `shard/0017.cls` are the sample "shard/0017". A
    sample has one image and a label, in `.cls` (a number or a name) or as "label" in `.json`.

    `split` is a name or a pattern, see `names.find_files`; for classes see `number_classes`.

    Raises InputError if shards, images or labels are missing or damaged.
    """
    shards = find_files(root, split, _SHARD)
    if compressed := [path for path in shards if not path.lower().endswith(".tar")]:
        raise InputError(f"{compressed[0]} is compressed and has no random access: decompress it")
    index = open_index("webdataset", shards, _scan_shard)
    return TarImages(index, *number_classes(index.texts, classes, f"{root} ({split})"))


def _scan_shard(file, part, shard):
    """Yields start and size of each sample's image, and the sample's label as written."""
    found = (member for member in members(file, 0, part.end, shard) if _key(member.name))
    for key, group in itertools.groupby(found, lambda member: _key(member.name)):
        what = f"{shard}: sample {key!r}"
        files = {member.name[len(key) + 1 :].lower(): member for member in group}
        images = [member for suffix, member in files.items() if f".{suffix}" in image_suffixes()]
        if not images and not files.keys() & set(LABELS):
            continue  # no sample, such as README.md
        text = _label(file, files, what)
        if len(images) != 1:
            problem = "two images" if images else f"no image among {', '.join(files)}"
            raise InputError(f"{what} has {problem}")
        yield images[0].offset_data, images[0].size, text


def _key(name):
    """Returns the path up to the first dot of the file name; "" for a file of no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.partition(".")
    if not stem or not dot or (not slash and re.fullmatch(r"__.*__", stem)):
        return ""
    return folder + slash + stem


def _label(file, files, what):
    for extension in LABELS:
        try:
            member = files[extension]
            file.seek(member.offset_data)
            text = file.read(member.size).decode()
            if extension == "json":
                text = json.loads(text)["label"]
                text = text if isinstance(text, str) else json.dumps(text)
        except (ValueError, KeyError, TypeError):  # no file, not UTF-8, not JSON, no "label"
            continue
        if text.strip():
            return text.strip()
    raise InputError(f'{what} has no label: expected a .cls file, or a .json file with "label"')
