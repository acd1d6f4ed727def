"""The connection to upstream: one request out, one answer back, whose body is read as it comes and surely closed.

urllib3 makes the connections (TLS, CONNECT and SOCKS proxies) and frames the messages; its pool and its urlopen are
not used, because they would re-quote the target, hide whether any byte was written, and bound neither the name
look-up nor several addresses nor TLS in time.
"""

import http.client
import socket
import ssl
import time
import urllib.parse
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import gevent
import urllib3
import urllib3.connection
import urllib3.exceptions
import urllib3.util

from xaiproxy import __version__, config, errors
from xaiproxy.request_body import ReplayableBody

USER_AGENT = f"xaiproxy/{__version__}"  # our own: Cloudflare turns some clients' away
IDLE_LIMIT = 60  # seconds that a connection waits for its next request
INTERIM_LIMIT = 20  # 1xx answers before the final one
READ = 65536
PEEK_LIMIT = 65536  # bytes of an error that are looked at
PEEK_TIME = 2.0  # seconds for them to come
# Dead peers behind a silent network are noticed within two minutes.
KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
             (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)]
SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *KEEPALIVE]
# Sent again on a new connection when a pooled one breaks: repeating these changes nothing (RFC 9110 section 9.2.2
# would allow PUT and DELETE too, but what they do here may be paid for).
REPEATABLE = frozenset(("GET", "HEAD", "OPTIONS"))
BROKEN = (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError)


class _Response(http.client.HTTPResponse):
    """http.client's, but for two laxities: it skips 100 only of all 1xx, and takes a head cut short for whole."""

    def begin(self):
        stream = self.fp
        self.fp = lines = _HeadLines(stream)
        try:
            super().begin()
        finally:
            if self.fp is lines:  # else it closed it
                self.fp = stream
        if self.msg.defects:  # a line without a colon, at which the parser gave up
            raise http.client.HTTPException
        if self.length == 0:
            self.chunked = False  # RFC 9112 section 6.3: 204, 304 and the answer to HEAD end with their head

    def _read_status(self):
        for _ in range(INTERIM_LIMIT):
            version, status, reason = super()._read_status()
            if not 100 <= status < 200:
                return version, status, reason
            if status == 101:  # we ask for no upgrade
                break
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException


class _HeadLines:
    """Reads whole lines, or raises: http.client takes an end of file for the empty line."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(limit)
        if not line.endswith(b"\n") and len(line) < limit:
            raise http.client.RemoteDisconnected
        return line

    def close(self) -> None:
        self._stream.close()


class _TooLate(TimeoutError):
    """CONNECT_TIMEOUT is over. An OSError, since at others an SSLSocket in its handshake stays open."""


class _Dialling:
    """urllib3's way would go on to the next address after any OSError, and at others leave the socket open."""

    def _new_conn(self) -> socket.socket:
        last = OSError("its name has no address")
        host = self._dns_host.strip("[]").encode()  # text would be taken through IDNA, which has its own errors
        for family, kind, protocol, _, address in socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            try:
                for option in SOCKET_OPTIONS:
                    sock.setsockopt(*option)
                sock.settimeout(self.timeout)
                sock.connect(address)
                return sock
            except BaseException as error:
                sock.close()
                if not isinstance(error, OSError) or isinstance(error, _TooLate):
                    raise
                last = error
        raise last


class _PlainConnection(_Dialling, urllib3.connection.HTTPConnection):
    pass


class _TLSConnection(_Dialling, urllib3.connection.HTTPSConnection):
    pass


CONNECTIONS = {urllib3.connection.HTTPConnection: _PlainConnection,
               urllib3.connection.HTTPSConnection: _TLSConnection}


