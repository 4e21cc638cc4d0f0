# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint of any framework strictly: every tensor must be used exactly once."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tnt_flax.core.errors import InputError, as_input_error, listed, one_line
from tnt_flax.core.trees import check_tensors_match
from tnt_flax.models import MODELS, create_model
from tnt_flax.weights import hub, identify, inputs, names, states
from tnt_flax.weights.formats import INDEX, Content, open_file
from tnt_flax.weights.formats.restricted_pickle import DENSE

logger = logging.getLogger("tnt_flax")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
# What trainers save beside the weights: optimizer.bin, scheduler.pt, training_args.bin ...
OTHERS = ("optimizer", "scheduler", "training_args", "random_states", "rng_state", "scaler")


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
    inputs: inputs.Inputs  # preprocessing and class names
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
        return self.inputs.class_names

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Mean, standard deviation, crop and interpolation of its images."""
        return self.inputs.preprocessing

    @property
    def num_params(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.params))

    def log_notes(self, summary: str) -> None:
        """Logs `summary` and the notes in one line, as a warning if one of the notes is."""
        warns = any(note.startswith("warning") for note in self.notes)
        log = logger.warning if warns else logger.info
        log("%s", "; ".join([f"loaded {summary}", *self.notes]))

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
    state: str | None = None,
    other_head: bool = False,
    put: Callable[[str, np.ndarray], Any] = lambda name, x: x,
    **overrides: Any,
) -> LoadedWeights:
    """Reads weights of any framework.

    Args:
        path: a file (torch's .pth and .bin, .safetensors, MindSpore's .ckpt), a folder with one and
            perhaps its config.json, a training workdir of ours or one of its steps, an address
            "hf://OWNER/NAME", or a name whose published weights are on the Hugging Face hub.
        name: the network that it must be, one of `list_models()`.
        weights: "ema" or "raw", for files that hold both; must be "ema" for EMA weights alone.
        checkpoint: "best" or "last", of a workdir.
        state: which network of a file with several, such as "teacher".
        other_head: the head will be replaced: leaves out heads of another kind, and tensors that do
            not belong to the network.
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
    address = None if os.path.exists(source) else hub.address_of(source)
    if address:
        fetched = hub.fetch(address)
        name = name or (source if source in MODELS else None)  # the file must be that network
        path, source = fetched.path, fetched.address
        notes += fetched.notes
    path = pathlib.Path(path if address else source.removeprefix(hub.LOCAL))
    _check_exists(path)
    if path.is_dir() and not _is_run(path):
        path = _find_weights(path)
        source = str(path)
    if path.is_dir():
        found = _read_run(path, name, weights, checkpoint, put, overrides)
    else:
        options = dict(weights=weights, state=state, other_head=other_head, put=put)
        found = read_file(path, source, name, folder=path.parent, **options, **overrides)
    found.notes = notes + found.notes
    return found


def read_file(
    path: pathlib.Path,
    source: str,
    name: str | None = None,
    *,
    folder: pathlib.Path | None = None,
    weights: str = "ema",
    state: str | None = None,
    other_head: bool = False,
    put: Callable[[str, np.ndarray], Any] = lambda name, x: x,
    **overrides: Any,
) -> LoadedWeights:
    """Reads one file.

    Args:
        path: the file.
        source: what the user called it, for messages.
        folder: with a config.json about the weights, read unless the file has a header of ours.
        name, weights, state, other_head, put, overrides: see `read_checkpoint`.
    """
    content = open_file(path)
    network_state, which, notes = states.choose(source, content.tree, weights, state)
    assigned = states.assign(source, network_state, other_head=other_head)
    notes += [*assigned.notes, *content.notes]
    naming, tensors = network_state.naming, {n: x for n, (_, x) in assigned.weights.items()}
    found = {theirs: names.our_names(naming, theirs) for theirs in tensors}
    places = {ours: place for pairs in found.values() for ours, place in pairs}
    if naming == names.OURS and not content.info.get("config"):
        notes.append("no config in its header: inferred the network from its tensors")
    with _sizes_of(source):
        shapes = {
            ours: names.to_ours(naming, ours, at, names.shapes_only(tensors[at.name])).shape
            for ours, at in places.items()
        }
        described = _describe(source, folder, content, shapes, notes)
        network = _identify(source, described, content, naming, shapes, name, overrides)
        abstract = network.abstract_variables()
        expected = names.exported_shapes(naming, names.join_collections(abstract))
    _check_tensors(source, tensors, expected, assigned.unexpected)
    notes += _conversions(tensors)

    def read_block(ours: str) -> np.ndarray:
        place = places[ours]
        return names.to_ours(naming, ours, place, tensors[place.name].read())

    stored_as = {theirs: stored for theirs, (stored, _) in assigned.weights.items()}
    renamed = {stored_as[n]: " + ".join(ours for ours, _ in pairs) for n, pairs in found.items()}
    return LoadedWeights(
        path=source,
        file_format=content.file_format,
        naming=naming,
        network=network,
        inputs=_inputs_of(described, network, notes),
        variables=_read_variables(abstract, read_block, put, notes),
        weights=which,
        info=content.info,
        renamed=renamed | {x: f"{states.verb(why)}: {why}" for x, why in assigned.left_out.items()},
        notes=notes,
    )


