"""The connections to one origin: new ones, and those that wait for their next request."""

from __future__ import annotations

import ssl
import time
import urllib.parse
from collections import deque

import gevent

from xaiproxy import config, errors, trust
from xaiproxy.http1.connection import BROKEN, Connection, reason
from xaiproxy.http1.dialler import Dialler, TooLate

IDLE_LIMIT = 60  # seconds that a connection waits for its next request


class Pool:
    """`origin`: as XAI_PROXY_UPSTREAM has it; `host`: its authority, for the Host header.

    `opened`: the number of connections that were made; `open`: of those that are not closed.
    """

    def __init__(self, settings: config.Config, idle_limit: float = IDLE_LIMIT):
        self.origin = settings.upstream
        self.host = urllib.parse.urlsplit(settings.upstream).netloc
        self.settings = settings
        self.opened = self.open = 0
        self._idle_limit = idle_limit
        # Each with the time.monotonic since when; the last is the latest.
        self._idle: deque[tuple[float, Connection]] = deque()
        self._sweeper: gevent.Greenlet | None = None
        self._dialler = Dialler(settings)

    @property
    def idle(self) -> int:
        """The number of pooled connections."""
        return len(self._idle)

    @property
    def busy(self) -> int:
        """The number of connections with a request."""
        return self.open - self.idle

    def take(self) -> Connection | None:
        """A live connection, or None if there is none."""
        while self._idle:
            _, connection = self._idle.pop()
            connection.readable.stop()
            # The watcher alone is not enough: libev reports 64 descriptors at a time, and a close
            # may not have been reported yet.
            if connection.is_quiet():
                return connection
            connection.close()
        return None

    def keep(self, connection: Connection) -> None:
        """Pool a connection whose last response was read to its end."""
        kept = (time.monotonic(), connection)
        self._idle.append(kept)
        connection.readable.start(self._on_readable, kept)
        if not self._sweeper:
            self._sweeper = gevent.spawn(self._sweep)

    def _on_readable(self, kept: tuple[float, Connection]) -> None:
        """Drop a pooled connection that was closed, or that sends bytes without a request."""
        if not kept[1].is_quiet():
            self._idle.remove(kept)
            kept[1].close()

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

    def answered(self, connection: Connection) -> None:
        """To be called after the first response on a new connection."""
        self._dialler.answered(connection)

    def timed_out(self) -> errors.UpstreamTimeout:
        return errors.UpstreamTimeout(
            f"{self.origin} sent no byte for {self.settings.idle_timeout:g} s "
            "(XAI_PROXY_IDLE_TIMEOUT); the request may have been processed"
        )

    def connect(self) -> Connection:
        """A new connection, within CONNECT_TIMEOUT in all. Raises UpstreamUnreachable."""
        limit = self.settings.connect_timeout
        try:
            with gevent.Timeout(limit, TooLate):
                connection = self._dialler.connect()
        except TooLate as error:
            raise errors.UpstreamUnreachable(
                f"no connection to {self.origin} within {limit:g} s; check the network, or "
                "raise XAI_PROXY_CONNECT_TIMEOUT",
                kind="timeout",
                may_retry=True,
            ) from error
        except ssl.SSLCertVerificationError as error:
            refusal = trust.refusal(error, self.settings.egress)
            raise errors.UpstreamUnreachable(
                f"no connection to {self.origin}: its certificate is not trusted {refusal}",
                kind="tls",
                may_retry=True,
            ) from error
        except BROKEN as error:
            raise errors.UpstreamUnreachable(
                f"no connection to {self.origin}: {reason(error)}",
                kind=self._dialler.stage_of(error),
                may_retry=True,
            ) from error
        self.opened += 1
        self.open += 1
        connection.on_close = self._on_close
        return connection

    def _on_close(self) -> None:
        self.open -= 1
