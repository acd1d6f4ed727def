"""Opening the files of the token folder: regular files only, with a limit to what is read of them.

Other users may be able to put things into that folder. Opening a FIFO would block until its other
end is opened, reading from a link to /dev/zero never ends, and through a link another file would be
written.
"""

import errno
import os
import secrets
import stat
from pathlib import Path


class NotAFile(OSError):
    """The path does not name a regular file, or it names a link that may not be followed."""


def opened(path: Path, flags: int, *, follow: bool = False) -> int:
    """Return a descriptor of the regular file at `path`; a new file gets mode 0600.

    `follow`: whether `path` may be a symbolic link, as in a mounted Secret; never true for a file
    that is written or locked. Raises NotAFile, OSError.
    """
    # stat(2) first: opening a device can have effects, and without a free descriptor an open would
    # not find out that a file is missing.
    try:
        _check(path, os.stat(path, follow_symlinks=follow))
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    # O_NONBLOCK: a FIFO may have replaced the file since.
    fd = os.open(
        path,
        flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW),
        0o600,
    )
    try:
        _check(path, os.fstat(fd))
    except OSError:
        os.close(fd)
        raise
    return fd


def read(path: Path, limit: int, *, follow: bool = False) -> tuple[bytes, os.stat_result]:
    """Return the first `limit` bytes of the file, and its status. Raises as `opened` does."""
    with open(opened(path, os.O_RDONLY, follow=follow), "rb", buffering=0) as file:
        content = b""
        while len(content) < limit and (part := file.read(limit - len(content))):
            content += part
        return content, os.fstat(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Replace the file at `path` at once, but without a sync. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    fd = opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with open(fd, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        # On a full disk such files must not pile up.
        os.unlink(temporary)
        raise


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "it is a symbolic link" if stat.S_ISLNK(status.st_mode) else "it is not a file"
        raise NotAFile(errno.EINVAL, what, os.fspath(path))
