# SPDX-License-Identifier: Apache-2.0
"""The files of a split: webdataset shards, tables, Parquet shards."""

import fnmatch
import os
import re

from tnt_flax.core.errors import InputError, listed
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.names import (
    is_passed_over,
    natural_key,
    report_split,
    split_names,
)


def find_files(
    root: str, split: str, name: re.Pattern, *, may_be_missing: bool = False
) -> list[str]:
    """Returns the paths of the files of a split, in natural order.

    A name of a split means the files in the folder of that name, or else the files whose name has
    it as a word ("train-00000-of-00294.parquet"): in `root` or, if that has none, in one of its
    subfolders. A path or pattern below `root` means the files that match; braces keep their order.

    Args:
        root: folder or URL.
        split: name, see `names.split_names`; path; or pattern ("{000000..000146}", "*").
        name: pattern of the names of files to consider.
        may_be_missing: return [] if there are none.

    Raises:
        InputError: there are none (unless `may_be_missing`), or several subfolders have some.
    """
    if re.search(r"[{*?\[]", split) or name.fullmatch(os.path.basename(split)):
        found = [p for one in expand_braces(storage.join(root, split)) for p in _glob(one, name)]
        looked_for = [split]
    else:
        found, below = _files_of(root, split, name), {}
        if not found:
            folders = (f for f in storage.list_folder(root) if not is_passed_over(f))
            for folder in (storage.join(root, f) for f in folders):
                if storage.is_folder(folder) and (files := _files_of(folder, split, name)):
                    below[folder] = files
        if len(below) > 1:
            raise InputError(f"{root} has the split {split!r} in {listed(below)}: set data.root")
        found = found or next(iter(below.values()), [])
        looked_for = [f"{split}/*", f"*{split}*"]
    if not found and not may_be_missing:
        raise InputError(
            f"no files {' or '.join(looked_for)} in {root}, which holds "
            f"{listed(storage.list_folder(root)) or 'nothing'}: set data.train_split or "
            "data.eval_split to a file or pattern"
        )
    return found


def _files_of(folder, split, pattern):
    names = storage.list_folder(folder)
    files = sorted(filter(pattern.fullmatch, names), key=natural_key)
    for candidate in split_names(split):
        found = [
            path
            for name in names
            if candidate in (name, name.lower()) and storage.is_folder(storage.join(folder, name))
            for path in _glob(storage.join(folder, f"{name}/*"), pattern)
        ]
        found = found or [storage.join(folder, name) for name in files if has_word(name, candidate)]
        if found:
            report_split(split, candidate, folder)
            return found
    return []


def has_word(name: str, word: str) -> bool:
    """True if a file name has the word, in any case of letters: "x_train2.csv" has "train"."""
    return bool(re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z])", name, re.IGNORECASE))


def expand_braces(pattern: str) -> list[str]:
    """Expands number ranges as a shell does: "{08..11}" counts with leading zeros."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [path for number in numbers for path in expand_braces(f"{before}{number}{after}")]


def _glob(pattern, name):
    """Expands a glob in the last part of a path; a path without one is returned unchanged."""
    folder, base = os.path.split(pattern)
    if not re.search(r"[*?\[]", base):
        return [pattern]
    found = filter(name.fullmatch, fnmatch.filter(storage.list_folder(folder), base))
    return [storage.join(folder, n) for n in sorted(found, key=natural_key)]
