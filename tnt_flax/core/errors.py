# SPDX-License-Identifier: Apache-2.0
"""Exceptions, their exit codes, and helpers for messages: one line with what, where, what to do."""

import contextlib
import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence

# Exit codes. Launchers restart the same command after STOPPED and STALLED.
FAILED = 1  # the run failed: a NaN, unavailable data, a full disk, a bug
BAD_INPUT = 2
STOPPED = 42  # stopped by a signal (SIGTERM, Ctrl-C) with the state saved
STALLED = 75  # a hang or a dead process; EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # Ctrl-C without saving: in a command, or the second one in a training run


class InputError(ValueError):
    """Invalid input: a path, a config key, a file, a size. Commands exit with code 2.

    `details` are lines that a command may print below the message, for instance all tensors that
    do not fit where the message names the first five.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = tuple(details)


class RunError(RuntimeError):
    """A failure at run time: a NaN loss, a full disk. Commands exit with code 1."""


class Stopped(RuntimeError):
    """A signal stopped the run; the same command resumes it. Commands exit with code 42."""


def one_line(error: BaseException) -> str:
    """Returns the type and the first line of an error, for use inside another message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def printable(text: str) -> str:
    """Returns `text` as one line: control characters, such as line breaks in names, are escaped."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], text)


def listed(items: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    """Joins the first `limit` items and counts the rest: "a, b and 7 more"."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the closest of `known`; "" if none is similar."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f" (did you mean {by_lower_case[close[0]]!r}?)" if close else ""


# Optional dependencies: the extras of pyproject.toml and the modules of their packages.
EXTRAS = {
    "train": "absl clu fsspec grain matplotlib ml_collections optax orbax pyarrow scipy sklearn "
    "tensorboard tqdm",
    "tfds": "array_record google_crc32c tensorflow_datasets",
    "hub": "huggingface_hub",
    "gcs": "gcsfs",
    "opencv": "cv2",
    "demo": "python_multipart starlette uvicorn",
    "onnx": "onnx onnx_ir onnxruntime",
    "tpu": "libtpu",
    "wandb": "wandb",
    "mlflow": "mlflow sqlalchemy alembic",
    "trackio": "trackio",
    "cuda-compile": "jax_cuda13_plugin",
}


def require_extras(purpose: str, *extras: str) -> None:
    """Raises InputError with what to install unless all packages of `extras` are installed."""
    modules = " ".join(EXTRAS[extra] for extra in extras).split()
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f'{purpose} needs {listed(missing)}: pip install "tnt_flax[{",".join(extras)}]"'
        )


@contextlib.contextmanager
def as_input_error(problem: str) -> Iterator[None]:
    """Turns an OSError, or a ValueError of a parser, into the InputError "`problem`: reason"."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0][:300]
        raise InputError(f"{problem}: {reason}") from None


@contextlib.contextmanager
def as_run_error(problem: str) -> Iterator[None]:
    """Turns an OSError into the RunError "`problem`: reason"."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{problem}: {error.strerror or error}") from error


def print_error(error: BaseException) -> int:
    """Prints an error to stderr, a bug with its traceback, and returns the exit code."""
    with contextlib.suppress(OSError):  # stderr is a closed terminal
        if isinstance(error, Stopped):
            print(f"stopped: {error}", file=sys.stderr, flush=True)
        elif isinstance(error, InputError | RunError):
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
    if isinstance(error, Stopped):
        return STOPPED
    return BAD_INPUT if isinstance(error, InputError) else FAILED
