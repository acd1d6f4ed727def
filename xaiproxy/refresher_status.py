"""The refresher's own status: what its last try brought, when the next one is due, and whether it can save a login.

tokens.json cannot tell any of that while the disk is full. tokens.json.status is made when the refresher starts and then
overwritten in place, always with the same number of bytes, for which the disk already has room.
"""

import dataclasses
import json
import os
import re

from xaiproxy import errors, folder_file, storage
from xaiproxy.token_store import ALIVE, TokenStore
from xaiproxy.tokens import Tokens, fingerprint

SIZE = 4096  # bytes: one block of most file systems
TEXT_LIMIT = 400  # characters of a sentence
UNSAFE = re.compile(r"[^ -~]")  # JSON may need six bytes for one of these
OK = "ok"


@dataclasses.dataclass(frozen=True)
class Status:
    """Times are unix seconds.

    `login`: the fingerprint of the access token that it is about.
    `result`: OK, the code of the last try's failure, or "" before the first try. `reason`: the failure in a sentence.
    `next_try`: None when none is planned. `no_room`: why no login can be saved, in a sentence; "" when one can.
    """

    at: float
    result: str = ""
    reason: str = ""
    next_try: float | None = None
    no_room: str = ""
    login: str = ""

    @property
    def failure(self) -> str:
        """The code of the last try's failure, or ""."""
        return "" if self.result == OK else self.result


def write(store: TokenStore, status: Status) -> bool:
    """Write the status file; return whether that was possible. To be called at least every ALIVE / 2 seconds."""
    values = dataclasses.asdict(status)
    for name in ("result", "reason", "no_room"):
        values[name] = UNSAFE.sub("?", values[name])[:TEXT_LIMIT]
    content = json.dumps(values).encode().ljust(SIZE - 1) + b"\n"
    try:
        storage.check_owner(store.path)  # a file of root's would be closed to the user who serves
        fd = folder_file.opened(store.status_path, os.O_WRONLY | os.O_CREAT)
        try:
            return (
                os.pwrite(fd, content, 0) == SIZE
            )  # in one call: a reader sees the old or the new bytes
        finally:
            os.close(fd)
    except (OSError, errors.StorageError):
        return False


def read(store: TokenStore, login: Tokens, now: float) -> Status | None:
    """The latest status, if it is about this login and not older than ALIVE seconds."""
    try:
        status = Status(**json.loads(folder_file.read(store.status_path, SIZE)[0]))
        if abs(now - status.at) >= ALIVE or status.login != fingerprint(login.access_token):
            return None
        texts = (
            isinstance(status.result, str)
            and isinstance(status.reason, str)
            and isinstance(status.no_room, str)
        )
        return status if texts and isinstance(status.next_try, (int, float, type(None))) else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None  # there is none, it is half-written, or it is another program's file
