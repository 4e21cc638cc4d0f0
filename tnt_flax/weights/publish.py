# SPDX-License-Identifier: Apache-2.0
"""Folders as the Hugging Face hub and timm keep them: weights, config.json and a model card.

The facts of the model card (README.md) come from the weights, from the run that trained them, and
from the caller. Where none of them states a fact, the card says that it is unknown.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from tnt_flax.core.errors import InputError, RunError, listed, one_line, require_extras
from tnt_flax.data.labels import readable_names
from tnt_flax.data.transforms import height_width
from tnt_flax.weights import hub, write
from tnt_flax.weights.read import LoadedWeights

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # identifiers of the hub: apache-2.0, cc-by-4.0
UNKNOWN = "unknown"  # also the hub's identifier of an unknown license
METRICS = {  # of `training.evaluate` -> heading
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean of the classes' top-1 accuracies",
    "mean_average_precision": "mean average precision",
    "loss": "loss",
    "ece": "expected calibration error",
    "images": "images",
}
SOURCES = {"digits": "handwritten digits of scikit-learn (load_digits)"}
CITATIONS = """\
@inproceedings{han2021transformer,
  title = {Transformer in Transformer},
  author = {Han, Kai and Xiao, An and Wu, Enhua and Guo, Jianyuan and Xu, Chunjing and Wang, Yunhe},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {34},
  year = {2021},
  note = {arXiv:2103.00112}
}
@article{han2022pyramidtnt,
  title = {PyramidTNT: Improved Transformer-in-Transformer Baselines with Pyramid Architecture},
  author = {Han, Kai and Guo, Jianyuan and Tang, Yehui and Wang, Yunhe},
  journal = {arXiv preprint arXiv:2201.00978},
  year = {2022}
}"""


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


# ------------------------------------------------------------------------------------ model card


@dataclasses.dataclass(frozen=True)
class Statements:
    """What a card states beyond the weights; None is unknown."""

    license: str | None = None  # the hub's identifier
    licensed_by: str = ""  # who states the license
    data: str | None = None  # name of the evaluation data
    metrics: Mapping[str, float] | None = None  # on them
    repo: str | None = None  # OWNER/NAME on the hub


def check_license(identifier: str) -> str:
    """Returns `identifier`; raises InputError unless it has the form of the hub's identifiers."""
    if not LICENSE.fullmatch(identifier):
        raise InputError(
            f"{identifier!r} is not an identifier of a license, such as apache-2.0 or cc-by-nc-4.0"
        )
    return identifier


def license_of(source: str) -> str | None:
    """Returns the license in the model card beside weights, or None if none is stated.

    Args:
        source: path of a file, or an hf:// address, whose card is downloaded.
    """
    match = hub.ADDRESS.fullmatch(source)
    card = match[1] if match else pathlib.Path(source).parent / CARD
    if not match and not card.is_file():
        return None
    try:
        from huggingface_hub import ModelCard

        found = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except Exception:  # no package, no network, no card, no YAML: the license is unknown
        return None
    known = isinstance(found, str) and LICENSE.fullmatch(found) and found != UNKNOWN
    return found if known else None


def data_name(data: Mapping[str, Any], split: str) -> str:
    """Returns the name of a data set for the card, without folders of this machine.

    Args:
        data: `config.data`.
        split: the split that was used.
    """
    folder = pathlib.PurePath(str(data.get("root") or "")).name
    name = data.get("name") or folder or data.get("source") or UNKNOWN
    return f"{SOURCES.get(data.get('source'), name)}, split {split}"


