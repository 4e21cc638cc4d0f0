# SPDX-License-Identifier: Apache-2.0
"""Writes tests/goldens/data/torch/*: files of torch.save for a few tiny objects.

    python tests/goldens/scripts/torch_files.py        (needs torch)

EXPECTED is their content as it must be read, without torch. A `Stub` is any object.
"""

import argparse
import collections
import pathlib
import sys

import ml_dtypes
import numpy as np

from tnt_flax.weights.formats.restricted_pickle import Stub

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "torch"


def ramp(*shape, dtype=np.float32, start=0.0):
    """Small numbers that every float type holds exactly."""
    return (np.arange(np.prod(shape)) / 4 + start).reshape(shape).astype(dtype)


FLAT = {
    "patch_embed.proj.weight": ramp(3, 2, 2, 2),
    "patch_embed.proj.bias": ramp(3, start=7),
    "head.weight": ramp(2, 3, start=-1),
    "bn.num_batches_tracked": np.array(5, np.int64),
}
TENSORS = {
    "float16": ramp(5, dtype=np.float16),
    "float64": ramp(2, 2, dtype=np.float64) / 3,
    "int64": np.array([2**40, -1]),
    "int32": np.array([2**20, -1], np.int32),
    "int16": np.array([2**10, -1], np.int16),
    "int8": np.array([100, -1], np.int8),
    "uint8": np.array([200, 1], np.uint8),
    "bool": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "whole": ramp(2, 5),
    "parameter": ramp(3, start=3),
    "labelled_parameter": ramp(3, start=4),
}
VALUES = {
    "text": "für",
    "numbers": [0, 255, 256, 65536, -1, 2**31, -(2**70), 0.1, float("inf")],
    "rest": (None, True, False, (), [], {}, ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))),
    "by_number": {0: "zero", 1.5: "float", None: "none", True: "true"},
    "many": list(range(200, 500)),
}
ZOO = {
    **TENSORS,
    "bfloat16": ramp(5, dtype=ml_dtypes.bfloat16, start=1),
    "transposed": ramp(2, 3, 4).transpose(2, 0, 1),
    "every_other_row": ramp(6, 2)[1::2],
    "same_storage": ramp(2, 5)[:, 1:3],
    "uint16": Stub,
    "size": Stub,
    "dtype": Stub,
    **VALUES,
}
WEIGHTS = {"weight": ramp(2, 3), "bias": ramp(2, start=1)}
GROUP = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-8, "weight_decay": 0.25, "params": [0, 1]}
TRAINER = {
    "epoch": 3,
    "arch": "tnt_s_patch16_224",
    "state_dict": WEIGHTS,
    "optimizer": {
        "state": {
            i: {"step": np.array(1, np.float32), "exp_avg": g / 2, "exp_avg_sq": g * g / 4}
            for i, g in enumerate(WEIGHTS.values())
        },
        "param_groups": [GROUP],
    },
    "version": 2,
    "args": Stub,
    "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
    "state_dict_ema": {name: x + 1 for name, x in WEIGHTS.items()},
    "metric": Stub,
    "meta": {"best": Stub, "classes": ("a", "b")},
}
EXPECTED = {
    "flat.pth": FLAT,
    "flat_stream.pth": FLAT,
    "zoo.pth": ZOO,
    "zoo_stream.pth": ZOO,
    "trainer.pth.tar": TRAINER,
}


def flat():
    import torch

    state = collections.OrderedDict((name, torch.from_numpy(x)) for name, x in FLAT.items())
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # as in state_dict()
    return state


def zoo():
    import torch

    tensors = {name: torch.from_numpy(np.array(x)) for name, x in TENSORS.items()}
    for name in ("parameter", "labelled_parameter"):
        tensors[name] = torch.nn.Parameter(tensors[name])
    tensors["labelled_parameter"].label = "no_decay"
    special = {
        "bfloat16": torch.from_numpy(ZOO["bfloat16"].astype(np.float32)).bfloat16(),
        "transposed": torch.from_numpy(ramp(2, 3, 4)).permute(2, 0, 1),
        "every_other_row": torch.from_numpy(ramp(6, 2))[1::2],
        "same_storage": tensors["whole"][:, 1:3],
        "uint16": torch.tensor([1], dtype=torch.uint16),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
    }
    return {**tensors, **special, **VALUES}


def trainer():
    import torch

    model = torch.nn.Linear(3, 2)

    def load(content):
        model.load_state_dict({name: torch.from_numpy(x) for name, x in content.items()})
        return collections.OrderedDict((k, v.clone()) for k, v in model.state_dict().items())

    options = {key: value for key, value in GROUP.items() if key != "params"}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for parameter, gradient in zip(model.parameters(), WEIGHTS.values(), strict=True):
        parameter.grad = torch.from_numpy(gradient.copy())
    optimizer.step()
    return TRAINER | {
        "state_dict": load(WEIGHTS),
        "state_dict_ema": load(TRAINER["state_dict_ema"]),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(model="tnt_s_patch16_224", lr=1e-3, mean=(0.5, 0.5, 0.5)),
        "metric": np.float64(73.9),
        "meta": {"best": np.array([71.5, 73.9]), "classes": ("a", "b")},
    }


def main(directory: pathlib.Path = GOLDEN) -> None:
    import torch

    directory.mkdir(exist_ok=True)
    for name in EXPECTED:
        make = next(make for make in (flat, zoo, trainer) if name.startswith(make.__name__))
        torch.save(make(), directory / name, _use_new_zipfile_serialization="stream" not in name)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
