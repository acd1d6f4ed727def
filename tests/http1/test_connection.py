"""A connection that waits first and tries then, in a greenlet or in the hub; and TLS in memory over
one.
"""

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

from xaiproxy.http1.connection import BURST, OPEN, READ, Connection, DeadPath
from xaiproxy.http1.message_head import Malformed, TooLong
from xaiproxy.http1.tls import TLSConnection
from xaiproxy.http1.tunnel import Tunnel

RESET = struct.pack("ii", 1, 0)  # SO_LINGER that turns close into a reset
SOON = 0.05  # seconds, as a limit that is to be reached
HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: y\r\n\r\n"
Pair = "tuple[socket.socket, socket.socket]"
LONG = os.urandom(8_000_000)  # more than any socket buffers hold


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    with gevent.Timeout(20):
        yield


@contextlib.contextmanager
def connected(pair: Pair) -> Iterator[tuple[Connection, gevent.socket.socket]]:
    """A connection, and its peer as a socket of gevent's."""
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
    """Work for as long, without giving others their turn."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def received(peer: gevent.socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (part := peer.recv(size - len(data))):
        data += part
    return bytes(data)


# one read


def test_what_is_there_is_given_at_once_and_nothing_is_waited_for(pair):
    connection, peer = pair
    with pytest.raises(BlockingIOError):
        connection.receive()
    peer.sendall(b"hello")
    assert connection.receive() == b"hello"
    peer.close()
    assert connection.receive() == b""


def test_a_greenlet_waits_for_what_comes_next_and_lets_others_run(pair):
    connection, peer = pair
    reading = gevent.spawn(connection.recv, 5)
    gevent.sleep()
    assert not reading.ready()
    peer.sendall(b"hello")
    assert reading.get() == b"hello"
    peer.close()
    assert connection.recv(None) == b""
    assert connection.recv(5) == b""  # again


def test_what_is_unread_comes_first_and_without_waiting(pair):
    connection, peer = pair
    connection.unread = b"hello"
    assert connection.recv(0) == b"hello" and connection.unread == b""
    peer.sendall(b"world")
    assert connection.recv(5) == b"world"


@pytest.mark.parametrize("limit", [SOON, 0, -SOON])
def test_the_limit_of_a_read(pair, limit):
    connection, peer = pair
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        connection.recv(limit)
    assert max(limit, 0) <= time.monotonic() - began < 1
    peer.sendall(b"hello")
    assert connection.recv(5) == b"hello"  # nothing of the time-out is left behind
    gevent.sleep(SOON)


def test_work_before_a_wait_takes_nothing_from_its_limit(pair):
    """The loop's clock stands still within a turn, and a long turn must not end the waits that
    begin in it early.
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


def test_what_came_in_time_is_read_though_the_limit_is_over(pair):
    """When others hold the loop up, it finds the bytes and the end of the time in the same turn."""
    connection, peer = pair
    reading = gevent.spawn(connection.recv, SOON)
    gevent.sleep()
    peer.sendall(b"hello")
    hold_up(2 * SOON)
    assert reading.get() == b"hello"


def test_a_read_whose_bytes_somebody_else_took_waits_on(pair):
    """The watcher fires for bytes that a callback in the hub has read before the greenlet ran."""
    connection, peer = pair
    reading = gevent.spawn(connection.recv, 5)
    gevent.sleep()
    peer.sendall(b"first")
    first = connection.socket.recv(100)
    peer.sendall(b"second")
    assert (first, reading.get()) == (b"first", b"second")


def test_what_is_thrown_into_a_waiting_greenlet_arrives_and_stops_its_watcher(pair):
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


def test_a_time_out_of_gevents_own_reaches_a_reader(pair):
    with gevent.Timeout(SOON, False):
        pair[0].recv(None)
        pytest.fail("something was read")
    assert not pair[0].readable.active


def test_a_reset_is_an_oserror(tcp):
    connection, peer = tcp
    peer.sendall(b"GET / HTTP/1.1\r\nHost: lo")
    assert connection.recv(5)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    with pytest.raises(ConnectionResetError):
        connection.recv(5)


def test_it_may_be_closed_twice_and_the_peer_sees_it(pair):
    connection, peer = pair
    assert connection.writable
    connection.close()
    connection.close()
    assert peer.recv(1) == b""


# a head


def come(
    connection: Connection, peer: gevent.socket.socket, data: bytes, size: int
) -> gevent.Greenlet:
    """Send `size` bytes at a time, the next when those were read."""

    def send() -> None:
        for at in range(0, len(data), size):
            peer.sendall(data[at : at + size])
            while select.select([connection.socket], [], [], 0)[0]:
                gevent.sleep()

    return gevent.spawn(send)


