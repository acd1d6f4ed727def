"""The refresher's status: the result of its last try, the time of the next, and room for a login.

While the disk is full none of that can be written to tokens.json. tokens.json.status is made when
the refresher starts and then overwritten in place, always with the same number of bytes, for which
the disk already has room.
"""

import dataclasses
import json
import os
import re

from xaiproxy import errors, folder_file, storage
from xaiproxy.token_store import ALIVE, TokenStore
from xaiproxy.tokens import Login, fingerprint

SIZE = 4096  # bytes: one block of most file systems
TEXT_LIMIT = 400  # characters of a sentence
UNSAFE = re.compile(r"[^ -~]")  # characters for which JSON may need six bytes
OK = "ok"


@dataclasses.dataclass(frozen=True)
class Status:
    """Times are unix seconds.

    `result`: OK, the code of the last try's failure, or "" before the first try.
    `reason`: the failure in a sentence.
    `next_try`: time of the next try; None if none is planned.
    `no_room`: why no login can be saved, in a sentence; "" if one can.
    `login`: fingerprint of the login's access token.
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
    """Write the status file, at least every ALIVE / 2 seconds; return whether that was possible."""
    values = dataclasses.asdict(status)
    for name in ("result", "reason", "no_room"):
        values[name] = UNSAFE.sub("?", values[name])[:TEXT_LIMIT]
    content = json.dumps(values).encode().ljust(SIZE - 1) + b"\n"
    try:
        storage.check_owner(store.path)
        fd = folder_file.opened(store.status_path, os.O_WRONLY | os.O_CREAT)
        try:
            # In one call, so that a reader sees either the former bytes or the new ones.
            return os.pwrite(fd, content, 0) == SIZE
        finally:
            os.close(fd)
    except (OSError, errors.StorageError):
        return False


def read(store: TokenStore, login: Login, now: float) -> Status | None:
    """Return the status if it is this login's and not older than ALIVE seconds."""
    try:
        status = Status(**json.loads(folder_file.read(store.status_path, SIZE)[0]))
        if abs(now - status.at) >= ALIVE or status.login != fingerprint(login.access_token):
            return None
        texts = (status.result, status.reason, status.no_room)
        valid = all(isinstance(text, str) for text in texts)
        return status if valid and isinstance(status.next_try, (int, float, type(None))) else None
    except (OSError, ValueError, TypeError, RecursionError):
        # Missing, half-written, or another program's.
        return None
