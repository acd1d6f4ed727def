"""Copies of a published token that arrive late, as the kubelets of a cluster bring them."""

from __future__ import annotations

import contextlib
import pathlib
import random
import threading
import time

from mounted_secret import MountedSecret

# Seconds from the publishing of a token to a proxy's copy of it, at random. In a cluster it is more,
# and so is LIFETIME: docs/scaling.md.
ARRIVAL = (1.0, 8.0)


class Kubelet(threading.Thread):
    """Brings what is published at `source` to each mount, at a time of its own.

    `rotations`: published versions; `arrivals`: copies
    """

    def __init__(self, source: pathlib.Path, mounts: list[MountedSecret], enough: threading.Event):
        super().__init__(daemon=True)
        self.rotations = self.arrivals = 0
        self._source, self._mounts, self._enough = source, mounts, enough
        self._content = ""

    def run(self) -> None:
        due: dict[MountedSecret, float] = {}
        while not self._enough.wait(0.05):
            now = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                if (content := self._source.read_text()) != self._content:
                    self._content = content
                    self.rotations += 1
                    # One that waits for a copy gets the newest one.
                    due = {
                        mount: due.get(mount, now + random.uniform(*ARRIVAL))
                        for mount in self._mounts
                    }
            for mount in [mount for mount, at in due.items() if at <= now]:
                del due[mount]
                mount.swap(self._content)
                self.arrivals += 1
