"""The published copy of a login as a file: XAI_PROXY_PUBLISH=file:/path."""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from xaiproxy import durable_file, errors, folder_file, storage
from xaiproxy.refresher.target import check_replaceable
from xaiproxy.token_store import SIZE_LIMIT

NEW_MODE = 0o600
# Permissions that the file may keep from the one that it replaces: those of readers.
KEPT_MODE = 0o644


class PublishedFile:
    """Raises ConfigurationError for the token file, or a file beside it that belongs to it."""

    def __init__(self, path: Path, token_path: Path):
        if path.parent == token_path.parent and path.name.startswith(token_path.name):
            raise errors.ConfigurationError(
                f"XAI_PROXY_PUBLISH must not be {path}, a name of the token file and its siblings",
                "XAI_PROXY_PUBLISH",
            )
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def publish(self, content: str, issued_at: float) -> bool:
        try:
            with _locked(self._path.parent):
                return self._replace(content.encode(), issued_at)
        except OSError as error:
            advice = storage.advice(self._path, error, "XAI_PROXY_PUBLISH")
            raise errors.PublishError(
                f"{self._path} cannot be written: {error.strerror}. {advice}"
            ) from error

    def _replace(self, content: bytes, issued_at: float) -> bool:
        mode = NEW_MODE
        with contextlib.suppress(FileNotFoundError):
            held, status = folder_file.read(self._path, SIZE_LIMIT + 1)
            if held == content:
                return False
            check_replaceable(held, issued_at, self)
            if status.st_uid == os.geteuid():
                mode |= stat.S_IMODE(status.st_mode) & KEPT_MODE
        new = durable_file.NewFile(self._path.with_name(self._path.name + ".new"))
        try:
            os.fchmod(new.fd, mode)
            new.write(content)
            new.rename(self._path)
        finally:
            new.remove()
        durable_file.sync_folder(self._path.parent)
        return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other refreshers from replacing a file in between its read and its replacement."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.PublishError(f"{folder} is locked by another process") from None
        # Some file systems refuse a lock on a folder.
        except OSError:
            pass
        yield
    finally:
        os.close(fd)
