# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import safetensors

from tnt_flax.weights.write import save_weights

PARAMS = {
    "head": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "pos": jnp.ones(2),
}
INFO = {"config": {"model": {"name": "x"}}, "class_names": ["a", "b", "c"]}


def test_a_weights_file_says_what_it_holds(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, PARAMS, INFO)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]  # nothing temporary stays
    with safetensors.safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == ["head/bias", "head/kernel", "pos"]
        np.testing.assert_array_equal(file.get_tensor("head/kernel"), [[0, 1, 2], [3, 4, 5]])
        assert list(file.metadata()) == ["tnt_flax"]


def test_the_same_weights_are_the_same_bytes(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_weights(tmp_path / name, PARAMS, INFO)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
