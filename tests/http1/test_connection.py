"""A connection that waits before it reads, in a greenlet or in the hub, and TLS in memory over it."""

import contextlib
import itertools
import os
import select
import socket
import ssl
import struct
import time
import types
from collections.abc import Iterator

import gevent
import gevent.socket
import pytest
from scripted_upstream import make_certificate

from xaiproxy import trust
from xaiproxy.egress import Egress
from xaiproxy.http1.connection import BURST, OPEN, READ, Connection, DeadPath
from xaiproxy.http1.message_head import Malformed, TooLong
from xaiproxy.http1.tls import TLSConnection
from xaiproxy.http1.tunnel import Tunnel

# SO_LINGER that turns close() into a reset.
RESET = struct.pack("ii", 1, 0)
# In seconds: a timeout that is meant to expire.
SOON = 0.05
HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: y\r\n\r\n"
Pair = "tuple[socket.socket, socket.socket]"
# More bytes than any socket buffers hold.
LONG = os.urandom(8_000_000)


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    with gevent.Timeout(20):
        yield


@contextlib.contextmanager
def connected(pair: Pair) -> Iterator[tuple[Connection, gevent.socket.socket]]:
    """A connection and its peer, which is a gevent socket."""
    ours, theirs = pair
    connection = Connection(ours)
    with contextlib.closing(connection), gevent.socket.socket(fileno=theirs.detach()) as peer:
        yield connection, peer


@pytest.fixture
def pair() -> Iterator[tuple[Connection, gevent.socket.socket]]:
    with connected(socket.socketpair()) as both:
        yield both


def tcp_pair() -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        return listener.accept()[0], theirs


@pytest.fixture
def tcp() -> Iterator[tuple[Connection, gevent.socket.socket]]:
    with connected(tcp_pair()) as both:
        yield both


