"""The refresher's status: the result of its last try, the time of the next, and room for a login.

While the disk is full none of that can be written to tokens.json. tokens.json.status is made when
the refresher starts and then overwritten in place, always with the same number of bytes, for which
the disk already has room.
"""

import dataclasses
import json
import os
import re
from typing import Any

from xaiproxy import errors, folder_file, state_file, storage, tokens
from xaiproxy.token_store import ALIVE, TokenStore
from xaiproxy.tokens import Login, fingerprint

SIZE = 4096  # bytes: one block of most file systems
TEXT_LIMIT = 400  # characters of a sentence
# A file that is missing, half-written, or another program's.
UNREADABLE = (OSError, ValueError, TypeError, RecursionError)
UNSAFE = re.compile(r"[^ -~]")  # characters for which JSON may need six bytes
OK = "ok"
# What a refresh ends with, for /metrics.
RESULTS = (OK, "unreachable", "refused_for_now", "entitlement", "ended", "disk")


@dataclasses.dataclass(frozen=True)
class Status:
    """Times are unix seconds.

    `result`: OK, the code of the last try's failure, or "" before the first try.
    `reason`: the failure in a sentence.
    `next_try`: time of the next try; None if none is planned.
    `no_room`: why no login can be saved, in a sentence; "" if one can.
    `login`: fingerprint of the login's access token.
    `refreshes`: the number of refreshes by their result, one of RESULTS; it survives restarts.
    `published_at`: time at which the login was last published; None if it never was.
    `publish_failure`: why the login is not published, in a sentence; "" if it is.
    `publish_failures`: the number of failures to publish; it survives restarts.
    """

    at: float
    result: str = ""
    reason: str = ""
    next_try: float | None = None
    no_room: str = ""
    login: str = ""
    refreshes: dict[str, int] = dataclasses.field(default_factory=dict)
    published_at: float | None = None
    publish_failure: str = ""
    publish_failures: int = 0

    @property
    def failure(self) -> str:
        """The code of the last try's failure, or ""."""
        return "" if self.result == OK else self.result


def write(store: TokenStore, status: Status) -> bool:
    """Write the status file, at least every ALIVE / 2 seconds; return whether that was possible."""
    values = dataclasses.asdict(status)
    for name in ("result", "reason", "no_room", "publish_failure"):
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
        status = _parsed(store)
        if abs(now - status.at) >= ALIVE or status.login != fingerprint(login.access_token):
            return None
        texts = (status.result, status.reason, status.no_room, status.publish_failure)
        valid = all(isinstance(text, str) for text in texts)
        times = (status.next_try, status.published_at)
        dated = all(time is None or tokens.number(time) is not None for time in times)
        return status if valid and dated else None
    except UNREADABLE:
        return None


def refreshes(store: TokenStore) -> dict[str, int]:
    """Return the number of refreshes by result, also if no refresher runs; 0 if unknown."""
    counted = filed(store).refreshes
    if not isinstance(counted, dict):
        counted = {}
    return {result: int(tokens.number(counted.get(result)) or 0) for result in RESULTS}


def published(store: TokenStore) -> tuple[float | None, int]:
    """Return `published_at` and `publish_failures`, also if no refresher runs."""
    status = filed(store)
    return tokens.number(status.published_at), int(tokens.number(status.publish_failures) or 0)


def lasting(store: TokenStore, own: Status) -> dict[str, Any]:
    """Return the members that survive restarts, from the file and a process's own status."""
    published_at, failures = published(store)
    return {
        "refreshes": {
            result: max(number, own.refreshes.get(result, 0))
            for result, number in refreshes(store).items()
        },
        "published_at": own.published_at or published_at,
        "publish_failures": max(own.publish_failures, failures),
    }


def filed(store: TokenStore) -> Status:
    """Return what the file has, unchecked and of any age; if it cannot be read, an old status."""
    try:
        return _parsed(store)
    except UNREADABLE:
        return Status(0.0)


def _parsed(store: TokenStore) -> Status:
    return state_file.parsed(Status, folder_file.read(store.status_path, SIZE)[0])


def next_refresh(login: Login, status: Status | None, skew: float) -> float | None:
    """Return the time of the running refresher's next refresh or retry; None if there is none.

    `skew`: as for Login.margin.
    """
    error = login.refresh_error
    if login.refresh_token is None or (error is not None and error.terminal):
        return None
    if status is not None and status.next_try is not None:
        return status.next_try
    if error is not None and error.retry_at is not None:
        return error.retry_at
    return login.expires_at - login.margin(skew)
