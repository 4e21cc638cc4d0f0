# SPDX-License-Identifier: Apache-2.0
"""The folded network is the network: every lineage, every form, and what is left of its weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_lanes import build, jit
from tnt_flax import fold
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import flat_names
from tnt_flax.models import LINEAGES

NORMS = {  # that keep their weights
    "official": ("proj/norm2", "blocks_0/proj/norm2"),
    "legacy": ("proj/norm2",),
    "mindspore": ("proj/norm2", "blocks_0/proj/norm2"),
    "mindspore_pets": (),
}


def check_equal(found, expected, tolerance=1e-5):
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)


def compare(forms=("auto",), **fields):
    """Returns the folded network, its variables, and images."""
    model, params, images = build(**fields)
    folded, variables = fold(model, {"params": params})
    expected = jit(model.apply)({"params": params}, images)
    for form in forms:
        check_equal(jit(folded.clone(inner=form).apply)(variables, images), expected)
    return folded, variables, images


@pytest.mark.parametrize("lineage", LINEAGES)
def test_every_lineage_in_every_form(lineage):
    """The weights of "lanes" are those of the TPU's kernels, too."""
    folded, variables, images = compare(("cpu", "lanes"), depth=1, **LINEAGES[lineage])
    shapes = jax.eval_shape(folded.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    norms = {name.rpartition("/")[0] for name in flat_names(variables["params"]) if "norm" in name}
    assert norms == set(NORMS[lineage])


def test_features_of_the_plain_definition():
    fields = dict(num_classes=0, qkv_bias=True, inner="reference", outer="reference")
    folded, variables, _ = compare(("reference",), **fields)
    assert "norm" in variables["params"]


def test_blocks_without_words_and_with_squeeze_excite():
    compare(vanilla_blocks=(0, 2), depth=3, se=True)


def test_bfloat16_takes_half_the_memory_and_loses_no_more():
    model, params, images = build(depth=1, dtype=jnp.bfloat16)
    folded, variables = fold(model, {"params": params})
    networks = (folded, variables), (model, {"params": params})
    found, plain = (jit(network.apply)(given, images) for network, given in networks)
    exact = jit(model.clone(dtype=jnp.float32).apply)({"params": params}, images)
    errors = [float(jnp.square(x - exact).mean()) ** 0.5 for x in (found, plain)]
    assert 0 < errors[0] < 1.5 * errors[1]
    for name, x in flat_names(variables["params"]).items():
        assert x.dtype == (jnp.float32 if "norm" in name else jnp.bfloat16), name


def test_a_folded_network_is_not_trained():
    model, params, images = build(depth=1)
    names = list(flat_names(params))
    folded, variables = fold(model, {"params": params})
    assert list(flat_names(params)) == names  # they still are those of the network
    with pytest.raises(InputError, match="a folded network is for inference"):
        jax.eval_shape(functools.partial(folded.apply, train=True), variables, images)
    with pytest.raises(InputError, match="folded already"):
        fold(folded, variables)