@pytest.mark.parametrize("size", [1, 2, 7, len(HEAD) - 1, len(HEAD), len(HEAD) + 3, 1000])
def test_a_head_may_come_in_any_pieces_and_what_is_behind_stays(pair, size):
    connection, peer = pair
    for behind in (b"", b"body", HEAD):
        sender = come(connection, peer, HEAD + behind, size)
        assert connection.recv_head(1000, 5) == HEAD
        rest = b""
        while len(rest) < len(behind):
            rest += connection.recv(5)
        assert rest == behind and connection.unread == b""
        sender.join()


def test_heads_that_came_together_are_read_one_by_one(pair):
    connection, peer = pair
    peer.sendall(HEAD * 3)
    assert [connection.recv_head(1000, 5) for _ in range(3)] == [HEAD] * 3
    assert connection.unread == b""


def test_a_head_at_the_limit_and_one_beyond(pair):
    connection, peer = pair
    for size in (1448, 1 << 20):
        sender = come(connection, peer, b"x" * 65532 + b"\r\n\r\n", size)
        assert len(connection.recv_head(65536, 5)) == 65536
        sender.join()
    for data in (b"x" * 65533 + b"\r\n\r\n", b"x" * 65537):
        with connected(socket.socketpair()) as (connection, peer):
            sender = come(connection, peer, data, 1448)
            with pytest.raises(TooLong):
                connection.recv_head(65536, 5)
            sender.join()


def test_the_limit_holds_for_a_head_that_came_in_one_piece(pair):
    connection, _ = pair
    connection.unread = HEAD
    assert connection.recv_head(len(HEAD), 5) == HEAD
    connection.unread = HEAD
    with pytest.raises(TooLong):
        connection.recv_head(len(HEAD) - 1, 5)


def test_no_more_is_read_of_a_head_than_the_limit_and_one_read(pair):
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


def test_a_bare_lf_is_refused_before_the_head_is_whole(pair):
    pair[1].sendall(b"GET / HTTP/1.1\n")
    with pytest.raises(Malformed):
        pair[0].recv_head(1000, 5)


def test_an_end_before_a_head_is_none_and_one_within_is_an_error(pair):
    connection, peer = pair
    peer.close()
    assert connection.recv_head(1000, 5) == b""
    for size in range(1, len(HEAD)):
        with connected(socket.socketpair()) as (connection, peer):
            peer.sendall(HEAD[:size])
            peer.close()
            with pytest.raises(EOFError):
                connection.recv_head(1000, 5)


def test_a_byte_now_and_then_does_not_lengthen_the_time_for_a_head(pair):
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


def test_a_peer_that_takes_little_gets_all_in_the_end(pair):
    connection, peer = pair
    sending = gevent.spawn(connection.send_all, LONG, 5)
    gevent.sleep()
    assert not sending.ready() and connection.send(b"x") == 0
    assert received(peer, len(LONG)) == LONG
    sending.get()


def test_the_limit_of_a_write_is_between_two_bytes_that_are_taken(pair):
    connection, peer = pair
    sending = gevent.spawn(connection.send_all, LONG, 0.5)
    began = time.monotonic()
    while (
        time.monotonic() - began < 0.7
    ):  # longer than the limit, and something is taken all the time
        peer.recv(100_000)
        gevent.sleep(SOON / 2)
    assert not sending.ready()
    with pytest.raises(TimeoutError):
        sending.get()
    assert time.monotonic() - began > 0.9 and not connection.writable.active


def test_a_write_to_a_peer_that_left_is_an_oserror(tcp):
    connection, peer = tcp
    sending = gevent.spawn(connection.send_all, LONG, 5)
    gevent.sleep()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    with pytest.raises(OSError):
        sending.get()


def test_nothing_is_sent_without_waiting(pair):
    pair[0].send_all(b"", 0)
    assert select.select([pair[1]], [], [], 0)[0] == []


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("certificates"), "localhost")


@pytest.fixture(scope="module")
def context(certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates[0]))


class Peer:
    """A TLS server on a plain socket of gevent's, which can hold its records back."""

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
        """A record or more of each, unsent."""
        for content in contents:
            self.tls.write(content)
        return self.out.read()

    def flush(self) -> None:
        self.socket.sendall(self.out.read())

    def sendall(self, data: bytes) -> None:
        self.socket.sendall(self.records(data))

    def close_notify(self) -> bytes:
        with contextlib.suppress(ssl.SSLWantReadError):  # for the answer to it
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
        shaking = gevent.spawn(theirs.handshake)
        ours.handshake()
        shaking.get()
        yield ours, theirs


