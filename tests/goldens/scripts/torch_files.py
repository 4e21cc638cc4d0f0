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
PLAIN = {
    "float16": ramp(5, dtype=np.float16),
    "float64": ramp(2, 2, dtype=np.float64) / 3,
    "integers": [np.array([100, -1], x) for x in (np.int64, np.int32, np.int16, np.int8)],
    "uint8": np.array([200, 1], np.uint8),
    "bool": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "whole": ramp(2, 5),
    "text": "für",
    "numbers": [0, 255, 256, 65536, -1, 2**31, -(2**70), 0.1, float("inf")],
    "rest": [None, True, False, (), [], {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "by_number": {0: "zero", 1.5: "float", None: "none", True: "true"},
    "many": list(range(200, 500)),
}
ZOO = PLAIN | {
    "bfloat16": ramp(5, dtype=ml_dtypes.bfloat16, start=1),
    "transposed": ramp(2, 3, 4).transpose(2, 0, 1),
    "every_other_row": ramp(6, 2)[1::2],
    "same_storage": ramp(2, 5)[:, 1:3],
    "parameter": ramp(3, start=3),
    "labelled_parameter": ramp(3, start=3),
    "uint16": np.array([1], np.uint16),
    "size": Stub,
    "dtype": Stub,
}
WEIGHTS = {"weight": ramp(2, 3), "bias": ramp(2, start=1)}
MOMENTS = {"step": np.array(1, np.float32), "exp_avg": ramp(2, 3), "exp_avg_sq": ramp(2, 3)}
TRAINER = {
    "epoch": 3,
    "arch": "tnt_s_patch16_224",
    "state_dict": WEIGHTS,
    "optimizer": {
        "state": {0: MOMENTS, 1: MOMENTS},
        "param_groups": [{"lr": 0.5, "betas": (0.5, 0.75), "fused": None, "params": [0, 1]}],
    },
    "amp_scaler": {"scale": 65536.0, "_growth_tracker": 0},
    "state_dict_ema": {name: x + 1 for name, x in WEIGHTS.items()},
    "args": Stub,
    "metric": Stub,
    "best": Stub,
}
EXPECTED = {
    "flat.pth": FLAT,
    "flat_stream.pth": FLAT,
    "zoo.pth": ZOO,
    "zoo_stream.pth": ZOO,
    "trainer.pth.tar": TRAINER,
}


def to_torch(value):
    import torch

    if isinstance(value, dict):
        return {key: to_torch(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_torch(item) for item in value]
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def flat():
    state = collections.OrderedDict(to_torch(FLAT))
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # as in state_dict()
    return state


def zoo():
    import torch

    content = to_torch(PLAIN)
    parameter, labelled = (torch.nn.Parameter(to_torch(ZOO["parameter"])) for _ in range(2))
    labelled.label = "no_decay"
    return content | {
        "bfloat16": to_torch(ZOO["bfloat16"].astype(np.float32)).bfloat16(),
        "transposed": to_torch(ramp(2, 3, 4)).permute(2, 0, 1),
        "every_other_row": to_torch(ramp(6, 2))[1::2],
        "same_storage": content["whole"][:, 1:3],
        "parameter": parameter,
        "labelled_parameter": labelled,
        "uint16": torch.tensor([1], dtype=torch.uint16),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
    }


def trainer():
    args = argparse.Namespace(model="tnt_s_patch16_224", lr=1e-3)
    return to_torch(TRAINER) | dict(args=args, metric=np.float64(73.9), best=np.array([71.5, 73.9]))


def main(directory: pathlib.Path = GOLDEN) -> None:
    import torch

    for name in EXPECTED:
        make = next(make for make in (flat, zoo, trainer) if name.startswith(make.__name__))
        torch.save(make(), directory / name, _use_new_zipfile_serialization="stream" not in name)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
