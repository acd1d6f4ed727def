"""bin/soak as a command: what it takes, and that Ctrl-C leaves nothing behind. What it finds takes minutes."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from refresher_process import wait_until

COMMAND = [sys.executable, "-W", "error", "-m", "tests.soak"]
ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("options", [[], ["--login", "0"], ["--login", "x"], ["--nonsense"]], ids=" ".join)
def test_what_cannot_be_run_is_said_in_one_line(options):
    done = subprocess.run([*COMMAND, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 64 and done.stderr.startswith("soak: ") and done.stderr.count("\n") == 1


def of_folder(folder: pathlib.Path) -> "list[str]":
    """The processes that work in it."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            found += [process.name] * os.readlink(process / "cwd").startswith(str(folder))
        except OSError:
            pass  # it has ended
    return found


def test_ctrl_c_ends_all_that_was_started(tmp_path):
    process = subprocess.Popen([*COMMAND, "--login", "1"], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(of_folder(tmp_path)) > 4, 20)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "soak: interrupted\n") and process.returncode == 130
    assert of_folder(tmp_path) == [] and list(tmp_path.iterdir()) == []
