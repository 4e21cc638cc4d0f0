# SPDX-License-Identifier: Apache-2.0
"""Every image counts exactly once, for any batch size and number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.runtime import sharding
from tnt_flax.runtime.workdir import config_to_json
from tnt_flax.training.evaluate import evaluate, evaluate_checkpoint
from tnt_flax.training.experiment import Experiment
from tnt_flax.weights.write import save_weights


@pytest.fixture
def setting(smoke_config):
    experiment = Experiment(smoke_config())
    variables = experiment.init_variables(jax.random.key(3))
    variables["params"]["head"]["kernel"] *= 50  # logits that differ between images
    return experiment, variables


@pytest.mark.slow
def test_metrics_are_equal_for_any_batch_size(setting):
    experiment, variables = setting
    config, model = experiment.config, experiment.model
    step = jax.jit(experiment.make_eval_step(model))
    results = []
    for batch_size in (8, 56, 368):  # without padding, in the last batch, in the only one
        config.eval.batch_size = batch_size
        result, sums = evaluate(step, variables, experiment.data.eval_batches(), experiment.mesh)
        results.append(result)
        for name in ("per_class", "calibration"):  # images, hits, ...
            assert sums[name][0].sum() == 360
            assert sums[name][1].sum() == pytest.approx(360 * result["top1"])
    for result in results:
        assert (result["images"], result["skipped"]) == (360, 0)
        assert result["top1"] == results[0]["top1"] and result["top5"] == results[0]["top5"]
        np.testing.assert_allclose(result["loss"], results[0]["loss"], rtol=1e-6)

    # Computed directly, without batches, masks or devices.
    config.eval.batch_size = 360
    (batch,) = experiment.data.eval_batches()
    pixels = (jnp.asarray(batch["image"], jnp.float32) - 127.5) / 127.5
    order = np.argsort(-np.asarray(jax.jit(model.apply)(variables, pixels)), axis=1)
    hits = order == batch["label"][:, None]
    assert results[0]["top1"] == hits[:, 0].mean()
    assert results[0]["top5"] == hits[:, :5].any(axis=1).mean()
    assert 0 < results[0]["top1"] < results[0]["top5"] < 1


@pytest.mark.slow
def test_a_weights_file_is_evaluated_if_its_network_and_classes_fit(setting, tmp_path):
    experiment, variables = setting
    config, path = experiment.config, tmp_path / "w.safetensors"
    evaluated = lambda: evaluate_checkpoint(config, None, str(path))
    info = {"config": config_to_json(config), "class_names": [*"0123456789"]}
    save_weights(path, variables["params"], info)
    result = evaluated()
    assert (result["images"], result["checkpoint"]) == (360, str(path))
    info["config"]["data"]["interpolation"] = "bilinear"  # as a config.json of timm may state it
    save_weights(path, variables["params"], info)
    assert abs(evaluated()["loss"] / result["loss"] - 1) > 1e-4
    config.model.dtype = "bfloat16"  # not part of the architecture
    assert evaluated()["images"] == 360
    config.model.depth = 2
    with pytest.raises(InputError, match="another network, not the tnt_ti_.*depth: 1 -> 2"):
        evaluated()
    config.model.depth = 1
    save_weights(path, variables["params"], info | {"class_names": [*"abcdefghi0"]})
    with pytest.raises(InputError, match=r"10 classes \(a, b, c, d, e and 5 more\) and none is"):
        evaluated()


def test_missing_weights_or_images_are_errors(setting, tmp_path):
    experiment, variables = setting
    config = experiment.config
    with pytest.raises(InputError, match="--checkpoint=best needs the --workdir"):
        evaluate_checkpoint(config, None, "best")
    with pytest.raises(InputError, match="no intact checkpoint in"):
        evaluate_checkpoint(config, tmp_path, "best")
    with pytest.raises(InputError, match="none.safetensors: No such file"):
        evaluate_checkpoint(config, None, str(tmp_path / "none.safetensors"))
    step = experiment.make_eval_step(experiment.model)
    with pytest.raises(RunError, match="no image could be evaluated"):
        evaluate(step, variables, (batch for batch in ()), sharding.make_mesh())


def test_a_nan_loss_is_an_error(setting):
    experiment, variables = setting
    variables["params"]["head"]["bias"] = jnp.full(10, jnp.nan)
    step = jax.jit(experiment.make_eval_step(experiment.model))
    with pytest.raises(RunError, match="the evaluation loss is nan"):
        evaluate(step, variables, experiment.data.eval_batches(), experiment.mesh)