def _identify(
    source: str,
    described: inputs.Description,
    content: Content,
    naming: str,
    shapes: Mapping[str, tuple[int, ...]],
    name: str | None,
    overrides: Mapping[str, Any],
) -> identify.SizedNetwork:
    """Returns the network of the header of our own files, else that of the tensors."""
    if config := content.info.get("config"):
        return identify.from_config(source, config, shapes, name, overrides)
    stated = {k: x for k, x in described.fields.items() if k in identify.UNSTORED_FIELDS}
    network = identify.identify(source, naming, shapes, name, stated | dict(overrides))
    return dataclasses.replace(network, stored_size=described.image_size)


def _inputs_of(
    described: inputs.Description, network: identify.SizedNetwork, notes: list[str]
) -> inputs.Inputs:
    """Returns what is described, completed by the published preprocessing of the variant."""
    variant = identify.variant_of(network.model)
    defaults = identify.PREPROCESSING.get(variant, identify.PREPROCESSING["official"])
    return described.inputs(defaults, network.model.num_classes, notes)


def _describe(
    source: str,
    folder: pathlib.Path | None,
    content: Content,
    shapes: Mapping[str, tuple[int, ...]],
    notes: list[str],
) -> inputs.Description:
    """Returns what the header of our own files states, else what a config.json does.

    A config.json of another network is ignored. Class names in a trainer's file replace its own.
    """
    if content.info.get("config"):
        return inputs.from_header(source, content.info)
    sizes, described = identify.sizes(shapes), folder and inputs.from_folder(folder)
    wrong = {k: x for k, x in described.fields.items() if sizes.get(k, x) != x} if described else {}
    if wrong:
        stated = ", ".join(f"{field}={x}, not {sizes[field]}" for field, x in wrong.items())
        notes.append(f"warning: ignored {described.source}, which is of another network ({stated})")
        described = None
    elif described:
        notes.append(f"read {described.source}")
    described = described or inputs.Description(source)
    if class_names := inputs.class_names_in(content.tree):
        notes.append(f"took {len(class_names)} class names from the file")
        described = dataclasses.replace(described, class_names=class_names)
    return described


def _check_tensors(
    source: str, tensors: Mapping[str, Any], expected: Mapping, unexpected: Mapping[str, Any]
) -> None:
    """Raises InputError unless the tensors are exactly those of the network."""
    floats = {name for name, x in expected.items() if _is_float(x)}
    if packed := [name for name, x in tensors.items() if name in floats and not _is_float(x)]:
        raise InputError(f"{source}: {listed(packed, limit=3)} are quantized or integers: {DENSE}")
    more = {(f"{n} (again)" if n in tensors else n): x for n, x in unexpected.items()}
    try:
        check_tensors_match(source, _as_converted({**tensors, **more}), _as_converted(expected))
    except InputError as error:
        if not more:
            raise
        advice = "with another head (num_classes=N, 0 for none, init_from, or convert --no-head)"
        left_out = f"{advice} {listed([*more], 3)} would be left out"
        raise InputError(f"{error}; {left_out}", error.details) from error


