# SPDX-License-Identifier: Apache-2.0
"""Writes weights for another system: what it can hold, in its names, in its kind of file."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from tnt_flax.core.errors import InputError, RunError, listed
from tnt_flax.core.trees import fingerprint, named_leaves
from tnt_flax.models import Network
from tnt_flax.weights import identify, names, weights_file
from tnt_flax.weights.formats import mindspore, torch
from tnt_flax.weights.read import Checkpoint, read_checkpoint

# The endings of each system's files; the first word of a target is what `--to` says.
SUFFIXES = {
    "huawei": (".pth", ".tar", ".pt", ".safetensors"),
    "timm": (".safetensors", ".bin", ".pth", ".pt"),
    "mmpretrain": (".pth", ".pt"),
    "mindspore": (".ckpt",),
    "flax": (".safetensors",),
}
# Lineages that differ in one of these are different functions; biases can be zero, and the rest
# changes the result only a little.
STRUCTURE = ("conv_first", "norm_each_word", "proj_norm", "stem_norm", "zero_sentences")
NUMERICS = ("norm_eps", "gelu")


@dataclasses.dataclass(frozen=True)
class Target:
    """Weights as another system's network has them."""

    naming: str
    model: Network
    params: Any
    notes: list[str]

    @property
    def same_function(self) -> bool:
        return not self.notes


def default_system(path: pathlib.Path) -> str:
    """What a file of this name is for, if only one system has such files."""
    systems = {".ckpt": "mindspore", ".safetensors": "flax"}
    if path.suffix not in systems:
        raise InputError(f"say for which system {path} is: --to={'|'.join(SUFFIXES)}")
    return systems[path.suffix]


def check_destination(path: pathlib.Path, system: str) -> None:
    """Raises InputError unless `path` can be written as a file of `system`."""
    if path.suffix not in SUFFIXES[system]:
        raise InputError(f"{path}: a file for {system} ends in {' or '.join(SUFFIXES[system])}")
    if path.exists():
        raise InputError(f"{path} exists already: remove it, or choose another name")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}")


def make_target(found: Checkpoint, system: str) -> Target:
    """The network of `found` as `system` runs it.

    Biases that only the target has become zeros; those that it has not must be zeros.

    Raises:
        InputError: the target has no such network, or would lose a value that is not zero; the
            first tensors concerned are named.
    """
    model = found.network.model
    if system == "flax":
        return Target("tnt_flax", model, found.params, [])
    held = [
        (naming, lineage)
        for naming, lineages in identify.VARIANTS_OF.items()
        for lineage in lineages
        if naming.startswith(system) and lineage in model.variants
    ]
    if not held:
        raise InputError(f"{found.path} is a {type(model).__name__}, which {system} does not have")
    candidates = [(n, model.clone(**identify.lineage_fields(lineage))) for n, lineage in held]
    fitting = [
        c
        for c in candidates
        if all(getattr(model, f, None) == getattr(c[1], f, None) for f in STRUCTURE)
    ]
    if not fitting:
        raise InputError(
            f"{found.path} is the {identify.lineage_of(model)} network, which {system} does not "
            f"have: it has the {' and the '.join(lineage for _, lineage in held)}"
        )
    naming, target = fitting[0]
    _check_system(found.path, system, model)
    params = _with_biases_of(found, naming, target)
    notes = [
        f"{system} computes with {field}={getattr(target, field)}, this network with "
        f"{getattr(model, field)}: its results will differ a little"
        for field in NUMERICS
        if getattr(model, field, None) != getattr(target, field, None)
    ]
    return Target(naming, target, params, notes)


def _check_system(path: str, system: str, model: Network) -> None:
    """What the system's own code cannot be told, though its names could be written."""
    faults = []
    if getattr(model, "vanilla_blocks", ()) and system != "huawei":
        faults.append("blocks without words")
    if model.mlp_ratio != 4 and system == "timm":
        faults.append(f"mlp_ratio={model.mlp_ratio} for the words (it has 4)")
    if faults:
        raise InputError(f"{path}: {system} cannot build {' and '.join(faults)}")


def _with_biases_of(found: Checkpoint, naming: str, target: Network) -> Any:
    """The parameters with exactly the biases that `target` has."""
    network = dataclasses.replace(found.network, model=target)
    abstract, params = network.abstract_params(), named_leaves(found.params)
    wanted = named_leaves(abstract)
    lost = [name for name in params if name not in wanted and np.any(params[name])]
    if lost:
        raise InputError(
            f"{naming} has no place for values of {found.path} that are not zero: {listed(lost)}"
        )
    leaves = [params.get(name, np.zeros(x.shape, np.float32)) for name, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def write(path: pathlib.Path, system: str, target: Target, found: Checkpoint) -> None:
    """Writes `target` in one atomic step, reads it again, and compares every bit.

    Raises:
        RunError: it cannot be written, or what was read is not what was written.
    """
    try:
        if system == "flax":
            weights_file.save_weights(path, target.params, describe(found))
        else:
            tensors = dict(names.export(target.naming, target.params))
            _write_tensors(path, system, tensors, found)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    again = read_checkpoint(path, **identify.unstored_fields(target.model))
    if fingerprint(again.params) != fingerprint(target.params):
        path.unlink()
        raise RunError(f"{path} did not read back as it was written, and was removed")


def _write_tensors(
    path: pathlib.Path, system: str, tensors: dict[str, np.ndarray], found: Checkpoint
) -> None:
    if system == "mindspore":
        mindspore.write(path, tensors)
    elif system == "mmpretrain":
        meta: dict[str, Any] = {"converted_by": "tnt_flax"}
        if found.class_names:
            meta["dataset_meta"] = {"classes": list(found.class_names)}
        torch.write(path, {"meta": meta, "state_dict": tensors})
    elif path.suffix == ".safetensors":
        weights_file.write_tensors(path, tensors, {"format": "pt"})
    else:
        torch.write(path, tensors)


def describe(found: Checkpoint) -> dict[str, Any]:
    """What the header of our own file says of weights that came from anywhere."""
    if found.info.get("config"):
        return found.info
    model, grid = found.network.model, found.network.grid
    fields = identify.function_fields(model)
    fields.pop("num_classes")  # the head's shape says it
    data = found.preprocessing | ({"image_size": found.network.image_size} if grid else {})
    name = found.name or model.base_name  # the fields say the rest
    info = {"config": {"model": {"name": name} | fields, "data": data}, "source": found.naming}
    return json.loads(json.dumps(info))  # tuples become lists
