# SPDX-License-Identifier: Apache-2.0
"""Finds the weights in a folder: a training workdir of ours, or a folder of another framework."""

import os
import pathlib
import re

from tnt_flax.core.errors import InputError, listed
from tnt_flax.weights.formats import INDEX
from tnt_flax.weights.hub import ADDRESS, DEFAULT_FILES

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
# What trainers save beside the weights: optimizer.bin, scheduler.pt, training_args.bin ...
OTHERS = ("optimizer", "scheduler", "training_args", "random_states", "rng_state", "scaler")


def check_exists(path: pathlib.Path) -> None:
    """Raises InputError if there is no such file or folder; names the form of hub addresses."""
    if not os.path.exists(path):  # also False for names that no file can have
        hint = ""
        if ADDRESS.fullmatch(f"hf://{path}") and not _is_weights_file(path.name):
            hint = f" (write hf://{path} if it is on the Hugging Face hub)"
        raise InputError(f"cannot read {path}: No such file or directory{hint}")


def is_run(folder: pathlib.Path) -> bool:
    """Whether `folder` is a workdir of ours, its folder of checkpoints, or one of them."""
    if any((folder / name).exists() for name in DEFAULT_FILES):
        return False
    return is_step(folder) or any(name.isdecimal() for name in _names(steps_of(folder)))


def is_step(folder: pathlib.Path) -> bool:
    """Whether `folder` is one checkpoint of a run of ours."""
    return folder.name.isdecimal() and (folder / "info").exists()


def steps_of(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder of checkpoints of a workdir; such a folder itself."""
    inside = folder / "checkpoints"
    return inside if inside.is_dir() else folder


def find_weights(folder: pathlib.Path) -> pathlib.Path:
    """Returns the file, or the index of several, that holds the weights.

    Raises:
        InputError: there is none, there are several, or they are in a sharded format.
    """
    names = _names(folder)
    for name in DEFAULT_FILES:
        for candidate in (name, f"{name}{INDEX}"):
            if candidate in names:
                return folder / candidate
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        raise InputError(
            f"{folder} is a distributed checkpoint of torch: join it by python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pth"
        )
    files = sorted(name for name in names if _is_weights_file(name))
    if len(indices := sorted(name for name in names if name.endswith(INDEX))) == 1:
        return folder / indices[0]
    if any(re.search(r"-\d+-of-\d+\.", name) for name in files):
        raise InputError(
            f"{folder} has weights in several files without their index: put NAME{INDEX} there, as "
            "it was saved or published with them"
        )
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise InputError(f"{folder} has several weights files: give one of {listed(files)}")
    levels = ("*/*", "*/*/*", "*/*/*/*")
    below = [x for level in levels for x in folder.glob(level) if _is_weights_file(x.name)]
    advice = f"give {below[0]}" if below else "train first or name other weights"
    raise InputError(f"no intact checkpoint in {folder}, and no weights file: {advice}")


def _names(folder: pathlib.Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from error


def _is_weights_file(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith((*OTHERS, "."))
