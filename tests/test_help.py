"""The --help and --version of every command in bin/, among which are those that the wheel has."""

import importlib
import os
import re
import subprocess
from functools import partial
from typing import Any

import pytest
from checkout import ROOT

from xaiproxy import __version__, console_scripts

COMMANDS = sorted(name for name in os.listdir(ROOT / "bin") if not name.startswith("."))
EXAMPLE = r"  (?:[A-Z_]+=\S+ |nohup )*(?:bin/)?{}(?= ).*"


def run(command: str, *arguments: str) -> str:
    """Return what it prints; there are neither errors nor warnings."""
    environ = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [ROOT / "bin" / command, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_begins_with_examples_and_fits_a_terminal(command: str) -> None:
    text = run(command, "--help")
    examples, usage = text.split("\n\n")[:2]
    for line in examples.split("\n"):
        # Less than a terminal has, since man(1) indents them.
        assert re.fullmatch(EXAMPLE.format(command), line) and len(line) <= 75
    assert re.match(rf"usage: (bin/)?{command}\b", usage)
    assert max(map(len, text.split("\n"))) <= 80


# These patch the standard library for gevent, which the tests' own process must not.
PATCHING = ["xai-proxy", "xai-sandbox"]


@pytest.mark.parametrize(
    "command", [name for name in COMMANDS if not name.startswith("xai-")] + PATCHING
)
def test_every_command_prints_its_version(command: str) -> None:
    assert run(command, "--version") == f"{__version__}\n"


MODULES = [
    each.args[1]
    for each in vars(console_scripts).values()
    if isinstance(each, partial) and each.args[0] not in PATCHING
]


@pytest.mark.parametrize("module", MODULES)
def test_every_parser_has_a_version(module: str, capsys: Any) -> None:
    parser = importlib.import_module(module).parser()
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"{__version__}\n")
