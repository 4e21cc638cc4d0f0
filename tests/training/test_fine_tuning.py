# SPDX-License-Identifier: Apache-2.0
"""Layer-wise learning rates and freezing, over stacked blocks; the network of the weights."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import default, digits, finetune
from tests.helpers.random_weights import random_params
from tests.helpers.smoke import SMOKE
from tnt_flax import create_model
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import named_leaves
from tnt_flax.runtime.workdir import config_to_json
from tnt_flax.training.config import check_config, describe_model, resolve_model_config
from tnt_flax.training.evaluate import evaluate_checkpoint
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.optimizer import check_freeze, layer_scales, make_optimizer, names_per_block
from tnt_flax.training.step import TrainState
from tnt_flax.training.train import train_and_evaluate
from tnt_flax.weights import names
from tnt_flax.weights.formats import torch as torch_files
from tnt_flax.weights.identify import unstored_fields
from tnt_flax.weights.read import read_checkpoint
from tnt_flax.weights.write import save_weights

SMALL = dict(outer_dim=12, inner_dim=4, outer_heads=2, inner_heads=2, num_classes=5)
ADAMW = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, clip_norm=0.0)


@functools.cache
def make(depth=3, vanilla=()):
    """A small network with random weights in every tensor."""
    model = create_model("tnt_s_patch16_224", depth=depth, vanilla_blocks=vanilla, **SMALL)
    return model, random_params(model, 32)


def test_every_layer_has_its_factor():
    _, params = make(depth=4, vanilla=(1,))  # three groups of blocks: 0, 1, and 2 to 3
    scales = {n: np.ravel(x).tolist() for n, x in named_leaves(layer_scales(params, 0.5)).items()}
    for name in ("word_embed/conv/kernel", "proj/dense/kernel", "sentence_pos", "cls_token"):
        assert scales[name] == [0.5**5], name
    assert scales["blocks_0/inner/fc1/kernel"] == [0.5**4]
    assert scales["blocks_1/outer/fc1/kernel"] == [0.5**3]
    assert scales["blocks_2/proj/dense/kernel"] == [0.5**2, 0.5]
    assert scales["norm/scale"] == [0.5] and scales["head/bias"] == [1.0]
    headless = layer_scales({k: x for k, x in params.items() if k != "head"}, 0.5)
    assert headless["norm"]["scale"] == 1
    with pytest.raises(InputError, match="is for TNT, which has no tail/kernel"):
        layer_scales(params | {"tail": {"kernel": jnp.zeros(1)}}, 0.5)


@pytest.mark.slow
def test_the_update_of_each_layer_is_scaled_including_weight_decay():
    _, params = make()
    grads = jax.tree.map(jnp.ones_like, params)

    def updates(**options):
        tx = make_optimizer(lambda step: 0.1, **ADAMW, **options).tx
        return jax.jit(lambda: tx.update(grads, tx.init(params), params)[0])()

    scaled = jax.tree.map(jnp.multiply, updates(), layer_scales(params, 0.75))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6), updates(layer_decay=0.75), scaled
    )
    first, last = updates(layer_decay=0.75)["blocks_0"]["outer"]["fc1"]["kernel"][jnp.array([0, 2])]
    assert 1.6 < np.abs(last).mean() / np.abs(first).mean() < 2  # 0.75^-2


def setup(freeze, params=None, **options):
    """Returns the initial state and the jitted train step of the small network."""
    model, initial = make()
    config = digits.get_config()
    config.optimizer.update(freeze=freeze, clip_norm=1.0, **options)
    experiment = Experiment(config, steps_per_epoch=1)
    experiment.model = model
    state = TrainState.create({"params": params or initial}, experiment.optimizer.tx)
    return state, jax.jit(experiment.make_train_step())


@pytest.fixture
def batch():
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.arange(8) % 5}


@pytest.mark.slow
def test_freezing_keeps_exactly_the_named_tensors(batch):
    """With dropout, weight decay and clipping."""
    _, params = make()
    params = params | {"sentence_pos": params["sentence_pos"].at[0, 1].set(-0.0)}
    before, step = setup("^blocks/[02]/|sentence_pos|norm/scale$", params, layer_decay=0.9)
    after = before
    for _ in range(2):
        after, _ = step(after, batch, jax.random.key(1))
    frozen = 0
    for old, new in ((before.params, after.params), (before.ema["params"], after.ema["params"])):
        for name, leaf in named_leaves(new).items():
            names, start = names_per_block(name, leaf), named_leaves(old)[name]
            pairs = [(start, leaf)] if names == [name] else zip(start, leaf, strict=True)
            for row, (x, y) in zip(names, pairs, strict=True):
                matched = row == "sentence_pos" or row.endswith("norm/scale")
                matched |= row.startswith(("blocks/0/", "blocks/2/"))
                frozen += matched
                assert (np.asarray(x).tobytes() == np.asarray(y).tobytes()) == matched, row
    assert frozen == 2 * (2 * 31 + 2)


def test_frozen_tensors_have_no_moments():
    _, params = make()
    tx = make_optimizer(lambda step: 0.1, **ADAMW, layer_decay=0.9, freeze="^(?!head/)").tx
    moments = [x for x in jax.tree.leaves(jax.eval_shape(tx.init, params)) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(params["head"]))


@pytest.mark.slow
def test_a_linear_probe_computes_no_gradient_of_the_blocks(batch):
    def loops(freeze):
        state, step = setup(freeze)
        return step.lower(state, batch, jax.random.key(0)).as_text().count("stablehlo.while")

    assert loops("^(?!head/)") == loops("^head/") - 1  # no backward pass through the blocks


@pytest.mark.parametrize(
    "freeze, message",
    [
        ("blocks/(", "is not a regular expression: missing \\)"),
        ("haed", "matches no parameter: names are such as"),
        (".", "matches every parameter"),
        ("^blocks/3/", "matches no parameter"),
    ],
)
def test_bad_patterns(smoke_config, freeze, message):
    with pytest.raises(InputError, match="optimizer.freeze=.*" + message):
        check_freeze({"params": make()[1]}, freeze)
    with pytest.raises(InputError, match="optimizer.freeze=.*" + message):  # before any workdir
        Experiment(smoke_config(optimizer__freeze=freeze)).check_training()


@pytest.mark.parametrize("decay", [0.0, 1.5, -1.0])
def test_bad_decays(smoke_config, decay):
    with pytest.raises(InputError, match=r"optimizer.layer_decay=.* is outside \(0, 1\]"):
        check_config(smoke_config(optimizer__layer_decay=decay))


# ------------------------------------------------------------------- the network of the weights


def test_a_config_takes_the_network_of_the_weights(tmp_path):
    fields = dict(depth=2, vanilla_blocks=(1,), se=True, mlp_ratio=2.0, patch_size=8)
    model = create_model("tnt_b_legacy_patch16_224", **(SMALL | fields))
    description = describe_model("x", model)
    assert create_model(**description, num_classes=5) == model and "legacy" in description["name"]
    assert describe_model("x", create_model("tnt_ti_patch16_224", num_classes=3)) == {
        "name": "tnt_ti_patch16_224"
    }
    with pytest.raises(InputError, match="x is a network of no published variant"):
        describe_model("x", model.clone(gelu="tanh"))

    config = finetune.get_config()
    with pytest.raises(InputError, match="model.name is empty.*: set init_from=FILE"):
        Experiment(config).check_training()
    config.init_from = str(tmp_path / "none.pth")
    with pytest.raises(InputError, match="none.pth: No such file"):
        resolve_model_config(config)


def test_a_config_with_a_network_reads_no_weights():
    config = digits.get_config()
    config.init_from = "none.pth"
    assert resolve_model_config(config) is config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of ten digits, not trained."""
    config = digits.get_config()
    config.update_from_flattened_dict(SMOKE)
    model = Experiment(config).model
    params = random_params(model, 32)
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_weights(path, params, {"config": config_to_json(config), "class_names": [*"0123456789"]})
    return path


