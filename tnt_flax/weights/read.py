# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint of any framework strictly: every tensor must be used exactly once."""

import collections
import contextlib
import dataclasses
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tnt_flax.core.errors import InputError, listed, one_line
from tnt_flax.core.trees import check_tensors_match, named_leaves
from tnt_flax.models import MODELS, create_model
from tnt_flax.runtime import checkpoints as run_checkpoints
from tnt_flax.weights import hub, identify, name_tables, names
from tnt_flax.weights.formats import Content, Spec, open_file

logger = logging.getLogger("tnt_flax")

FLOAT32 = {"float32", "F32"}
INTEGERS = {"int32", "I32", "int64", "I64"}
CONVERTED = {"float16", "F16", "bfloat16", "BF16", "float64", "F64"}


@dataclasses.dataclass
class LoadedWeights:
    """A network, its variables, and where they come from."""

    path: str  # of the file or folder, or the hf:// address
    file_format: str  # for messages
    naming: str  # naming of the tensors in the file, one of `names.NAMINGS`
    network: identify.SizedNetwork
    variables: dict[str, Any]  # by collection, float32; for `network.model.apply`
    weights: str | None  # "ema" or "raw" if the file states it
    info: dict[str, Any]  # header of our own files: config and class names of the run
    renamed: dict[str, str]  # their name -> our per-block names, joined by " + "
    notes: list[str]  # what was chosen, ignored or converted, for the user

    @property
    def name(self) -> str | None:
        """Published name of the network, if it has one."""
        return identify.name_of(self.network.model)

    @property
    def params(self) -> dict[str, Any]:
        return self.variables["params"]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self.info.get("class_names")
        return None if names is None else tuple(names)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Mean, standard deviation and crop of its images, see `identify.PREPROCESSING`."""
        published = identify.PREPROCESSING.get(
            identify.variant_of(self.network.model), identify.PREPROCESSING["official"]
        )
        data = (self.info.get("config") or {}).get("data") or {}
        return {key: data.get(key, value) for key, value in published.items()}

    @property
    def num_params(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.params))

    def log_notes(self, summary: str) -> None:
        """Logs `summary` and the notes in one line, as a warning if one of the notes is."""
        warns = any(note.startswith("warning") for note in self.notes)
        level = logging.WARNING if warns else logging.INFO
        logger.log(level, "%s", "; ".join([f"loaded {summary}", *self.notes]))

    def summary(self) -> str:
        """Returns one line that describes the weights."""
        model, grid = self.network.model, self.network.grid
        size = f"{self.network.image_size} px" if grid else f"{self.network.sentences} patches"
        kind = {"ema": "EMA weights, ", "raw": "raw weights, ", None: ""}[self.weights]
        return (
            f"{self.path}: {self.name or f'unpublished {type(model).__name__}'} "
            f"({identify.variant_of(model)} network, {self.naming} names, {self.file_format}), "
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
) -> LoadedWeights:
    """Reads weights of any framework.

    Args:
        path: a file (torch's .pth and .bin, .safetensors, MindSpore's .ckpt), a training workdir of
            ours or one of its steps, an address "hf://OWNER/NAME", or a name whose published
            weights are on the Hugging Face hub.
        name: the network that it must be, one of `list_models()`.
        weights: "ema" or "raw", for files that hold both; must be "ema" for EMA weights alone.
        checkpoint: "best" or "last", of a workdir.
        put: called with the name and array of each variable as soon as it is complete. Its result
            is stored, so no second copy of all variables is needed.
        overrides: fields of the network. `inner_heads` and `outer_heads` are needed for unpublished
            sizes; dtype, remat and the drop rates can be chosen.

    Raises:
        InputError: no such file, damaged, not a TNT, or tensors that are missing, unexpected, of
            the wrong shape or dtype, or not loadable; `details` lists all of them.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights={weights!r} is neither 'ema' nor 'raw'")
    if name is not None and name not in MODELS:
        create_model(name)  # raises with the list of names
    notes, source = [], str(path)
    if (hub.is_address(source) or source in MODELS) and not pathlib.Path(source).exists():
        fetched = hub.fetch(source)  # raises for networks without published weights
        name = name or (source if source in MODELS else None)  # the file must be that network
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
) -> LoadedWeights:
    notes = list(content.notes)
    naming = names.detect_naming(source, content.specs)
    specs, left_out = _without_extras(source, naming, content, notes)
    places, renamed = _places(naming, specs)
    shapes = {
        ours: names.to_ours(naming, ours, place, names.shapes_only(specs[place.name].shape)).shape
        for ours, place in places.items()
    }
    with _sizes_of(source):
        if content.info.get("config"):
            network = _described(source, content.info["config"], shapes, name, overrides)
        else:
            network = identify.identify(source, naming, shapes, name, overrides)
            if naming == "tnt_flax":
                notes.append("no config in its header: inferred the network from its tensors")
        abstract = names.join_collections(network.abstract_variables())
        _check_complete(source, naming, specs, abstract)
    notes += _check_types(source, {n: s for n, s in specs.items() if not _is_count(renamed[n], s)})

    def read_ours(ours: str) -> np.ndarray:
        place = places[ours]
        return names.to_ours(naming, ours, place, content.read(place.name))

    variables = names.split_collections(_assembled(abstract, read_ours, put, notes))
    return LoadedWeights(
        source,
        content.file_format,
        naming,
        network,
        variables,
        content.weights,
        content.info,
        renamed | left_out,
        notes,
    )


