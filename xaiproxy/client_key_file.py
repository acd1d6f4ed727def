"""Changing the key file: adding and removing keys, under its lock."""

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from xaiproxy import client_keys, durable_file, errors, folder_file, key_uses, storage

HEADER = "# client keys: a name and the SHA-256 of a key a line; made by xai-client-key"


def new_key() -> str:
    return "xaip_" + secrets.token_urlsafe(32)


def add(path: Path, name: str, key: str, show: Callable[[], None] = lambda: None) -> bool:
    """Add a key, and return whether it is the only one.

    `show`: called when only the rename is left to do; if it raises, nothing is changed. Raises
    UsageError, ConfigurationError, StorageError.
    """
    return not client_keys.parse(_change(path, lambda text: _added(text, name, key), show))


def remove(path: Path, name: str) -> bool:
    """Remove a key, and return whether it was the last one. Raises as `add` does."""
    _change(path, lambda text: _removed(text, name))
    left = client_keys.parse(read(path))
    # The file is no more than a memory aid.
    with contextlib.suppress(OSError, errors.StorageError):
        key_uses.save(path, {}, left.values())
    return not left


def _added(text: str, name: str, key: str) -> str:
    if not client_keys.NAME.fullmatch(name):
        raise errors.UsageError(
            f"{name!r} cannot be a name: 1 to 64 letters, digits, dots, dashes and underscores"
        )
    if name in client_keys.parse(text):
        raise errors.UsageError(
            f"{name} already has a key; remove it first, or choose another name"
        )
    made = time.strftime(client_keys.MADE, time.gmtime())
    lines = [*(text or HEADER).splitlines(), made, f"{name} {client_keys.digest(key)}", ""]
    return "\n".join(lines)


def _removed(text: str, name: str) -> str:
    if name not in client_keys.parse(text):
        raise errors.UsageError(
            f"{name} has no key; {errors.typed('xai-client-key list')} prints the names"
        )
    lines: list[str] = []
    for line in text.splitlines():
        if line.split()[:1] != [name]:
            lines.append(line)
        elif lines and client_keys.made_time(lines[-1]) is not None:
            lines.pop()
    return "\n".join([*lines, ""])


def read(path: Path) -> str:
    """Return the text of the key file, which parses; "" if there is none."""
    try:
        text = client_keys.read(path)
        client_keys.parse(text)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise errors.ConfigurationError(
            f"{path} cannot be used: {reason}; correct or remove it"
        ) from error
    return text


def _change(
    path: Path,
    edit: Callable[[str], str],
    show: Callable[[], None] = lambda: None,
) -> str:
    """Replace the key file under its lock, so that no change is lost; return its former text.

    `edit`: returns the new text, from the former one. `show`: called when only the rename is left
    to do; if it raises, nothing is changed.
    """
    outcome = "nothing was changed"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            # A mounted Secret, or a file that is kept elsewhere: the rename would replace the link.
            if path.is_symlink():
                raise errors.ConfigurationError(
                    f"{path} is a symbolic link to {os.readlink(path)!r} and is left alone; name "
                    "that file with XAI_PROXY_CLIENT_KEYS_FILE, or remove the link"
                )
            former = read(path)
            text = edit(former)
            new = durable_file.NewFile(path.with_name(path.name + ".new"))
            try:
                _keep_access(path, new.fd)
                new.write(text.encode())
                show()
                new.rename(path)
            finally:
                new.remove()
            outcome = "it was changed, but a power cut may undo that"
            durable_file.sync_folder(path.parent)
            return former
    except OSError as error:
        raise errors.StorageError(
            f"{error.filename or path} cannot be written: {error.strerror}; {outcome}. "
            f"{storage.advice(path, error, 'XAI_PROXY_CLIENT_KEYS_FILE')}"
        ) from error


def _keep_access(path: Path, fd: int) -> None:
    """Let the group of the file at `path` read the new one as well: it may be the proxy's."""
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path)
        if status.st_gid != os.fstat(fd).st_gid:
            os.fchown(fd, -1, status.st_gid)
            os.fchmod(fd, 0o600 | status.st_mode & 0o040)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = folder_file.opened(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
