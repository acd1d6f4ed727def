"""A new connection to upstream: its addresses, an egress proxy (CONNECT or SOCKS), and TLS."""

from __future__ import annotations

import base64
import socket
import ssl
import urllib.parse

from xaiproxy import addresses, config, kernel, socks_proxy, trust
from xaiproxy.http1 import response_head
from xaiproxy.http1.connection import BROKEN, Connection
from xaiproxy.http1.resolver import Resolver
from xaiproxy.http1.tls import TLSConnection

# A dead peer on a silent network is noticed within two minutes.
KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, kernel.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
]
SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *KEEPALIVE]
PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080, "socks4": 1080, "socks4a": 1080}


class TooLate(Exception):
    """CONNECT_TIMEOUT is over. Not an OSError, after which the next address would be tried."""


class _NotResumed(Exception):
    """The handshake failed, and it offered a session."""


class Dialler:
    def __init__(self, settings: config.Config):
        self._upstream = urllib.parse.urlsplit(settings.upstream)
        proxy = settings.egress.proxy_for(settings.upstream)
        self._proxy = urllib.parse.urlsplit(proxy) if proxy else None
        # One for all connections: it holds the parsed CA certificates.
        self._context = trust.context(settings.egress)
        self._session: ssl.SSLSession | None = None
        # Seconds for an attempt that may hang: the second attempt has the other half.
        self._attempt_timeout = settings.connect_timeout / 2
        self._target = Resolver(*_address(self._proxy or self._upstream), self._attempt_timeout)
        # For a SOCKS proxy that does not resolve names.
        self._destination = Resolver(*_address(self._upstream), self._attempt_timeout)

    def connect(self) -> Connection:
        """Raises OSError, EOFError, Malformed, and what is thrown in. Has no time limit of its own.

        An address that cannot be used is followed by the next one; after the last comes what a new
        lookup finds.
        """
        session = self._session
        tried: list[addresses.Address] = []
        last: Exception | None = None
        while True:
            left = [address for address in self._target.addresses() if address not in tried]
            if not left and last is not None:
                raise last
            try:
                sock, address = addresses.connect(left, None, SOCKET_OPTIONS, self._target.failed)
            except OSError as error:
                tried += left
                last = error
                continue
            except TooLate:
                for address in left:
                    self._target.failed(address)
                raise
            # Seconds without a byte: the last address may take all the time that is left.
            limit = self._attempt_timeout if len(left) > 1 else None
            try:
                connection = self._secured(sock, session, limit)
            except _NotResumed as error:
                # The same address once more, unless it was silent and there are others.
                session = None
                if limit and isinstance(error.__cause__, TimeoutError):
                    tried.append(address)
                    self._target.failed(address)
            except BROKEN as error:
                tried.append(address)
                self._target.failed(address)
                last = error
            except TooLate:
                self._target.failed(address)
                raise
            else:
                self._target.reached(address)
                return connection

    def stage_of(self, error: Exception) -> str:
        """Which part of `connect` raised `error`: dns, connect, tls or egress_proxy."""
        if isinstance(error, ssl.SSLError):
            return "tls"
        if self._proxy is not None:
            return "egress_proxy"
        if isinstance(error, socket.gaierror):
            return "dns"
        # A connection that was made, and then ended: only TLS has read from it.
        return "tls" if isinstance(error, EOFError) else "connect"

    def answered(self, connection: Connection) -> None:
        """To be called after the first response on a new connection, to keep its TLS session."""
        # Asking OpenSSL for the session is expensive.
        if isinstance(connection, TLSConnection) and not connection.session_reused:
            self._session = connection.session

    def _secured(
        self, sock: socket.socket, session: ssl.SSLSession | None, limit: float | None
    ) -> Connection:
        """The connection to upstream by way of `sock`, which is closed if that fails."""
        proxy = self._proxy
        if proxy is not None and proxy.scheme.startswith("socks"):
            sock = self._through_socks(sock, proxy)
        connection = Connection(sock)
        try:
            if proxy is not None and proxy.scheme in ("http", "https"):
                if proxy.scheme == "https":
                    connection = TLSConnection(connection, self._context, _address(proxy)[0])
                    connection.handshake(limit)
                self._tunnel(connection, proxy, limit)
            if self._upstream.scheme == "https":
                host = _address(self._upstream)[0]
                connection = TLSConnection(connection, self._context, host, session)
                self._handshake(connection, session, limit)
            return connection
        except BaseException:
            connection.close()
            raise

    def _handshake(
        self, connection: TLSConnection, session: ssl.SSLSession | None, limit: float | None
    ) -> None:
        if session is None:
            connection.handshake(limit)
            return
        try:
            connection.handshake(self._attempt_timeout)
        except ssl.SSLCertVerificationError:
            # Only a full handshake verifies: the session was not the cause.
            raise
        except BROKEN as error:
            if self._session is session:
                self._session = None
            raise _NotResumed from error

    def _through_socks(self, sock: socket.socket, proxy: urllib.parse.SplitResult) -> socket.socket:
        host, port = _address(self._upstream)
        kind = socks_proxy.SOCKS4 if proxy.scheme.startswith("socks4") else socks_proxy.SOCKS5
        remote = proxy.scheme in ("socks5h", "socks4a")
        address = None
        try:
            if not remote:
                address = self._destination_for(kind)
                host = address[4][0]
            return socks_proxy.negotiate(
                sock,
                host,
                port,
                kind=kind,
                rdns=remote,
                username=proxy.username and urllib.parse.unquote(proxy.username),
                password=proxy.password and urllib.parse.unquote(proxy.password),
            )
        except BaseException:
            sock.close()
            if address is not None:
                self._destination.failed(address)
            raise

    def _destination_for(self, kind: int) -> addresses.Address:
        for address in self._destination.addresses():
            if kind == socks_proxy.SOCKS5 or address[0] == socket.AF_INET:
                return address
        raise OSError("its name has no IPv4 address, which SOCKS 4 needs")

    def _tunnel(
        self, connection: Connection, proxy: urllib.parse.SplitResult, limit: float | None
    ) -> None:
        """RFC 9110 section 9.3.6."""
        host, port = _address(self._upstream)
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        request = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n"
        if proxy.username is not None:
            user = urllib.parse.unquote_to_bytes(proxy.username)
            password = urllib.parse.unquote_to_bytes(proxy.password or "")
            credentials = base64.b64encode(user + b":" + password).decode()
            request += f"Proxy-Authorization: Basic {credentials}\r\n"
        connection.send_all(request.encode() + b"\r\n")
        answer = None
        while answer is None or answer.status < 200:
            head = connection.recv_head(response_head.SIZE_LIMIT, limit or 600)
            if not head:
                raise EOFError
            answer = response_head.parse(head, "CONNECT")
        if answer.status >= 300:
            raise OSError(f"the egress proxy responded {answer.status} {answer.reason}")


def _address(url: urllib.parse.SplitResult) -> tuple[str, int]:
    return url.hostname or "", url.port or PORTS[url.scheme]
