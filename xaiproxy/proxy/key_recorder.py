"""Records when the client keys were last used, once a minute and not while a request waits."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import gevent

from xaiproxy import client_keys, errors, key_uses

logger = logging.getLogger(__name__)

INTERVAL = 60.0  # seconds between two writes
TRIES = 5  # of the last write, with which those of other proxies may collide
PAUSE = 0.2  # seconds at most between two of these tries


class Recorder:
    def __init__(self, keys: client_keys.ClientKeys):
        self._keys = keys
        self._complained = False

    def run(self, interval: float = INTERVAL) -> None:
        while True:
            gevent.sleep(interval)
            self.save()

    def save_last(self) -> None:
        """Record the uses since the last `save`, at the end of the process."""
        for _ in range(TRIES):
            if self.save():
                return
            gevent.sleep(random.uniform(0, PAUSE))

    def save(self) -> bool:
        """Return False if another process wrote at the same moment. Raises nothing."""
        # Before the uses are read, so that no key of another proxy's seems to be unknown.
        self._keys.refresh()
        uses = dict(self._keys.last_uses)
        # A key file that is broken at the moment must not make all uses forgotten.
        if not (uses and self._keys.digests):
            return True
        # A disk may be slow, and the event loop must not wait for it.
        outcome = gevent.get_hub().threadpool.apply(
            _save, (self._keys.path, self._keys.digests, uses)
        )
        if isinstance(outcome, Exception) and not self._complained:
            logger.info("the last use of client keys cannot be recorded: %s", outcome)
        self._complained = isinstance(outcome, Exception)
        return bool(outcome)


def _save(
    keys_file: Path, digests: frozenset[str], uses: dict[str, float]
) -> bool | OSError | errors.StorageError:
    """Return what key_uses.save returns or raises: gevent logs the traceback of what is raised."""
    try:
        return key_uses.save(keys_file, uses, digests)
    except (OSError, errors.StorageError) as error:
        return error
