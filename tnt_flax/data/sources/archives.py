# SPDX-License-Identifier: Apache-2.0
"""Images in uncompressed tar files, read in place: ImageNet's original tars and webdataset shards.

Compressed tars and sparse members cannot be read in place and are refused.
"""

import fnmatch
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from tnt_flax.core.errors import InputError, listed, one_line
from tnt_flax.data.images import image_suffixes, is_image
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.index import Index, Part, open_index
from tnt_flax.data.sources.names import (
    natural_key,
    order_classes,
    read_class_list,
    split_names,
)


def members(file: BinaryIO, start: int, end: int, what: str) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of the tar in bytes [start, end) of a file, from their headers.

    Raises InputError, with `what` as the tar's name, if it is truncated, damaged or sparse.
    """
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


class TarImages:
    """A source of images in tar files. `classes[k]` is the class of records with text number k."""

    def __init__(self, index: Index, class_names: tuple[str, ...], classes: Iterable[str]):
        label_of = {name: label for label, name in enumerate(class_names)}
        self.index, self.class_names = index, class_names
        self._label_of_text = np.array([label_of[name] for name in classes], np.int32)
        self.storage_path = index.files[0]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self.index.read(index), int(self._label_of_text[self.index.text[index]])

    @property
    def labels(self) -> np.ndarray:
        return self._label_of_text[self.index.text]

    def name_of(self, index: int) -> str:
        path, start, _ = self.index.locate(index)
        try:  # the index stores no names; the header before the contents has the (short) name
            header = storage.read(path, start - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
        except (OSError, tarfile.HeaderError):
            name = "?"
        return f"{path}: {name} (at byte {start})"


# ------------------------------------------------------------------------- ImageNet's original tars

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
LABEL_FILES = (  # looked for next to the tars unless data.eval_labels is set
    "ILSVRC2012_devkit_t12.tar.gz",
    "imagenet_2012_validation_synset_labels.txt",
    "LOC_val_solution.csv",
)
_IN_DEVKIT = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
_LABEL = re.compile(r"\s*(?:([^,\s]+)[,\s]+)?(n\d{8})\b")  # a synset, perhaps after a name


def imagenet_tars(root: str, split: str, eval_labels: str = "", class_list: str = "") -> TarImages:
    """Opens ImageNet's training or validation tar as downloaded.

    `ILSVRC2012_img_train.tar` holds one tar per class, named by its synset (n01440764.tar);
    `ILSVRC2012_img_val.tar` holds images, and their labels are in another file. Classes are sorted
    by synset, as in torchvision and timm, unless `class_list` names them in another order.

    `eval_labels` is the devkit (ILSVRC2012_devkit_t12.tar.gz); or text with a synset per line, in
    the order of the image names; or text with an image name and its synset per line, separated by a
    comma or blanks (as in LOC_val_solution.csv). "" takes the first of LABEL_FILES in `root`.

    Raises InputError if a file is missing or damaged, or if labels do not match the images.
    """
    if split == "train":
        path = storage.join(root, TRAIN)
        index = open_index("imagenet train", [path], _scan_images, _cut_classes)
        names = order_classes(sorted(index.texts), class_list, path)
        return TarImages(index, names, index.texts)
    if "val" not in split_names(split):
        raise InputError(f"ImageNet's tars have no split {split!r}: choose train or validation")
    index = open_index("imagenet val", [storage.join(root, VALIDATION)], _scan_images)
    labels_file = storage.join(root, eval_labels) if eval_labels else _find_labels(root)
    synsets = read_labels(labels_file, sorted(index.texts, key=natural_key))
    names = order_classes(sorted(set(synsets.values())), class_list, labels_file)
    return TarImages(index, names, [synsets[image] for image in index.texts])


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
            yield member.offset_data, member.size, part.text or _stem(member.name)
    if not found:
        raise InputError(f"{what} has no images: download the tar again")


def _stem(name):
    return name.rpartition("/")[2].partition(".")[0]


def _find_labels(root):
    found = storage.list_folder(root)
    for name in LABEL_FILES:
        if name in found:
            return storage.join(root, name)
    raise InputError(
        f"no labels for {VALIDATION} in {root}: put {LABEL_FILES[0]} there, or set "
        "data.eval_labels to a file with one synset per line"
    )


def read_labels(path: str, images: list[str]) -> dict[str, str]:
    """Reads the synset of each image from any of the formats that `imagenet_tars` accepts.

    `images` are names without suffix, in natural order.
    Raises InputError unless the file has the synset of every image. A file without names must have
    exactly one line per image.
    """
    with storage.as_input_error(f"cannot read the labels {path}"):
        data = storage.read_file(path)
        lines = _devkit_lines(path, data) if data[:2] == b"\x1f\x8b" else data.decode().splitlines()
    lines = [line for line in lines if line.strip()]
    if lines and "," in lines[0] and not _LABEL.match(lines[0]):
        lines = lines[1:]  # a header line
    labels = []
    for number, line in enumerate(lines, 1):
        if not (found := _LABEL.match(line)):
            raise InputError(
                f"{path}: label {number} is {line!r}, not a synset such as n01440764; for numbers, "
                f"set data.eval_labels to {LABEL_FILES[0]}"
            )
        labels.append(found.groups())
    if labels and labels[0][0]:
        labels = {_stem(name or ""): synset for name, synset in labels}
        if unlabeled := [image for image in images if image not in labels]:
            raise InputError(f"{path} has no label for {listed(unlabeled, limit=2)}")
        return {image: labels[image] for image in images}
    if len(labels) != len(images):
        raise InputError(f"{path} has {len(labels)} labels for {len(images)} images")
    return {image: synset for image, (_, synset) in zip(images, labels, strict=True)}


def _devkit_lines(path, data):
    """Returns the devkit's ground truth with each ILSVRC2012_ID replaced by its synset."""
    import scipy.io

    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files = {name.partition("/")[2]: name for name in tar.getnames()}
            meta, truth = (tar.extractfile(files[name]).read() for name in _IN_DEVKIT)
        table = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        synset_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
        return [synset_of[int(line)] for line in truth.split()]
    except Exception as error:  # gzip, tar and MAT files each raise their own errors
        raise InputError(
            f"{path} is not ImageNet's devkit with {' and '.join(_IN_DEVKIT)}: {one_line(error)}"
        ) from None


