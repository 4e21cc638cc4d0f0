# SPDX-License-Identifier: Apache-2.0
"""The frame of all commands: list, help, errors and exit codes."""

import subprocess
import sys

import pytest

import tnt_flax
from tnt_flax.__main__ import COMMANDS, load_command, main
from tnt_flax.core.errors import InputError, RunError, Stopped
from tnt_flax.tools import command_line

NAMES = (
    "train eval predict convert export visualize explore demo report describe check-data preview"
)
NAMES = {*NAMES.split(), "compile-check", "selftest"}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed_with_one_line_each(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.startswith("  ")} == NAMES == set(COMMANDS)
    assert len(lines) < 24 and max(map(len, lines)) <= 80


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tnt_flax {tnt_flax.__version__}\n"


@pytest.mark.parametrize(
    "name, message",
    [("trian", " (did you mean 'train'?)"), ("zzz", ": tnt-flax --help lists all commands")],
)
def test_unknown_command(name, message, capsys):
    assert main([name, "--config=x"]) == 2
    out, err = capsys.readouterr()
    assert not out and err == f"error: there is no command {name!r}{message}\n"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_help_fits_a_screen_and_has_an_example(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = load_command(name)[1].format_help()
    assert f"\n    tnt-flax {name}" in text
    lines = text.splitlines()
    assert lines[0].startswith(f"usage: tnt-flax {name}")
    assert len(lines) <= 40 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", sorted(NAMES))
def test_options_are_written_with_hyphens(name):
    for action in load_command(name)[1]._actions:
        assert not any("_" in option for option in action.option_strings)


def test_the_module_is_the_same_program_and_imports_no_library(root):
    command = [sys.executable, "-X", "importtime", "-m", "tnt_flax"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: tnt-flax COMMAND" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tnt_flax.tools.command_line" in imported
    assert not imported & {"jax", "numpy", "flax", "absl", "ml_collections"}


@pytest.mark.parametrize(
    "error, code, line",
    [
        (None, 0, ""),
        (InputError("bad path"), 2, "error: bad path\n"),
        (InputError("bad\npath\t"), 2, "error: bad\\npath\\t\n"),
        (RunError("full disk"), 1, "error: full disk\n"),
        (Stopped("saved step 3"), 42, "stopped: saved step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted: half a file remains\n"),
    ],
)
def test_exit_codes_and_one_line_for_each_error(error, code, line, capsys):
    def command(args):
        if error:
            raise error
        return {"images": 3}

    parser = command_line.Parser("tnt-flax test", "")
    ended = command_line.run(parser, command, [], on_interrupt="half a file remains")
    out, err = capsys.readouterr()
    assert (ended, err) == (code, line)
    assert out == ("" if error else '{"images": 3}\n')


def test_ctrl_c_during_the_imports_is_one_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["describe"]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"


def test_a_failed_result_is_printed_and_exits_with_one(capsys):
    parser = command_line.Parser("tnt-flax test", "")
    command = lambda args: {"passed": False}
    assert command_line.run(parser, command, [], failed=lambda r: not r["passed"]) == 1
    assert capsys.readouterr().out == '{"passed": false}\n'


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--btach-size=3"], "unknown option --btach-size: did you mean --batch-size?"),
        (["--zzz"], "unknown option --zzz; see tnt-flax predict --help"),
        ([], "the following arguments are required: CHECKPOINT, PATH; see tnt-flax predict --help"),
        (["--weights=x"], "argument --weights: invalid choice: 'x'"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    positional = ["weights.pth", "cat.jpg"] if arguments else []
    assert main(["predict", *positional, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
