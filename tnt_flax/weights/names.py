# SPDX-License-Identifier: Apache-2.0
"""Translates names and layouts of tensors between frameworks, by the tables in `name_tables`.

Our names in this module are per block, such as "blocks/3/inner/fc1/kernel", as in all other
frameworks. In the parameter tree, equal blocks are stacked: `unstacked` and `restacked` convert.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tnt_flax.core.errors import InputError, listed
from tnt_flax.core.trees import named_leaves
from tnt_flax.weights import name_tables

NAMINGS = tuple(name_tables.BLOCK_PREFIXES)
OURS = "tnt_flax"
STACKED = re.compile(r"((?:stages_\d+/)?)blocks_(\d{1,4})/(.*)")  # of our parameter tree
NUMBER = re.compile(r"\{\}|[0-9]+")  # in a row of the tables, or in a name
NORM_OF_WORDS = re.compile(".*/inner/norm[12]/[a-z]+")
BLOCK = re.compile("0|[1-9][0-9]{0,3}")  # number of a block


@dataclasses.dataclass(frozen=True)
class Place:
    """One of our tensors in another naming: part `part` of `parts` of the tensor `name`."""

    name: str
    part: int = 0
    parts: int = 1


@functools.cache
def rows(naming: str) -> dict[str, Place]:
    """Returns {our name: its place} with one entry per leaf, and {} for the numbers of blocks."""
    places = {}
    prefixes = name_tables.BLOCK_PREFIXES[naming]
    for table, table_prefixes in ((name_tables.STEM, [("", "")]), (name_tables.BLOCK, prefixes)):
        header, *layers = [line.split() for line in table.strip().splitlines()]
        for layer in layers:
            ours, theirs = layer[0], layer[header.index(naming)]
            for our_prefix, prefix in table_prefixes if theirs != "-" else ():
                places |= _leaves(naming, our_prefix + ours, prefix + theirs)
    return places


def _leaves(naming: str, ours: str, theirs: str) -> dict[str, Place]:
    """Returns {our name: its place} for the leaves of a row."""
    theirs, _, share = theirs.partition(":")
    part, parts = map(int, share.split("/")) if share else (0, 1)
    layer = ours.rpartition("/")[2]
    if layer in name_tables.SINGLE:
        return {ours: Place(theirs)}
    leaves = name_tables.NORM_LEAVES if "norm" in layer else name_tables.LAYER_LEAVES
    if layer == "batch_norm":
        leaves = leaves + name_tables.STATISTICS_LEAVES
    column = 0 if naming == OURS else 2 if naming.startswith("mindspore") else 1
    separator = "/" if naming == OURS else "" if theirs.endswith("_") else "."
    return {
        f"{ours}/{leaf[0]}": Place(theirs + separator + leaf[column], part, parts)
        for leaf in leaves
        if leaf[column]
    }


@functools.cache
def _index(naming: str, *, theirs: bool) -> dict[str, list[tuple[str, Place]]]:
    """Returns the rows by our or by their name, with # for every number."""
    index: dict[str, list[tuple[str, Place]]] = {}
    for ours, place in rows(naming).items():
        index.setdefault(NUMBER.sub("#", place.name if theirs else ours), []).append((ours, place))
    return index


def _find(naming: str, name: str, *, theirs: bool) -> Iterator[tuple[str, Place]]:
    """Yields our name and the place of each row that has `name` as our or their name."""
    if "#" in name:
        return
    numbers = NUMBER.findall(name)
    for ours, place in _index(naming, theirs=theirs).get(NUMBER.sub("#", name), ()):
        expected = NUMBER.findall(place.name if theirs else ours)
        blocks = [n for n, wanted in zip(numbers, expected, strict=False) if wanted == "{}"]
        found = dataclasses.replace(place, name=place.name.format(*blocks))
        ours = ours.format(*blocks)
        if name == (found.name if theirs else ours) and all(map(BLOCK.fullmatch, blocks)):
            yield ours, found


def place_of(naming: str, ours: str) -> Place | None:
    """Returns the place of our tensor `ours` in `naming`, or None."""
    return next((place for _, place in _find(naming, ours, theirs=False)), None)


def our_names(naming: str, theirs: str) -> list[tuple[str, Place]]:
    """Returns our names for the parts of their tensor, empty if `naming` has no such tensor."""
    return list(_find(naming, theirs, theirs=True))


def ignored_reason(naming: str, theirs: str) -> str | None:
    """Returns why a tensor is not a weight; None for weights."""
    extra = name_tables.EXTRA.get(naming, {})
    reasons = {NUMBER.sub("#", name): why for name, (why, _) in extra.items()}
    return reasons.get(NUMBER.sub("#", theirs))


def detect_naming(theirs: Iterable[str]) -> tuple[str, int]:
    """Returns the naming that knows the most of these names, and their number."""
    theirs = list(theirs)
    known = {
        naming: sum(bool(our_names(naming, n) or ignored_reason(naming, n)) for n in theirs)
        for naming in NAMINGS
    }
    best = max(known, key=known.get)
    return best, known[best]


def to_ours(naming: str, ours: str, place: Place, x: np.ndarray) -> np.ndarray:
    """Returns our tensor, part of their tensor `x`, as a view where possible.

    Raises:
        InputError: `x` has another rank or size, or its rows cannot be divided into the parts.
    """
    try:
        part = np.split(x, place.parts)[place.part] if place.parts > 1 else x
        return part if naming == OURS else _to_our_layout(naming, ours, part)
    except (ValueError, IndexError) as error:
        rows = f" or cannot be split into {place.parts} parts" if place.parts > 1 else ""
        raise InputError(f"{place.name} {list(x.shape)} has the wrong shape{rows}") from error


