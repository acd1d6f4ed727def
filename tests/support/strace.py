"""strace(1), which records system calls, makes them fail, or stops or kills the process."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

# Only traced system calls stop the process. Otherwise Python takes four times as long to start.
FEW_STOPS = ["-f", "--seccomp-bpf"]

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None
    or subprocess.run(
        ["strace", *FEW_STOPS, "-o", os.devnull, "true"], capture_output=True
    ).returncode
    != 0,
    reason="strace is not installed, older than 5.3, or not permitted here",
)


def strace(
    log: Path | str, *options: str, paths: Iterable[Path] = (), few_stops: bool = True
) -> list[str]:
    """Return a prefix for a command, which stays the caller's child.

    `paths`: only system calls on these files are traced, or all if empty. `few_stops`:
    False if a signal is injected, which strace cannot do otherwise.
    """
    how = FEW_STOPS if few_stops else ["-f"]
    return ["strace", "-D", *how, "-o", str(log), *(f"-P{path}" for path in paths), *options]


def attach(
    pid: int, log: Path | str, *options: str, paths: Iterable[Path] = ()
) -> subprocess.Popen[bytes]:
    """Trace a running process until it ends."""
    return subprocess.Popen(
        ["strace", "-f", "-o", str(log), *(f"-P{path}" for path in paths), *options, f"-p{pid}"],
        stderr=subprocess.DEVNULL,
    )