def write_card(
    folder: pathlib.Path, target: write.ForeignWeights, loaded: LoadedWeights, stated: Statements
) -> None:
    """Writes README.md into the folder of `write_folder`, with the same arguments.

    `stated` is what the card states beyond the weights.
    """
    facts = write.facts(loaded)
    name = stated.repo.partition("/")[2] if stated.repo else facts["network"]
    metadata = _metadata(name, stated)
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    notes = "".join(f"\n- {note}" for note in target.notes)
    sections = {
        "Model": _table(_model_rows(loaded, facts, stated)) + notes,
        "Preprocessing": _preprocessing(facts),
        "Evaluation": _evaluation(stated),
        "Use": _usage(stated.repo, facts),
        "Labels": _labels(facts),
        "Citation": f"```bibtex\n{CITATIONS}\n```",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    summary = (
        "An image classifier" if facts["num_classes"] else "A network without a head, for features"
    )
    (folder / CARD).write_text(
        f"---\n{header}\n---\n# {name}\n\n{summary}: Transformer in Transformer "
        f"([paper](https://arxiv.org/abs/2103.00112)). Written by tnt_flax.\n\n{body}\n",
        encoding="utf-8",
    )


def _metadata(name: str, stated: Statements) -> dict[str, Any]:
    """Returns the YAML at the top. JSON values are YAML."""
    task = "image-classification"
    metadata: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": task,
        "tags": [task, "timm", "transformer-in-transformer", "tnt_flax"],
        "license": stated.license or UNKNOWN,
    }
    if stated.metrics and "top1" in stated.metrics:
        metadata["metrics"] = ["accuracy"]
        result = {
            "task": {"type": task},
            "dataset": {"type": _slug(stated.data), "name": stated.data},
            "metrics": [{"type": "accuracy", "name": "top-1", "value": stated.metrics["top1"]}],
        }
        metadata["model-index"] = [{"name": name, "results": [result]}]
    return metadata


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _model_rows(
    loaded: LoadedWeights, facts: Mapping[str, Any], stated: Statements
) -> dict[str, str]:
    model, config = loaded.network.model, loaded.info.get("config") or {}
    address = loaded.path if loaded.path.startswith("hf://") else pathlib.PurePath(loaded.path).name
    # The name of a checkpoint of a run is its step.
    origin = "" if address.isdecimal() else f"`{address}`, {loaded.naming} names, "
    origin += loaded.file_format
    which = {"ema": ", EMA weights", "raw": ", raw weights", None: ""}[loaded.weights]
    data, training = config.get("data") or {}, f"{UNKNOWN}: not stored with the weights"
    if data.get("source"):
        start = config.get("init_from")
        begun = f", from `{start if '://' in start else pathlib.PurePath(start).name}`"
        training = data_name(data, data.get("train_split", "train"))
        training += f"; {config.get('epochs')} epochs" + (begun if start else "")
    height, width = height_width(facts["image_size"])
    return {
        "network": f"{loaded.name or 'TNT of an unpublished size'}, the {facts['variant']} variant",
        "parameters": f"{loaded.num_params:,}",
        "blocks": f"{model.depth}",
        "widths": f"{model.outer_dim} of sentences, {model.inner_dim} of words",
        "images": f"{height}x{width} pixels, RGB",
        "output": f"{facts['num_classes']} classes"
        if facts["num_classes"]
        else f"{model.num_features} features",
        "weights from": origin + which,
        "training data": training,
        "license": f"{stated.license}, as stated by {stated.licensed_by}"
        if stated.license
        else f"{UNKNOWN}: the source of the weights states none",
    }


def _table(rows: Mapping[str, Any], head: tuple[str, str] = ("", "")) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items())])


def _preprocessing(facts: Mapping[str, Any]) -> str:
    height, width = height_width(facts["image_size"])
    return (
        f"Resize the shorter side to {height} / {facts['crop_fraction']:.4g} pixels "
        f"({facts['interpolation']}), cut out the center of {height}x{width} pixels, scale to "
        f"[0, 1], subtract the mean {tuple(facts['mean'])} and divide by the standard "
        f"deviation {tuple(facts['std'])}."
    )


def _evaluation(stated: Statements) -> str:
    if not stated.metrics:
        return "Unknown: these weights were not evaluated when they were exported."
    rows = {text: stated.metrics[key] for key, text in METRICS.items() if key in stated.metrics}
    rows = {k: f"{x:.4f}" if isinstance(x, float) else f"{x:,}" for k, x in rows.items()}
    return _table(rows, (f"on {stated.data}", ""))


def _usage(repo: str | None, facts: Mapping[str, Any]) -> str:
    timm_name, ours = (f"hf-hub:{repo}", f"hf://{repo}") if repo else ("local-dir:FOLDER", "FOLDER")
    classify = f'\nclasses = tnt_flax.load_classifier("{ours}").predict("image.jpg")'
    return f"""```python
import timm

model = timm.create_model("{timm_name}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
```

```python
import tnt_flax

model, variables = tnt_flax.load("{ours}"){classify if facts["num_classes"] else ""}
```"""


def _labels(facts: Mapping[str, Any]) -> str:
    names = facts["class_names"]
    if not facts["num_classes"]:
        return "None: the network has no head."
    if not names:
        return f"{UNKNOWN.capitalize()}: the weights store no names of the classes."
    readable = readable_names(names)
    rows = {
        i: _cell(name if name == shown else f"{name}: {shown}")
        for i, (name, shown) in enumerate(zip(names, readable, strict=True))
    }
    table = _table(rows, ("class", "name"))
    return f"<details><summary>{len(names)} classes</summary>\n\n{table}\n\n</details>"


def _cell(text: str) -> str:
    """Returns `text` for a cell of a table: no Markdown or HTML of a class name takes effect."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~-])", r"\\\1", text)


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
