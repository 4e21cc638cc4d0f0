# SPDX-License-Identifier: Apache-2.0
"""Writes tests/goldens/data/trajectory.npz: 50 steps of training a tiny TNT, as timm does it.

    python tests/goldens/scripts/trajectory.py        (needs torch and timm)

Network, mixed batches, soft targets, loss, parameter groups, AdamW, learning rates and average are
all timm's own. It computes in float64, so that the file is the same on every machine. Weights and
batches are drawn again by whoever reads it; of the tensors it holds norms and a few elements.
"""

import math
import pathlib
import sys
from unittest import mock

import numpy as np

from tests.helpers import timm_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "trajectory.npz"
CLASSES, IMAGE_SIZE, BATCH = 5, 32, 8
EPOCHS, WARMUP, COOLDOWN, STEPS_PER_EPOCH = 7, 2, 3, 5  # 50 steps: warm-up, cosine, cool-down
EMA_DECAY = 0.9  # the published one would stay at the initial weights
# Of the configs that are compared: optimizer, peak, first and last learning rate, weight decay,
# threshold of the binary cross entropy (None: softmax) and label smoothing.
RECIPES = {
    "tnt_s": ("adamw", (1e-3, 1e-6, 1e-5), 0.05, None, 0.1),
    "tnt_s_deit3": ("lamb", (4e-3, 1e-6, 1e-5), 0.05, 0.0, 0.0),
    "tnt_s_a2": ("lamb", (5e-3, 1e-4, 1e-6), 0.02, 0.2, 0.0),
    "tnt_s_muon": ("muon", (1e-3, 1e-6, 1e-5), 0.05, None, 0.1),
}
MUON_MOMENTUM = 0.95
# The batch is two groups: the first is mixed by mixup, the second by cutmix, always the same way.
LAM = 0.6875
BOX = (4, 20, 18, 32)  # top, bottom, left, right
TIMM_FIELDS = dict(
    img_size=IMAGE_SIZE,
    embed_dim=48,
    inner_dim=12,
    num_heads_outer=4,
    num_heads_inner=2,
    depth=2,
    num_classes=CLASSES,
)
OUR_FIELDS = dict(
    outer_dim=48, inner_dim=12, outer_heads=4, inner_heads=2, depth=2, num_classes=CLASSES
)


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """Images uint8 [B, H, W, 3] and labels [B], for every step."""
    random = np.random.RandomState(0)
    labels = random.randint(0, CLASSES, (50, BATCH))
    noise = random.randint(0, 256, (50, BATCH, IMAGE_SIZE, IMAGE_SIZE, 3))
    templates = random.randint(0, 256, (CLASSES, IMAGE_SIZE, IMAGE_SIZE, 3))  # something to learn
    images = (noise + 2 * templates[labels]) // 3
    return list(zip(images.astype(np.uint8), labels.astype(np.int32), strict=True))


def mixed(images: np.ndarray, labels: np.ndarray, smoothing: float = 0.1):
    """Pixels uint8 [B, 3, H, W] and soft targets [B, K], as timm's collate function mixes them."""
    import timm.data.mixup
    import torch

    parts = []
    half = BATCH // 2
    for rows, draw in ((slice(half), (LAM, False)), (slice(half, BATCH), (0.5, True))):
        collate = timm.data.mixup.FastCollateMixup(
            0.8, 1.0, num_classes=CLASSES, label_smoothing=smoothing
        )
        collate._params_per_batch = lambda draw=draw: draw
        chw = images[rows].transpose(0, 3, 1, 2)
        with mock.patch("timm.data.mixup.rand_bbox", lambda *_, **__: BOX):
            parts.append(collate(list(zip(chw, labels[rows].tolist(), strict=True))))
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def make_optimizer(model, name: str, rate: float, weight_decay: float):
    """timm's optimizer. Muon gets the matrices of blocks alone; query and key have one each."""
    import torch
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    if name == "adamw":
        return create_optimizer_v2(model, opt=name, lr=rate, weight_decay=weight_decay, eps=1e-8)

    class QueryAndKey(torch.nn.Module):
        def __init__(self, joined):
            super().__init__()
            halves = joined.weight.detach().chunk(2)
            self.weights = torch.nn.ParameterList([torch.nn.Parameter(x.clone()) for x in halves])

        def forward(self, x):
            return x @ torch.cat(list(self.weights)).T

    for module in list(model.modules()):
        if hasattr(module, "qk"):
            assert module.qk.bias is None
            module.qk = QueryAndKey(module.qk)
    in_blocks = {id(p) for n, p in model.named_parameters() if n.startswith("blocks.")}
    groups, skipped = [], model.no_weight_decay()
    for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=skipped):
        for inside in (True, False):
            params = [p for p in group["params"] if (id(p) in in_blocks) == inside]
            groups.append(group | {"params": params, "use_fallback": not inside})
    return create_optimizer_v2(
        groups,
        opt=name,
        lr=rate,
        weight_decay=weight_decay,
        eps=1e-8,
        momentum=MUON_MOMENTUM,
        betas=(0.9, 0.999),
    )