def _to_our_layout(naming: str, ours: str, x: np.ndarray) -> np.ndarray:
    leaf = ours.rpartition("/")[2]
    if leaf == "kernel":  # (out, in, height, width) and (out, in)
        return x.transpose((2, 3, 1, 0) if ours.endswith("conv/kernel") else (1, 0))
    if leaf == "word_pos" and naming in name_tables.WORD_POS:
        x = x.transpose((0, 2, 1) if name_tables.WORD_POS[naming] == "1CM" else (0, 2, 3, 1))
        return x.reshape(x.shape[0], -1, x.shape[-1])
    if naming == "huawei_pyramid" and NORM_OF_WORDS.fullmatch(ours):
        return x.reshape(name_tables.PYRAMID_WORDS, -1)
    return x.astype(np.int32) if leaf == "count" else x


def to_theirs(naming: str, ours: str, x: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`, without joining parts."""
    leaf = ours.rpartition("/")[2]
    if naming == OURS:
        return x
    if leaf == "kernel":
        return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    if leaf == "word_pos" and naming in name_tables.WORD_POS:
        x = x.swapaxes(1, 2)
        side = math.isqrt(x.shape[2])
        return x if name_tables.WORD_POS[naming] == "1CM" else x.reshape(*x.shape[:2], side, side)
    if naming == "huawei_pyramid" and NORM_OF_WORDS.fullmatch(ours):
        return x.reshape(-1)
    return x.astype(np.int64) if leaf == "count" else x


def join_collections(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one tree of parameters and BatchNorm statistics, as weights files store them.

    The statistics are beside the scale of their norm.
    """
    params, statistics = variables["params"], variables.get("batch_stats", {})
    return unflatten_dict(flatten_dict(params) | flatten_dict(statistics))


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Returns `tree` with `function(name, leaf)` for each leaf ("blocks_0/inner/fc1/kernel")."""
    leaves = [function(name, leaf) for name, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def unstacked(params: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a parameter tree by per-block name, as views."""
    tensors = {}
    for name, leaf in named_leaves(params).items():
        if match := STACKED.fullmatch(name):
            tensors |= {unstacked_name(match, i): leaf[i] for i in range(leaf.shape[0])}
        else:
            tensors[name] = leaf
    return tensors


def unstacked_name(match: re.Match, i: int) -> str:
    """Returns the per-block name of entry `i` of a leaf; `match` is of `STACKED`."""
    return f"{match[1]}blocks/{int(match[2]) + i}/{match[3]}"


def restacked(
    read: Callable[[str], np.ndarray], name: str, leaf: jax.ShapeDtypeStruct
) -> np.ndarray:
    """Returns a leaf of the parameter tree as a new array; `read(name)` returns one block of it."""
    out = np.empty(leaf.shape, leaf.dtype)
    match = STACKED.fullmatch(name)
    with np.errstate(over="ignore"):  # a float64 out of range becomes infinite: the caller checks
        if match:
            for i in range(len(out)):
                out[i] = read(unstacked_name(match, i))
        else:
            out[...] = read(name)
    return out


def export(naming: str, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (their name, their tensor) for all of `params`, with the zeros that `naming` adds.

    Raises:
        InputError: `naming` has no place for some tensors; the message lists them.
    """
    tensors = unstacked(params)
    for name, parts in _joined(naming, tensors).items():
        pieces = [to_theirs(naming, ours, np.asarray(tensors[ours])) for ours in parts]
        joined = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        yield name, np.asarray(joined, order="C")
    for name, shape in extra_shapes(naming, tensors).items():
        yield name, np.zeros(shape, np.float32)


def exported_shapes(naming: str, params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the names, shapes and dtypes of `export`, without the zeros."""
    tensors = unstacked(jax.tree.map(shapes_only, params))
    shapes = {}
    for name, parts in _joined(naming, tensors).items():
        pieces = [to_theirs(naming, ours, tensors[ours]) for ours in parts]
        shape = pieces[0].shape
        if parts[1:]:
            shape = (sum(x.shape[0] for x in pieces), *shape[1:])
        shapes[name] = jax.ShapeDtypeStruct(shape, pieces[0].dtype)
    return shapes


def extra_shapes(naming: str, tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of tensors of zeros in files of `naming`, beside the weights."""
    if naming not in name_tables.EXTRA:
        return {}
    sentences, width = tensors["sentence_pos"].shape[1] - 1, tensors["cls_token"].shape[-1]
    matches = (re.match(r"blocks/(\d+)/", name) for name in tensors)
    blocks = sorted({int(match[1]) for match in matches if match})
    shapes = {}
    for pattern, (_, rows) in name_tables.EXTRA[naming].items():
        shape = (1, sentences if rows == "ND" else 1, width)
        shapes |= {pattern.format(i): shape for i in (blocks if "{}" in pattern else [0])}
    return shapes


def _joined(naming: str, tensors: Iterable[str]) -> dict[str, list[str]]:
    """Returns {their name: our names in the order of the parts}."""
    places = {ours: place_of(naming, ours) for ours in tensors}
    unmapped = [ours for ours, place in places.items() if place is None]
    if unmapped:
        raise InputError(f"{naming} has no place for {listed(unmapped)}")
    joined: dict[str, list[str]] = {}
    for ours, place in places.items():
        joined.setdefault(place.name, [""] * place.parts)[place.part] = ours
    return joined


def shapes_only(x: Any) -> np.ndarray:
    """Returns an array without memory of its own, to compute the shape of a layout."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)
