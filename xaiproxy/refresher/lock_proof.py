"""Proof that the token folder's lock excludes refreshers on other machines.

Some network and FUSE file systems grant a flock on each machine, or at each mount, without asking
the others. On such a file system the holder writes a random text into the lock file and reads it
again after PROOF_TIME, before it writes to the folder or spends the refresh token: another holder
has written its own by then. The text stays until the refresh has ended, so that a holder that comes
later finds it as well.
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator

from xaiproxy import errors, folder_file, kernel, storage
from xaiproxy.token_store import ALIVE, TokenStore

PROOF_TIME = 2.0  # seconds; longer than a FUSE mount caches attributes
SIZE_LIMIT = 512  # bytes of the text: unix seconds, random digits, instance
NETWORK = re.compile(
    r"fuse(\..+)?|nfs4?|cifs|smb3|smbfs|9p|afs|ceph|gfs2|glusterfs|lustre|ocfs2|virtiofs|vboxsf"
)
MARK = re.compile(r"([0-9]{1,12}) [0-9a-f]{32} ([!-~]{1,253})")


@contextlib.contextmanager
def proven(
    store: TokenStore,
    instance: str,
    pause: Callable[[float], object] = time.sleep,
    now: Callable[[], float] = time.time,
) -> Iterator[None]:
    """Hold the proof, with the lock held. Raises NotClaimed, and StorageError.

    `instance`: name of this pod or machine. What a killed process of its own has left is ignored.
    """
    kind = kernel.file_system(store.path.parent)
    if not NETWORK.fullmatch(kind):
        yield
        return
    mark = f"{int(now())} {secrets.token_hex(16)} {instance}"
    try:
        with storage.translated(store.lock_path):
            former = MARK.fullmatch(_read(store))
            if former and former[2] != instance and abs(now() - int(former[1])) < ALIVE:
                raise _unreal(store, kind, former[2])
            _write(store, mark)
        pause(PROOF_TIME)
        with storage.translated(store.lock_path):
            found = _read(store)
        if found != mark:
            other = MARK.fullmatch(found)
            raise _unreal(store, kind, other[2] if other else "unknown")
        yield
    finally:
        # If it fails, the text counts as that of a killed process.
        with contextlib.suppress(OSError):
            if _read(store) == mark:
                _write(store, "")


def _read(store: TokenStore) -> str:
    # It is opened anew each time, because NFS then asks the server.
    return folder_file.read(store.lock_path, SIZE_LIMIT)[0].decode("ascii", "replace")


def _write(store: TokenStore, text: str) -> None:
    fd = folder_file.opened(store.lock_path, os.O_WRONLY)
    try:
        os.pwrite(fd, text.encode("ascii", "replace"), 0)
        os.ftruncate(fd, len(text))
        os.fsync(fd)
    finally:
        os.close(fd)


def _unreal(store: TokenStore, kind: str, other: str) -> errors.NotClaimed:
    return errors.NotClaimed(
        f"another process (on {other}) holds {store.lock_path} at the same time: its file system "
        f"({kind}) does not keep locks between machines or mounts; run one refresher only, or put "
        "the token folder elsewhere"
    )
