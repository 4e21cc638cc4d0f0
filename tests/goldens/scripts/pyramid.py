# SPDX-License-Identifier: Apache-2.0
"""Writes tests/goldens/data/pyramid: weights and outputs of the official PyramidTNT, in small.

    python tests/goldens/scripts/pyramid.py SOURCE                             (needs torch, timm)

SOURCE is Efficient-AI-Backbones/tnt_pytorch/pyramid_tnt.py, downloaded beforehand,
of commit e560a12 or later: the one before cannot compute gradients.

tiny.pth.tar  a state dict of it, no value as it was initialized, BatchNorm's statistics included.
expected.npz  for `images()`, computed in float64: the logits and the sentences after every stage in
              evaluation; the loss of one step of training, the statistics after it, and the
              gradients of some parameters.
names.json    SHA-256 of all names and shapes of the four networks in their full size.
"""

import copy
import hashlib
import json
import pathlib
import re
import sys
import zlib

import numpy as np

from tests.goldens.scripts.weights import load_source

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "pyramid"
# One stage is deep enough for a second block with words.
FIELDS = dict(outer_dim=4, inner_dim=2, outer_heads=2, inner_heads=1, depths=(1, 7, 1, 1))
CLASSES, SIZE, BATCHES = 5, 64, 7
LABELS = [1, 4]
GRADIENTS = r"patch_embed|.*_pos|.*merges.0|stages.[03].blocks.0.*(q|kv|proj|linear).weight"
FULL = ("ptnt_ti_patch16_192", "ptnt_s_patch16_256", "ptnt_m_patch16_256", "ptnt_b_patch16_256")


def images() -> np.ndarray:
    return np.random.RandomState(0).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    lines = (f"{name} {list(shape)}\n" for name, shape in sorted(shapes.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Depends on the name alone. Norms stay near 1, what goes through products keeps its size."""
    if name.endswith("num_batches_tracked"):
        return np.array(BATCHES)
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        return 0.5 + np.abs(x)
    if name.endswith("weight"):
        return 1 + 0.3 * x if x.ndim == 1 else x / np.prod(shape[1:]) ** 0.5
    return x if name.endswith("relative_pos") else 0.3 * x


def main() -> None:
    import torch

    source = pathlib.Path(sys.argv[1])
    upstream = load_source(source.parent, source.stem)
    configs = dict(
        depths=list(FIELDS["depths"]),
        outer_dims=[4, 8, 16, 16],
        inner_dims=[2, 4, 8, 8],
        outer_heads=[2, 4, 8, 8],
        inner_heads=[1, 2, 4, 4],
    )
    model = upstream.PyramidTNT(configs=configs, img_size=SIZE, num_classes=CLASSES)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            x.copy_(torch.from_numpy(random_tensor(name, tuple(x.shape))))
    torch.save(model.state_dict(), GOLDEN / "tiny.pth.tar")

    x = torch.from_numpy(images().transpose(0, 3, 1, 2).copy()).double()
    trained = copy.deepcopy(model).double()
    stages, results = [], {}
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: stages.append(output[1]))
    with torch.no_grad():
        results["logits"] = model.double().eval()(x)
    results |= {f"stage_{i}": sentences for i, sentences in enumerate(stages)}
    loss = torch.nn.functional.cross_entropy(trained.train()(x), torch.tensor(LABELS))
    loss.backward()
    results["loss"] = loss.detach()
    kept = [(n, p.grad) for n, p in trained.named_parameters() if re.match(GRADIENTS, n)]
    results |= {f"gradient {name}": gradient for name, gradient in kept}
    results |= {f"after {n}": b for n, b in trained.named_buffers()}
    arrays = {name: x.numpy() for name, x in results.items()}
    arrays = {k: x.astype(np.float32) if x.dtype == np.float64 else x for k, x in arrays.items()}
    np.savez_compressed(GOLDEN / "expected.npz", **arrays)

    shapes = lambda model: {name: tuple(x.shape) for name, x in model.state_dict().items()}
    names = {name: digest(shapes(getattr(upstream, name)())) for name in FULL}
    (GOLDEN / "names.json").write_text(json.dumps(names, indent=1) + "\n")


if __name__ == "__main__":
    main()
