"""Everything that is ever written to tokens.json, under its lock (token_lock.py).

A change must keep these rules:

1. No process writes tokens.json, or reads a refresh token in order to spend it, without the lock.
2. There is one way onto the disk, that of durable_file.py through tokens.json.new, so a reader
   sees either the former file or the new one.
3. tokens.json.new names in `replaces` the refresh token that it succeeds. A process that has taken
   the lock first checks for a left-over of that name. A left-over that is whole and succeeds what
   tokens.json holds is the only copy of a login whose writer was killed: it is renamed into place.
   Any other left-over is removed.
4. Before a refresh token is spent, the save of its successor is rehearsed: a full disk, a read-only
   folder or a bind-mounted file fails while the former token is still valid.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator

from xaiproxy import (
    durable_file,
    errors,
    folder_file,
    storage,
    token_json,
    token_lock,
    token_store,
    tokens,
)
from xaiproxy.token_store import TokenStore

logger = logging.getLogger(__name__)

RESERVE = 65536  # bytes, really written; a login has about 2,000


@contextlib.contextmanager
def locked(
    store: TokenStore,
    timeout: float,
    pause: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[TokenWriter]:
    """Hold the lock, with any left-over dealt with. Raises StorageError, and as token_lock.held."""
    with token_lock.held(store, timeout, pause, clock) as lock:
        writer = TokenWriter(store, lock)
        writer.adopt_leftover()
        yield writer


class TokenWriter:
    """What a process may do while it holds the lock. Only `locked` makes one."""

    def __init__(self, store: TokenStore, lock: token_lock.Lock):
        self.store = store
        self._lock = lock

    def adopt_leftover(self) -> None:
        """Rename a left-over tokens.json.new into place if it is the successor, else remove it.

        Raises StorageError.
        """
        path = self.store.new_path
        with storage.translated(path):
            try:
                fd = folder_file.opened(path, os.O_RDONLY)
            except FileNotFoundError:
                return
            with open(fd, "rb") as file:
                content = file.read(token_store.SIZE_LIMIT + 1)
                owner = os.fstat(fd).st_uid
                # It may be the only copy of the other user's login.
                if owner != os.geteuid():
                    raise errors.StorageError(
                        f"{path} belongs to user {owner}, and this process runs as user "
                        f"{os.geteuid()}; run as that user, or remove it"
                    )
                if not self._is_successor(content):
                    path.unlink()
                    return
                # Its writer may have been killed before its own fsync.
                os.fsync(fd)
            self._keep_corrupt()
            os.rename(path, self.store.path)
        _sync_folder(self.store)
        logger.warning(
            "%s was left behind by a process that was killed; it is now %s", path, self.store.path
        )

    def _is_successor(self, content: bytes) -> bool:
        """Whether a left-over is whole and succeeds what tokens.json holds."""
        try:
            token_store.parse(content, self.store.new_path)
            fits = token_json.replaces(content) == _mark_in_file(self.store)
            return fits and not self.store.path.is_symlink()
        except errors.LoginUnusable:
            return False

    def save(self, login: tokens.Login, over: tokens.Login | None = None) -> None:
        """Make `login` the content of tokens.json, durably. Raises StorageError.

        A file that does not parse is kept as tokens.json.corrupt-<unix time>.
        `over`: the login that tokens.json must hold; if a program that takes no lock has put
        another one there, LoginUnusable is raised.
        """
        with storage.translated(self.store.path):
            mark = _mark_in_file(self.store) if over is None else _mark_of(over)
            new = durable_file.NewFile(self.store.new_path)
            try:
                new.write(token_json.to_json(login, mark).encode())
                if over is not None:
                    self._check_holds(mark)
                self._keep_corrupt()
                new.rename(self.store.path)
            finally:
                new.remove()
        _sync_folder(self.store)

    def rehearse(self, login: tokens.Login) -> Reserved:
        """Save the login that tokens.json holds once more, and reserve room for its successor.

        Raises as `save` does.
        """
        self.save(login, over=login)
        reserved = self.reserve()
        try:
            self._check_holds(_mark_of(login))
            if not self._lock.is_real():
                raise errors.StorageError(
                    f"{self.store.lock_path} was removed or replaced while it was locked; do not "
                    "remove it while a program of ours runs"
                )
        except BaseException:
            reserved.discard()
            raise
        return reserved

    def reserve(self) -> Reserved:
        """Make tokens.json.new, with room for a login. Raises StorageError."""
        with storage.translated(self.store.path):
            mark = _mark_in_file(self.store)
            new = durable_file.NewFile(self.store.new_path)
            try:
                # Spaces, because JSON may end with them: the file parses even if this process is
                # killed after writing the login over them and before cutting off the rest.
                new.write(b" " * RESERVE)
            except BaseException:
                new.remove()
                raise
            return Reserved(self.store, new, mark)

    def remove(self) -> None:
        """Remove every file of the login except the lock. Raises StorageError."""
        store = self.store
        with storage.translated(store.path):
            # The left-over is removed first: after a kill in between it must not become the login.
            store.new_path.unlink(missing_ok=True)
            names = (store.refused_path.name, store.quota_path.name, store.path.name + ".corrupt-")
            for path in store.path.parent.iterdir():
                if path.name.startswith(names):
                    path.unlink(missing_ok=True)
            store.path.unlink(missing_ok=True)
            store.status_path.unlink(missing_ok=True)
            store.notify_path.unlink(missing_ok=True)
        _sync_folder(store)

    def _check_holds(self, mark: str | None) -> None:
        if _mark_in_file(self.store) != mark:
            raise _replaced(self.store, "and is left as it is")

    def _keep_corrupt(self) -> None:
        path = self.store.path
        try:
            token_store.parse(self.store.read()[0], path)
        except errors.LoginUnusable as error:
            if error.state == "corrupt":
                aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
                os.rename(path, aside)
                logger.warning("%s could not be read as a login and is kept as %s", path, aside)


class Reserved:
    """tokens.json.new, open and with room for the successor of a refresh token that is being spent.

    `renamed`: whether tokens.json holds the successor.
    """

    def __init__(self, store: TokenStore, new: durable_file.NewFile, mark: str | None):
        """`mark`: fingerprint of the refresh token that is being spent."""
        self._store = store
        self._new = new
        self._mark = mark
        self.renamed = False

    def commit(self, login: tokens.Login) -> None:
        """Write, sync and rename. After a StorageError call it again: `login` is the only copy.

        Raises LoginUnusable if tokens.json no longer holds the login that was spent: its removal is
        a sign-out, and a login that was put there without the lock must stay.
        """
        with storage.translated(self._store.path):
            if not self.renamed:
                self._write(login)
                # The login is on the disk, so a kill loses nothing from here on. No check comes
                # before this point.
                self._check_holds(login)
                if not self.renamed:
                    self._new.rename(self._store.path)
                    self.renamed = True
        # Outside the condition: this alone is left to do if it failed the first time.
        _sync_folder(self._store)

    def _write(self, login: tokens.Login) -> None:
        try:
            if not self._new.is_in_place():
                self._new.close()
                self._new = durable_file.NewFile(self._store.new_path)
            self._new.write(token_json.to_json(login, self._mark).encode())
        except FileNotFoundError:
            # The folder is gone.
            self._check_holds(login)
            raise
        except OSError as error:
            # On a full disk the room that the file has must not be given up.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._new.close()
            raise

    def _check_holds(self, login: tokens.Login) -> None:
        """Raise LoginUnusable unless tokens.json holds the login that was spent, or `login`."""
        mark = _mark_in_file(self._store)
        if mark == self._mark:
            return
        self.discard()
        if mark != _mark_of(login):
            raise _replaced(self._store, "so the new tokens of that login are dropped")
        # A network file system may rename a file and report that it failed.
        self.renamed = True

    def discard(self) -> None:
        """Free the room: nothing was spent, or nothing is to be saved."""
        self._new.remove()


def _mark_of(login: tokens.Login) -> str | None:
    return tokens.fingerprint(login.refresh_token) if login.refresh_token else None


def _mark_in_file(store: TokenStore) -> str | None:
    """Fingerprint of the refresh token in tokens.json, or None. Raises StorageError."""
    try:
        return _mark_of(token_store.parse(store.read()[0], store.path))
    except errors.LoginUnusable as error:
        if error.state == "unreadable":
            raise errors.StorageError(str(error)) from error
        return None


def _replaced(store: TokenStore, consequence: str) -> errors.LoginUnusable:
    return errors.LoginUnusable(
        "replaced",
        f"{store.path} was replaced or removed while its login was refreshed, {consequence}",
    )


def _sync_folder(store: TokenStore) -> None:
    folder = store.path.parent
    try:
        durable_file.sync_folder(folder)
    except OSError as error:
        raise errors.StorageError(
            f"{folder} cannot be synced: {error.strerror}; the change of {store.path} is made, but "
            "a power cut could undo it. Check the disk"
        ) from error
