"""The token folder, and the access of other users to it and to tokens.json."""

import logging
import os
import stat

from xaiproxy import folder_file, storage
from xaiproxy.token_store import TokenStore

logger = logging.getLogger(__name__)


def prepare(store: TokenStore) -> None:
    """Make the token folder if it is missing; warn if other users may write to it.

    Raises StorageError.
    """
    folder = store.path.parent
    storage.check_owner(store.path)
    with storage.translated(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        risk = storage.risk_of(folder.stat())
    if risk:
        logger.warning("%s %s", folder, risk)


def tighten(store: TokenStore) -> str:
    """Reduce a mode of tokens.json wider than 0600; return the warning about it, or ""."""
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
