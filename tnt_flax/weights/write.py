# SPDX-License-Identifier: Apache-2.0
"""Writes weights: our own .safetensors, and files of other frameworks."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from tnt_flax.core.errors import InputError, RunError, as_run_error, listed
from tnt_flax.core.files import write_atomic
from tnt_flax.core.trees import fingerprint, named_leaves
from tnt_flax.models import Network
from tnt_flax.weights import identify, names
from tnt_flax.weights.formats import HEADER, mindspore, torch
from tnt_flax.weights.inputs import TIMM_ARGUMENTS
from tnt_flax.weights.read import LoadedWeights, read_file

# File extensions of each framework. The keys are the choices of `--to`.
SUFFIXES = {
    "huawei": (".pth", ".tar", ".pt", ".safetensors"),
    "timm": (".safetensors", ".bin", ".pth", ".pt"),
    "mmpretrain": (".pth", ".pt"),
    "mindspore": (".ckpt",),
    "flax": (".safetensors",),
}
# Variants that differ in one of STRUCTURE are different functions. Differences in NUMERICS change
# the results slightly. Biases may differ where they are zero.
STRUCTURE = ("conv_first", "norm_each_word", "proj_norm", "stem_norm", "zero_sentences")
NUMERICS = ("norm_eps", "gelu")


def save_weights(path: pathlib.Path, params: Any, info: dict[str, Any]) -> None:
    """Writes a .safetensors file of ours in one atomic step.

    Args:
        path: the file.
        params: parameter tree; BatchNorm statistics are included by `names.join_collections`.
        info: JSON values for the header, such as "config" and "class_names".
    """
    arrays = {name: np.asarray(x) for name, x in named_leaves(jax.device_get(params)).items()}
    write_atomic(path, safetensors.numpy.save(arrays, metadata={HEADER: json.dumps(info)}))


def header_info(loaded: LoadedWeights) -> dict[str, Any]:
    """Returns the header of our own file for weights of any framework."""
    if loaded.info.get("config"):
        return loaded.info
    model, grid = loaded.network.model, loaded.network.grid
    fields = identify.function_fields(model)
    fields.pop("num_classes")  # known from the shape of the head
    data = loaded.preprocessing | ({"image_size": loaded.network.image_size} if grid else {})
    name = loaded.name or model.base_name  # `fields` override all of its fields
    info = {"config": {"model": {"name": name} | fields, "data": data}, "source": loaded.naming}
    if loaded.class_names:
        info["class_names"] = loaded.class_names
    return json.loads(json.dumps(info))  # tuples become lists


@dataclasses.dataclass(frozen=True)
class ForeignWeights:
    """Weights as the network of another framework has them."""

    naming: str
    model: Network
    params: Any  # with BatchNorm statistics, see `names.join_collections`
    notes: list[str]  # differences of the results; empty if both are the same function


def check_destination(path: pathlib.Path, framework: str | None) -> str:
    """Returns `framework`, by default that of the file extension.

    Raises:
        InputError: several frameworks use the extension, or `path` cannot be written for one.
    """
    suffix = path.suffix.lower()
    framework = framework or {".ckpt": "mindspore", ".safetensors": "flax"}.get(suffix)
    if framework is None:
        raise InputError(f"{path}: set the target framework: --to={'|'.join(SUFFIXES)}")
    if suffix not in SUFFIXES[framework]:
        suffixes = " or ".join(SUFFIXES[framework])
        raise InputError(f"{path}: a file for {framework} ends in {suffixes}")
    if path.exists():
        raise InputError(f"{path} exists already: remove it, or choose another name")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}")
    return framework


def to_framework(loaded: LoadedWeights, framework: str) -> ForeignWeights:
    """Returns the weights for the network of `framework` that computes the same function.

    Biases missing in the source are written as zeros. Biases missing in the target must be zero.

    Raises:
        InputError: the framework has no such network, or has no place for values that are not
            zero; the message lists the first tensors.
    """
    model = loaded.network.model
    if framework == "flax":
        return ForeignWeights(names.OURS, model, names.join_collections(loaded.variables), [])
    held = {
        variant: (naming, model.clone(**identify.variant_fields(variant)))
        for naming, variants in identify.VARIANTS_OF.items()
        for variant in variants
        if naming.startswith(framework) and variant in model.variants
    }
    if not held:
        name = type(model).__name__
        raise InputError(f"{loaded.path} is a {name}, which {framework} does not have")

    def different(target: Network, fields: tuple[str, ...]) -> list[str]:
        return [f for f in fields if getattr(model, f, None) != getattr(target, f, None)]

    fitting = [target for target in held.values() if not different(target[1], STRUCTURE)]
    if not fitting:
        raise InputError(
            f"{loaded.path} is the {identify.variant_of(model)} network, which {framework} does "
            f"not have: it has the {' and the '.join(held)}"
        )
    naming, target = fitting[0]
    if getattr(model, "vanilla_blocks", ()) and framework != "huawei":
        raise InputError(f"{loaded.path}: {framework} cannot build blocks without words")
    if model.mlp_ratio != 4 and framework == "timm":
        ratio = f"mlp_ratio={model.mlp_ratio}"
        raise InputError(f"{loaded.path}: timm cannot build {ratio} for the words")
    notes = [
        f"{framework} computes with {field}={getattr(target, field)}, this network with "
        f"{getattr(model, field)}: its results will differ slightly"
        for field in different(target, NUMERICS)
    ]
    return ForeignWeights(naming, target, _with_biases_of(loaded, naming, target), notes)


def _with_biases_of(loaded: LoadedWeights, naming: str, target: Network) -> Any:
    """Returns the parameters with exactly the biases of `target`."""
    network = dataclasses.replace(loaded.network, model=target)
    abstract = names.join_collections(network.abstract_variables())
    params, wanted = named_leaves(names.join_collections(loaded.variables)), named_leaves(abstract)
    lost = [name for name in params if name not in wanted and np.any(params[name])]
    if lost:
        raise InputError(
            f"{naming} has no place for nonzero values of {loaded.path}: {listed(lost)}"
        )
    return names.map_named(
        lambda name, x: params.get(name, np.zeros(x.shape, np.float32)), abstract
    )


def write(
    path: pathlib.Path, framework: str, target: ForeignWeights, loaded: LoadedWeights
) -> None:
    """Writes `target` in one atomic step, reads it back and compares it bit for bit.

    Args:
        path: the file.
        framework: a key of `SUFFIXES`.
        target: the weights, from `to_framework`.
        loaded: the source of `target`, for the metadata of the file.

    Raises:
        RunError: the file cannot be written, or reads back differently.
    """
    with as_run_error(f"cannot write {path}"):
        if framework == "flax":
            save_weights(path, target.params, header_info(loaded))
        else:
            tensors = dict(names.export(target.naming, target.params))
            _write_tensors(path, framework, tensors, loaded)
    again = read_file(path, str(path), **identify.unstored_fields(target.model))
    if fingerprint(names.join_collections(again.variables)) != fingerprint(target.params):
        path.unlink()
        raise RunError(f"{path} did not read back as it was written, and was removed")


def _write_tensors(
    path: pathlib.Path, framework: str, tensors: dict[str, np.ndarray], loaded: LoadedWeights
) -> None:
    if framework == "mindspore":
        mindspore.write(path, tensors)
    elif framework == "mmpretrain":
        meta: dict[str, Any] = {"converted_by": "tnt_flax"}
        if loaded.class_names:
            meta["dataset_meta"] = {"classes": list(loaded.class_names)}
        torch.write(path, {"meta": meta, "state_dict": tensors})
    elif path.suffix.lower() == ".safetensors":
        write_atomic(path, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    else:
        torch.write(path, tensors)


def facts(loaded: LoadedWeights) -> dict[str, Any]:
    """Returns JSON values that a user of the weights needs: image size, normalization, classes.

    Raises:
        InputError: the size of the images is not known.
    """
    model, grid = loaded.network.model, loaded.network.grid
    if grid is None:
        raise InputError(f"{loaded.path} is not for square images, and stores no other size")
    prepared = loaded.preprocessing
    return {
        "network": loaded.name or "tnt",
        "variant": identify.variant_of(model),
        "image_size": loaded.network.image_size,
        "mean": list(prepared["mean"]),
        "std": list(prepared["std"]),
        "crop_fraction": prepared["crop_fraction"],
        "interpolation": prepared["interpolation"],
        "num_classes": model.num_classes,
        "class_names": list(loaded.class_names) if loaded.class_names else None,
    }


def timm_arguments(target: ForeignWeights, loaded: LoadedWeights) -> dict[str, Any]:
    """Returns the arguments of timm's TNT for this network; raises what `facts` raises."""
    model = target.model
    return {
        "img_size": facts(loaded)["image_size"],
        "in_chans": loaded.network.channels,
        "num_classes": model.num_classes,
        **{theirs: getattr(model, ours) for ours, theirs in TIMM_ARGUMENTS.items()},
    }
