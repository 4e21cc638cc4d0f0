# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint of any system, strictly, as a network of ours: `read_checkpoint`."""

import collections
import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tnt_flax.core.errors import InputError, listed, one_line
from tnt_flax.core.trees import check_tensors_match, named_leaves, split
from tnt_flax.models import MODELS, create_model
from tnt_flax.runtime import checkpoints as run_checkpoints
from tnt_flax.weights import hub, identify, name_tables
from tnt_flax.weights import names as mapping
from tnt_flax.weights.formats import Content, Spec, open_file

FLOAT32 = {"float32", "F32"}
INTEGERS = {"int32", "I32", "int64", "I64"}
CONVERTED = {"float16", "F16", "bfloat16", "BF16", "float64", "F64"}


@dataclasses.dataclass
class Checkpoint:
    """A network and its weights, and what they came from."""

    path: str  # of the file or folder, or the hf:// address
    container: str  # in words
    naming: str  # the system whose names the tensors had: one of `mapping.NAMINGS`
    network: identify.SizedNetwork
    params: Any  # float32; ours, whatever the file was; with statistics: see `state.merged`
    weights: str | None  # "ema" or "raw" where the source tells them apart
    info: dict[str, Any]  # our own files: the config and the class names of the run
    renamed: dict[str, str]  # their name -> ours, per block; several ours joined by " + "
    notes: list[str]  # everything that was chosen, dropped or converted, for the user to read

    @property
    def name(self) -> str | None:
        """The published name of the network, if it has one."""
        return identify.name_of(self.network.model)

    @property
    def variables(self) -> dict[str, Any]:
        """For `network.model.apply`."""
        return split(self.params)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self.info.get("class_names")
        return None if names is None else tuple(names)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How its images have to be prepared: see `networks.PREPROCESSING`."""
        published = identify.PREPROCESSING.get(
            identify.lineage_of(self.network.model), identify.PREPROCESSING["official"]
        )
        data = (self.info.get("config") or {}).get("data") or {}
        return {key: data.get(key, value) for key, value in published.items()}

    @property
    def num_params(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.variables["params"]))

    def summary(self) -> str:
        """One line: what it is."""
        model, grid = self.network.model, self.network.grid
        size = f"{self.network.image_size} px" if grid else f"{self.network.sentences} patches"
        kind = {"ema": "averaged weights, ", "raw": "raw weights, ", None: ""}[self.weights]
        return (
            f"{self.path}: {self.name or f'a {type(model).__name__} of no published size'} "
            f"({identify.lineage_of(model)} network, {self.naming} names, {self.container}), "
            f"{kind}{self.num_params:,} parameters, {size}, {model.num_classes} classes"
        )


def read_checkpoint(
    path: str | pathlib.Path,
    name: str | None = None,
    *,
    weights: str = "ema",
    checkpoint: str = "best",
    put: Callable[[str, np.ndarray], Any] = lambda name, x: x,
    **overrides: Any,
) -> Checkpoint:
    """Reads weights of any system; every tensor in them is accounted for.

    Args:
        path: a file (torch's .pth and .bin, .safetensors, MindSpore's .ckpt), a training workdir of
            ours or one of its steps, an address "hf://OWNER/NAME", or a name whose published
            weights are on the Hugging Face hub.
        name: what it has to be, one of `list_models()`.
        weights: "ema" or "raw", where both are there; "ema" where there is only one.
        checkpoint: "best" or "last", of a workdir.
        put: called with every parameter's name and array as soon as it is whole; what it returns
            is kept, so that no second copy of all of them need exist.
        overrides: fields of the network. `inner_heads` and `outer_heads` are needed for sizes that
            were never published; dtype, remat and the drop rates are free.

    Raises:
        InputError: nothing there, not readable without running code, damaged, not a TNT, or tensors
            missing, left over, or of another shape or type: `details` lists them all.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights={weights!r} is neither 'ema' nor 'raw'")
    if name is not None and name not in MODELS:
        create_model(name)  # says which names there are
    notes, source = [], str(path)
    if (hub.is_address(source) or source in MODELS) and not pathlib.Path(source).exists():
        fetched = hub.fetch(source)  # also says of which networks nobody published weights
        name = name or (source if source in MODELS else None)  # the name is a promise
        path, source = fetched.path, fetched.address
        notes.append(f"fetched revision {fetched.revision}")
    path = pathlib.Path(path)
    if path.is_dir():
        found = _read_run(path, name, weights, checkpoint, put, overrides)
    else:
        content = open_file(path, weights)
        found = _read_content(source, content, name, put, overrides)
    found.notes = notes + found.notes
    return found