@pytest.fixture
def tls(tcp, context, certificates) -> Iterator[tuple[TLSConnection, Peer]]:
    with tls_over(*tcp, context, certificates[1]) as both:
        yield both


def test_both_ways(tls):
    ours, theirs = tls
    assert ours.send(b"hello") == 5 and theirs.recv(10) == b"hello"
    theirs.sendall(b"world")
    assert ours.recv(5) == b"world"


def test_records_may_be_split_anywhere(tls):
    ours, theirs = tls
    ours.send(
        b"x"
    )  # so that the tickets behind the handshake are read, and reads below are of one record
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


def test_all_records_that_came_together_are_given_together(tls):
    """What stayed behind in OpenSSL no poll would report."""
    ours, theirs = tls
    theirs.socket.sendall(theirs.records(*[b"%04d" % number for number in range(500)]))
    assert ours.recv(5) == b"".join(b"%04d" % number for number in range(500))
    with pytest.raises(BlockingIOError):
        ours.receive()


def test_whole_records_are_given_before_the_rest_of_the_next_has_come(tls):
    ours, theirs = tls
    first, second = theirs.records(b"first"), theirs.records(b"second")
    theirs.socket.sendall(first + second[:10])
    assert ours.recv(5) == b"first"
    reading = gevent.spawn(ours.recv, 5)
    gevent.sleep(SOON)
    assert not reading.ready()
    theirs.socket.sendall(second[10:])
    assert reading.get() == b"second"


def test_records_at_their_largest(tls):
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
def test_what_is_sent_over_tls_arrives_whole(tls, size):
    ours, theirs = tls
    sending = gevent.spawn(ours.send_all, LONG[:size], 5)
    came = bytearray()
    while len(came) < size:
        came += theirs.recv(READ)
    sending.get()
    assert came == LONG[:size] and not ours.holds_back


def test_back_pressure_over_tls(tls):
    """What the kernel has not taken is kept, at most a write of it, and goes first."""
    ours, theirs = tls
    taken = 0
    while sent := ours.send(LONG[taken : taken + 100_000]):
        taken += sent
    assert ours.holds_back and ours.send(b"more") == 0
    with pytest.raises(TimeoutError):
        ours.send_all(b"", SOON)  # nothing but what it holds back
    sending = gevent.spawn(ours.send_all, LONG[taken:], 5)
    came = bytearray()
    while len(came) < len(LONG):
        came += theirs.recv(READ)
    assert came == LONG
    sending.get()
    assert not ours.holds_back


def test_the_limit_of_a_read_over_tls(tls):
    ours, theirs = tls
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ours.recv(SOON)
    assert SOON <= time.monotonic() - began < 1
    theirs.sendall(b"hello")
    assert ours.recv(5) == b"hello"


def test_close_notify_is_an_end_and_a_cut_is_not(tls):
    ours, theirs = tls
    theirs.socket.sendall(theirs.records(b"all") + theirs.close_notify())
    theirs.socket.shutdown(socket.SHUT_WR)
    assert (ours.recv(5), ours.recv(5), ours.recv(5)) == (b"all", b"", b"")


def test_a_cut_between_records_is_an_error(tls):
    ours, theirs = tls
    theirs.sendall(b"some")
    theirs.socket.shutdown(socket.SHUT_WR)
    assert ours.recv(5) == b"some"
    with pytest.raises(ssl.SSLEOFError):
        ours.recv(5)


def test_a_cut_within_a_record_is_an_error(tls):
    ours, theirs = tls
    theirs.socket.sendall(theirs.records(b"some")[:-1])
    theirs.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(ssl.SSLEOFError):
        ours.recv(5)


def test_a_record_that_was_changed_on_the_way_is_an_error(tls):
    ours, theirs = tls
    data = bytearray(theirs.records(b"some"))
    data[-1] ^= 1
    theirs.socket.sendall(data)
    with pytest.raises(ssl.SSLError):
        ours.recv(5)


def test_bytes_behind_close_notify_are_nothing(tls):
    """OpenSSL never takes them: who read until they were gone would stop the whole process."""
    ours, theirs = tls
    theirs.socket.sendall(theirs.records(b"all") + theirs.close_notify() + b"garbage")
    assert ours.recv(5) == b"all"
    theirs.socket.sendall(b"more")
    assert ours.recv(5) == b""


def test_a_head_over_tls(tls):
    ours, theirs = tls
    theirs.sendall(HEAD + b"body")
    assert ours.recv_head(1000, 5) == HEAD and ours.recv(5) == b"body"