def finetune_config(weights, root, parameters="all", **changes):
    config = finetune.get_config(parameters)
    config.init_from, config.data.root = str(weights), str(root)
    config.data.update(image_size=32, threads=2)
    config.update(batch_size=8, epochs=1)
    config.eval.batch_size = 8
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.slow
def test_fine_tuning_on_an_image_folder(weights, tmp_path, capsys):
    """Without splits, with other classes than the weights', and without a network in the config."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "emu"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 256, (40, 36, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    config = finetune_config(weights, tmp_path / "data", "probe", **{"optimizer.layer_decay": 0.9})
    result = train_and_evaluate(config, tmp_path / "run")
    err = capsys.readouterr().err
    assert "has no split 'validation': holding out a fixed set of 6 images" in err
    assert "a new head for 3 classes" in err and "of the EMA" not in err
    assert (result["images"], result["step"]) == (6, 3)
    found = read_checkpoint(tmp_path / "run", weights="raw")
    assert found.class_names == ("cat", "dog", "emu")
    before, after = read_checkpoint(weights).params, found.params
    for name in before.keys() - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
    assert np.any(after["head"]["bias"])  # a new one begins with 0

    # The workdir's config describes the network; the config of an evaluation need not.
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["name"]
    again = evaluate_checkpoint(config, tmp_path / "run", "last")
    assert [again[k] for k in ("top1", "images")] == [result[k] for k in ("top1", "images")]


def test_a_different_normalization_is_logged(weights, tmp_path, capsys):
    config = finetune_config(weights, tmp_path, **{"data.mean": (0.4, 0.5, 0.5)})
    Experiment(config).load_variables(config.init_from)
    err = capsys.readouterr().err
    assert "warning: made with data.mean=(0.5, 0.5, 0.5), used with (0.4" in err
    assert "warning: made with data.crop_fraction=1.0, used with 0.9" in err


def test_fine_tuning_leaves_out_heads_of_several_layers(weights, tmp_path, capsys):
    found, path = read_checkpoint(weights), tmp_path / "module.ckpt"
    tensors = {f"model.{n}": x for n, x in names.export("timm", found.params) if "head" not in n}
    tensors |= {f"model.head.{i}.weight": np.zeros((4, 4), np.float32) for i in (0, 2)}
    torch_files.write(path, {"state_dict": tensors})
    fields = unstored_fields(found.network.model)
    config = finetune_config(path, tmp_path, **{f"model.{k}": x for k, x in fields.items()})
    variables, _ = Experiment(config).load_variables(str(path), ("a", "b", "c"))
    assert variables["params"]["head"]["kernel"].shape[1] == 3
    before = found.params["sentence_pos"]
    np.testing.assert_array_equal(variables["params"]["sentence_pos"], before)
    assert "left out model.head.0.weight, model.head.2.weight" in capsys.readouterr().err


def test_an_uncertain_order_of_classes_is_logged(weights, tmp_path, capsys):
    found, path = read_checkpoint(weights), tmp_path / "unnamed.safetensors"
    save_weights(path, found.params, {"config": found.info["config"]})
    classes = tuple(map(str, range(8, 18)))
    Experiment(finetune_config(path, tmp_path)).load_variables(str(path), classes)
    assert "natural order (8, 9, 10 from class 0); torchvision" in capsys.readouterr().err


def test_settings_that_will_probably_fail_are_reported():
    """1,500 images with the published EMA; DeiT-III's learning rate without its optimizer."""

    def warnings(config):
        return Experiment(config, num_classes=10, steps_per_epoch=46).training_warnings()

    config = default.get_config()
    config.epochs, config.optimizer.cooldown_epochs = 30, 0
    (ema,) = warnings(config)
    assert ema.startswith("after all 1380 steps, 95% of the EMA will still be the initial weights")
    config.ema.warmup, config.optimizer.learning_rate = True, 4e-3
    (rate,) = warnings(config)
    assert rate.startswith("optimizer.learning_rate=0.004 often diverges with adamw")
    config.optimizer.name = "lamb"
    assert not warnings(config)
    assert not warnings(finetune.get_config())


