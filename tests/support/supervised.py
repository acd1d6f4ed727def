"""Both programs under supervisord, as in a container."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

from checkout import ONE_CA, PYTHONPATH, ROOT
from proxy_process import Client

CONF = ROOT / "conf" / "supervisord.conf"
BIN = Path(sys.executable).parent


class Supervised:
    """supervisord with the real conf, and its output: `lines`.

    It has no controlling terminal, and its folder is not on PATH. `pipe`: a function that returns
    the read and write descriptors of its output. `conf`: another configuration. `command`: another
    one that becomes supervisord.
    """

    def __init__(
        self, folder, sandbox, *, prefix=(), pipe=os.pipe, conf=CONF, command=(), **settings
    ):
        self.environ = {
            "PATH": os.defpath,
            "PYTHONPATH": PYTHONPATH,
            "SSL_CERT_FILE": str(ONE_CA),
            "HOME": str(folder),
            "XAI_PROXY_PORT": "0",
            **sandbox.env,
            "XAI_PROXY_TOKEN_PATH": str(folder / "login" / "tokens.json"),
            **settings,
        }
        sandbox.write_login(self.environ["XAI_PROXY_TOKEN_PATH"])
        self._output, stdout = pipe()
        self.process = subprocess.Popen(
            [*prefix, *(command or (BIN / "supervisord", "-c", conf))],
            cwd=folder,
            env=self.environ,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(stdout)
        self.lines = []
        self._changed = threading.Condition()
        self._may_read = threading.Event()
        self._may_read.set()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.read_on()
        if self.process.poll() is None:
            self.process.terminate()
        self.ended()
        self._reader.join()

    def _read(self):
        # The end of a terminal's output is EIO.
        with (
            open(self._output) as output,
            contextlib.suppress(OSError),
        ):
            for line in output:
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()
                self._may_read.wait()

    def stop_reading(self):
        self._may_read.clear()

    def read_on(self):
        self._may_read.set()

    def close_output(self):
        """Close the read end of its output."""
        os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), self._output)

    def wait_for_line(self, pattern, times=1):
        """Wait until `times` lines match `pattern`. Return the last match."""

        def matches():
            return [match for match in map(re.compile(pattern).search, self.lines) if match]

        with self._changed:
            found = self._changed.wait_for(lambda: len(matches()) >= times, 30)
            assert found, "".join(self.lines)
            return matches()[times - 1]

    def client(self, start=1):
        """Return a connection to the proxy after its `start`th start."""
        return Client(int(self.wait_for_line(r"listening on http://127.0.0.1:(\d+)/v1", start)[1]))

    def signal(self, number):
        self.process.send_signal(number)

    def ended(self):
        """Wait for its end, read all output, and return the exit status."""
        status = self.process.wait(30)
        self._reader.join(10)
        return status

    def pids(self):
        """Return the process ID of each program by its name."""
        return {
            name: int(self.wait_for_line(rf"spawned: '{name}' with pid (\d+)")[1])
            for name in ("refresher", "proxy")
        }

    def complaints(self):
        """Return the messages of supervisord's own lines above info, which are JSON."""
        lines = map(json.loads, self.lines)
        return [
            line["message"]
            for line in lines
            if line["process"] == "supervisord" and line["level"] != "info"
        ]