# ------------------------------------------------------------------------------ webdataset shards

# Compressed shards are matched too, so that they are refused instead of overlooked.
_SHARD = re.compile(r"[^.].*\.(tar|tar\.(gz|bz2|xz|zst)|tgz)")


def webdataset(root: str, split: str, class_list: str = "") -> TarImages:
    """Opens all shards of a split of a webdataset, as one sequence of samples.

    The consecutive files of a shard that share a key are one sample. The key is the path up to the
    first dot of the file name: `shard/0017.jpg` and `shard/0017.cls` are the sample "shard/0017". A
    sample has one image and a label, in `.cls` (a number or a name) or as "label" in `.json`.

    `split` is a pattern below `root` ("train-{000000..000146}.tar", "train/*.tar"); or a name, and
    then the shards are ROOT/NAME/*.tar, or else ROOT/*NAME*.tar with NAME as a whole word. Class
    names are those of `class_list`, or else the names found, in natural order, or "0", "1", ... up
    to the largest number found.

    Raises InputError if shards, images or labels are missing or damaged.
    """
    index = open_index("webdataset", find_shards(root, split), _scan_shard)
    return TarImages(index, *_classes(index.texts, class_list, f"{root} ({split})"))


def find_shards(root: str, split: str) -> list[str]:
    """Returns the shards' paths in natural order; the braces of a pattern keep their order."""
    if re.search(r"[{*?\[]|\.tar$", split):
        looked_for = [split]
        shards = [p for one in expand_braces(storage.join(root, split)) for p in _glob(one)]
    else:
        looked_for, shards = [f"{split}/*.tar", f"*{split}*.tar"], []
        names = storage.list_folder(root)
        for name in split_names(split):
            if name in names:
                shards = shards or _glob(storage.join(root, f"{name}/*"))
            word = re.compile(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z])", re.IGNORECASE)
            whole = lambda path, word=word: word.search(os.path.basename(path))
            shards = shards or list(filter(whole, _glob(storage.join(root, "*"))))
    if not shards:
        raise InputError(
            f"no shards {' or '.join(looked_for)} in {root}, which holds "
            f"{listed(storage.list_folder(root)) or 'nothing'}: set the split to a pattern"
        )
    if compressed := [path for path in shards if not path.endswith(".tar")]:
        raise InputError(f"{compressed[0]} is compressed and has no random access: decompress it")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Expands number ranges as a shell does: "{08..11}" counts with leading zeros."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [path for number in numbers for path in expand_braces(f"{before}{number}{after}")]


def _glob(pattern):
    """Expands a glob in the last part of a path; a path without one is returned unchanged."""
    folder, name = os.path.split(pattern)
    if not re.search(r"[*?\[]", name):
        return [pattern]
    found = filter(_SHARD.fullmatch, fnmatch.filter(storage.list_folder(folder), name))
    return [storage.join(folder, n) for n in sorted(found, key=natural_key)]


def _scan_shard(file, part, shard):
    """Yields start and size of each sample's image, and the sample's label as written."""
    found = (member for member in members(file, 0, part.end, shard) if _key(member.name))
    for key, group in itertools.groupby(found, lambda member: _key(member.name)):
        what = f"{shard}: sample {key!r}"
        files = {member.name[len(key) + 1 :].lower(): member for member in group}
        text = _label(file, files, what)
        images = [member for suffix, member in files.items() if f".{suffix}" in image_suffixes()]
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
    for extension in ("cls", "json"):
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


def _classes(texts, class_list, where):
    """Returns the class names, and the class of each text: of that name, or else of that number."""
    numeric = all(re.fullmatch(r"\d{1,9}", text) for text in texts)
    if class_list:
        names = read_class_list(class_list)
    elif numeric:
        names = tuple(map(str, range(1 + max(map(int, texts)))))
    else:
        names = tuple(sorted(texts, key=natural_key))
    by_number = numeric and not set(texts) <= set(names)
    class_of = dict(enumerate(names)) if by_number else {name: name for name in names}
    keys = list(map(int, texts)) if by_number else texts
    for text, key in zip(texts, keys, strict=True):
        if key not in class_of:
            raise InputError(
                f"{where} has the label {text!r}, which is not in the class list {class_list} of "
                f"{len(names)} classes"
            )
    return names, [class_of[key] for key in keys]
