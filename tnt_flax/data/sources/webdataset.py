# SPDX-License-Identifier: Apache-2.0
"""Shards in the manner of webdataset: tar files in which the files of one sample share a key.

`shard/0017.jpg` and `shard/0017.cls` are the sample "shard/0017": the key ends at the first dot of
the file's name, and the files of a sample follow each other.
"""

import fnmatch
import functools
import itertools
import json
import re

import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.archives import TarImages, members
from tnt_flax.data.sources.index import Part, open_index
from tnt_flax.data.sources.names import (
    IMAGE_SUFFIXES,
    natural_key,
    read_class_list,
    some,
    split_names,
)

_EXTENSIONS = {suffix[1:] for suffix in IMAGE_SUFFIXES}
_SHARD = re.compile(r"[^.].*\.(tar|tar\.(gz|bz2|xz|zst)|tgz)")  # compressed ones: to say so
_LONGEST_LABEL = 2**20  # bytes of a .cls or .json


def webdataset(root: str, split: str, class_list: str = "") -> TarImages:
    """The samples of all shards of a split, in order.

    `split` is a pattern below `root` ("train-{000000..000146}.tar", "train/*.tar"), or a name: then
    the shards are ROOT/NAME/*.tar, or else ROOT/*NAME*.tar with the name as a word of its own.
    A sample has one image, and its label in `.cls` (a number or a name) or as "label" in `.json`.
    Class names are those of the class list; without one the names found, sorted naturally, or
    "0", "1", ... up to the largest number. Raises InputError for what is missing or damaged.
    """
    if not root:
        raise InputError("webdataset shards need their folder: set data.root")
    shards = find_shards(root, split)
    index = open_index(
        "webdataset",
        shards,
        lambda sizes: [Part(file, 0, size) for file, size in enumerate(sizes)],
        functools.partial(_scan, shards),
    )
    texts = index.texts()
    class_names, labels = _classes(texts, class_list, f"{root} ({split})")
    return TarImages(index, np.array(labels, np.int32), class_names)


def find_shards(root: str, split: str) -> list[str]:
    """The paths of the shards, in natural order (a pattern's braces keep their own order)."""
    if re.search(r"[{*?\[]|\.tar$", split):
        shards = [
            path for pattern in expand_braces(storage.join(root, split)) for path in _glob(pattern)
        ]
        if not shards:
            raise InputError(f"no shards {split} in {root}: it holds {_holds(root)}")
        return shards
    names = storage.list_folder(root)
    for name in split_names(split):
        if name in names and (shards := _glob(storage.join(root, f"{name}/*"))):
            return shards
        word = re.compile(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z])", re.IGNORECASE)
        shards = _glob(storage.join(root, "*"))
        if shards := [path for path in shards if word.search(storage.base(path))]:
            return shards
    raise InputError(
        f"no shards of the split {split!r} in {root}: expected {split}/*.tar, or *{split}*.tar, or "
        f"a pattern as the name of the split; it holds {_holds(root)}"
    )


def expand_braces(pattern: str) -> list[str]:
    """As a shell does it: "{08..11}" counts, with its zeros, and "{a,b}" lists."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        return [pattern]
    first, last, listed = found.groups()
    if listed:
        middle = listed.split(",")
    else:
        middle = [f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [path for one in middle for path in expand_braces(f"{before}{one}{after}")]


def _glob(pattern):
    """Only the last part of a path may be a glob; without one the path itself."""
    folder, name = storage.parent(pattern), storage.base(pattern)
    if not re.search(r"[*?\[]", name):
        return [pattern]
    found = filter(_SHARD.fullmatch, fnmatch.filter(storage.list_folder(folder), name))
    return [storage.join(folder, n) for n in sorted(found, key=natural_key)]


def _holds(root):
    return some(storage.list_folder(root), none="nothing")


# ----------------------------------------------------------------------------- one shard's samples


def _scan(shards, read, part):
    """(start, size, the label as it is written) of the image of each sample."""
    shard, seen = shards[part.file], False
    found = ((*_key(member.name), member) for member in members(read, 0, part.end, shard))
    samples = itertools.groupby((f for f in found if f[0]), key=lambda f: f[0])
    for key, files in samples:
        seen = True
        image, label = None, {}
        for _, extension, member in files:
            if extension in _EXTENSIONS:
                if image:
                    raise InputError(f"{shard}: sample {key!r} has two images")
                image = member
            elif extension in ("cls", "json"):
                label[extension] = member
        text = _label(read, label, f"{shard}: sample {key!r}")
        if not image:
            raise InputError(f"{shard}: sample {key!r} has no image ({', '.join(_EXTENSIONS)})")
        yield image.start, image.size, text
    if not seen:
        raise InputError(f"{shard} has no samples")


def _key(name):
    """The key and the extension in lower case; ("", "") for a file of no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or (not slash and re.fullmatch(r"__.*__", stem)):
        return "", ""
    return folder + slash + stem, extension.lower()


def _label(read, files, what):
    for extension, member in sorted(files.items()):  # cls before json
        if member.size > _LONGEST_LABEL:
            raise InputError(f"{what} has a .{extension} of {member.size} bytes: that is no label")
        try:
            text = read(member.start, member.size).decode()
            if extension == "json":
                text = json.loads(text)["label"]
                text = text if isinstance(text, str) else json.dumps(text)
        except (ValueError, KeyError, TypeError):  # not UTF-8, no JSON, no "label", no object
            continue
        if text.strip():
            return text.strip()
    raise InputError(f'{what} has no label: expected a .cls file, or a .json file with "label"')


def _classes(texts, class_list, where):
    """(class names, the label of each text)."""
    names = read_class_list(class_list) if class_list else ()
    number = {name: label for label, name in enumerate(names)}
    numeric = all(re.fullmatch(r"\d{1,9}", text) for text in texts)
    if names and all(text in number for text in texts):
        return names, [number[text] for text in texts]
    if names:
        for text in texts:
            if not (numeric and int(text) < len(names)) and text not in number:
                raise InputError(
                    f"{where} has the label {text!r}, which is not in the class list {class_list} "
                    f"of {len(names)} classes"
                )
    if numeric:
        count = len(names) or 1 + max(map(int, texts))
        return names or tuple(map(str, range(count))), [int(text) for text in texts]
    names = tuple(sorted(texts, key=natural_key))
    return names, [names.index(text) for text in texts]