class Upstream:
    """All connections to the one origin."""

    def __init__(self, settings: config.Config, idle_limit: float = IDLE_LIMIT):
        self.origin = settings.upstream
        self.host = urllib.parse.urlsplit(settings.upstream).netloc
        self.idle_timeout = settings.idle_timeout
        self._settings = settings
        self._idle_limit = idle_limit
        self._idle: "deque[tuple[float, http.client.HTTPConnection]]" = deque()  # the last is the latest
        self._sweeper: "gevent.Greenlet | None" = None
        self._factory = _manager(settings).connection_from_url(settings.upstream)
        of_urllib3 = self._factory.ConnectionCls
        self._factory.ConnectionCls = CONNECTIONS.get(of_urllib3, of_urllib3)  # SOCKS dials in its own way

    def send(self, method: str, target: str, fields: "Iterable[tuple[str, str]]", body: ReplayableBody,
             framing: "tuple[str, str] | None") -> "Exchange":
        """Send a request, on a pooled connection if there is a live one.

        `framing`: the Content-Length or Transfer-Encoding of the body. Raises UpstreamUnreachable, UpstreamTimeout,
        and what reading the client's body raises.
        """
        fields = [*fields, framing] if framing else list(fields)
        exchange = Exchange(self, method, target, fields, body)
        connection = self._take()
        exchange.send(connection or self.connect(), pooled=connection is not None)
        return exchange

    def _take(self) -> "http.client.HTTPConnection | None":
        while self._idle:
            _, connection = self._idle.pop()
            if connection.is_connected:
                return connection
            connection.close()
        return None

    def keep(self, connection: http.client.HTTPConnection) -> None:
        """Pool a connection whose last answer was read to its end."""
        self._idle.append((time.monotonic(), connection))
        if not self._sweeper:
            self._sweeper = gevent.spawn(self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for too long, until nothing is left."""
        while self._idle:
            due = self._idle[0][0] + self._idle_limit - time.monotonic()
            if due > 0:
                gevent.sleep(due)
            else:
                self._idle.popleft()[1].close()

    def close(self) -> None:
        """Close the pooled connections."""
        while self._idle:
            self._idle.pop()[1].close()

    def connect(self) -> http.client.HTTPConnection:
        """A new connection, within CONNECT_TIMEOUT all in all. Raises UpstreamUnreachable."""
        limit = self._settings.connect_timeout
        connection = self._factory._new_conn()
        connection.response_class = _Response
        try:
            with gevent.Timeout(limit, _TooLate):
                if self._factory.proxy is not None:
                    self._factory._prepare_proxy(connection)
                else:
                    connection.connect()
        except _TooLate as error:
            connection.close()
            raise errors.UpstreamUnreachable(f"no connection to {self.origin} within {limit:g} s; look at the network, or "
                                             "raise XAI_PROXY_CONNECT_TIMEOUT") from error
        except BROKEN as error:
            connection.close()
            raise errors.UpstreamUnreachable(f"no connection to {self.origin}: {_reason(error)}") from error
        except BaseException:
            connection.close()
            raise
        return connection


class _Fields:
    """What urllib3 wants of a mapping, with order, case and repetitions kept."""

    def __init__(self, fields: "list[tuple[str, str]]"):
        self._fields = fields

    def __iter__(self):
        # The last is for it to add none of its own.
        return iter([*(name for name, _ in self._fields), "accept-encoding"])

    def items(self) -> "list[tuple[str, str]]":
        return self._fields


class _AnsweredEarly(Exception):
    """Thrown into the greenlet that still writes a body which upstream has refused already."""


class Exchange:
    """A request that was sent and the answer to it. `close` may be called twice, and at any time."""

    def __init__(self, upstream: Upstream, method: str, target: str, fields: "list[tuple[str, str]]", body: ReplayableBody):
        self._upstream = upstream
        self._method = method
        self._target = target
        self._request_fields = fields
        self._body = body
        self._connection: "http.client.HTTPConnection | None" = None
        self._pooled = False
        self._head_written = False
        self._writing = False
        self._whole = True  # whether all of the request was written
        self._reader: "gevent.Greenlet | None" = None  # waits for the answer's head while a body is written
        self._response: "urllib3.HTTPResponse | None" = None
        self._peeked: "list[bytes]" = []
        self._peeker: "gevent.Greenlet | None" = None
        self._ended = False
        self.status = 0
        self.reason = ""
        self.fields: "list[tuple[str, str]]" = []
        self.length: "int | None" = None  # of the body that the client is to be told

    def send(self, connection: http.client.HTTPConnection, pooled: bool) -> None:
        """Write head and body, or as much of it as upstream takes before it answers with an error.

        A pooled connection that took no byte is replaced by a new one.
        """
        self._connection, self._pooled = connection, pooled
        self._head_written, self._writing, self._whole, self._reader = False, True, True, None
        has_body = any(name.lower() in ("content-length", "transfer-encoding") for name, _ in self._request_fields)
        sock, limit = connection.sock, gevent.Timeout(self._upstream.idle_timeout, TimeoutError)
        try:
            connection.request(self._method, self._target, body=self._chunks(connection, limit) if has_body else None,
                               headers=_Fields(self._request_fields), preload_content=False, decode_content=False)
        except (_AnsweredEarly, BrokenPipeError, ConnectionResetError, http.client.NotConnected) as error:
            self._writing = self._whole = False
            if not self._head_written:
                self.close()
                if not pooled:
                    raise self._broke_off(error) from error
                return self.send(self._upstream.connect(), pooled=False)
            # else upstream may have answered before it had read everything: receive tells
            if isinstance(error, _AnsweredEarly) and self._request_fields[-1][0] == "Transfer-Encoding":
                self._body.forget()  # a chunk's size cannot be read on from where that was broken off
        except TimeoutError as error:
            self.close()
            raise self._timed_out() from error
        except BROKEN as error:
            self.close()
            raise self._broke_off(error) from error
        except BaseException:
            self.close()
            raise
        finally:
            limit.close()
        self._writing = False
        connection.timeout = self._upstream.idle_timeout
        sock.settimeout(connection.timeout)

    def _chunks(self, connection: http.client.HTTPConnection, limit: gevent.Timeout) -> Iterator[bytes]:
        """The body; `limit` runs while it is upstream that we wait for."""
        self._head_written = True  # urllib3 asks for the first chunk once the head is out
        connection.timeout = None  # of the reader: that upstream is silent meanwhile says nothing
        self._reader = gevent.spawn(self._read_head, connection, gevent.getcurrent())
        for data in self._body:
            limit.start()
            yield data
            limit.cancel()
        limit.start()  # for the last chunk

    def _read_head(self, connection: http.client.HTTPConnection, writer: gevent.Greenlet) -> "urllib3.HTTPResponse | Exception":
        """Get the answer while the body is written: who refuses it may not read it to its end."""
        connection.auto_open = 0  # should this answer close the connection, what is still written must open no other
        try:
            response = connection.getresponse()
        except BROKEN as error:
            return error

        def interrupt() -> None:
            if self._writing:
                writer.throw(_AnsweredEarly)
        if response.status >= 400:
            gevent.get_hub().loop.run_callback(interrupt)
        return response

    def receive(self) -> None:
        """Wait for the answer's head. Raises UpstreamTimeout, UpstreamUnreachable."""
        try:
            if self._reader is None:
                response = self._connection.getresponse()
            else:  # its own wait has no limit yet
                with gevent.Timeout(self._upstream.idle_timeout, TimeoutError):
                    response = self._reader.get()
            if isinstance(response, Exception):
                raise response
        except TimeoutError as error:
            self.close()
            raise self._timed_out() from error
        except BROKEN as error:
            self.close()
            if self._pooled and self._repeatable():
                self.send(self._upstream.connect(), pooled=False)
                return self.receive()
            raise self._broke_off(error) from error
        except BaseException:
            self.close()
            raise
        self._response = response
        self.status, self.reason = response.status, response.reason or ""
        self.fields = response._original_response.msg.items()  # with order and repetitions, unlike .headers
        self.length = None if response.status in (204, 304) else response.length_remaining  # pywsgi wants none there
        if self._method == "HEAD":  # it tells how long the body would be
            lengths = [value for name, value in self.fields if name.lower() == "content-length"]
            self.length = int(lengths[0]) if lengths and lengths[0].isdecimal() else None

    def _repeatable(self) -> bool:
        names = {name.lower() for name, _ in self._request_fields}
        return self._body.replayable and (
            self._method in REPEATABLE or bool(names & {"idempotency-key", "x-idempotency-key"}))

    def __iter__(self) -> Iterator[bytes]:
        """The body as it comes. Raises UpstreamBroken."""
        if self._peeker is not None:
            yield from self._peeked
            seen = len(self._peeked)
            self._peeker.join()  # it may still wait for what comes next
            yield from self._peeked[seen:]
            if isinstance(self._peeker.value, errors.UpstreamBroken):
                raise self._peeker.value
        while data := self._read():
            yield data

    def _read(self) -> bytes:
        if self._ended:
            return b""
        try:
            data = self._response.read1(READ, decode_content=False)
        except urllib3.exceptions.ReadTimeoutError as error:
            raise errors.UpstreamBroken(f"no byte for {self._upstream.idle_timeout:g} s") from error
        except BROKEN as error:
            raise errors.UpstreamBroken(_reason(error)) from error
        if not data:
            self._ended = True
            self._release()
        return data or b""

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and connection.sock is not None and self._whole:
            self._upstream.keep(connection)
        elif connection is not None:
            connection.close()

    def peek(self) -> bytes:
        """The beginning of the body, at most PEEK_LIMIT bytes and PEEK_TIME seconds of it; it is not lost to __iter__.

        A greenlet of its own reads it: to give up on a read in the middle would break the connection.
        """
        deadline = time.monotonic() + PEEK_TIME

        def fill() -> "errors.UpstreamBroken | None":
            size = 0
            try:
                while size < PEEK_LIMIT and time.monotonic() < deadline and (data := self._read()):
                    self._peeked.append(data)
                    size += len(data)
            except errors.UpstreamBroken as error:
                return error  # for __iter__, after what came before it
            return None

        self._peeker = gevent.spawn(fill)
        self._peeker.join(PEEK_TIME)
        return b"".join(self._peeked)[:PEEK_LIMIT]

    def close(self) -> None:
        """Break off: unless the answer was read to its end, the connection is closed and not used again."""
        for greenlet in (self._reader, self._peeker):
            if greenlet is not None:
                greenlet.kill()
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._response is not None:
                self._response.close()
            connection.close()

    def _timed_out(self) -> errors.UpstreamTimeout:
        return errors.UpstreamTimeout(f"{self._upstream.origin} sent no byte for {self._upstream.idle_timeout:g} s "
                                      "(XAI_PROXY_IDLE_TIMEOUT); the request may have been worked on")

    def _broke_off(self, error: Exception) -> errors.UpstreamUnreachable:
        return errors.UpstreamUnreachable(f"{self._upstream.origin} broke off before it answered: {_reason(error)}; "
                                          "the request may have been worked on")


def is_refused_token(exchange: Exchange) -> bool:
    """Whether the answer says that the access token is dead: xAI does so with 403, whose other causes are not ours."""
    if exchange.status == 401:
        return True
    if exchange.status != 403:
        return False
    codings = [value.strip().lower() for name, value in exchange.fields if name.lower() == "content-encoding"]
    text = _decoded(exchange.peek(), codings).lower()
    return b"unauthenticated:" in text or b"could not be validated" in text


def _decoded(data: bytes, codings: "list[str]") -> bytes:
    """As much as can be decoded of what may be only the beginning of a body."""
    if not codings or codings == ["identity"]:
        return data
    for window in (47, -15):  # gzip or zlib, told by their headers; raw deflate, which some servers send
        try:
            return zlib.decompressobj(window).decompress(data, PEEK_LIMIT)
        except zlib.error:
            continue
    return data


def _manager(settings: config.Config) -> urllib3.PoolManager:
    context = urllib3.util.create_urllib3_context()  # one for all connections: it holds the parsed certificates
    context.load_verify_locations(settings.egress.ca_file)
    options = {"ssl_context": context, "socket_options": SOCKET_OPTIONS, "timeout": settings.idle_timeout}
    proxy = settings.egress.proxy_for(settings.upstream)
    if proxy is None:
        return urllib3.PoolManager(**options)
    if proxy.startswith("socks"):
        from urllib3.contrib.socks import SOCKSProxyManager
        return SOCKSProxyManager(proxy, **options)
    user = urllib3.util.parse_url(proxy).auth
    return urllib3.ProxyManager(proxy, proxy_ssl_context=context, **options,
                                proxy_headers=urllib3.util.make_headers(proxy_basic_auth=user) if user else None)


def _reason(error: Exception) -> str:
    """What went wrong, in words: urllib3 wraps it twice and prints object addresses."""
    cause = error
    while not isinstance(cause, OSError) or isinstance(cause, urllib3.exceptions.HTTPError):
        inner = cause.__cause__ or cause.__context__ or next((a for a in cause.args if isinstance(a, Exception)), None)
        if inner is None:
            break
        cause = inner
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({cause.verify_message}); set SSL_CERT_FILE if a CA of your own signed it"
    if isinstance(cause, ssl.SSLError):
        return f"TLS failed ({(cause.reason or 'closed').lower().replace('_', ' ')})"
    if isinstance(cause, (http.client.RemoteDisconnected, http.client.IncompleteRead)):
        return "it closed the connection"
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    return "what it sent is not HTTP"
