"""What only Linux's kernel offers, and what takes its place elsewhere (macOS).

- TCP_INFO: without it, a close that unread bytes hide is noticed when they are read, or at the next
  write, and all that was sent counts as acknowledged. dead_paths.sweep then does nothing.
- TCP_KEEPIDLE: macOS calls it TCP_KEEPALIVE.
- CLOCK_BOOTTIME: macOS's CLOCK_MONOTONIC counts suspends as well, which Linux's does not.
- PR_SET_PDEATHSIG: without it, the programs of a supervisord that was killed keep running.
- /proc: without it, the memory of this process is unknown, its start counts as now, and no file
  system counts as one of a network.

No other module uses these. None of it has been run on a Mac: tests/test_without_linux.py runs the
programs on Linux with all of this removed, and bin/check checks the types for macOS as well.
"""

import ctypes
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

_TCP_INFO: int | None = getattr(socket, "TCP_INFO", None)
HAS_TCP_INFO = _TCP_INFO is not None
_TCP_ESTABLISHED, _TCP_CLOSE = 1, 7  # the first byte of Linux's struct tcp_info
_UNACKNOWLEDGED = struct.Struct("=24xI116xI")  # of that, tcpi_unacked and tcpi_notsent_bytes
# Of that, tcpi_retransmits, tcpi_probes, and tcpi_last_ack_recv in milliseconds.
_ACKNOWLEDGEMENT = struct.Struct("=2xBB52xI")
TCP_KEEPIDLE: int = getattr(
    socket, "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"
)
_SINCE_BOOT: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def is_established(sock: socket.socket) -> bool:
    """Whether the peer has not closed, as far as the kernel knows; also if bytes are unread."""
    if _TCP_INFO is None:
        return not is_closed(sock)
    return _state(sock, _TCP_INFO) == _TCP_ESTABLISHED


def is_closed(sock: socket.socket) -> bool:
    """Whether it was reset, or both sides have closed it, even while bytes are unread."""
    if _TCP_INFO is not None:
        return _state(sock, _TCP_INFO) == _TCP_CLOSE
    try:
        sock.getpeername()
    except OSError:
        return True
    return False


def _state(sock: socket.socket, tcp_info: int) -> int:
    state: int = sock.getsockopt(socket.IPPROTO_TCP, tcp_info, 1)[0]
    return state


def unacknowledged(sock: socket.socket) -> int:
    """Unsent bytes plus unacknowledged segments; 0 once all is acknowledged."""
    if _TCP_INFO is None:
        return 0
    info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _UNACKNOWLEDGED.size)
    return sum(_UNACKNOWLEDGED.unpack(info))


def unanswered_for(sock: socket.socket) -> float:
    """Seconds since the peer's last acknowledgement while it owes one, or 0."""
    if _TCP_INFO is None:
        return 0.0
    info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _ACKNOWLEDGEMENT.size)
    retransmits, probes, last_ack = _ACKNOWLEDGEMENT.unpack(info)
    # One unanswered probe may be on its way to a peer that is alive and reads nothing; two are not.
    return last_ack / 1000 if retransmits > 0 or probes > 1 else 0.0


def uptime() -> float:
    """Return the seconds since the machine started, suspends included."""
    return time.clock_gettime(_SINCE_BOOT)


def started_at() -> float:
    """The unix time at which this process was started."""
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return time.time()
    return time.time() - uptime() + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def memory() -> tuple[int, int] | None:
    """The virtual and the resident bytes of this process, or None if they are unknown."""
    try:
        with open("/proc/self/statm", "rb") as file:
            virtual, resident = (int(pages) * _PAGE for pages in file.read().split()[:2])
    except OSError:
        return None
    return virtual, resident


_prctl: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "prctl", None)


def end_with_parent(parent: int) -> bool:
    """Have the kernel send this process SIGTERM when `parent` ends, which forked it.

    Return whether `parent` still runs. The signal comes at the end of the thread that forked.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == parent


def file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`, such as "ext4"; "" if it is unknown."""
    try:
        device = os.stat(path).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                # Of proc(5): the third field, and the first one after the separator.
                if line.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                    return line.partition(" - ")[2].split()[0]
    except OSError:
        pass
    return ""
