"""Everything that is ever written to tokens.json, under its lock.

The rules that a change must keep:

1. Nobody writes, and nobody reads a refresh token in order to spend it, without the lock. It is a flock on the
   sibling tokens.json.lock, which is never removed: a lock on tokens.json itself would not stop a second one on
   the file renamed over it, and a removed lock file lets two processes hold two locks.
2. There is one way onto the disk: tokens.json.new, fsync, rename, fsync of the folder. A reader sees the old
   file or the new one.
3. tokens.json.new says in `replaces` which refresh token it succeeds. Whoever takes the lock first looks for such
   a left-over: one that is whole and succeeds what tokens.json holds is the only copy of a login whose writer was
   killed, and is put into place; any other is rubbish.
4. Before a refresh token is spent the save of its successor is rehearsed, so that a full disk, a read-only folder
   or a bind-mounted file is found out while the old token is still good.
"""

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator

from xaiproxy import errors, folder_file, token_store, tokens

logger = logging.getLogger(__name__)

RESERVE = 65536  # bytes, really written; a login has about 2,000
POLL = 0.1  # seconds between two looks at a lock that somebody else holds
FULL = "Make room on the disk that {folder} is on"
ADVICE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: "Mount {folder} writable",
    errno.EBUSY: "Mount {folder} itself, not the file in it: a file that is a mount cannot be replaced",
}


def prepare_folder(store: token_store.TokenStore) -> None:
    """Make the token folder when it does not exist; warn when others may write into it. Raises StorageError."""
    folder = store.path.parent
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
            os.utime(fd)
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
        "its mode is now 0600" if kept else "the file system does not keep another mode")


@contextlib.contextmanager
def locked(store: token_store.TokenStore, wait: float, pause: "Callable[[float], object]" = time.sleep,
           clock: "Callable[[], float]" = time.monotonic) -> "Iterator[TokenWriter]":
    """Hold the lock. Raises LockBusy after `wait` seconds and StorageError when there can be no lock.

    `pause` is called with the seconds until the next look; what it raises ends the wait.
    """
    try:
        fd = _open_lock(store)
    except OSError as error:
        raise _storage_error(store.lock_path, error) from error
    try:
        end = clock() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if clock() >= end:
                    raise errors.LockBusy(
                        f"{store.lock_path} has been held by another process for {wait:g} s; look for a refresher "
                        "or xai-login that hangs (fuser shows it)") from None
                pause(POLL)
            except OSError as error:
                raise _storage_error(store.lock_path, error) from error
        writer = TokenWriter(store)
        writer.adopt_leftover()
        yield writer
    finally:
        os.close(fd)  # releases the lock


