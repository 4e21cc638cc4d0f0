# SPDX-License-Identifier: Apache-2.0
"""Trees of named arrays: names, fit, fingerprint."""

import hashlib
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from tnt_flax.core.errors import InputError, listed

STATISTICS = ("mean", "var", "count")  # of a `batch_norm`


def merged(variables: dict[str, Any]) -> dict[str, Any]:
    """Parameters and statistics as one tree, in which files hold them: beside a norm's scale."""
    parts = (variables["params"], variables.get("batch_stats", {}))
    flat = {path: x for part in parts for path, x in flax.traverse_util.flatten_dict(part).items()}
    return flax.traverse_util.unflatten_dict(flat)


def split(tree: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `merged`; without `batch_stats` where there are none."""
    collections: dict[str, Any] = {"params": {}}
    for path, x in flax.traverse_util.flatten_dict(tree).items():
        statistic = "batch_norm" in path[:-1] and path[-1] in STATISTICS
        collections.setdefault("batch_stats" if statistic else "params", {})[path] = x
    return {k: flax.traverse_util.unflatten_dict(flat) for k, flat in collections.items()}


def flat_names(tree) -> dict[str, Any]:
    """{"blocks_0/inner/fc1/kernel": leaf, ...} in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def check_fit(path: Any, found: Any, wanted: Any) -> None:
    """Every tensor that a file holds is wanted, and every wanted one is there.

    `found` and `wanted` are trees of anything with a shape and a dtype; `path` is for the message.

    Raises:
        InputError: naming what is missing (-), left over (+) or of another shape or type (!); the
            first five in the message, all of them in its details.
    """
    found, wanted = flat_names(found), flat_names(wanted)
    faults = [f"- {name} {_form(wanted[name])}" for name in wanted if name not in found]
    faults += [f"+ {name} {_form(found[name])}" for name in found if name not in wanted]
    for name in found.keys() & wanted.keys():
        a, b = _form(found[name]), _form(wanted[name])
        faults += [f"! {name} {a}, not {b}"] if a != b else []
    if faults:
        faults.sort()
        message = f"{path} does not fit this model: {listed(faults, separator='; ')}"
        raise InputError(message, details=faults[5:] and faults)


def _form(x: Any) -> str:
    return f"{np.dtype(x.dtype)}{list(x.shape)}"


def fingerprint(params: Any, fetch: Callable[[Any], np.ndarray] = np.asarray) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters: equal only if they all are.

    `fetch(leaf)` returns the whole array on this host (`runtime.sharding.fetch` for arrays that are
    sharded over hosts, which must all call this function); one leaf is held at a time.
    """
    digest = hashlib.sha256()
    for name, leaf in flat_names(params).items():
        array = fetch(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
