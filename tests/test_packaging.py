# SPDX-License-Identifier: Apache-2.0
"""Dependencies: the core is small and suffices for predictions; the lists agree."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib

import pytest

from tnt_flax.__main__ import main
from tnt_flax.core.errors import EXTRAS, InputError, require_extras


def normalized(requirement):
    """ "Tnt_Flax[x]>=1" is ("tnt-flax", ">=1")."""
    name, bound = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(.*)", requirement).groups()
    return re.sub(r"[-_]+", "-", name).lower(), bound


@pytest.fixture
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def test_core_dependencies_are_few(project):
    assert len(project["dependencies"]) <= 8


def test_requirements_are_those_of_the_package_and_its_training_with_reasons(project, root):
    blocks = [
        block.splitlines()
        for block in re.split(r"\n+(?=#)", (root / "requirements.txt").read_text())
    ]
    listed = {}
    for lines in blocks:
        requirements = [normalized(line) for line in lines if not line.startswith("#")]
        assert lines[0].startswith("# ") and lines[0].endswith((".", ":")) or not requirements
        listed |= dict(requirements)
    extras = project["optional-dependencies"]
    packaged = [*project["dependencies"], *extras["train"], *extras["tfds"], *extras["demo"]]
    assert listed == dict(map(normalized, packaged))


def test_modules_that_extras_are_checked_for_are_those_of_their_packages(project):
    """By the metadata of the installed packages."""
    packages = importlib.metadata.packages_distributions()
    for extra in EXTRAS.keys() - {"gcs", "tpu", "cuda-compile", "mlflow", "trackio"}:
        wanted = {normalized(each)[0] for each in project["optional-dependencies"][extra]}
        found = {normalized(packages[module][0])[0] for module in EXTRAS[extra].split()}
        assert found == wanted, extra


def test_missing_extras_are_one_line(monkeypatch, capsys):
    found = importlib.util.find_spec
    hidden = ("grain", "tqdm", "libtpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x in hidden else found(x))
    with pytest.raises(InputError, match=r'^x needs libtpu: pip install "tnt_flax\[tpu\]"$'):
        require_extras("x", "tpu")
    assert main(["compile-check", "--unknown"]) == 2
    message = 'tnt-flax compile-check needs grain, tqdm: pip install "tnt_flax[train]"'
    assert capsys.readouterr().err == f"error: {message}\n"


# What Windows lacks: modules, and functions of os.
POSIX_MODULES = {"fcntl", "grp", "pwd", "resource", "termios"}
HIDE = """
import importlib.util, os, runpy, sys
for name in ("fork", "geteuid", "getuid", "posix_fadvise", "pread", "sched_getaffinity", "statvfs"):
    delattr(os, name)
modules = set(sys.argv.pop(1).split())
class Hide:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in modules:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide)
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name in modules else found(name, *args)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.slow
def test_core_dependencies_suffice_to_load_convert_and_predict_on_any_platform(root, tmp_path):
    comes_with_flax = {"absl", "optax", "orbax", "fsspec"}
    hidden = set(" ".join(EXTRAS.values()).split()) - comes_with_flax | POSIX_MODULES
    command = [sys.executable, "-c", HIDE, " ".join(hidden), str(root / "tests/installed/core.py")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "error: tnt-flax train needs clu, grain, matplotlib, ml_collections" in done.stderr


def test_lowest_versions_are_the_lower_bounds(root):
    lines = (root / "constraints/lowest.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    bounds = [
        line.replace(">=", "==")
        for line in (root / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert pinned == bounds