def test_an_unknown_kind_of_fine_tuning():
    with pytest.raises(InputError, match="finetune.py:head: the argument after the colon"):
        finetune.get_config("head")


# ---------------------------------------------------------------------------------------- oracle


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "tnt_s_legacy_patch16_224"])
def test_factors_are_timms(name):
    import timm
    import timm.models.tnt
    from timm.optim import param_groups_layer_decay

    from tnt_flax.weights import names as mapping

    network = timm.create_model(name)
    names = {id(p): n for n, p in network.named_parameters()}
    groups = param_groups_layer_decay(network, layer_decay=0.7)
    theirs = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(create_model(name).init, jax.random.key(0), images)["params"]
    ours = {}
    for stacked, scales in named_leaves(layer_scales(shapes, 0.7)).items():
        rows = names_per_block(stacked, named_leaves(shapes)[stacked])
        ours |= dict(zip(rows, np.ravel(scales).tolist(), strict=True))
    compared = {n: (ours[n], theirs[mapping.place_of("timm", n).name]) for n in ours}
    assert len(compared) == len(ours) > 200
    assert {mapping.place_of("timm", n).name for n in ours} == set(theirs)
    for ours_name, (mine, timms) in compared.items():
        assert mine == pytest.approx(timms, rel=1e-6), ours_name