def joined_queries(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undoes QueryAndKey in a state."""
    first, second = "qk.weights.0", "qk.weights.1"
    return {
        name.replace(first, "qk.weight"): (
            np.concatenate([x, state[name.replace(first, second)]]) if first in name else x
        )
        for name, x in state.items()
        if second not in name
    }


def train(dtype: str = "float64", recipe: str = "tnt_s") -> dict[str, object]:
    """Returns losses and rates [50], final weights and their average as our trees, and shapes."""
    import timm.optim.muon
    import torch
    from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
    from timm.models.tnt import TNT
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEma

    dtype = getattr(torch, dtype)
    name, (rate, warmup_rate, min_rate), weight_decay, threshold, smoothing = RECIPES[recipe]
    newton_schulz = timm.optim.muon.zeropower_via_newtonschulz  # in bfloat16 by default
    newton_schulz.__defaults__ = tuple(
        dtype if x is torch.bfloat16 else x for x in newton_schulz.__defaults__
    )
    model = TNT(**TIMM_FIELDS)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    start = timm_weights.random_state(shapes)
    model.load_state_dict({name: torch.from_numpy(x) for name, x in start.items()}, strict=True)
    model.to(dtype).train()
    optimizer = make_optimizer(model, name, rate, weight_decay)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=EPOCHS,
        cooldown_epochs=COOLDOWN,
        min_lr=min_rate,
        warmup_lr=warmup_rate,
        warmup_epochs=WARMUP,
    )
    assert epochs == EPOCHS + COOLDOWN
    ema = ModelEma(model, decay=EMA_DECAY)
    loss_fn = SoftTargetCrossEntropy()
    if threshold is not None:
        loss_fn = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)
    losses, rates, data = [], [], iter(batches())
    for epoch in range(epochs):
        for _ in range(STEPS_PER_EPOCH):
            images, targets = mixed(*next(data), smoothing)
            loss = loss_fn(model((images.to(dtype) - 127.5) / 127.5), targets.to(dtype))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
            rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1)

    def tree(network):
        state = {name: x.detach().numpy() for name, x in network.state_dict().items()}
        return timm_weights.to_flax(joined_queries(state))

    return {
        "losses": np.array(losses),
        "rates": np.array(rates),
        "shapes": shapes,
        "parameters": tree(model),
        "average": tree(ema.ema),
    }


def probe(tensor: np.ndarray) -> np.ndarray:
    """The norm of a tensor, and at most 16 of its elements, evenly spaced."""
    flat = np.asarray(tensor, np.float64).ravel()
    return np.append(np.linalg.norm(flat), flat[:: math.ceil(flat.size / 16)])


def summary(run: dict) -> dict[str, np.ndarray]:
    """What the file holds of a run. Tensors follow each other as `jax.tree.leaves` has them."""
    import jax

    results = {name: run[name] for name in ("losses", "rates")}
    for tree in ("parameters", "average"):
        results[tree] = np.concatenate([probe(x) for x in jax.tree.leaves(run[tree])])
    results = {name: x.astype(np.float32) for name, x in results.items()}
    lines = [f"{name} {' '.join(map(str, shape))}" for name, shape in run["shapes"].items()]
    return results | {"shapes": np.array(lines)}


def main(path: pathlib.Path = GOLDEN) -> None:
    np.savez_compressed(path, **summary(train()))


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
