"""Networks with faults, for the processes of one test: names, name servers, dead addresses."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def refused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def black_hole(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port whose listen queue is full: the kernel drops every further SYN."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((address, port), backlog=0))
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def hosts(folder: Path, *lines: str, resolv_conf: str | None = None) -> tuple[str, ...]:
    """Return a prefix for a command, which then has these lines as its /etc/hosts."""
    files = {"hosts": "".join(line + "\n" for line in lines)}
    if resolv_conf is not None:
        files["resolv.conf"] = resolv_conf
    for name, text in files.items():
        (folder / name).write_text(text)
    mounts = " && ".join(f'mount --bind "{folder}/{name}" /etc/{name}' for name in files)
    prefix = ("unshare", "-rm", "sh", "-c", f'{mounts} && exec "$@"', "sh")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not available here")
    return prefix


class NameServer:
    """Answers every query with `addresses` after `delay` seconds, or not at all while `silent`.

    `prefix`: a prefix for a command, which then uses this name server.
    """

    def __init__(self, folder: Path, *addresses: str):
        self.addresses = list(addresses)
        self.delay = 0.0
        self.silent = False
        # The names whose IPv4 addresses were queried.
        self.asked: list[str] = []
        self.was_asked = threading.Event()
        self._answers: list[threading.Timer] = []
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for number in itertools.count(1):
            try:
                self._sock.bind((f"127.53.{number // 256}.{number % 256}", 53))
                break
            except PermissionError:
                self._sock.close()
                pytest.skip("port 53 is not available here")
            # Another test uses this address.
            except OSError:
                continue
        self.prefix = hosts(folder, resolv_conf=f"nameserver {self._sock.getsockname()[0]}\n")
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> NameServer:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._sock.sendto(b"", self._sock.getsockname())
        self._thread.join()
        for answer in self._answers:
            answer.join()
        self._sock.close()

    def _serve(self) -> None:
        """Answer queries until an empty one (RFC 1035 section 4.1)."""
        while True:
            query, client = self._sock.recvfrom(512)
            if not query:
                return
            end = query.index(0, 12) + 5
            question, (kind,) = query[12:end], struct.unpack("!H", query[end - 4 : end - 2])
            addresses = self.addresses if kind == 1 else []
            if kind == 1:
                self.asked.append(query[13 : end - 5].decode())
                self.was_asked.set()
            if self.silent:
                continue
            head = query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(addresses), 0, 0)
            records = [
                b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton(one)
                for one in addresses
            ]
            answer = threading.Timer(
                self.delay, self._sock.sendto, (b"".join([head, question, *records]), client)
            )
            self._answers.append(answer)
            answer.start()