def hold_up(seconds: float) -> None:
    """Block the event loop for `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def received(peer: gevent.socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (part := peer.recv(size - len(data))):
        data += part
    return bytes(data)


# one read


def test_receive_returns_what_has_arrived_and_never_waits(pair):
    connection, peer = pair
    with pytest.raises(BlockingIOError):
        connection.receive()
    peer.sendall(b"hello")
    assert connection.receive() == b"hello"
    peer.close()
    assert connection.receive() == b""


def test_a_read_that_waits_lets_other_greenlets_run(pair):
    connection, peer = pair
    reading = gevent.spawn(connection.recv, 5)
    gevent.sleep()
    assert not reading.ready()
    peer.sendall(b"hello")
    assert reading.get() == b"hello"
    peer.close()
    assert connection.recv(None) == b""
    # EOF can be read again.
    assert connection.recv(5) == b""


def test_a_read_returns_unread_bytes_first_and_without_waiting(pair):
    connection, peer = pair
    connection.unread = b"hello"
    assert connection.recv(0) == b"hello" and connection.unread == b""
    peer.sendall(b"world")
    assert connection.recv(5) == b"world"


@pytest.mark.parametrize("limit", [SOON, 0, -SOON])
def test_a_read_times_out(pair, limit):
    connection, peer = pair
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        connection.recv(limit)
    assert max(limit, 0) <= time.monotonic() - began < 1
    peer.sendall(b"hello")
    # The timeout does not affect the next read.
    assert connection.recv(5) == b"hello"
    gevent.sleep(SOON)


def test_work_before_a_wait_does_not_shorten_its_timeout(pair):
    """The loop's clock stands still within a turn.

    A long turn must not shorten the waits that begin in it.
    """
    connection, peer = pair

    def wait_after_work() -> float:
        connection.recv(5)
        hold_up(1)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            connection.recv(1.5)
        return time.monotonic() - began

    waiting = gevent.spawn(wait_after_work)
    gevent.sleep()
    peer.sendall(b"hello")
    assert 1.5 <= waiting.get() < 2.5


def test_a_read_returns_bytes_that_arrived_before_its_timeout(pair):
    """A blocked loop sees the bytes and the expired timer in the same turn."""
    connection, peer = pair
    reading = gevent.spawn(connection.recv, SOON)
    gevent.sleep()
    peer.sendall(b"hello")
    hold_up(2 * SOON)
    assert reading.get() == b"hello"


def test_a_read_keeps_waiting_after_another_reader_took_its_bytes(pair):
    """The watcher also fires for bytes that a callback in the hub reads before the greenlet runs."""
    connection, peer = pair
    reading = gevent.spawn(connection.recv, 5)
    gevent.sleep()
    peer.sendall(b"first")
    first = connection.socket.recv(100)
    peer.sendall(b"second")
    assert (first, reading.get()) == (b"first", b"second")


def test_an_exception_thrown_into_a_waiting_read_stops_its_watcher(pair):
    connection, peer = pair

    def read() -> bytes:
        with pytest.raises(ZeroDivisionError):
            connection.recv(5)
        assert not connection.readable.active
        return connection.recv(5)

    reading = gevent.spawn(read)
    gevent.sleep()
    gevent.get_hub().loop.run_callback(reading.throw, ZeroDivisionError)
    peer.sendall(b"hello")
    assert reading.get() == b"hello"


def test_a_gevent_timeout_interrupts_a_read(pair):
    with gevent.Timeout(SOON, False):
        pair[0].recv(None)
        pytest.fail("something was read")
    assert not pair[0].readable.active


def test_a_reset_raises_connection_reset_error(tcp):
    connection, peer = tcp
    peer.sendall(b"GET / HTTP/1.1\r\nHost: lo")
    assert connection.recv(5)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    with pytest.raises(ConnectionResetError):
        connection.recv(5)


def test_a_connection_may_be_closed_twice(pair):
    connection, peer = pair
    assert connection.writable
    connection.close()
    connection.close()
    assert peer.recv(1) == b""


# a head


def send_pieces(
    connection: Connection, peer: gevent.socket.socket, data: bytes, size: int
) -> gevent.Greenlet:
    """Send `size` bytes at a time, each piece once the previous one has been read."""

    def send() -> None:
        for at in range(0, len(data), size):
            peer.sendall(data[at : at + size])
            while select.select([connection.socket], [], [], 0)[0]:
                gevent.sleep()

    return gevent.spawn(send)


@pytest.mark.parametrize("size", [1, 2, 7, len(HEAD) - 1, len(HEAD), len(HEAD) + 3, 1000])
def test_a_head_may_arrive_in_any_pieces_and_the_bytes_after_it_stay(pair, size):
    connection, peer = pair
    for following in (b"", b"body", HEAD):
        sender = send_pieces(connection, peer, HEAD + following, size)
        assert connection.recv_head(1000, 5) == HEAD
        rest = b""
        while len(rest) < len(following):
            rest += connection.recv(5)
        assert rest == following and connection.unread == b""
        sender.join()


def test_heads_that_arrive_together_are_read_one_by_one(pair):
    connection, peer = pair
    peer.sendall(HEAD * 3)
    assert [connection.recv_head(1000, 5) for _ in range(3)] == [HEAD] * 3
    assert connection.unread == b""


def test_a_head_of_the_maximum_length_is_read_and_a_longer_one_raises(pair):
    connection, peer = pair
    for size in (1448, 1 << 20):
        sender = send_pieces(connection, peer, b"x" * 65532 + b"\r\n\r\n", size)
        assert len(connection.recv_head(65536, 5)) == 65536
        sender.join()
    for data in (b"x" * 65533 + b"\r\n\r\n", b"x" * 65537):
        with connected(socket.socketpair()) as (connection, peer):
            sender = send_pieces(connection, peer, data, 1448)
            with pytest.raises(TooLong):
                connection.recv_head(65536, 5)
            sender.join()


def test_the_limit_holds_for_a_head_that_arrives_in_one_piece(pair):
    connection, _ = pair
    connection.unread = HEAD
    assert connection.recv_head(len(HEAD), 5) == HEAD
    connection.unread = HEAD
    with pytest.raises(TooLong):
        connection.recv_head(len(HEAD) - 1, 5)


def test_a_head_that_is_too_long_is_read_one_read_past_the_limit_at_most(pair):
    connection, peer = pair
    sending = gevent.spawn(peer.sendall, b"x" * 2_000_000)
    with pytest.raises(TooLong):
        connection.recv_head(65536, 5)
    left = 0
    with contextlib.suppress(TimeoutError):
        while True:
            left += len(connection.recv(SOON))
    assert left >= 2_000_000 - 65536 - READ
    sending.get()


def test_a_bare_lf_is_refused_before_the_head_is_complete(pair):
    pair[1].sendall(b"GET / HTTP/1.1\n")
    with pytest.raises(Malformed):
        pair[0].recv_head(1000, 5)


def test_eof_before_a_head_returns_no_bytes_and_eof_within_one_raises(pair):
    connection, peer = pair
    peer.close()
    assert connection.recv_head(1000, 5) == b""
    for size in range(1, len(HEAD)):
        with connected(socket.socketpair()) as (connection, peer):
            peer.sendall(HEAD[:size])
            peer.close()
            with pytest.raises(EOFError):
                connection.recv_head(1000, 5)


def test_a_trickle_of_bytes_does_not_extend_the_timeout_of_a_head(pair):
    connection, peer = pair

    def dribble() -> None:
        while True:
            peer.sendall(b"x")
            gevent.sleep(SOON / 5)

    dribbling = gevent.spawn(dribble)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        connection.recv_head(1000, SOON * 2)
    assert SOON * 2 <= time.monotonic() - began < 1
    dribbling.kill()


# writing


def test_a_slow_peer_receives_everything(pair):
    connection, peer = pair
    sending = gevent.spawn(connection.send_all, LONG, 5)
    gevent.sleep()
    assert not sending.ready() and connection.send(b"x") == 0
    assert received(peer, len(LONG)) == LONG
    sending.get()


def test_the_timeout_of_a_write_restarts_whenever_the_peer_reads(pair):
    connection, peer = pair
    sending = gevent.spawn(connection.send_all, LONG, 0.5)
    began = time.monotonic()
    # That is longer than the timeout, but the peer reads all the time.
    while time.monotonic() - began < 0.7:
        peer.recv(100_000)
        gevent.sleep(SOON / 2)
    assert not sending.ready()
    with pytest.raises(TimeoutError):
        sending.get()
    assert time.monotonic() - began > 0.9 and not connection.writable.active


def test_a_write_to_a_peer_that_reset_raises_os_error(tcp):
    connection, peer = tcp
    sending = gevent.spawn(connection.send_all, LONG, 5)
    gevent.sleep()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    with pytest.raises(OSError):
        sending.get()


def test_sending_nothing_does_not_wait(pair):
    pair[0].send_all(b"", 0)
    assert select.select([pair[1]], [], [], 0)[0] == []


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("certificates"), "localhost")


@pytest.fixture(scope="module")
def context(certificates) -> ssl.SSLContext:
    return trust.context(Egress(ca_file=str(certificates[0])))


class Peer:
    """A TLS server on a plain gevent socket, which can hold its records back."""

    def __init__(self, sock: gevent.socket.socket, server: ssl.SSLContext):
        self.socket = sock
        self._in, self.out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = server.wrap_bio(self._in, self.out, server_side=True)

    def handshake(self) -> None:
        self._with_reads(self.tls.do_handshake)
        self.flush()

    def _with_reads(self, step):
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self.flush()
                data = self.socket.recv(READ)
                if not data:
                    raise EOFError from None
                self._in.write(data)

    def recv(self, size: int) -> bytes:
        return self._with_reads(lambda: self.tls.read(size))

    def records(self, *contents: bytes) -> bytes:
        """Encrypt each of `contents` into records of its own, and return them unsent."""
        for content in contents:
            self.tls.write(content)
        return self.out.read()

    def flush(self) -> None:
        self.socket.sendall(self.out.read())

    def sendall(self, data: bytes) -> None:
        self.socket.sendall(self.records(data))

    def close_notify(self) -> bytes:
        # unwrap() would wait for the peer's close_notify.
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self.out.read()


@contextlib.contextmanager
def tls_over(
    connection: Connection,
    peer: gevent.socket.socket,
    context: ssl.SSLContext,
    server: ssl.SSLContext,
    session: ssl.SSLSession | None = None,
) -> Iterator[tuple[TLSConnection, Peer]]:
    ours, theirs = TLSConnection(connection, context, "localhost", session), Peer(peer, server)
    with contextlib.closing(ours):
        handshake = gevent.spawn(theirs.handshake)
        ours.handshake()
        handshake.get()
        yield ours, theirs


@pytest.fixture
def tls(tcp, context, certificates) -> Iterator[tuple[TLSConnection, Peer]]:
    with tls_over(*tcp, context, certificates[1]) as both:
        yield both


def test_tls_carries_bytes_both_ways(tls):
    ours, theirs = tls
    assert ours.send(b"hello") == 5 and theirs.recv(10) == b"hello"
    theirs.sendall(b"world")
    assert ours.recv(5) == b"world"


def test_tls_records_may_be_split_anywhere(tls):
    ours, theirs = tls
    # This reads the session tickets after the handshake, so that each read below returns one
    # record.
    ours.send(b"x")
    data = theirs.records(b"hello", b"world")
    for byte in range(len(data)):
        theirs.socket.sendall(data[byte : byte + 1])
        ours.wait(ours.readable, 5)
        try:
            came = ours.receive()
        except BlockingIOError:
            continue
        assert (came, byte) in ((b"hello", len(data) // 2 - 1), (b"world", len(data) - 1))
        data = data if came == b"hello" else b""
    assert not data


def test_one_read_returns_all_records_that_arrived_together(tls):
    """No poll would report a record that is left in OpenSSL."""
    ours, theirs = tls
    theirs.socket.sendall(theirs.records(*[b"%04d" % number for number in range(500)]))
    assert ours.recv(5) == b"".join(b"%04d" % number for number in range(500))
    with pytest.raises(BlockingIOError):
        ours.receive()


def test_a_complete_record_is_returned_before_the_next_one_is_complete(tls):
    ours, theirs = tls
    first, second = theirs.records(b"first"), theirs.records(b"second")
    theirs.socket.sendall(first + second[:10])
    assert ours.recv(5) == b"first"
    reading = gevent.spawn(ours.recv, 5)
    gevent.sleep(SOON)
    assert not reading.ready()
    theirs.socket.sendall(second[10:])
    assert reading.get() == b"second"


def test_records_of_the_largest_size_are_read(tls):
    ours, theirs = tls
    theirs.sendall(LONG[:16384])
    assert ours.recv(5) == LONG[:16384]
    sending = gevent.spawn(theirs.sendall, LONG)
    came = bytearray()
    while len(came) < len(LONG):
        came += ours.recv(5)
    assert came == LONG
    sending.get()


@pytest.mark.parametrize("size", [100, 16383, 16384, 16385, 65536, 65537, 1_000_000])
def test_everything_sent_over_tls_arrives(tls, size):
    ours, theirs = tls
    sending = gevent.spawn(ours.send_all, LONG[:size], 5)
    came = bytearray()
    while len(came) < size:
        came += theirs.recv(READ)
    sending.get()
    assert came == LONG[:size] and not ours.holds_back


def test_tls_applies_back_pressure(tls):
    """The connection keeps what the kernel has not taken, at most one write, and sends it first."""
    ours, theirs = tls
    taken = 0
    while sent := ours.send(LONG[taken : taken + 100_000]):
        taken += sent
    assert ours.holds_back and ours.send(b"more") == 0
    with pytest.raises(TimeoutError):
        # This sends only what the connection holds back.
        ours.send_all(b"", SOON)
    sending = gevent.spawn(ours.send_all, LONG[taken:], 5)
    came = bytearray()
    while len(came) < len(LONG):
        came += theirs.recv(READ)
    assert came == LONG
    sending.get()
    assert not ours.holds_back


def test_a_read_over_tls_times_out(tls):
    ours, theirs = tls
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ours.recv(SOON)
    assert SOON <= time.monotonic() - began < 1
    theirs.sendall(b"hello")
    assert ours.recv(5) == b"hello"


def test_close_notify_is_a_clean_end(tls):
    ours, theirs = tls
    theirs.socket.sendall(theirs.records(b"all") + theirs.close_notify())
    theirs.socket.shutdown(socket.SHUT_WR)
    assert (ours.recv(5), ours.recv(5), ours.recv(5)) == (b"all", b"", b"")


def test_eof_between_records_without_close_notify_raises(tls):
    ours, theirs = tls
    theirs.sendall(b"some")
    theirs.socket.shutdown(socket.SHUT_WR)
    assert ours.recv(5) == b"some"
    with pytest.raises(ssl.SSLError, match="(?i)eof"):
        ours.recv(5)


def test_eof_within_a_record_raises(tls):
    ours, theirs = tls
    theirs.socket.sendall(theirs.records(b"some")[:-1])
    theirs.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(ssl.SSLError, match="(?i)eof"):
        ours.recv(5)


def test_a_record_changed_in_transit_raises(tls):
    ours, theirs = tls
    data = bytearray(theirs.records(b"some"))
    data[-1] ^= 1
    theirs.socket.sendall(data)
    with pytest.raises(ssl.SSLError):
        ours.recv(5)


def test_bytes_after_close_notify_are_ignored(tls):
    """OpenSSL never takes them: a loop that reads until they are gone would hang the process."""
    ours, theirs = tls
    theirs.socket.sendall(theirs.records(b"all") + theirs.close_notify() + b"garbage")
    assert ours.recv(5) == b"all"
    theirs.socket.sendall(b"more")
    assert ours.recv(5) == b""


def test_a_head_is_read_over_tls(tls):
    ours, theirs = tls
    theirs.sendall(HEAD + b"body")
    assert ours.recv_head(1000, 5) == HEAD and ours.recv(5) == b"body"


def test_an_untrusted_certificate_and_a_wrong_host_name_are_refused(tcp, certificates, context):
    for trusting, host in ((ssl.create_default_context(), "localhost"), (context, "other.example")):
        with connected(tcp_pair()) as (connection, peer):

            def refused(peer: gevent.socket.socket = peer) -> None:
                with pytest.raises((OSError, EOFError)):
                    Peer(peer, certificates[1]).handshake()
                    peer.recv(1) or pytest.fail("the client completed the handshake")
                    raise EOFError

            handshake = gevent.spawn(refused)
            with pytest.raises(ssl.SSLCertVerificationError):
                TLSConnection(connection, trusting, host).handshake()
            connection.close()
            handshake.get()


def test_a_peer_that_closes_during_the_handshake_raises(tcp, context):
    connection, peer = tcp
    handshake = gevent.spawn(TLSConnection(connection, context, "localhost").handshake)
    assert peer.recv(READ)
    peer.close()
    with pytest.raises((EOFError, ConnectionResetError)):
        handshake.get()


def test_a_peer_without_tls_raises_ssl_error(tcp, context):
    connection, peer = tcp
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(ssl.SSLError):
        TLSConnection(connection, context, "localhost").handshake()


def test_a_tls_session_is_resumed(certificates, context):
    session = None
    for resumed in (False, True):
        with (
            connected(tcp_pair()) as both,
            tls_over(*both, context, certificates[1], session) as (ours, peer),
        ):
            peer.sendall(b"answer")
            assert ours.recv(5) == b"answer"
            session = ours.session
            assert peer.tls.session_reused is resumed


def test_tls_runs_inside_tls(tls, context, certificates):
    """The origin's TLS is the content of that of a proxy that speaks TLS itself."""
    outer, proxy = tls

    class TunnelSocket:
        """The proxy's side of the tunnel, as a socket."""

        recv = staticmethod(proxy.recv)
        sendall = staticmethod(proxy.sendall)

    with tls_over(outer, TunnelSocket, context, certificates[1]) as (ours, theirs):
        assert ours.send(b"hello") == 5 and theirs.recv(10) == b"hello"
        proxy.socket.sendall(proxy.records(theirs.records(b"one"), theirs.records(b"two")))
        came = ours.recv(5)
        assert came == b"onetwo"
        taken = 0
        while not outer.holds_back:
            taken += ours.send(LONG[taken : taken + 1000])
        with pytest.raises(TimeoutError):
            # This sends only what the outer connection holds back.
            ours.send_all(b"", SOON)
        sending = gevent.spawn(ours.send_all, LONG[taken:], 5)
        came = bytearray()
        while len(came) < len(LONG):
            came += theirs.recv(READ)
        assert came == LONG
        sending.get()
        assert not ours.holds_back
        proxy.socket.sendall(proxy.records(theirs.close_notify()))
        assert ours.recv(5) == b""


