# SPDX-License-Identifier: Apache-2.0
"""Runs main.py and records the samples of every training step in the file $READ/PROCESS."""

import json
import os
import pathlib
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax

from tnt_flax.runtime import sharding


def recorded(to_global, folder: pathlib.Path):
    """Wraps `sharding.to_global`: also writes a line for each batch of a training step."""

    def wrapped(batch, mesh):
        if "mask" not in batch:
            pairs = zip(batch["image"], batch["label"], strict=True)
            digests = [zlib.crc32(image.tobytes(), int(label)) for image, label in pairs]
            with open(folder / str(jax.process_index()), "a") as file:
                file.write(json.dumps([*sharding.host_rows(mesh), digests]) + "\n")
        return to_global(batch, mesh)

    return wrapped


def samples(folder: pathlib.Path) -> list[list[int]]:
    """Returns the digests of all samples of each step, in the order of the global batch."""
    steps = []
    for lines in zip(*[path.read_text().splitlines() for path in folder.iterdir()], strict=True):
        parts = {part: (count, digests) for part, count, digests in map(json.loads, lines)}
        assert {count for count, _ in parts.values()} == {len(parts)}
        steps.append([digest for part in sorted(parts) for digest in parts[part][1]])
    return steps


if __name__ == "__main__":
    import main

    sharding.to_global = recorded(sharding.to_global, pathlib.Path(os.environ["READ"]))
    sys.exit(main.main())
