# SPDX-License-Identifier: Apache-2.0
"""Translates names and layouts of tensors between frameworks, by the tables in `name_tables`.

Our names in this module are per block, such as "blocks/3/inner/fc1/kernel", as in all other
frameworks. In the parameter tree, equal blocks are stacked: `unstacked` and `restacked` convert.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tnt_flax.core.errors import InputError, listed
from tnt_flax.core.trees import named_leaves
from tnt_flax.weights import name_tables

NAMINGS = (*name_tables.BLOCK_PREFIX, *name_tables.PYRAMID_NAMINGS)
OURS = "tnt_flax"
STACKED = re.compile(r"((?:stages_\d+/)?)blocks_(\d{1,4})/(.*)")  # of our parameter tree


@dataclasses.dataclass(frozen=True)
class Place:
    """One of our tensors in another naming: part `part` of `parts` of the tensor `name`."""

    name: str
    part: int = 0
    parts: int = 1


@functools.cache
def _rows(naming: str, table: str) -> dict[str, Place]:
    """Returns {our name: its place} for one table, with one entry per leaf."""
    header, *rows = [line.split() for line in table.strip().splitlines()]
    column, places = header.index(naming), {}
    for row in rows:
        ours, theirs = row[0], row[column]
        if theirs == "-":
            continue
        theirs, _, share = theirs.partition(":")
        part, parts = map(int, share.split("/")) if share else (0, 1)
        if ours in name_tables.SINGLE:
            places[ours] = Place(theirs)
            continue
        layer = ours.rpartition("/")[2]
        kinds = [name_tables.NORM_LEAVES if "norm" in layer else name_tables.LAYER_LEAVES]
        kinds += [name_tables.STATISTICS_LEAVES] if layer == "batch_norm" else []
        joint = {OURS: "/"}.get(naming, "" if theirs.endswith("_") else ".")
        for leaves in kinds:
            for leaf, their_leaf in zip(leaves[OURS], leaves[naming], strict=True):
                places[f"{ours}/{leaf}"] = Place(theirs + joint + their_leaf, part, parts)
    return places


@functools.cache
def _sections(naming: str) -> list[tuple[str, str, str]]:
    """Returns (our prefix, their prefix, table) for each table of `naming`; {} is a number."""
    sections = []
    if naming not in name_tables.PYRAMID_NAMINGS:
        ours, theirs = (name_tables.BLOCK_PREFIX[n] for n in (OURS, naming))
        sections += [("", "", name_tables.STEM), (ours, theirs, name_tables.BLOCK)]
    if naming == OURS:
        sections += [(ours, ours, table) for ours, _, table in name_tables.PYRAMID]
    elif naming in name_tables.PYRAMID_NAMINGS:
        sections += name_tables.PYRAMID
    return sections


@functools.cache
def _prefixed(prefix: str) -> re.Pattern:
    """Returns a pattern for names with `prefix`: groups are its numbers, then the rest."""
    return re.compile(re.escape(prefix).replace(r"\{\}", r"(0|[1-9]\d{0,3})") + "(.*)")


@functools.cache
def _inverse(naming: str, table: str) -> dict[str, list[tuple[str, Place]]]:
    found: dict[str, list[tuple[str, Place]]] = {}
    for ours, place in _rows(naming, table).items():
        found.setdefault(place.name, []).append((ours, place))
    return found


def place_of(naming: str, ours: str) -> Place | None:
    """Returns the place of our tensor `ours` in `naming`, or None."""
    for our_prefix, prefix, table in _sections(naming):
        match = _prefixed(our_prefix).fullmatch(ours)
        place = match and _rows(naming, table).get(match[match.lastindex])
        if place:
            return dataclasses.replace(place, name=prefix.format(*match.groups()) + place.name)
    return None


def our_names(naming: str, theirs: str) -> list[tuple[str, Place]]:
    """Returns our names for the parts of their tensor, empty if `naming` has no such tensor."""
    for our_prefix, prefix, table in _sections(naming):
        match = _prefixed(prefix).fullmatch(theirs)
        found = match and _inverse(naming, table).get(match[match.lastindex])
        if found:
            before = our_prefix.format(*match.groups())
            return [(before + ours, dataclasses.replace(p, name=theirs)) for ours, p in found]
    return []


def ignored_reason(naming: str, theirs: str) -> str | None:
    """Returns why a tensor is not a weight, a key of `name_tables.IGNORED`; None for weights."""
    for pattern, (why, _) in name_tables.EXTRA.get(naming, {}).items():
        if re.fullmatch(re.escape(pattern).replace(r"\{\}", r"\d+"), theirs):
            return why
    return None


def detect_naming(path: Any, names: Iterable[str]) -> str:
    """Returns the naming that has the most of `names`.

    Raises:
        InputError: no naming has at least half of them.
    """
    names = list(names)
    known = {
        naming: sum(bool(our_names(naming, n) or ignored_reason(naming, n)) for n in names)
        for naming in NAMINGS
    }
    best = max(known, key=known.get)
    if 2 * known[best] <= len(names):
        unknown = [n for n in names if not our_names(best, n)]
        raise InputError(
            f"{path} holds no known TNT: the best match, {best}, has {known[best]} of its "
            f"{len(names)} tensors; unknown are {', '.join(map(repr, unknown[:3]))}"
        )
    return best


# ------------------------------------------------------------------------------------- layouts


def to_ours(naming: str, ours: str, place: Place, x: np.ndarray) -> np.ndarray:
    """Returns our tensor, part of their tensor `x`, as a view where possible."""
    if place.parts > 1:
        rows, rest = divmod(x.shape[0], place.parts) if x.ndim else (0, 1)
        if rest:
            raise InputError(
                f"{place.name} {list(x.shape)} cannot be split into {place.parts} parts by rows"
            )
        x = x[place.part * rows : (place.part + 1) * rows]
    if naming == OURS:
        return x
    *layers, leaf = ours.split("/")
    ranks = {"kernel": (4,) if "conv" in layers[-1:] else (2,), "word_pos": (3,)}
    if leaf == "word_pos" and name_tables.WORD_POS[naming] == "1CHW":
        ranks["word_pos"] = (4,)
    if x.ndim not in ranks.get(leaf, (x.ndim,)):
        raise InputError(f"{place.name} {list(x.shape)} should have rank {ranks[leaf][0]}")
    if leaf == "kernel":  # (out, in, height, width) and (out, in)
        return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    if leaf == "word_pos" and name_tables.WORD_POS[naming] != "1MC":
        return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
    if _is_norm_of_words(naming, layers) and x.size % name_tables.PYRAMID_WORDS == 0:
        return x.reshape(name_tables.PYRAMID_WORDS, -1)
    return x.astype(np.int32) if leaf == "count" else x


def to_theirs(naming: str, ours: str, x: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`, without joining parts."""
    *layers, leaf = ours.split("/")
    if naming == OURS:
        return x
    if leaf == "kernel":
        return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    if leaf == "word_pos" and name_tables.WORD_POS[naming] != "1MC":
        x = x.swapaxes(1, 2)
        side = round(x.shape[2] ** 0.5)
        return x.reshape(*x.shape[:2], side, side) if name_tables.WORD_POS[naming] == "1CHW" else x
    if _is_norm_of_words(naming, layers):
        return x.reshape(-1)
    return x.astype(np.int64) if leaf == "count" else x


