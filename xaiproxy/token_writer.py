"""Everything that is ever written to tokens.json, under its lock.

The rules that a change must keep:

1. Nobody writes, and nobody reads a refresh token in order to spend it, without the lock. It is a flock on the
   sibling tokens.json.lock, which is never removed: a lock on tokens.json itself would not stop a second one on
   the file renamed over it. Since a removed lock file would let two processes hold two locks, it is one on the folder
   as well.
2. There is one way onto the disk: tokens.json.new, fsync, rename, fsync of the folder. A reader sees the old
   file or the new one.
3. tokens.json.new says in `replaces` which refresh token it succeeds. Whoever takes the lock first looks for such
   a left-over: one that is whole and succeeds what tokens.json holds is the only copy of a login whose writer was
   killed, and is put into place; any other is rubbish.
4. Before a refresh token is spent the save of its successor is rehearsed, so that a full disk, a read-only folder
   or a bind-mounted file is found out while the old token is still good.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from xaiproxy import errors, folder_file, storage, token_store, tokens

logger = logging.getLogger(__name__)

RESERVE = 65536  # bytes, really written; a login has about 2,000
POLL = 0.1  # seconds between two looks at a lock that somebody else holds


def prepare_folder(store: token_store.TokenStore) -> None:
    """Make the token folder when it does not exist; warn when others may write into it. Raises StorageError."""
    folder = store.path.parent
    storage.check_owner(store.path)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        risk = token_store.risk_of(folder.stat())
    except OSError as error:
        raise _storage_error(folder, error) from error
    if risk:
        logger.warning("%s %s", folder, risk)


def beat(store: token_store.TokenStore) -> None:
    """The refresher's sign of life: the time of the lock file. Raises StorageError."""
    try:
        fd = _open_lock(store)
        try:
            now = time.time()
            os.utime(
                fd, (now, now)
            )  # our own time: a file server's clock may differ from that of the proxy's machine
        finally:
            os.close(fd)
    except OSError as error:
        raise _storage_error(store.lock_path, error) from error


def tighten(store: token_store.TokenStore) -> str:
    """Take away others' access to a file whose mode is wider than 0600; return the warning that is due, or ""."""
    try:
        fd = folder_file.opened(store.path, os.O_RDONLY)
        try:
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            if not mode & 0o077:
                return ""
            os.fchmod(fd, 0o600)
            kept = not os.fstat(fd).st_mode & 0o077
        finally:
            os.close(fd)
    except OSError:
        return f"{store.path} may be open to other users: its mode cannot be changed"
    return f"{store.path} was open to other users (mode {mode:04o}); " + (
        "its mode is now 0600" if kept else "the file system does not keep another mode"
    )


