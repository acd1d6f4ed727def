"""The run folder, beside the token file: what the processes of `xai-serve --workers` share.

Each name begins with the address that the processes listen on, such as 127.0.0.1:9090:

- ADDRESS.conf: the configuration of their supervisord;
- ADDRESS.sock: its control socket;
- ADDRESS-SLOT.json: the numbers of a worker, written by proxy/shared_numbers.py;
- ADDRESS-SLOT.pid: once the worker serves, a symbolic link to its process ID, which needs no room
  on a full disk.
"""

import os
import re
import signal
import stat
import urllib.parse
from pathlib import Path

from xaiproxy import config, errors, storage, token_folder
from xaiproxy.addresses import UnixSocket
from xaiproxy.token_store import TokenStore

# The programs of supervisord. WORKERS is also its group of several processes.
WORKERS, REFRESHER = "proxy", "refresher"
# Ends a worker whose siblings serve on: no load balancer must find out first. Before the worker has
# a handler, the signal just ends it.
REPLACE = signal.SIGUSR1


def path_of(settings: config.Config) -> Path:
    return settings.token_path.parent / "run"


def make(settings: config.Config) -> Path:
    """Make the run folder if it is missing. Raises StorageError."""
    folder = path_of(settings)
    token_folder.prepare(TokenStore(settings))
    with storage.translated(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    # supervisord runs the commands of a configuration in it.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise errors.StorageError(
            f"{folder} must be a folder of user {os.geteuid()} to which no other user can write; "
            "move it away"
        )
    return folder


def configuration(settings: config.Config) -> Path:
    bind = settings.bind
    name = _quoted(str(bind.path)) if isinstance(bind, UnixSocket) else _name(bind, settings.port)
    return path_of(settings) / f"{name}.conf"


def control_socket(settings: config.Config) -> Path:
    return configuration(settings).with_suffix(".sock")


def numbers(settings: config.Config, address: str | tuple[str, int], slot: int) -> Path:
    """The file with the numbers of a worker. `address`: of its listening socket."""
    name = address if isinstance(address, str) else _name(*address[:2])
    return path_of(settings) / f"{_quoted(name)}-{slot}.json"


def serving(numbers: Path) -> Path:
    """The link of the worker with this file of numbers."""
    return numbers.with_suffix(".pid")


def left_over(settings: config.Config, address: str | tuple[str, int]) -> list[Path]:
    """The files of former workers at this address and of their supervisord, except its socket.

    After a SIGKILL there may be some that were not renamed yet: see folder_file.replace.
    """
    numbers_of_any = re.escape(numbers(settings, address, 0).name.removesuffix("-0.json"))
    conf = re.escape(configuration(settings).name)
    pattern = rf"({numbers_of_any}-\d+\.(json|pid)|{conf})(\.[0-9a-f]{{8}})?"
    folder = path_of(settings)
    try:
        return [folder / name for name in os.listdir(folder) if re.fullmatch(pattern, name)]
    except OSError:
        return []


def _quoted(name: str) -> str:
    """A name without slashes."""
    return urllib.parse.quote(name, safe="[]:")


def _name(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