def _read_content(
    source: str, content: Content, name: str | None, put: Callable, overrides: Mapping[str, Any]
) -> Checkpoint:
    notes = list(content.notes)
    naming = mapping.detect_naming(source, content.specs)
    specs, left_out = _without_extras(source, naming, content, notes)
    places, renamed = _places(naming, specs)
    shapes = {
        ours: mapping.to_ours(naming, ours, place, mapping.hollow(specs[place.name].shape)).shape
        for ours, place in places.items()
    }
    with _sizes_of(source):
        if content.info.get("config"):
            network = _described(source, content.info["config"], shapes, name, overrides)
        else:
            network = identify.identify(source, naming, shapes, name, overrides)
            if naming == "tnt_flax":
                notes.append("its header has no configuration: the network is told by its tensors")
        abstract = network.abstract_params()
        _check_complete(source, naming, specs, abstract)
    notes += _check_types(source, {n: s for n, s in specs.items() if not _is_count(renamed[n], s)})

    def read_ours(ours: str) -> np.ndarray:
        place = places[ours]
        return mapping.to_ours(naming, ours, place, content.read(place.name))

    params = _assembled(abstract, read_ours, put, notes)
    return Checkpoint(
        source,
        content.container,
        naming,
        network,
        params,
        content.weights,
        content.info,
        renamed | left_out,
        notes,
    )


def _without_extras(
    source: str, naming: str, content: Content, notes: list[str]
) -> tuple[dict[str, Spec], dict[str, str]]:
    """(the weights, why each other tensor is left out). Raises InputError if one must not be."""
    kept, dropped = {}, collections.defaultdict(list)
    for name, spec in content.specs.items():
        why = mapping.why_no_weight(naming, name)
        if why is None:
            kept[name] = spec
        elif why == "zero" and np.any(content.read(name)):
            raise InputError(
                f"{source}: {name} is not zero, as every published {naming} file has it"
            )
        else:
            dropped[why].append(name)
    for why, names in dropped.items():
        notes.append(f"left out {listed(names, limit=3)} ({name_tables.NO_WEIGHT[why]})")
    left_out = {
        name: f"left out: {name_tables.NO_WEIGHT[why]}"
        for why, names in dropped.items()
        for name in names
    }
    return kept, left_out


def _places(
    naming: str, specs: Mapping[str, Spec]
) -> tuple[dict[str, mapping.Place], dict[str, str]]:
    """Our name -> where it lies, and their name -> our names; unknown names have none."""
    places, renamed = {}, {}
    for name in specs:
        found = mapping.our_names(naming, name)
        renamed[name] = " + ".join(ours for ours, _ in found)
        places |= dict(found)
    return places, renamed


def _described(
    source: Any,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    name: str | None,
    overrides: Mapping[str, Any],
) -> identify.SizedNetwork:
    """The network that a config of ours describes; sizes that it leaves open are the tensors'."""
    fields = {k: v for k, v in config["model"].items() if v is not None}
    described = fields.pop("name")
    fields = {k: v for k, v in fields.items() if k not in identify.FREE_FIELDS}
    fields["num_classes"] = shapes["head/kernel"][1] if "head/kernel" in shapes else 0
    model = create_model(described, **(fields | dict(overrides)))
    identify.check_same(source, create_model(described, **fields), model, "what was asked for")
    blocks = len({m[0] for m in map(re.compile(r"(stages_\d/)?blocks/\d+/").match, shapes) if m})
    if model.depth != blocks:
        raise InputError(f"{source} describes {model.depth} blocks, but holds {blocks}")
    if name is not None:
        wanted = create_model(name, num_classes=model.num_classes)
        identify.check_same(source, model, wanted, name)
    stem = "/".join(model.stem_kernel)
    if stem not in shapes:
        raise InputError(f"{source} describes a {type(model).__name__}, but holds none")
    sentences = shapes["sentence_pos"][1] - model.has_class_token
    return identify.SizedNetwork(model, sentences, shapes[stem][2])


