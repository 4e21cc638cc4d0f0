# SPDX-License-Identifier: Apache-2.0
"""Writes tests/goldens/data/torch/*: what torch.save makes of a few tiny objects.

    python tests/goldens/scripts/torch_files.py        (needs torch)

What must be read from them is in EXPECTED, which needs no torch.
"""

import argparse
import collections
import pathlib
import sys

import ml_dtypes
import numpy as np

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
ZOO = {
    "float16": ramp(5, dtype=np.float16),
    "bfloat16": ramp(5, dtype=ml_dtypes.bfloat16, start=1),
    "float64": ramp(2, 2, dtype=np.float64) / 3,
    "int64": np.array([2**40, -1]),
    "int32": np.array([2**20, -1], np.int32),
    "int16": np.array([2**10, -1], np.int16),
    "int8": np.array([100, -1], np.int8),
    "uint8": np.array([200, 1], np.uint8),
    "uint16": np.array([2**15, 1], np.uint16),
    "uint32": np.array([2**31, 1], np.uint32),
    "uint64": np.array([2**60, 1], np.uint64),
    "bool": np.array([True, False, True]),
    "transposed": ramp(2, 3, 4).transpose(2, 0, 1),
    "every_other_row": ramp(6, 2)[1::2],
    "last_of_it": np.array(1.25, np.float32),
    "whole": ramp(2, 5),
    "same_storage": ramp(2, 5)[:, 1:3],
    "parameter": ramp(3, start=3),
    "labelled_parameter": ramp(3, start=4),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "size": (2, 3),
    "device": "cpu",
    "dtype": "bfloat16",
    "numpy_scalar": np.float32(1.5),
    "numpy_bool": np.bool_(True),
    "numpy_array": np.arange(6).reshape(2, 3) - 3,
    "numpy_empty": np.zeros((0, 2)),
    "numpy_fortran": np.asfortranarray(ramp(2, 3)),
    "numpy_big_endian": ramp(3, dtype=">f4"),
    "numpy_dtype": "float32",
    "bytes": b"\x00\xff",
    "text": "für",
    "numbers": [0, 255, 256, 65536, -1, 2**31, -(2**70), 0.1, float("inf")],
    "rest": (None, True, False, (), [], {}, ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))),
    "by_number": {0: "zero", 1.5: "float", None: "none", True: "true"},
    "many": list(range(200, 500)),
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
    "args": {"model": "tnt_s_patch16_224", "lr": 1e-3, "opt_betas": None, "mean": (0.5, 0.5, 0.5)},
    "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
    "state_dict_ema": {name: x + 1 for name, x in WEIGHTS.items()},
    "metric": np.float64(73.9),
    "meta": {"best": np.array([71.5, 73.9]), "classes": ("a", "b")},
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
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # as state_dict() returns it
    return state


def zoo():
    import torch

    objects = dict(ZOO)
    for name in list(objects)[: list(objects).index("size")]:
        if name == "bfloat16":
            objects[name] = torch.from_numpy(ZOO[name].astype(np.float32)).bfloat16()
        else:
            objects[name] = torch.from_numpy(np.array(ZOO[name]))
    objects["transposed"] = torch.from_numpy(ramp(2, 3, 4)).permute(2, 0, 1)
    objects["every_other_row"] = torch.from_numpy(ramp(6, 2))[1::2]
    objects["last_of_it"] = torch.from_numpy(ramp(6))[-1]
    objects["same_storage"] = objects["whole"][:, 1:3]
    for name in ("parameter", "labelled_parameter"):
        objects[name] = torch.nn.Parameter(objects[name])
    objects["labelled_parameter"].label = "no_decay"
    special = {
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "numpy_dtype": np.dtype(np.float32),
    }
    return objects | special


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
    content = {
        "state_dict": load(WEIGHTS),
        "state_dict_ema": load(TRAINER["state_dict_ema"]),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(**TRAINER["args"]),
    }
    return {key: content.get(key, value) for key, value in TRAINER.items()}


def main(directory: pathlib.Path = GOLDEN) -> None:
    import torch

    directory.mkdir(exist_ok=True)
    for name in EXPECTED:
        make = next(make for make in (flat, zoo, trainer) if name.startswith(make.__name__))
        torch.save(make(), directory / name, _use_new_zipfile_serialization="stream" not in name)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
