# SPDX-License-Identifier: Apache-2.0
"""Networks as StableHLO, exported by `tools.export`: the file, and `load_exported`.

A file is a zip of `program`, what `jax.export` serialized, and `export.json`, what has to be known
about it. JAX promises that programs can be read for six months, so each carries its date and the
day it expires.
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

LIFETIME = datetime.timedelta(days=180)  # JAX's promise of compatibility
PROGRAM, INFO = "program", "export.json"


@dataclasses.dataclass(frozen=True)
class Exported:
    """A network without its code: call it with images (B, H, W, 3), any B, normalized float32."""

    program: jax_export.Exported
    info: dict[str, Any]  # image_size, mean, std, crop_fraction, class_names, created, expires ...

    def __call__(self, images: Any) -> jax.Array:
        """Logits (B, classes), or features (B, D) of a network without a head."""
        return self.program.call(images)


def load_exported(path: str | pathlib.Path) -> Exported:
    """Loads what `python -m tnt_flax.tools.export CHECKPOINT OUT.stablehlo` has written.

    Raises:
        InputError: it is missing, damaged, expired, for other platforms, or of a JAX that this one
            cannot read.
    """
    try:
        with zipfile.ZipFile(path) as file:  # its checksums find damage
            info, program = json.loads(file.read(INFO)), file.read(PROGRAM)
        expires = datetime.date.fromisoformat(info["expires"])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is no file of tnt_flax.tools.export, or damaged ({one_line(error)})"
        ) from None
    if datetime.date.today() > expires:
        raise InputError(
            f"{path} was exported on {info['created']} by jax {info['jax']} and expired on "
            f"{info['expires']}: export it again from the weights"
        )
    try:
        exported = jax_export.deserialize(bytearray(program))
    except Exception as error:  # whatever jax makes of a program of another version
        raise InputError(
            f"jax {jax.__version__} cannot read {path}, exported by jax {info['jax']} "
            f"({one_line(error)}): export it again from the weights"
        ) from error
    platform = jax.default_backend()
    platform = {"gpu": "cuda"}.get(platform, platform)
    if platform not in exported.platforms:
        raise InputError(f"{path} is for {', '.join(exported.platforms)}, this is {platform}")
    return Exported(exported, info)


def save_exported(path: pathlib.Path, program: jax_export.Exported, info: dict[str, Any]) -> None:
    """Writes the file. `info` gets the date, the day of expiry and the version of JAX."""
    today = datetime.date.today()
    info = info | {
        "created": today.isoformat(),
        "expires": (today + LIFETIME).isoformat(),
        "jax": jax.__version__,
        "platforms": list(program.platforms),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(INFO, json.dumps(info, indent=1))
        file.writestr(PROGRAM, bytes(program.serialize()))


def trace(function: Any, image_size: int, platforms: tuple[str, ...]) -> jax_export.Exported:
    """`function` of images (B, S, S, 3) with B left open, for all `platforms` at once."""
    (batch,) = jax_export.symbolic_shape("batch")
    shape = (batch, image_size, image_size, 3)
    images = jax.ShapeDtypeStruct(shape, np.float32)
    return jax_export.export(jax.jit(function), platforms=platforms)(images)