@contextlib.contextmanager
def _sizes_of(source: Any) -> Iterator[None]:
    """What goes wrong inside is the fault of the sizes that a file or its header has."""
    try:
        yield
    except InputError as error:
        if str(source) in str(error):
            raise
        raise InputError(f"{source}: {error}") from error  # of the model: heads, rates
    except Exception as error:  # whatever jax and flax make of absurd sizes
        raise InputError(f"{source} describes no possible network: {one_line(error)}") from error


def _is_count(ours: str, spec: Spec) -> bool:
    """Is it the number of batches that a BatchNorm has seen?"""
    return ours.endswith("/batch_norm/count") and spec.dtype in INTEGERS


def _check_complete(source: str, naming: str, specs: Mapping[str, Spec], abstract: Any) -> None:
    wanted = mapping.exported_shapes(naming, abstract)
    check_tensors_match(
        source,
        {name: jax.ShapeDtypeStruct(spec.shape, np.float32) for name, spec in specs.items()},
        {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in wanted.items()},
    )


def _check_types(source: str, specs: Mapping[str, Spec]) -> list[str]:
    """Notes on what will be converted to float32."""
    kinds = collections.defaultdict(list)
    for name, spec in specs.items():
        kinds[spec.dtype].append(name)
    notes = []
    for dtype, names in kinds.items():
        if dtype in CONVERTED:
            notes.append(f"converted {listed(names, limit=3)} from {dtype} to float32")
        elif dtype not in FLOAT32:
            raise InputError(
                f"{source}: {listed(names, limit=3)} of type {dtype}, which no weight can be"
            )
    return notes


def _assembled(
    abstract: Any, read: Callable[[str], np.ndarray], put: Callable, notes: list[str]
) -> Any:
    leaves, broken = [], []
    for name, leaf in named_leaves(abstract).items():
        x = mapping.restacked(read, name, leaf.shape, leaf.dtype)
        if not np.isfinite(x).all():
            broken.append(name)
        leaves.append(put(name, x))
    if broken:
        notes.append(f"warning: NaN or infinite values in {listed(broken, limit=3)}")
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _read_run(
    path: pathlib.Path,
    name: str | None,
    weights: str,
    checkpoint: str,
    put: Callable,
    overrides: Mapping[str, Any],
) -> Checkpoint:
    """From a workdir, its folder of checkpoints, or one step."""
    step_folder = path
    if not path.name.isdecimal() or not (path / "info").exists():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        step_folder = run_checkpoints.find_checkpoint(folder, checkpoint)
    info = run_checkpoints.read_info(step_folder)
    stored = run_checkpoints.read_param_shapes(step_folder)
    shapes = {n: x.shape for n, x in mapping.unstacked(mapping.hollow_tree(stored)).items()}
    with _sizes_of(step_folder):
        network = _described(step_folder, info.get("config"), shapes, name, overrides)
        abstract = network.abstract_params()
    params = run_checkpoints.read_weights(step_folder, weights, abstract)
    names = list(named_leaves(params))
    leaves, structure = jax.tree.flatten(params)
    params = jax.tree.unflatten(structure, [put(n, x) for n, x in zip(names, leaves, strict=True)])
    container = f"checkpoint of step {step_folder.name}"
    return Checkpoint(
        str(step_folder), container, "tnt_flax", network, params, weights, info, {}, []
    )
