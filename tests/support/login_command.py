"""xai-login as a program, against the sandbox."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkout import ONE_CA
from forked_process import run_python
from sandbox import Sandbox
from terminal import Terminal

ARGUMENTS = ["-m", "xaiproxy.login"]
COMMAND = [sys.executable, "-W", "error", *ARGUMENTS]
# xaiproxy.login.command imports late; a sign-in needs most of it.
MODULE = "xaiproxy.login.sign_in"
ACCOUNT = "sandbox@example.invalid"


class Login:
    """Runs xai-login against the sandbox with a token file in tmp_path and a bare environment."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self.sandbox = sandbox
        self.path = folder / "login" / "tokens.json"
        self.env = {
            "PATH": os.environ["PATH"],
            "SSL_CERT_FILE": str(ONE_CA),
            "HOME": str(folder),
            "TZ": "UTC",
            "LANG": "C.UTF-8",
            "XAI_PROXY_ISSUER": sandbox.url,
            "XAI_PROXY_UPSTREAM": sandbox.url,
            "XAI_PROXY_TOKEN_PATH": str(self.path),
            # Nothing listens there.
            "XAI_PROXY_PORT": "1",
        }
        self.options = {"env": self.env, "cwd": folder}

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return run_python(
            MODULE,
            [*ARGUMENTS, *arguments],
            cwd=self.options["cwd"],
            environ=self.env | environ,
            timeout=30,
        )

    def start(
        self, *arguments: str, prefix: Sequence[str] = (), **environ: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*prefix, *COMMAND, *arguments],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            **self.options | {"env": self.env | environ},
        )

    def terminal(self, *arguments: str, columns: int = 100, **environ: str) -> Terminal:
        # Python reads its own variables when it starts.
        forked = not any(name.startswith("PYTHON") for name in environ)
        return Terminal(
            [*(ARGUMENTS if forked else COMMAND), *arguments],
            columns=columns,
            module=MODULE if forked else "",
            **self.options | {"env": self.env | environ},
        )

    def saved(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    def files(self) -> list[str]:
        return sorted(path.name for path in self.path.parent.iterdir())

    def holds_no_secret(self, *outputs: str) -> None:
        if self.path.exists():
            for name in ("access_token", "refresh_token"):
                assert not any(self.saved()[name] in output for output in outputs)
