"""The folder of the login and the client keys: its owners, and advice about errors of writing."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from xaiproxy import errors, folder_file

FULL = "Make room on the disk that {folder} is on"
NO_LOCKS = (
    "The file system of {folder} has no locks: mount it with locks (NFS version 4 has them), "
    "or {elsewhere}"
)
OPEN_FILES = "Raise the limit of open files"
ADVICE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: "Mount {folder} writable, or {elsewhere}",
    errno.EBUSY: (
        "Mount {folder} itself, not the file in it: a file that is a mount cannot be replaced"
    ),
    errno.ENOLCK: NO_LOCKS,
    errno.EOPNOTSUPP: NO_LOCKS,
    errno.ENOSYS: NO_LOCKS,
    errno.EEXIST: "Something else is there: move {place} away",
    errno.EISDIR: "It is a folder: move {place} away",
    errno.EINVAL: "Something else is there: move {place} away",
    errno.ELOOP: "It is a symbolic link: remove {place}",
    errno.ENOTDIR: "A part of the path is not a folder: move that away, or {elsewhere}",
    errno.ENOENT: "Make the folder {folder}",
    errno.ENAMETOOLONG: "Its path is too long: {elsewhere}",
    errno.EMFILE: OPEN_FILES,
    errno.ENFILE: OPEN_FILES,
    errno.ESTALE: "Mount the file system of {folder} anew",
}


def check_owner(file: Path) -> None:
    """Raise StorageError if root would make files that another user's service cannot open.

    `file`: token file or key file. The service is its owner's; while it is missing, the owner's of
    its folder, or of the folder in which that is to be made.
    """
    if os.geteuid() != 0:
        return
    place = next((place for place in (file, *file.parents) if os.path.lexists(place)), file)
    owner = os.lstat(place).st_uid
    if owner != 0:
        raise errors.StorageError(
            f"{place} belongs to user {owner}, and this is user 0 (root), whose files would be "
            f"closed to that user; nothing was changed. Run the same as user {owner}, as with "
            f"`docker exec -u {owner}` or `sudo -u '#{owner}'`"
        )


def risk_of(folder: os.stat_result) -> str:
    """Return which other users could replace files in a folder, and what to do; "" if none."""
    if folder.st_uid not in (0, os.geteuid()):
        return (
            f"belongs to user {folder.st_uid}, who could replace the login; run as that user"
            f"{or_chown('it')}"
        )
    if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
        return "may be written by other users, who could then replace the login; chmod go-w it"
    return ""


def or_chown(what: str) -> str:
    """Return the advice to chown; "" for root, whose files the service could not open."""
    return f", or chown {what} to user {os.geteuid()}" if os.geteuid() else ""


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise a StorageError that names `path` in place of an OSError from inside."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error, folder_file.NotAFile) else path
        raise errors.StorageError(
            f"{name} cannot be written: {error.strerror}. {advice(Path(name), error)}"
        ) from error


def advice(path: os.PathLike[str], error: OSError, setting: str = "XAI_PROXY_TOKEN_PATH") -> str:
    """Return what to do about an error in writing `path`: a sentence without its full stop.

    `setting`: setting that names the file.
    """
    named = [
        name for name in (error.filename2, error.filename) if isinstance(name, (str, os.PathLike))
    ]
    place, folder, user = Path(named[0] if named else path), Path(path).parent, os.geteuid()
    elsewhere = f"set {setting} to a file elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM):
        return _permit(place, user, setting)
    known = ADVICE.get(error.errno or 0, "Check {folder} and the disk that it is on")
    return known.format(place=place, folder=folder, elsewhere=elsewhere)


def _permit(place: Path, user: int, setting: str) -> str:
    try:
        owner = os.lstat(place).st_uid
    except OSError:
        # The file is missing, and its folder does not permit making it. With HOME=/ that is /.
        if place.parent == Path("/"):
            return (
                f"User {user} cannot write in /: set {setting} to a file in a folder where that "
                "user can"
            )
        return f"Let user {user} write in {place.parent}"
    if owner != user:
        return (
            f"{place} belongs to user {owner}, and this is user {user}: run as user {owner}, "
            f"or chown it to user {user}"
        )
    return f"Let user {user} write {place}, and in {place.parent}"
