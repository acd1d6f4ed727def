"""Three hosts and a router that can drop packets without an error: network namespaces.

This process creates them and enters them to start processes and open sockets there. A namespace
ends with its last socket, process and `Namespace`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

# From sched.h: os.unshare and os.setns need Python 3.12.
CLONE_NEWNET = 0x40000000
# In bytes: the minimum, the default and the maximum of a socket.
BUFFER = "4096 131072 1048576"
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


class Namespace:
    def __init__(self) -> None:
        before = _current()
        try:
            _call("unshare", CLONE_NEWNET)
            self.fd = _current()
            _call("setns", before, CLONE_NEWNET)
        finally:
            os.close(before)

    def close(self) -> None:
        os.close(self.fd)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the namespace with this thread and every socket and process that it creates."""
        before = _current()
        try:
            _call("setns", self.fd, CLONE_NEWNET)
            yield
        finally:
            _call("setns", before, CLONE_NEWNET)
            os.close(before)

    def ip(self, *commands: str) -> None:
        """Run commands of ip(8) in the namespace."""
        with self.entered():
            subprocess.run(
                ["ip", "-batch", "-"],
                input="\n".join(commands),
                text=True,
                check=True,
                capture_output=True,
            )

    def set(self, name: str, value: object) -> None:
        """Set a sysctl under net.ipv4."""
        with self.entered():
            Path("/proc/sys/net/ipv4", name).write_text(str(value))


class Network:
    """`client`, `proxy` and `upstream`, at the addresses of ADDRESSES, connected by a router."""

    ADDRESSES: ClassVar[dict[str, str]] = {
        "client": "10.0.1.2",
        "proxy": "10.0.2.2",
        "upstream": "10.0.3.2",
    }

    def __init__(self) -> None:
        self._router = Namespace()
        self.client, self.proxy, self.upstream = Namespace(), Namespace(), Namespace()
        self._dropped: list[str] = []
        for name, address in self.ADDRESSES.items():
            host = getattr(self, name)
            gateway = address[:-1] + "1"
            self._router.ip(
                f"link add to-{name} type veth peer name eth0 netns {host.path}",
                f"address add {gateway}/24 dev to-{name}",
                f"link set to-{name} up",
            )
            host.ip(
                "link set lo up",
                f"address add {address}/24 dev eth0",
                "link set eth0 up",
                f"route add default via {gateway}",
            )
            host.set("tcp_rmem", BUFFER)
            host.set("tcp_wmem", BUFFER)
        self._router.set("ip_forward", 1)

    def close(self) -> None:
        for namespace in (self._router, self.client, self.proxy, self.upstream):
            namespace.close()

    def cut(self, name: str, port: int | None = None, action: str = "blackhole") -> None:
        """Drop all packets from and to a host, or one port of it.

        `action`: "blackhole", which drops packets without an ICMP error, or "unreachable", which
        sends one.
        """
        rules = f"from {self.ADDRESSES[name]}", f"to {self.ADDRESSES[name]}"
        if port is not None:
            rules = f"{rules[0]} ipproto tcp sport {port}", f"{rules[1]} ipproto tcp dport {port}"
        for rule in rules:
            self._router.ip(f"rule add {rule} {action}")
            self._dropped.append(f"{rule} {action}")

    def restore(self) -> None:
        while self._dropped:
            self._router.ip(f"rule delete {self._dropped.pop()}")


def _works() -> bool:
    try:
        Network().close()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


needs_network = pytest.mark.skipif(
    shutil.which("ip") is None or not _works(),
    reason=("ip (iproute2) is not installed, or may create no network namespaces here"),
)
