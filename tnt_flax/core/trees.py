# SPDX-License-Identifier: Apache-2.0
"""Trees of named arrays: names, comparison, fingerprint."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tnt_flax.core.errors import InputError, listed


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns {"blocks_0/inner/fc1/kernel": leaf, ...} in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def check_tensors_match(path: Any, found: Any, expected: Any) -> None:
    """Checks that the tensors of a file have the expected names, shapes and dtypes.

    Args:
        path: of the file or folder, for the message.
        found: tree of the file's tensors, anything with a shape and a dtype.
        expected: tree of the model's tensors, anything with a shape and a dtype.

    Raises:
        InputError: listing missing (-), unexpected (+) and different (!) tensors, the first five in
            the message and all in its `details`.
    """
    found, expected = named_leaves(found), named_leaves(expected)
    errors = [f"- {name} {_shape_text(expected[name])}" for name in expected if name not in found]
    errors += [f"+ {name} {_shape_text(found[name])}" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        a, b = _shape_text(found[name]), _shape_text(expected[name])
        errors += [f"! {name} {a}, not {b}"] if a != b else []
    if errors:
        errors.sort()
        message = f"{path} does not fit this model: {listed(errors, separator='; ')}"
        raise InputError(message, details=errors[5:] and errors)


def _shape_text(x: Any) -> str:
    return f"{np.dtype(x.dtype)}{list(x.shape)}"


def diff_nested(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lists the differing keys of nested dictionaries: ["data.batch_size: 1024 -> 512", ...]."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += diff_nested(before, after, f"{prefix}{key}.")
        elif before != after:
            changed.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return changed


def fingerprint(params: Any, fetch: Callable[[Any], np.ndarray] = np.asarray) -> str:
    """Returns the SHA-256 over the names, dtypes, shapes and bytes of all parameters.

    `fetch(leaf)` returns the whole array on this host, one leaf at a time. For arrays sharded over
    hosts use `runtime.sharding.fetch` and call this function in every process.
    """
    digest = hashlib.sha256()
    for name, leaf in named_leaves(params).items():
        array = fetch(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