# a dead path


@pytest.fixture(params=["plain", "tls"])
def both(request, tcp):
    """A connection, the TCP connection under it that OPEN holds, and the peer."""
    tcp[1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours, theirs = request.getfixturevalue("tls") if request.param == "tls" else tcp
    return ours, tcp[0], theirs


def test_bytes_that_arrived_are_read_before_an_abort_raises(both):
    ours, inner, theirs = both
    theirs.sendall(b"last words")
    assert inner in OPEN
    inner.abort("nothing is heard of it")
    assert inner not in OPEN
    assert ours.recv(5) == b"last words"
    for use in (lambda: ours.recv(5), ours.receive, lambda: ours.send(b"x"), lambda: ours.recv(5)):
        with pytest.raises(DeadPath, match="nothing is heard of it"):
            use()


def test_abort_wakes_readers_and_writers(both):
    ours, inner, _ = both
    waiting = [gevent.spawn(ours.recv, None), gevent.spawn(ours.send_all, LONG)]
    gevent.sleep(SOON)
    assert not any(greenlet.ready() for greenlet in waiting)
    inner.abort("nothing is heard of it")
    for greenlet in waiting:
        with pytest.raises(DeadPath):
            greenlet.get()


def test_a_tcp_timeout_of_the_kernel_raises_dead_path(both):
    """The kernel reports it once; the next read meets EOF."""
    ours, inner, _ = both
    inner.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)
    # The peer reads nothing, so the send buffer fills up.
    while ours.send(bytes(1 << 20)):
        pass
    for _ in range(2):
        with pytest.raises(DeadPath, match="TCP gave up: Connection timed out"):
            ours.recv(5)


