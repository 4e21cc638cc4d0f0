# SPDX-License-Identifier: Apache-2.0
"""Small networks with random parameters in every place, and what the tests of models compare."""

import functools

import flax.traverse_util
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from tests.helpers import numpy_tnt
from tnt_flax.models import TNT

SMALL = dict(outer_dim=24, inner_dim=8, outer_heads=3, inner_heads=2, depth=3, num_classes=5)
IMAGE_SHAPE = (2, 32, 48, 3)  # six sentences; not square, so that swapped sides are detected
CAPTURED = ["intermediates", "maps"]

# Compilation takes most of the time of these tests; unoptimized code compiles twice as fast.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape, seed=0):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


def build(image_shape=IMAGE_SHAPE, gain=1.0, **fields):
    """Returns a small TNT, random parameters and random images."""
    model = TNT(**(SMALL | fields))
    shapes = param_shapes(model, image_shape)
    return model, numpy_tnt.random_params(shapes, gain=gain), normal(*image_shape)


@functools.cache
def param_shapes(model, image_shape):
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def random_variables(module, *args, **kwargs):
    """Returns random parameters of a module that is called with these arguments."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    return {"params": numpy_tnt.random_params(shapes["params"])}


def apply(model, params, images, **kwargs):
    return jit(functools.partial(model.apply, **kwargs))({"params": params}, images)


def captured(state):
    """Returns words and sentences after every block of the first group."""
    words, sentences = (state[collection]["blocks_0"] for collection in CAPTURED)
    return {"words": words["words"][0], "sentences": sentences["sentences"][0]}


def edited(params, values):
    """Returns `params` with constants where the path ends in a key of `values`."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for end, value in values.items():
        places = [path for path in flat if ("/" + path).endswith("/" + end)]
        assert places, end
        flat |= {path: np.full_like(flat[path], value) for path in places}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


# With these parameters attention and MLP add nothing.
SILENT_INNER = {
    "inner/attention/out/kernel": 0,
    "inner/attention/out/bias": 0,
    "inner/fc2/kernel": 0,
    "inner/fc2/bias": 0,
}
SILENT_OUTER = {name.replace("inner", "outer"): 0 for name in SILENT_INNER}


def loss(model, images, params, **kwargs):
    """Returns a sum that weights every logit differently."""
    weights = normal(images.shape[0], 5, seed=3)
    return jnp.sum(weights * model.apply({"params": params}, images, **kwargs))


def value_and_gradients(model, params, images, **kwargs):
    return jit(jax.value_and_grad(functools.partial(loss, model, images, **kwargs)))(params)


def training_value_and_gradients(model, params, images):
    """Returns the values of `value_and_gradients` in training, with a fixed key for dropout."""
    rngs = {"dropout": jax.random.key(1)}
    return value_and_gradients(model, params, images, train=True, rngs=rngs)


def check_bfloat16(model, reference, variables, images):
    """Compares two networks in bfloat16 with `reference` in float32.

    The errors of logits, and of the gradients of all parameters together, may be 1.5 times those of
    `reference`.
    """
    weights = normal(images.shape[0], reference.num_classes, seed=3)

    def run(model):
        def loss(params):
            logits = model.apply(variables | {"params": params}, images)
            return jnp.sum(weights * logits), logits

        gradients, logits = jit(jax.grad(loss, has_aux=True))(variables["params"])
        return logits.ravel(), jax.flatten_util.ravel_pytree(gradients)[0]

    exact = run(reference)
    low = [run(network.clone(dtype=jnp.bfloat16)) for network in (model, reference)]
    for expected, ours, theirs in zip(exact, *low, strict=True):
        ours, theirs = (jnp.linalg.norm(x - expected) for x in (ours, theirs))
        assert 0 < ours < 1.5 * theirs


def check_same(found, expected, tolerance=1e-5):
    """Compares every leaf relative to its largest value."""
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for (path, x), y in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # A key's bias moves all logits of a query alike: its gradient is rounding noise.
        least = 1 if name.endswith("key/bias") else 1e-3
        scale = max(float(jnp.abs(x).max()), least * largest)
        difference = float(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max()) / scale
        assert difference < tolerance, (name, difference)
