"""The console scripts: each imports its command only here, where Ctrl-C is status 130 already.

The import takes most of a command's start, and command.run catches a Ctrl-C only after it.
"""

import contextlib
import functools
import importlib
import os

INTERRUPTED = 130  # EXIT_INTERRUPTED of errors.py, which is slow to import


def run(name: str, module: str) -> int:
    """Run the `main` of a module."""
    try:
        status: int = importlib.import_module(module).main()
        return status
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: interrupted\n".encode())
        return INTERRUPTED


login = functools.partial(run, "xai-login", "xaiproxy.login.command")
serve = functools.partial(run, "xai-serve", "xaiproxy.serve_command")
restart = functools.partial(run, "xai-restart", "xaiproxy.restart_command")
launch = functools.partial(run, "xai-launch", "xaiproxy.launch_command")
proxy = functools.partial(run, "xai-proxy", "xaiproxy.__main__")
refresher = functools.partial(run, "xai-refresher", "xaiproxy.refresher.command")
client_key = functools.partial(run, "xai-client-key", "xaiproxy.client_key_command")
sandbox = functools.partial(run, "xai-sandbox", "xaiproxy.sandbox.__main__")
