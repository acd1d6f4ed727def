"""A refresher as a separate process, which may run under strace or in a mount namespace."""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable

import pytest
from forked_process import start_python

from xaiproxy import config
from xaiproxy.token_store import TokenStore


def environment(sandbox, path, **more) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("XAI_PROXY_")
    }
    return {**inherited, **sandbox.env, "XAI_PROXY_TOKEN_PATH": str(path), **more}


def make_store(sandbox, path) -> TokenStore:
    return TokenStore(config.from_environ(environment(sandbox, path), dotenv_path=os.devnull))


class Process:
    """A refresher, whose log is read as it is written.

    `before`: a command that executes it. `trace`: a function that attaches a tracer to a process
    ID; the refresher waits for it before its own first system call.
    """

    def __init__(
        self,
        sandbox,
        path,
        *options: str,
        before: Iterable[object] = (),
        trace: Callable[[int], subprocess.Popen[bytes]] | None = None,
        **more: str,
    ):
        self.path = path
        self.process = start_python(
            "xaiproxy.refresher.process",
            ["-m", "xaiproxy.refresher", *options],
            prefix=tuple(map(str, before)),
            environ=environment(sandbox, path, **more),
            cwd="/",
            # The refresher has no terminal, whose hangup SIGHUP would mean.
            new_session=True,
            traced=trace is not None,
        )
        self.pid = self.process.pid
        self.tracer = trace(self.pid) if trace is not None else None
        self.lines: list[str] = []
        self._reader = threading.Thread(
            target=lambda: self.lines.extend(map(bytes.decode, self.process.stderr))
        )
        self._reader.start()

    def messages(self) -> list[str]:
        return [json.loads(line)["message"] for line in list(self.lines) if line.startswith("{")]

    def logged(self, text: str) -> int:
        """Count the messages that contain `text`."""
        return sum(text in message for message in self.messages())

    def wait_for(self, text: str, seconds: float = 10) -> None:
        wait_until(lambda: self.logged(text), seconds, lambda: f"no {text!r} in {self.lines}")

    def signal(self, *numbers: int) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def wait(self, seconds: float = 10) -> int:
        status = self.process.wait(seconds)
        self._reader.join()
        self.process.stderr.close()
        if self.tracer is not None:
            self.tracer.wait(seconds)
        return status

    def close(self) -> None:
        self.process.kill()
        self.wait()
        assert not re.search(r"eyJ|[\w-]{80}", "".join(self.lines)), "a token in the log"


def wait_until(true, seconds: float = 10, why=lambda: "it did not happen") -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, why()
        time.sleep(0.02)


mounts = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    ).returncode,
    reason="unshare is not installed, or may mount nothing here",
)


def mounted(script: str, folder) -> list[str]:
    """Return a prefix for a refresher, which runs a script in its own mount namespace first.

    `script`: shell commands that mount something on "$1", which is `folder`.
    """
    return ["unshare", "-rm", "sh", "-ec", script + '; shift; exec "$@"', "sh", str(folder)]


def seen_from(process: Process, path) -> str:
    """Return a path as seen from the mount namespace of a process."""
    return f"/proc/{process.pid}/root{path}"
