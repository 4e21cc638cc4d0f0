# SPDX-License-Identifier: Apache-2.0
"""A network for inference alone: what can be multiplied into its weights beforehand, is.

    norm1 of both transformers      its scale and bias into query, key and value
    the softmax's d**-0.5           into the query
    norm2 of both transformers      into fc1
    norm1 of the words' projection  into the projection, in the stem and in every block
    the last norm                   into the head; without classes it stays as it is

What is left of these norms has no weights. A bias of the key moves all scores of a query alike and
changes nothing; the attention weights of a query sum to 1, so one of the value is as good as one of
the output. Of the three only the query keeps its bias. Nothing else can be folded: the norm behind
the words' projection and that of squeeze-excite are followed by a sum and by a ReLU's own layer.
"""

import functools

import jax
import jax.numpy as jnp

from tnt_flax.core.errors import InputError
from tnt_flax.models.tnt import TNT

matmul = functools.partial(jnp.matmul, precision="highest")  # TPUs would round to bfloat16


def fold(model: TNT, variables: dict) -> tuple[TNT, dict]:
    """The same function of an image with fewer operations: a model and its variables.

    Equal to float32 rounding. The variables are in `model.dtype`, with the norms that are left in
    float32: in bfloat16 they are half as large, and rounded as the network itself would round them.

    Raises:
        InputError: `model` is folded already, or no TNT.
    """
    if not isinstance(model, TNT):
        raise InputError(f"only TNT has a folded form, not {type(model).__name__}")
    if model.folded:
        raise InputError("this network is folded already")
    params = dict(variables["params"])
    params["proj"] = _fold_projection(params["proj"])
    for start, _, vanilla in model.groups():
        block = dict(params[f"blocks_{start}"])
        has_words = not vanilla and model.inner_heads
        for name, heads in (("inner", model.inner_heads), ("outer", model.outer_heads)):
            if name == "outer" or has_words:
                block[name] = jax.vmap(lambda x, heads=heads: _fold_transformer(x, heads))(
                    block[name]
                )
        if has_words:
            block["proj"] = jax.vmap(_fold_projection)(block["proj"])
        params[f"blocks_{start}"] = block
    if model.num_classes:
        params["head"] = _behind(params.pop("norm"), params["head"])

    def cast(path, x):
        is_norm = any(str(getattr(key, "key", "")).startswith("norm") for key in path)
        return jnp.asarray(x) if is_norm else jnp.asarray(x, model.dtype)

    params = jax.tree.map_with_path(cast, params)
    return model.clone(folded=True), {**variables, "params": params}


def _fold_transformer(params: dict, heads: int) -> dict:
    params = dict(params)
    attention = dict(params["attention"])
    norm = params.pop("norm1")
    query, key, value = (_behind(norm, attention[name]) for name in ("query", "key", "value"))
    scale = (query["kernel"].shape[1] // heads) ** -0.5
    attention["query"] = {name: x * scale for name, x in query.items()}
    attention["key"] = {"kernel": key["kernel"]}
    attention["value"] = {"kernel": value["kernel"]}
    out = attention["out"]
    bias = matmul(value["bias"], out["kernel"]) + out.get("bias", 0)
    attention["out"] = {"kernel": out["kernel"], "bias": bias}
    return params | {"attention": attention, "fc1": _behind(params.pop("norm2"), params["fc1"])}


def _fold_projection(params: dict) -> dict:
    params = dict(params)
    norm, words = params.pop("norm1"), params["dense"]["kernel"].shape[0]
    # A norm of each word has the same weights for all of them.
    norm = {name: jnp.tile(x, words // x.shape[0]) for name, x in norm.items()}
    return params | {"dense": _behind(norm, params["dense"])}


def _behind(norm: dict, dense: dict) -> dict:
    """The dense layer behind a norm with the norm's scale and bias inside of it."""
    kernel = jnp.asarray(dense["kernel"])
    bias = matmul(norm["bias"], kernel) + dense.get("bias", 0)
    return {"kernel": norm["scale"][:, None] * kernel, "bias": bias}
