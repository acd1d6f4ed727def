"""More connections than the proxy has room for: thousands a second that open and close, and
thousands that stay open.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from .loaded import Load, Memory, Row, latency
from .login import get
from .processes import await_, open_files

# SO_LINGER that turns close into a reset.
ABORT = struct.pack("ii", 1, 0)
# IP_BIND_ADDRESS_NO_PORT: the port is chosen for the destination.
NO_PORT = 24
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
SENT = [
    b"",
    b"GE",
    MODELS[:-2],
    MODELS,
    MODELS + MODELS,
    b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\0\r\n\r\n",
]
# Client timeouts (XAI_PROXY_CLIENT_TIMEOUT) that a late client waits for its turn.
LATE_TIMEOUTS = 4
# Seconds that the slowest request over an open connection may take beside a crowd.
SERVED = 1.0


def connect(port: int, host: int, timeout: float = 30) -> socket.socket:
    """Connect from one of several addresses of this machine: each has only so many ports."""
    sock = socket.socket()
    sock.settimeout(timeout)
    sock.setsockopt(socket.IPPROTO_IP, NO_PORT, 1)
    sock.bind((f"127.0.1.{1 + host % 250}", 0))
    sock.connect(("127.0.0.1", port))
    return sock


def churn(run: Load) -> Iterator[Row]:
    files, memory, count = open_files(run.proxy.pid), Memory(), 0
    end = time.monotonic() + run.counts.churn
    with run.requests() as requests:
        for sent, resets in itertools.cycle(itertools.product(SENT, (True, False))):
            with connect(run.port, count) as sock:
                sock.send(sent)
                if resets:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            count += 1
            if not count % 250:
                memory.sample(run.resident())
                if time.monotonic() > end:
                    break
    lost = requests.lost() + memory.lost()
    try:
        # Some connections to upstream are pooled.
        await_(lambda: open_files(run.proxy.pid) < files + 50, 2 * run.counts.wait)
    except TimeoutError:
        lost.append(f"{open_files(run.proxy.pid) - files} descriptors")
    yield Row(
        "churn",
        f"{count / run.counts.churn:.0f} connections a second, half of them reset, in {len(SENT)} states",
        lost,
        memory.text(),
        requests.latency(),
    )


def hold(port: int, count: int) -> None:
    """The program of a process: hold so many connections, every other one with half a head, until
    stdin ends.
    """
    held = []
    for number in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_IP, NO_PORT, 1)
        sock.bind((f"127.0.1.{1 + number % 250}", 0))
        with contextlib.suppress(BlockingIOError):
            sock.connect(("127.0.0.1", port))
        if number % 2:
            # The connection waits in the queue, or for a place in it.
            with contextlib.suppress(OSError):
                sock.send(MODELS[:-2])
        held.append(sock)
        if not number % 50:
            time.sleep(0.02)
    print("held", flush=True)
    sys.stdin.read()


class Crowd:
    """Connections without a request, held by processes that have descriptors of their own."""

    def __init__(self, run: Load, port: int, count: int):
        self._holders = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from tests.soak.crowds import hold; hold({port}, {count // 2})",
                ],
                env=run.environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            for _ in range(2)
        ]
        run.running.callback(self.close)
        for holder in self._holders:
            holder.stdout.readline()

    def close(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.communicate()


def crowd(run: Load) -> Iterator[Row]:
    """A client that sends requests all the time, and one that connects after the crowd."""
    files = open_files(run.proxy.pid)
    times: list[float] = []
    left = threading.Event()
    good = threading.Thread(target=lambda: times.extend(ask_until(left, run.port)), daemon=True)
    good.start()
    crowd = Crowd(run, run.port, run.counts.crowd)
    run.progress(
        f"{run.counts.crowd} clients, for which the proxy has {open_files(run.proxy.pid) - files} descriptors"
    )
    most, lost, waited = run.resident(), [], -1.0
    try:
        waited = connect_late(run.port, LATE_TIMEOUTS * run.counts.wait)
    except OSError as error:
        lost.append(f"a later client got no response: {error}")
    left.set()
    good.join()
    crowd.close()
    lost += [] if times else ["the open connection was closed"]
    lost += (
        [f"a request over an open connection took {max(times):.1f} s"]
        if times and max(times) > SERVED
        else []
    )
    with contextlib.suppress(TimeoutError):
        await_(lambda: open_files(run.proxy.pid) < files + 50, 2 * run.counts.wait)
    kept, status = open_files(run.proxy.pid) - files, get(run.port, "/v1/models")[0]
    lost += [f"{kept} descriptors"] if kept >= 50 else []
    lost += [f"afterwards a request failed: {status}"] if status != "200" else []
    yield Row(
        "crowd",
        f"{run.counts.crowd} clients that send nothing or half a request; a later one waits {waited:.1f} s",
        lost,
        f"{most / 1024:.0f} MiB",
        latency(times),
    )


def ask_until(left: threading.Event, port: int) -> list[float]:
    """The duration of each request over one connection; none when it was closed."""
    times = []
    with connect(port, 0) as sock, contextlib.suppress(OSError, EOFError):
        while not left.wait(0.02):
            times.append(ask(sock))
        return times
    return []


def connect_late(port: int, timeout: float) -> float:
    """The seconds from the connection attempt to the response. Raises OSError."""
    began = time.monotonic()
    with connect(port, 1, timeout) as sock:
        ask(sock)
    return time.monotonic() - began


def ask(sock: socket.socket) -> float:
    """The seconds that one request took."""
    began = time.monotonic()
    sock.sendall(MODELS)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += received(sock)
    head, _, body = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += received(sock)
    assert head.startswith(b"HTTP/1.1 200 "), head
    return time.monotonic() - began


def received(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    if not data:
        raise EOFError("the proxy closed the connection of a good client")
    return data