def _conversions(tensors: Mapping[str, Any]) -> Iterator[str]:
    """Yields a note for each floating-point type other than float32."""
    for dtype in {x.dtype: None for x in tensors.values() if _is_float(x)}:
        if dtype != np.float32:
            converted = [theirs for theirs, x in tensors.items() if x.dtype == dtype]
            yield f"converted {listed(converted, limit=3)} from {dtype} to float32"


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _as_converted(tensors: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, with float32 for all floating-point types and int64 for int32."""
    dtypes = {
        name: np.float32 if _is_float(x) else np.int64 if x.dtype == np.int32 else x.dtype
        for name, x in tensors.items()
    }
    return {n: jax.ShapeDtypeStruct(x.shape, dtypes[n]) for n, x in tensors.items()}


def _read_variables(
    abstract: dict[str, Any], read_block: Callable, put: Callable, notes: list[str]
) -> dict[str, Any]:
    broken = []

    def read(name: str, leaf: jax.ShapeDtypeStruct) -> Any:
        x = names.restacked(read_block, name, leaf)
        if not np.isfinite(x).all():
            broken.append(name)
        return put(name, x)

    variables = {collection: names.map_named(read, tree) for collection, tree in abstract.items()}
    if broken:
        notes.append(f"warning: NaN or infinite values in {listed(broken, limit=3)}")
    return variables


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


def _read_run(
    path: pathlib.Path,
    name: str | None,
    weights: str,
    checkpoint: str,
    put: Callable,
    overrides: Mapping[str, Any],
) -> LoadedWeights:
    """Reads a workdir, its folder of checkpoints, or one step."""
    from tnt_flax.runtime import checkpoints as run_checkpoints  # slow: imports Orbax

    step_folder = path
    if not _is_step(path):
        step_folder = run_checkpoints.find_checkpoint(_steps_of(path), checkpoint)
    info = run_checkpoints.read_info(step_folder)
    stored = run_checkpoints.read_param_shapes(step_folder)
    shapes = {
        n: x.shape for n, x in names.unstacked(jax.tree.map(names.shapes_only, stored)).items()
    }
    with _sizes_of(step_folder):
        network = identify.from_config(step_folder, info["config"], shapes, name, overrides)
        abstract = network.abstract_variables()
    stored, notes = run_checkpoints.read_weights(step_folder, weights, abstract), []
    variables = {collection: names.map_named(put, tree) for collection, tree in stored.items()}
    return LoadedWeights(
        path=str(step_folder),
        file_format=f"checkpoint of step {step_folder.name}",
        naming=names.OURS,
        network=network,
        variables=variables,
        weights=weights,
        info=info,
        inputs=_inputs_of(inputs.from_header(str(step_folder), info), network, notes),
        renamed={},
        notes=notes,
    )


# ------------------------------------------------------------------------ weights in a folder


def _check_exists(path: pathlib.Path) -> None:
    """Raises InputError if there is no such file or folder; names the form of hub addresses."""
    if not os.path.exists(path):  # also False for names that no file can have
        hint = ""
        if hub.ADDRESS.fullmatch(f"hf://{path}") and not _is_weights_file(path.name):
            hint = f" (write hf://{path} if it is on the Hugging Face hub)"
        raise InputError(f"cannot read {path}: No such file or directory{hint}")


def _is_run(folder: pathlib.Path) -> bool:
    """Whether `folder` is a workdir of ours, its folder of checkpoints, or one of them."""
    if any((folder / name).exists() for name in hub.DEFAULT_FILES):
        return False
    return _is_step(folder) or any(name.isdecimal() for name in _names(_steps_of(folder)))


def _is_step(folder: pathlib.Path) -> bool:
    """Whether `folder` is one checkpoint of a run of ours."""
    return folder.name.isdecimal() and (folder / "info").exists()


def _steps_of(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder of checkpoints of a workdir; such a folder itself."""
    inside = folder / "checkpoints"
    return inside if inside.is_dir() else folder


def _find_weights(folder: pathlib.Path) -> pathlib.Path:
    """Returns the file, or the index of several, that holds the weights.

    Raises:
        InputError: there is none, there are several, or they are in a sharded format.
    """
    names = _names(folder)
    for name in hub.DEFAULT_FILES:
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
    with as_input_error(f"cannot read {folder}"):
        return set(os.listdir(folder))


def _is_weights_file(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith((*OTHERS, "."))
