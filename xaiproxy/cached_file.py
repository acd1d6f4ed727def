"""The content of a file, read again only after the file has changed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class CachedFile(Generic[T]):
    """What `load` returns, until the file at `path` or a link to it changes.

    An exception from `load` is not cached: the next `get` loads again.
    """

    def __init__(self, path: Path, load: Callable[[], T]):
        self._path = os.fspath(path)
        self._load = load
        self._identity: tuple[int, ...] | None = None
        self._value: T

    def get(self) -> T:
        """Return the value; as long as the file has not changed, at the cost of one os.stat."""
        try:
            status = os.stat(self._path)
            identity = status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
        except OSError:
            identity = None
        if identity is None or identity != self._identity:
            self._identity = None
            self._value = self._load()
            # From before `load`: a change in the middle of it is found by the next call.
            self._identity = identity
        return self._value