@contextlib.contextmanager
def locked(
    store: token_store.TokenStore,
    wait: float,
    pause: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[TokenWriter]:
    """Hold the lock. Raises LockBusy after `wait` seconds and StorageError when there can be no lock.

    `pause` is called with the seconds until the next look; what it raises ends the wait.
    """
    lock = Lock(store)
    try:
        end = clock() + wait
        while not lock.take():
            if clock() >= end:
                raise errors.LockBusy(
                    f"{store.lock_path} has been held by another process for {wait:g} s; look for a refresher "
                    "or xai-login that hangs (fuser shows it)"
                )
            pause(POLL)
        writer = TokenWriter(store, lock)
        writer.adopt_leftover()
        yield writer
    finally:
        lock.release()


class Lock:
    """A flock on tokens.json.lock and one on the folder, so that removing the file does not let a second process in.

    The order is the same for everybody: the file first. Where the file system refuses a flock on a folder, the file's
    has to do.
    """

    def __init__(self, store: token_store.TokenStore):
        self._store = store
        self._file = self._folder = -1

    def take(self) -> bool:
        """Whether both are held now; to be called again if not. Raises StorageError when there can be no lock."""
        path = self._store.lock_path
        try:
            if self._file < 0:
                self._file = _open_lock(self._store)
            if not _flock(self._file):
                return False
            if self._folder < 0:
                self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _storage_error(path, error) from error
        try:
            if not _flock(self._folder):
                return False
        except OSError:
            pass
        if not self.is_real():
            self.release()
            return False
        return True

    def is_real(self) -> bool:
        """Whether the locked file is still the one at its path."""
        return _is_at(self._store.lock_path, self._file)

    def release(self) -> None:
        for fd in (self._file, self._folder):
            if fd >= 0:
                os.close(fd)
        self._file = self._folder = -1


class TokenWriter:
    """What may be done with the lock held; made by `locked` only."""

    def __init__(self, store: token_store.TokenStore, lock: Lock):
        self.store = store
        self._lock = lock

    def adopt_leftover(self) -> None:
        """Put a killed writer's tokens.json.new into place if it succeeds what is there, else remove it."""
        store = self.store
        try:
            fd = folder_file.opened(store.new_path, os.O_RDONLY)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _storage_error(store.new_path, error) from error
        try:
            with open(fd, "rb", closefd=False) as file:
                text = file.read(token_store.SIZE_LIMIT + 1)
            owner = os.fstat(fd).st_uid
            if owner != os.geteuid():  # it may be the only copy of that user's login
                raise errors.StorageError(
                    f"{store.new_path} belongs to user {owner}, and this process runs as user "
                    f"{os.geteuid()}; run as that user, or remove it"
                )
            try:
                token_store.parse(text, store.new_path)
                fits = tokens.replaces(text) == self.successor_mark()
                whole = fits and not store.path.is_symlink()
            except errors.LoginUnusable:
                whole = False
            if whole:
                os.fsync(fd)  # its writer may have been killed before it did
                self._keep_corrupt()
                os.rename(store.new_path, store.path)
                self.sync_folder()
                logger.warning(
                    "%s was left behind by a process that was killed; it is now %s",
                    store.new_path,
                    store.path,
                )
            else:
                store.new_path.unlink()
        except OSError as error:
            raise _storage_error(store.new_path, error) from error
        finally:
            os.close(fd)

    def save(self, login: tokens.Tokens, over: tokens.Tokens | None = None) -> None:
        """Make `login` the file's content, durably. Raises StorageError.

        A file that does not parse is kept aside as tokens.json.corrupt-<unix time>. `over`: the login that it is to
        take the place of; raises LoginUnusable when somebody who takes no lock has put another one there.
        """
        with self.writing():
            mark = self.successor_mark() if over is None else _mark_of(over)
            new = NewFile(self.store.new_path)
            try:
                new.write(login.to_json(mark).encode())
                if over is not None:
                    self._check_holds(mark)
                self._keep_corrupt()
                new.rename(self.store.path)
            finally:
                new.remove()
            self.sync_folder()

    def rehearse(self, login: tokens.Tokens) -> Reserved:
        """Do the whole save with the login in hand, and reserve room for its successor. Raises as `save` does."""
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
        with self.writing():
            mark = self.successor_mark()
            new = NewFile(self.store.new_path)
            try:
                # Spaces: should we be killed between writing the login over them and cutting off the rest,
                # what is left is still whole JSON.
                new.write(b" " * RESERVE)
            except BaseException:
                new.remove()
                raise
            return Reserved(self, new, mark)

    def remove(self) -> None:
        """Remove every file of the login but the lock. Raises StorageError."""
        with self.writing():
            # The left-over goes first: should we be killed in between, it must not come back as a login.
            self.store.new_path.unlink(missing_ok=True)
            for path in self.store.path.parent.iterdir():
                if path.name.startswith(
                    (self.store.refused_path.name, self.store.path.name + ".corrupt-")
                ):
                    path.unlink(missing_ok=True)
            self.store.path.unlink(missing_ok=True)
            self.store.status_path.unlink(missing_ok=True)
            self.sync_folder()

    def successor_mark(self) -> str | None:
        """Fingerprint of the refresh token that tokens.json holds; None when there is none to succeed."""
        try:
            login = token_store.parse(self.store.read()[0], self.store.path)
        except errors.LoginUnusable as error:
            if error.state == "unreadable":
                raise errors.StorageError(str(error)) from error
            return None
        return _mark_of(login)

    def _check_holds(self, mark: str | None) -> None:
        if self.successor_mark() != mark:
            raise errors.LoginUnusable(
                "replaced",
                f"{self.store.path} was replaced or removed while its login was "
                "refreshed, and is left as it is",
            )

    def _keep_corrupt(self) -> None:
        try:
            token_store.parse(self.store.read()[0], self.store.path)
        except errors.LoginUnusable as error:
            if error.state == "corrupt":
                aside = self.store.path.with_name(
                    f"{self.store.path.name}.corrupt-{int(time.time())}"
                )
                os.rename(self.store.path, aside)
                logger.warning(
                    "%s could not be read as a login and is kept as %s", self.store.path, aside
                )

    def sync_folder(self) -> None:
        """Make a rename in it durable. Raises StorageError."""
        folder = self.store.path.parent
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if (
                error.errno != errno.EINVAL
            ):  # some network file systems cannot sync a folder, and need not
                raise errors.StorageError(
                    f"{folder} cannot be synced: {error.strerror}; the change of {self.store.path} "
                    "is made, but a power cut could undo it. Check the disk"
                ) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _storage_error(self.store.path, error) from error


class NewFile:
    """tokens.json.new, made by this process and open. What is at the path already is removed first."""

    def __init__(self, path: Path):
        self._path = path
        path.unlink(missing_ok=True)
        self._fd = folder_file.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def is_in_place(self) -> bool:
        """Whether it is still what is at its path: a process that takes no lock may have removed or replaced it."""
        return _is_at(self._path, self._fd)

    def write(self, content: bytes) -> None:
        """Make `content` all of it, and sync it. Raises OSError."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        view = memoryview(content)
        while view:
            view = view[os.write(self._fd, view) :]
        os.ftruncate(self._fd, len(content))
        os.fsync(self._fd)

    def rename(self, path: Path) -> None:
        """Raises OSError."""
        if not self.is_in_place():
            raise FileNotFoundError(
                errno.ENOENT, "it was removed or replaced by another process", os.fspath(self._path)
            )
        os.rename(self._path, path)
        self.close()

    def remove(self) -> None:
        """If this fails, the next process that takes the lock removes it."""
        if self.is_in_place():
            with contextlib.suppress(OSError):
                self._path.unlink()
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Reserved:
    """tokens.json.new, open and with room: where the successor of a refresh token that is being spent goes."""

    def __init__(self, writer: TokenWriter, new: NewFile, mark: str | None):
        self._writer = writer
        self._new = new
        self._mark = mark
        self.renamed = False  # whether tokens.json holds the successor

    def commit(self, login: tokens.Tokens) -> None:
        """Write, sync and rename. Raises StorageError, and is then to be called again: `login` is the only copy.

        Raises LoginUnusable when tokens.json is not what it was: whoever removes it by hand is signing out, and
        whoever puts another login there, as programs that know no lock do, wants that one kept.
        """
        with self._writer.writing():
            if not self.renamed:
                self._write(login)
                # From here on a kill loses nothing, so not before here may anything else be looked at.
                self._check_holds(login)
                if not self.renamed:
                    self._new.rename(self._writer.store.path)
                    self.renamed = True
        self._writer.sync_folder()  # all that is left to do when this failed the first time

    def _write(self, login: tokens.Tokens) -> None:
        try:
            if not self._new.is_in_place():
                self._new.close()
                self._new = NewFile(self._writer.store.new_path)
            self._new.write(login.to_json(self._mark).encode())
        except FileNotFoundError:  # the folder is gone
            self._check_holds(login)
            raise
        except OSError as error:
            if error.errno not in (
                errno.ENOSPC,
                errno.EDQUOT,
            ):  # then the room that it has must not be given up
                self._new.close()
            raise

    def _check_holds(self, login: tokens.Tokens) -> None:
        """Raise LoginUnusable unless tokens.json still holds the login that was spent.

        Or `login` itself: a network file system may do a rename and report that it failed.
        """
        mark = self._writer.successor_mark()
        if mark != self._mark and mark == _mark_of(login):
            self.renamed = True
            self._new.remove()
        elif mark != self._mark:
            self.discard()
            raise errors.LoginUnusable(
                "replaced",
                f"{self._writer.store.path} was replaced or removed while its login was "
                "refreshed, so the new tokens of that login are dropped",
            )

    def discard(self) -> None:
        """Free the room: nothing was spent, or nothing is to be saved."""
        self._new.remove()


def _mark_of(login: tokens.Tokens) -> str | None:
    return tokens.fingerprint(login.refresh_token) if login.refresh_token else None


def _is_at(path: Path, fd: int) -> bool:
    """Whether the open file `fd` is what is at `path`, which is not followed."""
    try:
        at_path, opened = os.lstat(path), os.fstat(fd)
    except OSError:
        return False
    return (at_path.st_dev, at_path.st_ino) == (opened.st_dev, opened.st_ino)


def _flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_lock(store: token_store.TokenStore) -> int:
    storage.check_owner(store.path)
    try:
        fd = folder_file.opened(store.lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.utime(fd, (0, 0))  # that we made it is no sign of the refresher's life
        return fd
    except FileExistsError:
        return folder_file.opened(store.lock_path, os.O_RDWR)


def _storage_error(path: os.PathLike[str], error: OSError) -> errors.StorageError:
    if isinstance(error, folder_file.NotAFile):
        path = error.filename
    return errors.StorageError(
        f"{path} cannot be written: {error.strerror}. {storage.advice(path, error)}"
    )