class TokenWriter:
    """What may be done with the lock held; made by `locked` only."""

    def __init__(self, store: token_store.TokenStore):
        self.store = store

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
                raise errors.StorageError(f"{store.new_path} belongs to user {owner}, and this process runs as user "
                                          f"{os.geteuid()}; run as that user, or remove it")
            try:
                token_store.parse(text, store.new_path)
                fits = tokens.replaces(text) == self._successor_mark()
                whole = fits and not store.path.is_symlink()
            except errors.LoginUnusable:
                whole = False
            if whole:
                os.fsync(fd)  # its writer may have been killed before it did
                self._put_into_place()
                logger.warning("%s was left behind by a process that was killed; it is now %s",
                               store.new_path, store.path)
            else:
                store.new_path.unlink()
        except OSError as error:
            raise _storage_error(store.new_path, error) from error
        finally:
            os.close(fd)

    def save(self, login: tokens.Tokens, over: "tokens.Tokens | None" = None) -> None:
        """Make `login` the file's content, durably. Raises StorageError, with the old content still in place.

        A file that does not parse is kept aside as tokens.json.corrupt-<unix time>. `over`: the login that it is to
        take the place of; raises LoginUnusable when somebody who takes no lock has put another one there.
        """
        with self._writing():
            mark = self._successor_mark() if over is None else _mark_of(over)
            fd = self._create()
            try:
                _write(fd, login.to_json(mark).encode())
                if over is not None:
                    self._check_holds(mark, "and is left as it is")
                self._put_into_place()
            except BaseException:
                self._clear_away()
                raise
            finally:
                os.close(fd)

    def rehearse(self, login: tokens.Tokens) -> "Reserved":
        """Do the whole save with the login in hand, and reserve room for its successor. Raises as `save` does."""
        self.save(login, over=login)
        reserved = self.reserve()
        try:
            self._check_holds(_mark_of(login), "and is left as it is")
        except BaseException:
            reserved.discard()
            raise
        return reserved

    def reserve(self) -> "Reserved":
        """Make tokens.json.new, with room for a login. Raises StorageError."""
        with self._writing():
            mark = self._successor_mark()
            fd = self._create()
            try:
                # Spaces: should we be killed between writing the login over them and cutting off the rest,
                # what is left is still whole JSON.
                _write(fd, b" " * RESERVE)
            except BaseException:
                os.close(fd)
                self._clear_away()
                raise
            return Reserved(self, fd, mark)

    def remove(self) -> None:
        """Remove every file of the login but the lock. Raises StorageError."""
        with self._writing():
            # The left-over goes first: should we be killed in between, it must not come back as a login.
            self.store.new_path.unlink(missing_ok=True)
            for path in self.store.path.parent.iterdir():
                if path.name.startswith((self.store.refused_path.name, self.store.path.name + ".corrupt-")):
                    path.unlink(missing_ok=True)
            self.store.path.unlink(missing_ok=True)
            self._sync_folder()

    def _successor_mark(self) -> "str | None":
        """Fingerprint of the refresh token that tokens.json holds; None when there is none to succeed."""
        try:
            login = token_store.parse(self.store.read()[0], self.store.path)
        except errors.LoginUnusable as error:
            if error.state == "unreadable":
                raise errors.StorageError(str(error)) from error
            return None
        return _mark_of(login)

    def _check_holds(self, mark: "str | None", consequence: str) -> None:
        if self._successor_mark() != mark:
            raise errors.LoginUnusable("replaced", f"{self.store.path} was replaced or removed while its login was "
                                       f"refreshed, {consequence}")

    def _create(self) -> int:
        self.store.new_path.unlink(missing_ok=True)
        return folder_file.opened(self.store.new_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def _keep_corrupt(self) -> None:
        try:
            token_store.parse(self.store.read()[0], self.store.path)
        except errors.LoginUnusable as error:
            if error.state == "corrupt":
                aside = self.store.path.with_name(f"{self.store.path.name}.corrupt-{int(time.time())}")
                os.rename(self.store.path, aside)
                logger.warning("%s could not be read as a login and is kept as %s", self.store.path, aside)

    def _clear_away(self) -> None:
        with contextlib.suppress(OSError):  # the failure that brought us here is the one to tell
            self.store.new_path.unlink()

    def _put_into_place(self) -> None:
        self._keep_corrupt()
        os.rename(self.store.new_path, self.store.path)
        self._sync_folder()

    def _sync_folder(self) -> None:
        fd = os.open(self.store.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder, and need not
                raise
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _writing(self) -> "Iterator[None]":
        try:
            yield
        except OSError as error:
            raise _storage_error(self.store.path, error) from error


class Reserved:
    """tokens.json.new, open and with room: where the successor of a refresh token that is being spent goes."""

    def __init__(self, writer: TokenWriter, fd: int, mark: "str | None"):
        self._writer = writer
        self._fd = fd
        self._mark = mark

    def commit(self, login: tokens.Tokens) -> None:
        """Write, sync and rename. Raises StorageError, and is then to be called again: `login` is the only copy.

        Raises LoginUnusable when tokens.json is not what it was: whoever removes it by hand is signing out, and
        whoever puts another login there, as programs that know no lock do, wants that one kept.
        """
        store = self._writer.store
        with self._writer._writing():
            if self._fd >= 0:
                if os.fstat(self._fd).st_nlink == 0:  # somebody tidied up
                    self.close()
                    self._fd = self._writer._create()
                content = login.to_json(self._mark).encode()
                os.lseek(self._fd, 0, os.SEEK_SET)
                _write(self._fd, content)
                os.ftruncate(self._fd, len(content))
                os.fsync(self._fd)
                # From here on a kill loses nothing, so not before here may anything else be looked at.
                try:
                    self._writer._check_holds(self._mark, "so the new tokens of that login are dropped")
                except errors.LoginUnusable:
                    self.discard()
                    raise
                os.rename(store.new_path, store.path)
                self.close()
            self._writer._sync_folder()  # all that is left to do when this failed the first time

    def discard(self) -> None:
        """Nothing was spent: give the room back. Whoever takes the lock next does so if this fails."""
        self._writer._clear_away()
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _mark_of(login: tokens.Tokens) -> "str | None":
    return tokens.fingerprint(login.refresh_token) if login.refresh_token else None


def _write(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view):]
    os.fsync(fd)


def _open_lock(store: token_store.TokenStore) -> int:
    try:
        fd = folder_file.opened(store.lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.utime(fd, (0, 0))  # that we made it is no sign of the refresher's life
        return fd
    except FileExistsError:
        return folder_file.opened(store.lock_path, os.O_RDWR)


def _storage_error(path: "os.PathLike[str]", error: OSError) -> errors.StorageError:
    folder = os.path.dirname(path)
    advice = ADVICE.get(error.errno, "Let user {user} write in {folder}").format(folder=folder, user=os.geteuid())
    if isinstance(error, folder_file.NotAFile):
        path, advice = error.filename, "Move it away"
    return errors.StorageError(f"{path} cannot be written: {error.strerror}; nothing was changed. {advice}")
