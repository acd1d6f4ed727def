"""tokens.json.notify: the record of calls, which all refreshers of a token folder share.

It has a lock of its own, held while a call is delivered. tokens.json.lock would keep refreshes
waiting. The file is overwritten in place, always with the same number of bytes, so that a full disk
does not prevent it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator

from xaiproxy import errors, folder_file, state_file, storage, tokens
from xaiproxy.refresher.calls import Record
from xaiproxy.token_store import TokenStore

SIZE = 512  # bytes; a record has at most 250


class Busy(Exception):
    """Another refresher holds the lock."""


class RecordFile:
    """`fd`: the locked file, or None if it cannot be opened."""

    def __init__(self, fd: int | None):
        self._fd = fd

    def read(self) -> Record | None:
        """Return the record; None if the file cannot be read."""
        if self._fd is None:
            return None
        try:
            content = os.pread(self._fd, SIZE, 0)
        except OSError:
            return None
        try:
            record = state_file.parsed(Record, content)
        except (ValueError, TypeError, RecursionError):
            # New, or another program's.
            return Record()
        texts = isinstance(record.trouble, str) and isinstance(record.called, str)
        return record if texts and tokens.number(record.since) is not None else Record()

    def write(self, record: Record) -> bool:
        """Write the record durably; return whether that was possible."""
        if self._fd is None:
            return False
        content = json.dumps(dataclasses.asdict(record)).encode().ljust(SIZE - 1) + b"\n"
        try:
            written = os.pwrite(self._fd, content, 0)
            os.fsync(self._fd)
        except OSError:
            return False
        return written == SIZE


@contextlib.contextmanager
def locked(store: TokenStore) -> Iterator[RecordFile]:
    """Hold the lock. Raises Busy."""
    fd = _open(store)
    try:
        if fd is not None:
            # A file system without locks has to do: then two refreshers may both call.
            with contextlib.suppress(OSError):
                _lock(fd)
        yield RecordFile(fd)
    finally:
        if fd is not None:
            os.close(fd)


def _open(store: TokenStore) -> int | None:
    try:
        storage.check_owner(store.path)
        return folder_file.opened(store.notify_path, os.O_RDWR | os.O_CREAT)
    except (OSError, errors.StorageError):
        return None


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy from None
