"""The client key of a client that xai-launch starts: made for the run, if keys are needed."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from xaiproxy import client_key_file, client_keys, errors, storage

VARIABLE = "XAIPROXY_KEY"
# Most clients require a key, even if the proxy does not.
NO_KEY = "none"
NAME = re.compile(r"launch-.+-(\d+)")  # of a client and the pid of its xai-launch


def is_needed(path: Path) -> bool:
    """Whether the proxy requires a key. `path`: the key file."""
    return os.path.lexists(path)


@contextlib.contextmanager
def key_for(client: str, path: Path, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the user's own key, or one that is removed at the end, or NO_KEY.

    `client`: as typed. `path`: the key file. Raises ConfigurationError, StorageError.
    """
    given = environ.get(VARIABLE)
    if given or not is_needed(path):
        yield given or NO_KEY
        return
    # A client of 64 characters has no room for it, but none is called so.
    name, key = f"launch-{client}-{os.getpid()}", client_key_file.new_key()
    try:
        try:
            storage.check_owner(path)
            remove_left_overs(path)
            client_key_file.add(path, name, key)
        except (errors.ConfigurationError, errors.StorageError) as error:
            raise type(error)(
                f"the proxy requires a client key, and none can be made: {error}; or set "
                f"{VARIABLE} to a key"
            ) from error
        yield key
    finally:
        # A signal may have come before it was added.
        if name in client_keys.parse(client_key_file.read(path)):
            client_key_file.remove(path, name)


def remove_left_overs(path: Path) -> None:
    """Remove the keys of every xai-launch that was killed."""
    for name in client_keys.parse(client_key_file.read(path)):
        found = NAME.fullmatch(name)
        if found and not _is_alive(int(found[1])):
            client_key_file.remove(path, name)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # Another user's process.
        return True
    return True
