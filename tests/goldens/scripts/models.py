# SPDX-License-Identifier: Apache-2.0
"""Writes tests/goldens/data/tnt_*.npz: what timm's TNT computes on two tiny networks.

    python tests/goldens/scripts/models.py        (needs torch and timm)

Weights and images are drawn again from their names by whoever reads the files, so only results are
stored. They are computed in float64 and rounded, so that they are the same on every machine.
"""

import pathlib
import sys

import numpy as np

from tests.helpers import timm_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "data"
IMAGE_SHAPE = (2, 32, 48, 3)  # not square, so that a swap of the sides shows
LABELS = (1, 3)
TIMM_FIELDS = dict(
    img_size=IMAGE_SHAPE[1:3],
    embed_dim=18,
    inner_dim=6,
    num_heads_outer=3,
    num_heads_inner=2,
    depth=2,
    num_classes=5,
)
OUR_FIELDS = dict(outer_dim=18, inner_dim=6, outer_heads=3, inner_heads=2, depth=2, num_classes=5)


def images() -> np.ndarray:
    return np.random.RandomState(0).standard_normal(IMAGE_SHAPE).astype(np.float32)


def compute(legacy: bool) -> dict[str, np.ndarray]:
    """Logits, loss, what every block returns, and the loss's gradient for every tensor."""
    import torch
    from timm.models.tnt import TNT

    model = TNT(**TIMM_FIELDS, legacy=legacy).double().eval()
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    weights = timm_weights.random_state(shapes)
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()}, strict=True)

    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logits = model(torch.from_numpy(images().transpose(0, 3, 1, 2)).double())
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS))
    loss.backward()

    results = {"logits": logits, "loss": loss}
    for i, (words, sentences) in enumerate(outputs):
        results |= {f"words_{i}": words, f"sentences_{i}": sentences}
    results |= {f"gradient {name}": p.grad for name, p in model.named_parameters()}
    return {name: x.detach().numpy().astype(np.float32) for name, x in results.items()}


def main(directory: pathlib.Path = GOLDEN) -> None:
    for variant in ("official", "legacy"):
        np.savez_compressed(directory / f"tnt_{variant}.npz", **compute(variant == "legacy"))


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
