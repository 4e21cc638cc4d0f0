# SPDX-License-Identifier: Apache-2.0
"""Downloads published weights from the Hugging Face hub into its cache.

An address is a name in HUB, or `hf://OWNER/NAME[@REVISION][/FILE]`. REVISION is a branch or a tag
without slashes, a commit hash, or `refs/pr/NUMBER`; without it, the branch main. FILE is a path in
the repository; without it, the first of DEFAULT_FILES that the repository has. `address_of` knows
other forms. The files of `inputs.DESCRIPTIONS` in the same folder are downloaded too.
"""

import dataclasses
import errno
import pathlib
import re

from tnt_flax.core.errors import InputError, one_line
from tnt_flax.models import MODELS
from tnt_flax.weights.inputs import DESCRIPTIONS

HUB = {  # our name -> repository of its weights; the other models have none
    "tnt_b_patch16_224": "timm/tnt_b_patch16_224.in1k",
    "tnt_s_legacy_patch16_224": "timm/tnt_s_legacy_patch16_224.in1k",
    "tnt_s_patch16_224": "timm/tnt_s_patch16_224.in1k",
}
LOCAL = "local-dir:"  # timm's name for a folder
DEFAULT_FILES = ("model.safetensors", "pytorch_model.bin")
GRAMMAR = "hf://OWNER/NAME[@REVISION][/FILE]"
ADDRESS = re.compile(
    r"hf://([\w.-]+/[\w.-]+)(?:@(refs/pr/\d+|\w[\w.+-]*))?((?:/(?!\.\.?(?:/|$))[^/\\\s]+)*)",
    re.ASCII,
)
# Addresses as timm's users and the hub's web pages write them.
HUB_PREFIXES = ("hf-hub:", "hf_hub:")
WEB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/([^/?]+)(/[^?]+?)?)?/?(?:\?.*)?"
)
OF_TIMM = re.compile(rf"timm/[\w.-]*tnt[\w.-]*|(?:{'|'.join(MODELS)})\.[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Fetched:
    path: pathlib.Path  # in the shared cache: read only
    address: str  # in full: hf://OWNER/NAME@REVISION/FILE
    notes: list[str]  # the commit; what could not be fetched


def address_of(text: str) -> str | None:
    """Returns the address that `text` means: a name in HUB or hf://..., or None for a path.

    Raises:
        InputError: `text` is a network without published weights, or of another server.
    """
    if text.startswith("hf://") or text in HUB:
        return text
    if text in MODELS:
        known = f"{', '.join(HUB)} or {GRAMMAR}"
        raise InputError(f"no weights of {text!r} are published: use {known}")
    if page := WEB_PAGE.fullmatch(text):
        return f"hf://{page[1]}@{page[2] or 'main'}{page[3] or ''}"
    for prefix in HUB_PREFIXES:
        if text.startswith(prefix):
            return f"hf://{text.removeprefix(prefix)}"
    if OF_TIMM.fullmatch(text):
        return f"hf://timm/{text.removeprefix('timm/')}"
    if re.match(r"\w+://", text):
        raise InputError(f"cannot read {text}: download the file and give its path, or {GRAMMAR}")
    return None


def fetch(address: str) -> Fetched:
    """Downloads a file and the JSON files beside it unless they are cached.

    Cached files are also found without a network.

    Raises:
        InputError: the address is invalid, or the file is neither on the hub nor in the cache.
    """
    match = ADDRESS.fullmatch(f"hf://{HUB[address]}" if address in HUB else address)
    if match is None:
        raise InputError(f"{address!r} is not a valid address: write {GRAMMAR}")
    repo, revision, file = match[1], match[2] or "main", match[3].removeprefix("/")
    try:
        file, path = _download(repo, revision, (file,) if file else DEFAULT_FILES)
        commit = path.parents[file.count("/")].name  # .../snapshots/COMMIT/FILE
        missing = _download_descriptions(repo, commit, file.rpartition("/")[0])
    except Exception as error:  # many types, including those of the HTTP client
        raise InputError(f"cannot fetch {address}: {_explain(error, repo)}") from error
    notes = [f"fetched revision {commit}"]
    if missing:
        notes.append(f"warning: {missing} is not in the cache, and the server does not respond")
    return Fetched(path, f"hf://{repo}@{revision}/{file}", notes)


def _download_descriptions(repo: str, commit: str, folder: str) -> str | None:
    """Downloads the files of DESCRIPTIONS that are there; returns the first that may be."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    for name in DESCRIPTIONS:
        file = f"{folder}/{name}".lstrip("/")
        if try_to_load_from_cache(repo, file, revision=commit) is None:  # not known to be absent
            try:
                hf_hub_download(repo, file, revision=commit)
            except errors.LocalEntryNotFoundError:
                return file
            except errors.EntryNotFoundError:
                pass
    return None


def _download(repo: str, revision: str, files: tuple[str, ...]) -> tuple[str, pathlib.Path]:
    """Returns the first of `files` that exists, and its path in the cache."""
    from huggingface_hub import constants, errors, hf_hub_download

    if constants.HF_HUB_CACHE.startswith("~"):
        raise FileNotFoundError("there is no home folder: set HF_HOME to a writable folder")
    failure: Exception | None = None
    for file in files:
        # If the server does not respond, only search the cache: a retry takes 20 seconds.
        offline = isinstance(failure, errors.LocalEntryNotFoundError)
        try:
            path = hf_hub_download(repo, file, revision=revision, local_files_only=offline)
            return file, pathlib.Path(path)
        except errors.EntryNotFoundError as error:
            failure = failure if offline else error
    raise failure


def _explain(error: Exception, repo: str) -> str:
    """Returns the cause of an error and what to do."""
    if isinstance(error, ImportError):
        return 'huggingface_hub is not installed: pip install "tnt_flax[hub]"'
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    by_hand = f"try again, or download the file by hand from {page} and give its path"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "the disk of the cache is full; make room, or set HF_HOME to a folder elsewhere"
    for kind, text in {  # a class comes before its bases
        errors.HFValidationError: f"{one_line(error)}; write {GRAMMAR}",
        errors.GatedRepoError: f"it is gated; accept its terms at {page} and run `hf auth login`",
        errors.RepositoryNotFoundError: "no such repository, or a private one; "
        "check OWNER/NAME, or run `hf auth login`",
        errors.RevisionNotFoundError: f"no such revision; see the branches at {page}",
        errors.LocalEntryNotFoundError: "not in the cache, and the server does not respond "
        f"({one_line(error.__cause__ or error)}); {by_hand}",
        errors.EntryNotFoundError: "no such file "
        f"(without /FILE it is {' or '.join(DEFAULT_FILES)}); see {page}",
    }.items():
        if isinstance(error, kind):
            return text
    return f"the download failed ({one_line(error)}); {by_hand}"
