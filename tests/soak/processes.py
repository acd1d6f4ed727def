"""Refreshers and proxies, their logs in files, all ended when the run ends."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# The signals that end a run.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REFRESHER = ("-m", "xaiproxy.refresher")
PROXY = ("-m", "xaiproxy")
STATUS = ("-m", "xaiproxy.login", "--status")


class Process:
    def __init__(
        self,
        running: contextlib.ExitStack,
        log: pathlib.Path,
        environ: dict[str, str],
        *command: str,
        prefix: Sequence[str] = (),
    ):
        """`prefix`: a command that executes it."""
        self.log = log
        # An interrupt between the start and the callback would leave the process running; one that
        # arrives waits till then. The child must not inherit the mask: a handler does the waiting.
        came: list[int] = []
        before = {
            number: signal.signal(number, lambda number, _: came.append(number))
            for number in SIGNALS
        }
        try:
            with open(log, "ab") as file:
                # In a session of its own, it gets no SIGINT from Ctrl-C.
                self._process = subprocess.Popen(
                    [*prefix, sys.executable, *command],
                    env=environ,
                    cwd=log.parent,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            self.pid = self._process.pid
            running.callback(self.kill)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])

    def kill(self) -> None:
        """End the process; may be called twice."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        return self._process.wait(seconds)

    def port(self) -> int:
        """The port on which a proxy is listening."""
        return int(
            await_(
                lambda: re.search(r"listening on http://[^ ]*?:([0-9]+)/", self.log.read_text())
            )[1]
        )


def lock_holder(token_path: pathlib.Path, refreshers: list[Process]) -> Process | None:
    """The refresher that has the lock of the token file (proc_locks(5)), or None."""
    try:
        inode = token_path.with_name("tokens.json.lock").stat().st_ino
    # None of them has started.
    except FileNotFoundError:
        return None
    for line in pathlib.Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
            return next((one for one in refreshers if one.pid == int(fields[4])), None)
    return None


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def environment(folder: pathlib.Path, settings: dict[str, str]) -> dict[str, str]:
    """An environment with `settings`, and none of the user's own."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        "XAI_PROXY_PORT": "0",
        **settings,
    }


def warnings(folder: pathlib.Path) -> list[str]:
    """The messages above level info in the logs, each once."""
    lines = [line for log in sorted(folder.glob("*.log")) for line in log.read_text().splitlines()]
    return sorted({message(line) for line in lines if '"level": "info"' not in line})


def message(line: str) -> str:
    try:
        return json.loads(line)["message"]
    except ValueError:
        return line


def print_progress(at: float, seconds: float, figures: Mapping[str, int]) -> None:
    named = ", ".join(f"{name} {value}" for name, value in figures.items())
    print(f"[{at:.0f} of {seconds:.0f} s] {named}", flush=True)


def await_(happened: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (outcome := happened()):
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)
    return outcome
