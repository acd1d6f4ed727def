"""tokens.json.lock: held while tokens.json is written, and by its time the refresher's heartbeat.

The lock is a flock on a sibling of tokens.json that is never removed: a lock on tokens.json itself
would not exclude another one on the file that is renamed over it. If the lock file is removed all
the same, two processes could hold two locks, so each holder locks the folder as well.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator

from xaiproxy import durable_file, errors, folder_file, storage
from xaiproxy.token_store import TokenStore

POLL_INTERVAL = 0.1  # seconds between two attempts to take a lock that another process holds


class Lock:
    """A flock on the lock file, then one on the folder, in this order in every process.

    Where the file system refuses a flock on a folder, the one on the file has to suffice.
    """

    def __init__(self, store: TokenStore):
        self._store = store
        self._file = self._folder = -1

    def take(self) -> bool:
        """Take both locks without waiting; return whether both are held. Raises StorageError."""
        path = self._store.lock_path
        with storage.translated(path):
            if self._file < 0:
                self._file = _open(self._store)
            if not _flock(self._file):
                return False
            if self._folder < 0:
                self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            if not _flock(self._folder):
                return False
        if not self.is_real():
            self.release()
            return False
        return True

    def is_real(self) -> bool:
        """Whether the locked file is still the one at its path."""
        return durable_file.is_at(self._store.lock_path, self._file)

    def release(self) -> None:
        for fd in (self._file, self._folder):
            if fd >= 0:
                os.close(fd)
        self._file = self._folder = -1


@contextlib.contextmanager
def held(
    store: TokenStore,
    timeout: float,
    pause: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Lock]:
    """Hold the lock. Raises LockBusy after `timeout` seconds, and StorageError.

    `pause`: called with the seconds until the next attempt; an exception from it ends the wait.
    """
    lock = Lock(store)
    try:
        end = clock() + timeout
        while not lock.take():
            if clock() >= end:
                raise errors.LockBusy(
                    f"{store.lock_path} has been held by another process for {timeout:g} s; "
                    "check for a refresher or xai-login that hangs (fuser shows it)"
                )
            pause(POLL_INTERVAL)
        yield lock
    finally:
        lock.release()


def beat(store: TokenStore, age: float = 0.0) -> None:
    """Write a heartbeat of the refresher that is `age` seconds old. Raises StorageError."""
    with storage.translated(store.lock_path):
        fd = _open(store)
        try:
            # A file server's clock may differ from this machine's, so the time is named.
            at = time.time() - age
            os.utime(fd, (at, at))
        finally:
            os.close(fd)


def _flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open(store: TokenStore) -> int:
    storage.check_owner(store.path)
    try:
        fd = folder_file.opened(store.lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        # Making the lock file is no heartbeat.
        os.utime(fd, (0, 0))
        return fd
    except FileExistsError:
        return folder_file.opened(store.lock_path, os.O_RDWR)
