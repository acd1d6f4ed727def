"""bin/soak as a command: its options, and that Ctrl-C ends all that it started.

Its findings take minutes.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
from checkout import ROOT
from refresher_process import wait_until

from tests.soak import crowds, held, restarts, shortage
from tests.soak.loaded import Counts, Load

COMMAND = [sys.executable, "-W", "error", "-m", "tests.soak"]


@pytest.mark.parametrize(
    "options",
    [[], ["--login", "0"], ["--login", "x"], ["--load", "0"], ["--cluster", "0"], ["--nonsense"]],
    ids=" ".join,
)
def test_bad_usage_is_one_line(options):
    done = subprocess.run([*COMMAND, *options], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 64
        and done.stderr.startswith("bin/soak: ")
        and done.stderr.count("\n") == 1
    )


def test_without_an_api_server_the_cluster_is_refused_in_one_line():
    done = subprocess.run(
        [*COMMAND, "--cluster", "1"],
        cwd=ROOT,
        # Without etcd.
        env={**os.environ, "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (69, "")
    assert re.fullmatch(r"soak: .*/shared/kube or etcd .* is not installed\n", done.stdout)


def of_folder(folder: pathlib.Path) -> list[str]:
    """The processes that work in `folder`."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        # OSError: the process has ended.
        with contextlib.suppress(OSError):
            found += [process.name] * os.readlink(process / "cwd").startswith(str(folder))
    return found


def test_ctrl_c_ends_all_that_was_started(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--login", "1"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(of_folder(tmp_path)) > 4, 20)
    process.send_signal(signal.SIGINT)
    assert (
        process.communicate(timeout=60) == ("", "soak: interrupted\n") and process.returncode == 130
    )
    assert of_folder(tmp_path) == [] and list(tmp_path.iterdir()) == []


SMALL = Counts(
    streams=30, idle_streams=60, crowd=200, descriptors=140, restarted=10, churn=1, wait=3
)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    with contextlib.ExitStack() as running:
        yield Load(tmp_path_factory.mktemp("load"), running, SMALL)


@pytest.mark.skipif(not shutil.which("gcc"), reason="the load client is compiled with gcc")
@pytest.mark.parametrize(
    "phase",
    [
        lambda load: held.streams(load, 3),
        held.idle_streams,
        crowds.churn,
        shortage.few_descriptors,
        shortage.none_left,
        crowds.crowd,
    ],
    ids=["streams", "idle streams", "churn", "few descriptors", "no descriptors", "crowd"],
)
def test_a_small_load_loses_nothing(load, phase):
    assert [row.lost for row in phase(load)] == [[]]


@pytest.mark.skipif(not shutil.which("gcc"), reason="the load client is compiled with gcc")
def test_broken_streams_are_distinguished_from_complete_ones(load):
    proxy = load.start("killed", "-m", "xaiproxy")
    streams = load.streams(5, 30, proxy.port())
    proxy.kill()
    assert (
        restarts.unseen(5, streams.result()) == []
        and streams.lost()
        and restarts.unseen(6, streams.result())
    )
    assert load.sandbox.counters()["reuses"] == 0
