"""A listening Unix socket and its file: its mode, a dead one replaced, and ours removed.

A connection needs write permission on the file. The file is created without any for other users,
gets its group and its mode, and only then does the socket listen.
"""

import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from xaiproxy import errors
from xaiproxy.addresses import UnixSocket

OWN_MODE, GROUP_MODE = 0o600, 0o660


class SocketFile(socket.socket):
    """The file is removed at the latest when the socket is closed."""

    _identity: tuple[int, int] | None = None
    _path = ""

    def bind_to(self, address: UnixSocket) -> None:
        """Bind, and listen later. Raises OSError, ConfigurationError."""
        group = None if address.group is None else group_id(address.group)
        path = str(address.path)
        # For all files of this process, and therefore only during one system call.
        umask = os.umask(0o777 & ~OWN_MODE)
        try:
            self.bind(path)
        finally:
            os.umask(umask)
        self._path, self._identity = path, _identity(os.lstat(path))
        if group is not None:
            try:
                os.chown(path, -1, group, follow_symlinks=False)
            except OSError as error:
                raise errors.ConfigurationError(
                    f"cannot give {path} to the group {address.group}: {error.strerror}; run the "
                    "proxy as a member of that group, or set XAI_PROXY_BIND to another"
                ) from error
            os.chmod(path, GROUP_MODE)

    def remove(self) -> None:
        """Remove the file, unless another one has replaced it. May be called twice."""
        if self._identity is not None:
            # While this socket is open, no other file can have the same inode number.
            with contextlib.suppress(OSError):
                if _identity(os.lstat(self._path)) == self._identity:
                    os.unlink(self._path)
            self._identity = None

    def close(self) -> None:
        self.remove()
        super().close()


def listen(address: UnixSocket, backlog: int) -> SocketFile:
    """Raises OSError, with EADDRINUSE if a process listens there; ConfigurationError."""
    listener = SocketFile(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Otherwise two processes could each take the other's new file for a dead one.
        with _locked(address.path.parent):
            try:
                listener.bind_to(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _remove_dead(address.path)
                listener.bind_to(address)
            listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def remove_dead(path: Path) -> None:
    """Remove the file of a socket that is closed, unless another process listens there by now."""
    with contextlib.suppress(OSError, errors.ConfigurationError), _locked(path.parent):
        _remove_dead(path)


def group_id(name: str) -> int:
    """`name`: or a number, as a group of a container's volume may have no name."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        if name.isdecimal():
            return int(name)
    raise errors.ConfigurationError(
        f"XAI_PROXY_BIND names the group {name!r}, which does not exist on this machine"
    )


def _remove_dead(path: Path) -> None:
    """Remove a socket on which no process listens.

    Raises OSError with EADDRINUSE if one does, and ConfigurationError if it is no socket.
    """
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise errors.ConfigurationError(
            f"{path} exists and is not a socket; remove it, or set XAI_PROXY_BIND to another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    os.unlink(path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder. Raises BlockingIOError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
