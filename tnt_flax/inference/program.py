# SPDX-License-Identifier: Apache-2.0
"""A network with its weights as one function of images, for export."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tnt_flax.core.errors import InputError
from tnt_flax.models import block_outputs
from tnt_flax.training.step import cast_kernels
from tnt_flax.weights.read import LoadedWeights

BLOCK_OUTPUTS = ("outer_attention", "inner_attention", "sentences", "words")
OUTPUTS = ("logits", "features", *BLOCK_OUTPUTS)
LAYOUTS = ("nhwc", "nchw")
Program = Callable[[Any], dict[str, jax.Array]]


def default_outputs(found: LoadedWeights) -> tuple[str, ...]:
    return ("logits",) if found.network.model.num_classes else ("features",)


def make_program(
    found: LoadedWeights,
    outputs: Sequence[str],
    *,
    layout: str = "nhwc",
    dtype: str = "float32",
    portable: bool = True,
) -> Program:
    """Returns `program(images) -> {name: array}`, in evaluation mode.

    Args:
        found: the weights.
        outputs: of OUTPUTS. `features` is the head's input [B, D]. An output of the blocks, see
            `models.block_outputs`, is one array per block: `outer_attention_0`, ...
        layout: of the normalized float32 images: [B, H, W, 3] or [B, 3, H, W].
        dtype: of the computation and of the stored kernels; norms, softmax, positions and the
            outputs are float32.
        portable: use the reference implementations; the others are for one platform.

    Raises:
        InputError: logits of a network without head.
    """
    if "logits" in outputs and not found.network.model.num_classes:
        raise InputError(f"{found.path} has no head: --outputs=logits is not possible")
    reference = dict(inner_impl="reference", outer_impl="reference", remat="none")
    model = found.network.model.clone(dtype=jnp.dtype(dtype), **(reference if portable else {}))
    # Stored as the network would cast them.
    variables = cast_kernels(jax.device_get(found.variables), jnp.dtype(dtype))
    of_blocks = [name for name in outputs if name in BLOCK_OUTPUTS]

    def program(images):
        if layout == "nchw":
            images = images.transpose(0, 2, 3, 1)
        results: dict[str, Any] = {}

        def keep(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if context.method_name != "__call__":
                return out
            if context.module.path == ("head",):
                results["features"] = args[0].astype(jnp.float32)
            elif not context.module.path:
                results[default_outputs(found)[0]] = out
            return out

        with nn.intercept_methods(keep):
            if of_blocks:
                for i, block in enumerate(block_outputs(model, variables, images)):
                    results |= {f"{name}_{i}": block[name] for name in of_blocks if name in block}
            else:
                model.apply(variables, images)
        return {k: x for k, x in results.items() if k in outputs or k.rpartition("_")[0] in outputs}

    return program
