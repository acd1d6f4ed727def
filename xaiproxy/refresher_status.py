"""The refresher's own status: what its last try brought, when the next one is due, and whether it can save a login.

tokens.json cannot tell any of that while the disk is full. The status file is made when the refresher starts and then
overwritten in place, always with the same number of bytes, for which the disk already has room. It is
/run/xaiproxy/status.json, or where that folder cannot be written, tokens.json.status beside tokens.json.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path

from xaiproxy import errors, folder_file, storage
from xaiproxy.token_store import ALIVE, TokenStore

RUN_FOLDER = Path("/run/xaiproxy")
SIZE = 4096  # bytes: one block of most file systems
TEXT_LIMIT = 400  # characters of a sentence
OK = "ok"


@dataclasses.dataclass(frozen=True)
class Status:
    """Times are unix seconds.

    `result`: OK, the code of the last try's failure, or "" before the first try. `reason`: the failure in a sentence.
    `next_try`: None when none is planned. `no_room`: why no login can be saved, in a sentence; "" when one can.
    """

    at: float
    result: str = ""
    reason: str = ""
    next_try: "float | None" = None
    no_room: str = ""

    @property
    def failure(self) -> str:
        """The code of the last try's failure, or ""."""
        return "" if self.result == OK else self.result


def write(store: TokenStore, status: Status, run_folder: Path = RUN_FOLDER) -> bool:
    """Write the status file; return whether there is a place for it. To be called at least every ALIVE / 2 seconds."""
    try:
        storage.check_owner(store.path)
    except errors.StorageError:  # a file of root's would be closed to the user who serves
        return False
    values = {"login": _name_of(store), **dataclasses.asdict(status)}
    for name in ("result", "reason", "no_room"):
        values[name] = values[name][:TEXT_LIMIT]
    content = json.dumps(values, ensure_ascii=False).encode("utf-8", "replace").ljust(SIZE - 1) + b"\n"
    for path in _paths(store, run_folder):
        with contextlib.suppress(OSError):
            fd = folder_file.opened(path, os.O_WRONLY | os.O_CREAT)
            try:
                if os.pwrite(fd, content, 0) == SIZE:  # in one call: a reader sees the old or the new bytes
                    return True
            finally:
                os.close(fd)
    return False


def read(store: TokenStore, now: float, run_folder: Path = RUN_FOLDER) -> "Status | None":
    """The latest status of this login's refresher; None when it is older than ALIVE seconds."""
    found = [status for path in _paths(store, run_folder) if (status := _parsed(store, path)) is not None]
    latest = max(found, key=lambda status: status.at, default=None)
    return latest if latest is not None and abs(now - latest.at) < ALIVE else None


def remove(store: TokenStore, run_folder: Path = RUN_FOLDER) -> None:
    """Remove the status files of this login. Raises OSError."""
    for path in _paths(store, run_folder):
        if _parsed(store, path) is not None:
            path.unlink(missing_ok=True)


def _paths(store: TokenStore, run_folder: Path) -> "tuple[Path, Path]":
    return run_folder / "status.json", store.path.with_name(store.path.name + ".status")


def _name_of(store: TokenStore) -> str:
    """The login that a status is about: several refreshers may share the run folder."""
    return hashlib.sha256(os.fsencode(os.path.abspath(store.path))).hexdigest()


def _parsed(store: TokenStore, path: Path) -> "Status | None":
    try:
        values = json.loads(folder_file.read(path, SIZE)[0])
        if values.pop("login") != _name_of(store):
            return None
        status = Status(**values)
        texts = isinstance(status.result, str) and isinstance(status.reason, str) and isinstance(status.no_room, str)
        times = isinstance(status.at, (int, float)) and isinstance(status.next_try, (int, float, type(None)))
        return status if texts and times else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # there is none, it is half-written, or it is somebody else's file
