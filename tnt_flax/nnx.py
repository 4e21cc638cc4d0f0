# SPDX-License-Identifier: Apache-2.0
"""The networks as `flax.nnx` modules, whose parameters are stored per block.

The linen networks store equal blocks as one stack and run them in a loop. Here, every block has
parameters of its own, such as `model.blocks[3].inner.fc1.kernel`. A call stacks them, which copies
all parameters once, and runs the linen network: outputs are bit-identical.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from tnt_flax import models
from tnt_flax.models.network import Network
from tnt_flax.weights import names
from tnt_flax.weights.load import load as load_linen

COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


class Layer(nnx.Module):
    """A named group of layers, parameters and running statistics; the network computes."""


class Module(nnx.Module):
    """Maps normalized images (B, H, W, channels) to logits (B, num_classes).

    Parameters are `nnx.Param`s and the running statistics of PyramidTNT are `nnx.BatchStat`s, named
    as in weights files: "blocks/3/inner/fc1/kernel" is `blocks[3].inner.fc1.kernel`.

    Attributes:
        linen: the linen network.
        rngs: random keys; training takes one key of the stream "dropout" per call.
        deterministic: disables dropout and drop path. `train()` and `eval()` set it.
        use_running_average: normalizes with the running statistics, and keeps them. `train()` and
            `eval()` set it.
    """

    def __init__(self, linen: Network, variables: dict[str, Any], *, rngs: nnx.Rngs):
        """Builds the module in evaluation mode.

        Args:
            linen: the linen network.
            variables: its variables, as `linen.init` returns them.
            rngs: see the class.
        """
        self.linen = linen
        self.rngs = rngs
        self.deterministic = True
        self.use_running_average = True
        for collection, kind in COLLECTIONS.items():
            for name, x in names.unstacked(variables.get(collection, {})).items():
                _set(self, name.split("/"), kind(x))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits, float32.

        Raises:
            InputError: see the linen network.
        """
        has_statistics = bool(jax.tree.leaves(nnx.state(self, nnx.BatchStat)))
        updates = has_statistics and not self.use_running_average
        out = self.linen.apply(
            self.variables(),
            images,
            train=not self.deterministic,
            rngs=None if self.deterministic else {"dropout": self.rngs.dropout()},
            mutable=["batch_stats"] if updates else False,
        )
        if not updates:
            return out
        logits, changed = out
        for name, x in names.unstacked(changed["batch_stats"]).items():
            variable = self
            for part in name.split("/"):
                variable = variable[int(part)] if part.isdecimal() else getattr(variable, part)
            variable.set_value(x)
        return logits

    def variables(self) -> dict[str, Any]:
        """Returns the variables of the linen network, with equal blocks stacked.

        `tnt_flax.feature_maps` and `linen.apply` take the result.
        """
        variables = {}
        for collection, kind in COLLECTIONS.items():
            flat = nnx.to_flat_state(nnx.state(self, kind))
            tensors = {"/".join(map(str, path)): x.get_value() for path, x in flat}
            if tensors:
                variables[collection] = _stacked(self.linen, tensors)
        return variables


def create_model(
    name: str,
    *,
    rngs: nnx.Rngs,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int = 3,
    **overrides: Any,
) -> Module:
    """Builds a published network with random weights, those of linen's `init`.

    Args:
        name: one of `tnt_flax.list_models()`.
        rngs: random keys; one of the stream "params" initializes the weights.
        image_size: pixels, one number or (height, width); that of the name by default.
        in_channels: channels of the images.
        **overrides: fields of the linen network.

    Raises:
        InputError: the name or a field is unknown.
    """
    linen = models.create_model(name, **overrides)
    size = int(name.rpartition("_")[2]) if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = jnp.zeros((1, height, width, in_channels))
    return Module(linen, jax.jit(linen.init)(rngs.params(), images), rngs=rngs)


def load(
    path: str | pathlib.Path, name: str | None = None, *, rngs: nnx.Rngs | None = None, **options
) -> Module:
    """Loads weights of any framework.

    Args:
        path, name, options: see `tnt_flax.load`.
        rngs: random keys of dropout and drop path; `nnx.Rngs(0)` by default.

    Raises:
        InputError: see `tnt_flax.load`.
    """
    linen, variables = load_linen(path, name, **options)
    return Module(linen, variables, rngs=nnx.Rngs(0) if rngs is None else rngs)


def _set(module, path, variable):
    """Stores `variable` in `module` under `path`, and creates the layers and lists on the way."""
    first, *rest = path
    if not rest:
        setattr(module, first, variable)
    elif rest[0].isdecimal():  # first is "blocks"
        blocks = getattr(module, first, None)
        if blocks is None:
            blocks = nnx.List([])
            setattr(module, first, blocks)
        while len(blocks) <= int(rest[0]):
            blocks.append(Layer())
        _set(blocks[int(rest[0])], rest[1:], variable)
    else:
        if not hasattr(module, first):
            setattr(module, first, Layer())
        _set(getattr(module, first), rest, variable)


def _stacked(linen, tensors):
    """Returns the parameter tree of `linen`, given its tensors by per-block name."""
    flat = dict(tensors)
    for path, length in linen.stacks():
        stack = names.STACKED.fullmatch("/".join((*path, "")))
        first, *others = (names.unstacked_name(stack, i) for i in range(length))
        for leaf in [name.removeprefix(first) for name in flat if name.startswith(first)]:
            blocks = [flat.pop(block + leaf) for block in (first, *others)]
            flat[stack[0] + leaf] = jnp.stack(blocks)
    return unflatten_dict(flat, sep="/")
