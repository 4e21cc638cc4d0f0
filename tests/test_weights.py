# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_flax.errors import InputError
from tnt_flax.state import fingerprint
from tnt_flax.weights import load_weights, save_weights

PARAMS = {
    "head": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "pos": jnp.ones(2),
}
INFO = {"config": {"model": {"name": "x"}}, "class_names": ["a", "b", "c"]}


@pytest.fixture
def path(tmp_path):
    save_weights(tmp_path / "w.safetensors", PARAMS, INFO)
    return tmp_path / "w.safetensors"


def shapes(**changes):
    tree = jax.eval_shape(lambda: PARAMS)
    return tree | changes


def test_round_trip_is_the_identity(path):
    params, info = load_weights(path, shapes())
    assert fingerprint(params) == fingerprint(PARAMS)
    assert info == INFO
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]  # nothing temporary stays


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"extra": jnp.ones(1)}, r"- extra"),
        ({"head": {"kernel": jnp.zeros((2, 3))}}, r"\+ head/bias"),
        ({"pos": jnp.ones(3)}, r"! pos float32\[2\], not float32\[3\]"),
        ({"pos": np.ones(2, np.float16)}, r"! pos float32\[2\], not float16\[2\]"),
    ],
)
def test_every_tensor_is_accounted_for(path, changes, fault):
    with pytest.raises(InputError, match=f"does not fit this model: .*{fault}"):
        load_weights(path, shapes(**changes))


def test_broken_files(path):
    with pytest.raises(InputError, match="there is no weights file"):
        load_weights(path.with_name("none.safetensors"), shapes())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="is not a whole weights file"):
        load_weights(path, shapes())
    path.write_bytes(b"not a weights file at all")
    with pytest.raises(InputError, match="is not a whole weights file"):
        load_weights(path, shapes())
