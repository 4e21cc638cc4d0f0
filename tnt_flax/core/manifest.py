# SPDX-License-Identifier: Apache-2.0
"""MANIFEST.json: the SHA-256 of every file of a checkpoint, by which damage is found.

Orbax does not notice a damaged array file: a flipped bit comes back as garbage.
"""

import hashlib
import json
import os
import pathlib

from tnt_flax.core.errors import one_line

MANIFEST = "MANIFEST.json"
NOT_IN_MANIFEST = {
    MANIFEST,
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
}  # Orbax touches them late


def write_manifest(folder: pathlib.Path) -> None:
    """Writes it into the folder of a checkpoint, all or nothing."""
    content = {name: digest(folder / name) for name in sorted(_files(folder))}
    replace_file(folder / MANIFEST, json.dumps(content, indent=1))


def fault(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was when it was committed."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is missing or unreadable ({one_line(error)})"
    for name, expected in content.items():
        try:
            if digest(folder / name) != expected:
                return f"{name} has changed"
        except OSError:
            return f"{name} is missing"
    return None


def digest(path: pathlib.Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def replace_file(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _files(folder: pathlib.Path):
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in NOT_IN_MANIFEST:
            yield str(path.relative_to(folder))
