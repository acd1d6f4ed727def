"""Aborts connections whose network path has failed silently (suspend, VPN, NAT), found by TCP_INFO.

TCP keep-alive does not run while bytes are unacknowledged; the kernel then retransmits for 15
minutes (tcp(7), tcp_retries2). TCP_USER_TIMEOUT would shorten that, but also ends a connection
whose peer is alive and reads nothing. That peer acknowledges every window probe, so the time since
its last acknowledgement stays short.
"""

from __future__ import annotations

import socket
import struct

import gevent

from xaiproxy.http1.connection import OPEN, Connection

INTERVAL = 15.0  # seconds between two sweeps
SILENCE = 120.0  # seconds without an acknowledgement
BATCH = 100  # connections between two yields: less than a millisecond of work
# Of Linux's struct tcp_info: tcpi_retransmits, tcpi_probes, and tcpi_last_ack_recv in milliseconds.
INFO = struct.Struct("=2xBB52xI")


def sweep(interval: float = INTERVAL, silence: float = SILENCE) -> None:
    """Abort dead connections, in an endless loop.

    Returns at once on systems without TCP_INFO (macOS).
    """
    while hasattr(socket, "TCP_INFO"):
        gevent.sleep(interval)
        connections = list(OPEN)
        for start in range(0, len(connections), BATCH):
            gevent.sleep(0)
            for connection in connections[start : start + BATCH]:
                if connection in OPEN and is_dead(connection, silence):
                    connection.abort(f"no acknowledgement for {silence:g} s")


def is_dead(connection: Connection, silence: float) -> bool:
    """Whether the peer has acknowledged neither bytes nor probes for that many seconds."""
    info = connection.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO.size)
    retransmits, probes, last_ack = INFO.unpack(info)
    # One unanswered probe may be on its way to a peer that is alive and reads nothing; two are not.
    return bool((retransmits > 0 or probes > 1) and last_ack > silence * 1000)