def _without_extras(
    source: str, naming: str, content: Content, notes: list[str]
) -> tuple[dict[str, Spec], dict[str, str]]:
    """Returns (the weights, why each other tensor is ignored); raises if one is not zero."""
    kept, dropped = {}, collections.defaultdict(list)
    for name, spec in content.specs.items():
        why = names.ignored_reason(naming, name)
        if why is None:
            kept[name] = spec
        elif why == "zero" and np.any(content.read(name)):
            raise InputError(f"{source}: {name} is not zero, unlike in published {naming} files")
        else:
            dropped[why].append(name)
    for why, dropped_names in dropped.items():
        notes.append(f"ignored {listed(dropped_names, limit=3)} ({name_tables.IGNORED[why]})")
    left_out = {
        name: f"ignored: {name_tables.IGNORED[why]}"
        for why, dropped_names in dropped.items()
        for name in dropped_names
    }
    return kept, left_out


def _places(
    naming: str, specs: Mapping[str, Spec]
) -> tuple[dict[str, names.Place], dict[str, str]]:
    """Returns {our name: its place} and {their name: our names}, "" for unknown names."""
    places, renamed = {}, {}
    for name in specs:
        found = names.our_names(naming, name)
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
    """Returns the network of a config of ours, with open sizes taken from the tensors."""
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
        raise InputError(f"{source} describes a {type(model).__name__}, but has no tensors of one")
    sentences = shapes["sentence_pos"][1] - model.has_class_token
    return identify.SizedNetwork(model, sentences, shapes[stem][2])


@contextlib.contextmanager
def _sizes_of(source: Any) -> Iterator[None]:
    """Reports errors in the block as caused by the sizes in a file or its header."""
    try:
        yield
    except InputError as error:
        if str(source) in str(error):
            raise
        raise InputError(f"{source}: {error}") from error  # from the model: heads, rates
    except Exception as error:  # what JAX and Flax raise for absurd sizes
        raise InputError(f"{source} describes an impossible network: {one_line(error)}") from error


def _is_count(ours: str, spec: Spec) -> bool:
    """Whether a tensor is the number of batches of a BatchNorm."""
    return ours.endswith("/batch_norm/count") and spec.dtype in INTEGERS


def _check_complete(source: str, naming: str, specs: Mapping[str, Spec], abstract: Any) -> None:
    wanted = names.exported_shapes(naming, abstract)
    check_tensors_match(
        source,
        {name: jax.ShapeDtypeStruct(spec.shape, np.float32) for name, spec in specs.items()},
        {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in wanted.items()},
    )


def _check_types(source: str, specs: Mapping[str, Spec]) -> list[str]:
    """Returns notes on conversions to float32; raises for dtypes that weights cannot have."""
    kinds = collections.defaultdict(list)
    for name, spec in specs.items():
        kinds[spec.dtype].append(name)
    notes = []
    for dtype, tensors in kinds.items():
        if dtype in CONVERTED:
            notes.append(f"converted {listed(tensors, limit=3)} from {dtype} to float32")
        elif dtype not in FLOAT32:
            raise InputError(
                f"{source}: {listed(tensors, limit=3)} of type {dtype}: not a floating-point type"
            )
    return notes


def _assembled(
    abstract: Any, read: Callable[[str], np.ndarray], put: Callable, notes: list[str]
) -> Any:
    leaves, broken = [], []
    for name, leaf in named_leaves(abstract).items():
        x = names.restacked(read, name, leaf.shape, leaf.dtype)
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
) -> LoadedWeights:
    """Reads a workdir, its folder of checkpoints, or one step."""
    step_folder = path
    if not path.name.isdecimal() or not (path / "info").exists():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        step_folder = run_checkpoints.find_checkpoint(folder, checkpoint)
    info = run_checkpoints.read_info(step_folder)
    stored = run_checkpoints.read_param_shapes(step_folder)
    shapes = {n: x.shape for n, x in names.unstacked(names.shapes_only_tree(stored)).items()}
    with _sizes_of(step_folder):
        network = _described(step_folder, info.get("config"), shapes, name, overrides)
        abstract = network.abstract_variables()
    params = names.join_collections(run_checkpoints.read_weights(step_folder, weights, abstract))
    leaves = [put(name, x) for name, x in named_leaves(params).items()]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return LoadedWeights(
        path=str(step_folder),
        file_format=f"checkpoint of step {step_folder.name}",
        naming="tnt_flax",
        network=network,
        variables=names.split_collections(params),
        weights=weights,
        info=info,
        renamed={},
        notes=[],
    )
