# SPDX-License-Identifier: Apache-2.0
"""Compares a network with timm's on the same images, after every part.

Imports torch and timm on first use.
"""

from typing import Any

import jax
import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.models import TNT, block_outputs
from tnt_flax.weights import names, write
from tnt_flax.weights.read import LoadedWeights
from tnt_flax.weights.write import timm_arguments

IMAGES = 2


def compare_with_timm(found: LoadedWeights) -> dict[str, float]:
    """Returns the largest differences after the stem, each block and the head, in float32.

    Raises:
        InputError: torch or timm is not installed, or timm has no such network.
    """
    try:
        import timm.models.tnt
        import torch
    except ImportError as error:
        raise InputError(f"--against=timm needs torch and timm: {error}") from error
    target = write.to_framework(found, "timm")
    arguments = timm_arguments(target, found)
    side = arguments["img_size"]
    shape = (IMAGES, side, side, found.network.channels)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)

    network = timm.models.tnt.TNT(**arguments).eval()
    state = {n: torch.from_numpy(x) for n, x in names.export("timm", target.params)}
    network.load_state_dict(state, strict=True)
    theirs = _trace_timm(torch, network, images)
    ours = _trace(found.network.model, {"params": found.params}, images)
    return {place: float(np.abs(ours[place] - x).max()) for place, x in theirs.items()}


def _trace_timm(torch: Any, network: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    trace = {}

    def record(place):
        return lambda module, inputs, output: trace.update({place: output})

    network.pixel_embed.register_forward_hook(record("stem words"))
    network.norm2_proj.register_forward_hook(record("stem sentences"))
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(record(f"block {i}"))
    with torch.no_grad():
        trace["head"] = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    blocks = {place: x for place, x in trace.items() if place.startswith("block")}
    parts = {place: x for place, x in trace.items() if place not in blocks}
    for place, (words, sentences) in blocks.items():
        parts |= {f"{place} words": words, f"{place} sentences": sentences}
    head = parts.pop("head")
    return {place: x.numpy() for place, x in (parts | {"head": head}).items()}


def _trace(model: TNT, variables: dict[str, Any], images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the outputs of the same parts in timm's shapes: words [B * N, M, C]."""

    @jax.jit
    def run(variables, images):
        stem = lambda module, method: module.path in (("word_embed",), ("proj",))
        logits, state = model.apply(
            variables, images, capture_intermediates=stem, mutable=["intermediates"]
        )
        found = state["intermediates"]
        words = found["word_embed"]["__call__"][0] + variables["params"]["word_pos"][:, None]
        blocks = block_outputs(model, variables, images)
        return logits, words, found["proj"]["__call__"][0], blocks

    with jax.default_matmul_precision("highest"):
        logits, words, sentences, blocks = jax.device_get(run(variables, images))
    trace = {"stem words": words, "stem sentences": sentences, "head": logits}
    for i, block in enumerate(blocks):
        trace |= {f"block {i} words": block["words"], f"block {i} sentences": block["sentences"]}
    return {
        place: x.reshape(-1, *x.shape[2:]) if place.endswith("words") else x
        for place, x in trace.items()
    }