def test_a_certificate_of_nobody_and_a_name_of_another(tcp, certificates, context):
    for trusting, host in ((ssl.create_default_context(), "localhost"), (context, "other.example")):
        with connected(tcp_pair()) as (connection, peer):

            def refused(peer: gevent.socket.socket = peer) -> None:
                with pytest.raises((OSError, EOFError)):
                    Peer(peer, certificates[1]).handshake()
                    peer.recv(1) or pytest.fail("the client has shaken hands")
                    raise EOFError

            shaking = gevent.spawn(refused)
            with pytest.raises(ssl.SSLCertVerificationError):
                TLSConnection(connection, trusting, host).handshake()
            connection.close()
            shaking.get()


def test_a_peer_that_closes_while_hands_are_shaken(tcp, context):
    connection, peer = tcp
    shaking = gevent.spawn(TLSConnection(connection, context, "localhost").handshake)
    assert peer.recv(READ)
    peer.close()
    with pytest.raises((EOFError, ConnectionResetError)):
        shaking.get()


def test_a_peer_that_speaks_no_tls(tcp, context):
    connection, peer = tcp
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(ssl.SSLError):
        TLSConnection(connection, context, "localhost").handshake()


def test_a_session_is_resumed(certificates, context):
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


def test_tls_in_tls(tls, context, certificates):
    """Through a proxy on the way that speaks TLS itself, the origin's TLS is content of the
    proxy's.
    """
    outer, proxy = tls

    class Through:
        """The proxy's side of the tunnel as a socket."""

        recv = staticmethod(proxy.recv)
        sendall = staticmethod(proxy.sendall)

    with tls_over(outer, Through, context, certificates[1]) as (ours, theirs):
        assert ours.send(b"hello") == 5 and theirs.recv(10) == b"hello"
        proxy.socket.sendall(proxy.records(theirs.records(b"one"), theirs.records(b"two")))
        came = ours.recv(5)
        assert came == b"onetwo"
        taken = 0
        while not outer.holds_back:
            taken += ours.send(LONG[taken : taken + 1000])
        with pytest.raises(TimeoutError):
            ours.send_all(b"", SOON)  # nothing but what the outer one holds back
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
    """A connection, the one below it that a sweep of OPEN finds, and the peer."""
    tcp[1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours, theirs = request.getfixturevalue("tls") if request.param == "tls" else tcp
    return ours, tcp[0], theirs


def test_what_has_come_is_read_before_an_abort_shows(both):
    ours, inner, theirs = both
    theirs.sendall(b"last words")
    assert inner in OPEN
    inner.abort("nothing is heard of it")
    assert inner not in OPEN
    assert ours.recv(5) == b"last words"
    for use in (lambda: ours.recv(5), ours.receive, lambda: ours.send(b"x"), lambda: ours.recv(5)):
        with pytest.raises(DeadPath, match="nothing is heard of it"):
            use()


def test_abort_wakes_all_that_wait(both):
    ours, inner, _ = both
    waiting = [gevent.spawn(ours.recv, None), gevent.spawn(ours.send_all, LONG)]
    gevent.sleep(SOON)
    assert not any(greenlet.ready() for greenlet in waiting)
    inner.abort("nothing is heard of it")
    for greenlet in waiting:
        with pytest.raises(DeadPath):
            greenlet.get()


def test_time_out_of_the_kernel_is_a_dead_path(both):
    """The kernel tells it once, and an end after it."""
    ours, inner, _ = both
    inner.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)
    while ours.send(bytes(1 << 20)):  # then it waits for room, as nobody reads it
        pass
    for _ in range(2):
        with pytest.raises(DeadPath, match="TCP gave up: Connection timed out"):
            ours.recv(5)


def test_open_connections_are_those_that_are_not_closed(pair, tcp, context):
    connection, _ = tcp
    assert connection in OPEN and pair[0] not in OPEN  # a UNIX socket has no path to lose
    over = TLSConnection(connection, context, "localhost")
    assert over not in OPEN
    over.close()
    assert connection not in OPEN


# what others have of it


class Endless(Connection):
    """One on which every read is full, which no process can be relied on to bring about."""

    def receive(self) -> bytes:
        return bytes(READ)


def test_a_peer_that_sends_without_a_pause_leaves_others_their_turn():
    ours, theirs = socket.socketpair()
    theirs.send(b"x")  # it is readable all the time
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


def test_a_head_that_takes_too_long_can_be_waited_for_again(pair):
    connection, peer = pair
    peer.send(HEAD[:10])
    with pytest.raises(TimeoutError):
        connection.recv_head(1000, 0.05)
    peer.send(HEAD[10:])
    assert connection.recv_head(1000, 5) == HEAD


def test_a_tunnel_sends_on_what_tls_holds_back(tls):
    """The records of the last bytes, which the kernel did not take at once, though nothing comes
    behind them.
    """
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
            assert theirs.recv(READ) == b""  # the end too, which follows them
        tunnel.kill()
