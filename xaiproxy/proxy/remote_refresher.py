"""XAI_PROXY_REFRESHER: the refresher on another machine, asked when upstream refuses the token.

The request has the SHA-256 of the token alone. The new token does not come in the response, but
with the next version of the token file, which can take more than a minute (a kubelet: up to 79 s).
Until then, requests would only be refused again, so they are not sent.

The API may have refused the request and not the token: it also answers 401 for other causes. So the
proxy first sends a request of its own, and if the API accepts that, only the client's is refused.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import urllib.parse
from collections.abc import Callable

import gevent
import gevent.lock

from xaiproxy import __version__, config, tokens
from xaiproxy.http1 import response_head
from xaiproxy.http1.connection import BROKEN, reason
from xaiproxy.http1.dialler import Dialler, TooLate

logger = logging.getLogger(__name__)

ASKED_TIME = 120.0  # seconds for which requests wait for the new token
DEADLINE = 2.0  # seconds for one request
# Seconds after a failure in which the refresher is not asked again, so that it delays no request,
# and those for which a token counts as accepted.
RETRY_INTERVAL = 10.0


class RemoteRefresher:
    def __init__(self, settings: config.Config, clock: Callable[[], float] = time.monotonic):
        self._url = settings.refresher
        self._dialler = Dialler(
            dataclasses.replace(
                settings,
                upstream=self._url,
                connect_timeout=DEADLINE,
                egress=settings.egress.direct(),
            )
        )
        self._upstream = Dialler(dataclasses.replace(settings, connect_timeout=DEADLINE))
        self._host = urllib.parse.urlsplit(settings.upstream).netloc
        self._clock = clock
        # One request for all greenlets whose token is refused at the same time.
        self._asking = gevent.lock.Semaphore()
        self._token = ""
        self._token_until = self._not_before = -math.inf
        self._accepted = ""
        self._accepted_until = -math.inf
        # The failure that was logged last.
        self._logged = ""

    def is_asked(self, login: tokens.Login) -> bool:
        """Whether the refresher was asked to replace this token, at most ASKED_TIME ago."""
        return login.access_token == self._token and self._clock() < self._token_until

    def is_accepted(self, login: tokens.Login) -> bool:
        """Whether the API accepts a request with this token that it refuses for no other cause."""
        token = login.access_token
        with self._asking:
            # While the refresher is not asked, the answer would change nothing.
            if self.is_asked(login) or self._clock() < self._not_before:
                return False
            if token == self._accepted and self._clock() < self._accepted_until:
                return True
            fields = f"Host: {self._host}\r\nAuthorization: Bearer {token}\r\n"
            try:
                accepted = _status(self._upstream, f"GET /v1/models HTTP/1.1\r\n{fields}") == 200
            except FAILURES:
                accepted = False
            if accepted:
                self._accepted, self._accepted_until = token, self._clock() + RETRY_INTERVAL
            return accepted

    def ask(self, login: tokens.Login) -> bool:
        """Ask the refresher to replace this token; return whether it has been asked."""
        with self._asking:
            if self.is_asked(login):
                return True
            if self._clock() < self._not_before:
                return False
            failure = self._post(tokens.fingerprint(login.access_token))
            if failure:
                self._not_before = self._clock() + RETRY_INTERVAL
                if failure != self._logged:
                    logger.warning(
                        "the refresher at %s cannot be asked for another access token: %s",
                        self._url,
                        failure,
                    )
            else:
                self._token, self._token_until = login.access_token, self._clock() + ASKED_TIME
                logger.info("asked the refresher at %s for another access token", self._url)
            self._logged = failure
            return not failure

    def _post(self, digest: str) -> str:
        """Return why the refresher did not accept the digest, or ""."""
        host = urllib.parse.urlsplit(self._url).netloc
        fields = f"Host: {host}\r\nContent-Length: {len(digest)}\r\n"
        try:
            status = _status(self._dialler, f"POST /refused HTTP/1.1\r\n{fields}", digest)
        except TooLate:
            return f"no response within {DEADLINE:g} s"
        except BROKEN as error:
            return reason(error)
        return "" if 200 <= status < 300 else f"it answered HTTP {status}"


FAILURES = (TooLate, *BROKEN)


def _status(dialler: Dialler, head: str, body: str = "") -> int:
    """Send a request on a connection of its own, and return the status of the response.

    `head`: without the end and the fields of all requests. Raises one of FAILURES.
    """
    fields = f"User-Agent: xaiproxy/{__version__}\r\nConnection: close\r\n\r\n"
    with gevent.Timeout(DEADLINE, TooLate):
        connection = dialler.connect()
        try:
            connection.send_all(f"{head}{fields}{body}".encode())
            data = connection.recv_head(response_head.SIZE_LIMIT, DEADLINE)
        finally:
            connection.close()
    if not data:
        raise EOFError
    return response_head.parse(data, head.partition(" ")[0]).status
