"""addresses.py: the order in which addresses are tried, and which connection is kept."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from typing import Any

import pytest
from network import black_hole, refused_port

from xaiproxy import addresses
from xaiproxy.addresses import ATTEMPT_DELAY


def at(host: str, port: int = 443) -> addresses.Address:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    target = (host, port, 0, 0) if ":" in host else (host, port)
    return family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", target


# A host of any family that this machine lacks: the kernel's error comes at once.
IMPOSSIBLE = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_UDP, "", ("127.0.0.1", 1))


@pytest.mark.parametrize(
    "found, ordered",
    [
        (["::1", "::2", "::3", "1.1.1.1", "1.1.1.2"], ["::1", "1.1.1.1", "::2", "1.1.1.2", "::3"]),
        (["1.1.1.1", "::1", "::2"], ["1.1.1.1", "::1", "::2"]),
        (["1.1.1.2", "1.1.1.1"], ["1.1.1.2", "1.1.1.1"]),
        (["::1", "::1", "1.1.1.1"], ["::1", "1.1.1.1"]),
    ],
)
def test_families_alternate_beginning_with_the_resolver_s_choice(
    found: list[str], ordered: list[str]
) -> None:
    def getaddrinfo(host: bytes, port: int, type: int) -> list[Any]:
        assert (host, port, type) == (b"upstream.test", 443, socket.SOCK_STREAM)
        return [at(one) for one in found]

    assert addresses.look_up("upstream.test", 443, getaddrinfo) == [at(one) for one in ordered]


def test_a_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(socket.gaierror):
        addresses.look_up("upstream.invalid", 443)


def test_the_first_that_answers_wins_and_no_other_is_tried() -> None:
    failed: list[Any] = []
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
    ):
        ends = [at(*one.getsockname()) for one in (first, second)]
        sock, address = addresses.connect(
            ends, 5, [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)], failed.append
        )
        with sock, first.accept()[0]:
            assert address == ends[0] and sock.gettimeout() == 5 and not failed
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        second.setblocking(False)
        with pytest.raises(BlockingIOError):
            second.accept()


def test_the_next_starts_at_once_after_a_failure() -> None:
    failed: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bad = [IMPOSSIBLE, *(at("127.0.0.1", refused_port()) for _ in range(4))]
        good = at(*listener.getsockname())
        start = time.monotonic()
        sock, address = addresses.connect([*bad, good], 5, failed=failed.append)
        sock.close()
        assert address == good and failed == bad
        assert time.monotonic() - start < ATTEMPT_DELAY


def test_the_next_starts_after_a_quarter_of_a_second_of_silence() -> None:
    failed: list[Any] = []
    with contextlib.ExitStack() as stack:
        silent = [at("127.0.0.1", stack.enter_context(black_hole())) for _ in range(2)]
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        good = at(*listener.getsockname())
        start = time.monotonic()
        sock, address = addresses.connect([*silent, good], 5, failed=failed.append)
        sock.close()
        # The silent addresses did not fail: they may be slow, so the winner only goes first from now on.
        assert address == good and failed == []
        assert 2 * ATTEMPT_DELAY <= time.monotonic() - start < 4 * ATTEMPT_DELAY


def test_a_slow_address_may_still_win() -> None:
    """It continues when the next one starts: its second SYN, after a second, is answered."""
    failed: list[Any] = []
    with socket.create_server(("127.0.0.1", 0), backlog=0) as slow, contextlib.ExitStack() as stack:
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(slow.getsockname())
        slow.settimeout(3)

        def make_room() -> None:
            with contextlib.suppress(TimeoutError):
                while True:
                    slow.accept()[0].close()

        thread = threading.Thread(target=make_room)

        def next_has_failed(address: addresses.Address) -> None:
            failed.append(address)
            thread.start()

        ends = [at(*slow.getsockname()), at("127.0.0.1", refused_port())]
        sock, address = addresses.connect(ends, 8, failed=next_has_failed)
        sock.close()
        thread.join()
        assert address == ends[0] and failed == [ends[1]]


def test_the_time_limit_is_for_all_together() -> None:
    failed: list[Any] = []
    with black_hole() as one, black_hole() as two:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            addresses.connect([at("127.0.0.1", one), at("127.0.0.1", two)], 1, failed=failed.append)
        assert 1 <= time.monotonic() - start < 3 and len(failed) == 2


def test_the_last_failure_is_raised() -> None:
    with pytest.raises(OSError) as caught:
        addresses.connect([IMPOSSIBLE, at("127.0.0.1", refused_port())], 5)
    assert caught.value.errno == errno.ECONNREFUSED
    with pytest.raises(OSError, match="no address"):
        addresses.connect([], 5)


@pytest.mark.parametrize(
    "host, loopback",
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("localhost.example", False),
        ("10.0.0.1", False),
        ("", False),
        (None, False),
    ],
)
def test_an_address_is_loopback_or_not(host: str | None, loopback: bool) -> None:
    assert addresses.is_loopback(host) is loopback
