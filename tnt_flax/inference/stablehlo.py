# SPDX-License-Identifier: Apache-2.0
"""Networks as StableHLO: `load_exported` reads the files of `tnt-flax export`.

A file is a zip archive of `program`, serialized by `jax.export`, and `export.json`, its metadata.
JAX guarantees to read a program for six months after its creation.
"""

import dataclasses
import datetime
import json
import pathlib
import zipfile
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from tnt_flax.core.errors import InputError, one_line

PROGRAM, INFO = "program", "export.json"


@dataclasses.dataclass(frozen=True)
class Exported:
    """A network without its code; call it with normalized float32 images, any number B.

    Images are [B, H, W, 3], or [B, 3, H, W] if `info["layout"]` is "nchw".
    """

    program: jax_export.Exported
    info: dict[str, Any]  # image_size, mean, std, crop_fraction, class_names, layout, dtype ...

    def __call__(self, images: Any) -> Any:
        """Returns logits [B, classes], or features [B, D] of a network without a head.

        A network exported with several `--outputs` returns a dictionary of arrays.
        """
        return self.program.call(images)


def load_exported(path: str | pathlib.Path) -> Exported:
    """Loads a network written by `tnt-flax export CHECKPOINT OUT.stablehlo`.

    Raises:
        InputError: the file is missing, damaged, for other platforms, or written by an incompatible
            JAX.
    """
    try:
        with zipfile.ZipFile(path) as file:  # verifies checksums
            info, program = json.loads(file.read(INFO)), file.read(PROGRAM)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or was not written by tnt-flax export ({one_line(error)})"
        ) from None
    try:
        exported = jax_export.deserialize(bytearray(program))
    except Exception as error:  # jax raises various types
        raise InputError(
            f"jax {jax.__version__} cannot read {path}, exported on {info.get('created')} by jax "
            f"{info.get('jax')} ({one_line(error)}): export it again from the weights"
        ) from error
    platform = jax.default_backend()
    platform = {"gpu": "cuda"}.get(platform, platform)
    if platform not in exported.platforms:
        raise InputError(f"{path} is for {', '.join(exported.platforms)}, this is {platform}")
    return Exported(exported, info)


def save_exported(path: pathlib.Path, program: jax_export.Exported, info: dict[str, Any]) -> None:
    """Writes the file. Date, JAX version and platforms are added to `info`."""
    info = info | {
        "created": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "platforms": list(program.platforms),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(INFO, json.dumps(info, indent=1))
        file.writestr(PROGRAM, bytes(program.serialize()))


def trace(
    function: Any, image_shape: tuple[int, ...], platforms: tuple[str, ...]
) -> jax_export.Exported:
    """Exports `function` of images [B, *image_shape] with symbolic B for all `platforms`."""
    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), np.float32)
    return jax_export.export(jax.jit(function), platforms=platforms)(images)