def _is_norm_of_words(naming: str, layers: list[str]) -> bool:
    pyramid = naming in name_tables.PYRAMID_NAMINGS
    return pyramid and layers[-2:] in (["inner", "norm1"], ["inner", "norm2"])


# ----------------------------------------------------------------------------- a whole network


def join_collections(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one tree of parameters and BatchNorm statistics, as weights files store them.

    The statistics are beside the scale of their norm. `split_collections` is the inverse.
    """
    parts = (variables["params"], variables.get("batch_stats", {}))
    flat = {path: x for part in parts for path, x in flatten_dict(part).items()}
    return unflatten_dict(flat)


def split_collections(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns variables by collection, without "batch_stats" where there are none."""
    flat: dict[str, dict] = {"params": {}}
    for path, x in flatten_dict(tree).items():
        statistic = "batch_norm" in path[:-1] and path[-1] in name_tables.STATISTICS_LEAVES[OURS]
        flat.setdefault("batch_stats" if statistic else "params", {})[path] = x
    return {collection: unflatten_dict(leaves) for collection, leaves in flat.items()}


def unstacked(params: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a parameter tree by per-block name, as views."""
    tensors = {}
    for name, leaf in named_leaves(params).items():
        match = STACKED.fullmatch(name)
        if not match:
            tensors[name] = leaf
            continue
        for i in range(leaf.shape[0]):
            tensors[unstacked_name(match, i)] = leaf[i]
    return tensors


def unstacked_name(match: re.Match, i: int) -> str:
    """Returns the per-block name of entry `i` of a leaf; `match` is of `STACKED`."""
    return f"{match[1]}blocks/{int(match[2]) + i}/{match[3]}"


def restacked(
    read: Callable[[str], np.ndarray],
    name: str,
    shape: tuple[int, ...],
    dtype: Any = np.float32,
) -> np.ndarray:
    """Returns a leaf of the parameter tree as a new array.

    Args:
        read: returns the tensor with a per-block name; called once per block.
        name: name of the leaf.
        shape: its shape.
        dtype: its dtype.
    """
    out = np.empty(shape, dtype)
    match = STACKED.fullmatch(name)
    with np.errstate(over="ignore"):  # a float64 out of range becomes infinite: the caller checks
        if match:
            for i in range(shape[0]):
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


def exported_shapes(naming: str, params: Any) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of `export`, without the zeros."""
    tensors = unstacked(shapes_only_tree(params))
    shapes = {}
    for name, parts in _joined(naming, tensors).items():
        pieces = [to_theirs(naming, ours, tensors[ours]).shape for ours in parts]
        shapes[name] = (sum(p[0] for p in pieces), *pieces[0][1:]) if parts[1:] else pieces[0]
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
    for ours, place in sorted(places.items(), key=lambda item: item[1].part):
        joined.setdefault(place.name, []).append(ours)
    return {places[ours].name: joined[places[ours].name] for ours in places}  # in our order


def shapes_only_tree(tree: Any) -> Any:
    return jax.tree.map(lambda x: shapes_only(x.shape), tree)


def shapes_only(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array without memory of its own, to compute the shape of a layout."""
    return np.broadcast_to(np.float32(0), shape)
