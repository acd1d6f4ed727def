"""Aborts connections whose network path has failed silently (suspend, VPN, NAT), found by TCP_INFO.

TCP keep-alive does not run while bytes are unacknowledged; the kernel then retransmits for 15
minutes (tcp(7), tcp_retries2). TCP_USER_TIMEOUT would shorten that, but also ends a connection
whose peer is alive and reads nothing. That peer acknowledges every window probe, so the time since
its last acknowledgement stays short.
"""

from __future__ import annotations

import gevent

from xaiproxy import kernel
from xaiproxy.http1.connection import OPEN

INTERVAL = 15.0  # seconds between two sweeps
SILENCE = 120.0  # seconds without an acknowledgement
BATCH = 100  # connections between two yields: less than a millisecond of work


def sweep(interval: float = INTERVAL, silence: float = SILENCE) -> None:
    """Abort dead connections, in an endless loop.

    Returns at once on systems without TCP_INFO (macOS).
    """
    while kernel.HAS_TCP_INFO:
        gevent.sleep(interval)
        connections = list(OPEN)
        for start in range(0, len(connections), BATCH):
            gevent.sleep(0)
            for connection in connections[start : start + BATCH]:
                if connection in OPEN and kernel.unanswered_for(connection.socket) > silence:
                    connection.abort(f"no acknowledgement for {silence:g} s")
