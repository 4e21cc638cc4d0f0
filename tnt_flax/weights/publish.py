# SPDX-License-Identifier: Apache-2.0
"""Folders as the Hugging Face hub and timm keep them, and their upload to the hub."""

import json
import pathlib
import re
import sys
from typing import Any

from tnt_flax.core.errors import InputError, RunError, listed, one_line, require_extras
from tnt_flax.data.transforms import height_width
from tnt_flax.weights import hub, model_card, write
from tnt_flax.weights.model_card import Statements
from tnt_flax.weights.read import LoadedWeights

WEIGHTS, CONFIG = "model.safetensors", "config.json"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def write_folder(folder: pathlib.Path, target: write.ForeignWeights, loaded: LoadedWeights) -> None:
    """Writes config.json and model.safetensors; raises what `write.write` raises.

    Args:
        folder: the new folder.
        target: the weights for timm, from `write.to_framework`.
        loaded: the source of `target`.
    """
    folder.mkdir()
    write.write(folder / WEIGHTS, "timm", target, loaded)
    config = json.dumps(_config(target, loaded), indent=2)
    (folder / CONFIG).write_text(config + "\n")


def write_card(
    folder: pathlib.Path, target: write.ForeignWeights, loaded: LoadedWeights, stated: Statements
) -> None:
    """Writes README.md into the folder of `write_folder`, with the same arguments."""
    facts = write.facts(loaded)
    model_card.write(folder / model_card.FILE, loaded, facts, stated, target.notes)


def _config(target: write.ForeignWeights, loaded: LoadedWeights) -> dict[str, Any]:
    known, arguments = write.facts(loaded), write.timm_arguments(target, loaded)
    for name in ("in_chans", "num_classes"):  # stored elsewhere in the file
        arguments.pop(name)
    config = {
        # Other sizes and variants are TNT-S with other arguments.
        "architecture": loaded.name if loaded.name in hub.HUB else "tnt_s_patch16_224",
        "num_classes": known["num_classes"],
        "num_features": target.model.outer_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [loaded.network.channels, *height_width(known["image_size"])],
            "fixed_input_size": True,
            "interpolation": known["interpolation"],
            "crop_pct": known["crop_fraction"],
            "mean": known["mean"],
            "std": known["std"],
            "first_conv": "pixel_embed.proj",
            "classifier": "head",
        },
    }
    if known["class_names"]:
        config["label_names"] = known["class_names"]
    return config


# ------------------------------------------------------------------------------------ upload


def check_upload(repo: str) -> None:
    """Checks what can be checked before the export.

    Raises:
        InputError: `repo` is not OWNER/NAME, huggingface_hub is not installed, or it has no token.
    """
    if not REPO.fullmatch(repo):
        raise InputError(f"--push={repo}: write OWNER/NAME")
    require_extras("--push", "hub")
    from huggingface_hub import get_token

    if not get_token():
        raise InputError(f"--push={repo}: not logged in: run `hf auth login`, or set HF_TOKEN")


def upload(folder: pathlib.Path, repo: str, *, private: bool = False) -> str:
    """Uploads the files of `folder` in one commit; returns the commit.

    A repository that does not exist is created. In an existing one, files of the same names are
    replaced and others stay. The token is that of huggingface_hub.

    Args:
        folder: the files.
        repo: OWNER/NAME on the hub.
        private: create a private repository, or require that the existing one is private. By
            default, a new repository is as private as its owner's settings say.

    Raises:
        RunError: nothing was pushed; the message has the reason.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    what = listed([path.name for path in files])
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise RunError(
                f"{what} were not pushed: {repo} exists and is public; make it private on its page "
                "or push without --private"
            )
        operations = [huggingface_hub.CommitOperationAdd(path.name, str(path)) for path in files]
        commit = api.create_commit(repo, operations, commit_message="Upload by tnt_flax")
    except RunError:
        raise
    except Exception as error:  # many types, including those of the HTTP client
        raise RunError(f"{what} were not pushed to {repo}: {_explain(error)}") from None
    return commit.oid


def _explain(error: Exception) -> str:
    """Returns the cause of an error and what to do, without the token."""
    from huggingface_hub import get_token

    cause = (type(error) is RuntimeError and error.__cause__) or error  # "Error while uploading"
    message = one_line(cause).replace(get_token() or "\0", "TOKEN")
    if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
        return f"{message}; log in with a token that may write to it: `hf auth login`"
    return f"{message}; push again, which updates what is there"
