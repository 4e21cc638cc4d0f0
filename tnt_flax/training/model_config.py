# SPDX-License-Identifier: Apache-2.0
"""A config whose network is that of some weights, so that one config suits them all."""

from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError
from tnt_flax.models import MODELS, TNT, create_model
from tnt_flax.weights import identify
from tnt_flax.weights.read import read_checkpoint

HEADS = ("inner_heads", "outer_heads", "patch_size")  # which few files store


def with_network(config: ConfigDict, path: str = "", checkpoint: str = "best") -> ConfigDict:
    """`config`; where its `model.name` is empty, a copy that names the network of the weights.

    These are at `path`, by default `config.init_from`. Fields of the model that are set stay.

    Raises:
        InputError: there are no weights to ask; see `convert.checkpoints.read_checkpoint`.
    """
    path = path or config.init_from
    if config.model.name:
        return config
    if not path:
        raise InputError(
            "model.name is empty, which means the network of the weights: set init_from=FILE, or "
            "name one of tnt_flax.list_models()"
        )
    heads = {field: config.model[field] for field in HEADS if config.model[field] is not None}
    found = read_checkpoint(path, checkpoint=checkpoint, put=lambda name, x: None, **heads)
    config = config.copy_and_resolve_references()
    for field, value in describe(found.path, found.network.model).items():
        if field not in config.model:
            raise InputError(f"{found.path} has {field}={value}, which no config can say")
        if field == "name" or config.model[field] is None:
            config.model[field] = value
    return config


def describe(path: str, model: TNT) -> dict:
    """The name of a published network, and the fields in which `model` differs from it.

    Raises:
        InputError: it is of no published lineage, which a config cannot say.
    """
    lineage = identify.lineage_of(model)
    same = [n for n in MODELS if identify.lineage_of(create_model(n)) == lineage]
    if not same:
        raise InputError(f"{path} is a network of no published lineage: set model.name")
    name = identify.name_of(model) or same[0]
    base = create_model(name, num_classes=model.num_classes)
    changed = identify.differences(model, base)
    return {"name": name} | {field: mine for field, (mine, _) in changed.items()}