def test_open_lists_tcp_connections_until_they_are_closed(pair, tcp, context):
    connection, _ = tcp
    # A UNIX socket has no network path.
    assert connection in OPEN and pair[0] not in OPEN
    over = TLSConnection(connection, context, "localhost")
    assert over not in OPEN
    over.close()
    assert connection not in OPEN


# fairness


class Endless(Connection):
    """A connection on which every read is full, which no real peer reliably causes."""

    def receive(self) -> bytes:
        return bytes(READ)


def test_a_peer_that_never_pauses_does_not_starve_other_greenlets():
    ours, theirs = socket.socketpair()
    # The socket stays readable.
    theirs.send(b"x")
    connection, reads, turns = Endless(ours), 0, []

    def take_turns() -> None:
        while reads < 10 * BURST:
            turns.append(reads)
            gevent.sleep(0)
        turns.append(reads)

    other = gevent.spawn(take_turns)
    while reads < 10 * BURST:
        assert len(connection.recv(5)) == READ
        reads += 1
    other.join()
    theirs.close()
    connection.close()
    assert max(later - earlier for earlier, later in itertools.pairwise(turns)) <= BURST


def test_a_head_can_be_awaited_again_after_a_timeout(pair):
    connection, peer = pair
    peer.send(HEAD[:10])
    with pytest.raises(TimeoutError):
        connection.recv_head(1000, 0.05)
    peer.send(HEAD[10:])
    assert connection.recv_head(1000, 5) == HEAD


def test_a_tunnel_flushes_what_tls_holds_back(tls):
    """These are the last records, which the kernel did not take at once: no later bytes push them."""
    ours, theirs = tls
    ours.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    source, far = socket.socketpair()
    with contextlib.closing(Connection(source)) as source, far:
        exchange = types.SimpleNamespace(
            connection=ours, idle_timeout=10, client_timeout=10, broken=lambda error: error
        )
        tunnel = gevent.spawn(Tunnel(exchange, source).run, b"")
        data = os.urandom(40_000)
        far.sendall(data)
        gevent.sleep(0.01)
        assert ours.holds_back
        with gevent.Timeout(5):
            came = b""
            while len(came) < len(data):
                came += theirs.recv(READ)
            assert came == data
            far.shutdown(socket.SHUT_WR)
            # EOF follows the records.
            assert theirs.recv(READ) == b""
        tunnel.kill()
