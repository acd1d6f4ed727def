"""XAI_PROXY_REFRESHER: the refresher on another machine, asked when upstream refuses the token.

The request has the SHA-256 of the token alone. The new token does not come in the response, but
with the next version of the token file, which can take more than a minute (a kubelet: up to 79 s).
Until then, requests would only be refused again, so they are not sent, except one every
TRIAL_INTERVAL: the API may have refused the request and not the token, and if it accepts another
one, all are sent again.
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
TRIAL_INTERVAL = 5.0  # seconds between two requests that are sent all the same
DEADLINE = 2.0  # seconds for the request to the refresher
# Seconds after a failure in which the refresher is not asked again, so that it delays no request.
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
        self._clock = clock
        # One request for all greenlets whose token is refused at the same time.
        self._asking = gevent.lock.Semaphore()
        self._token = ""
        self._token_until = self._trial_at = self._accepted_until = self._not_before = -math.inf
        # The failure that was logged last.
        self._logged = ""

    def is_asked(self, login: tokens.Login) -> bool:
        """Whether the refresher was asked to replace this token, at most ASKED_TIME ago."""
        return login.access_token == self._token and self._clock() < self._token_until

    def is_trial(self) -> bool:
        """Whether the next request is to be sent all the same; then the later ones are not."""
        now = self._clock()
        if now < self._trial_at:
            return False
        self._trial_at = now + TRIAL_INTERVAL
        return True

    def accepted(self, login: tokens.Login) -> None:
        """The API has accepted a request with this token."""
        if self.is_asked(login):
            self._token_until, self._accepted_until = -math.inf, self._clock() + ASKED_TIME
            logger.info("the API accepts the access token, and refused a request of another cause")

    def has_accepted(self, login: tokens.Login) -> bool:
        """Whether the API has accepted this token after a refusal, at most ASKED_TIME ago."""
        return login.access_token == self._token and self._clock() < self._accepted_until

    def ask(self, login: tokens.Login) -> bool:
        """Ask the refresher to replace this token; return whether it has been asked."""
        with self._asking:
            if self.is_asked(login):
                return True
            if self.has_accepted(login) or self._clock() < self._not_before:
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
                now = self._clock()
                self._token, self._token_until = login.access_token, now + ASKED_TIME
                self._trial_at, self._accepted_until = now, -math.inf
                logger.info("asked the refresher at %s for another access token", self._url)
            self._logged = failure
            return not failure

    def _post(self, digest: str) -> str:
        """Return why the refresher did not accept the digest, or ""."""
        try:
            with gevent.Timeout(DEADLINE, TooLate):
                connection = self._dialler.connect()
                try:
                    connection.send_all(
                        "POST /refused HTTP/1.1\r\n"
                        f"Host: {urllib.parse.urlsplit(self._url).netloc}\r\n"
                        f"User-Agent: xaiproxy/{__version__}\r\n"
                        f"Content-Length: {len(digest)}\r\n\r\n{digest}".encode()
                    )
                    data = connection.recv_head(response_head.SIZE_LIMIT, DEADLINE)
                finally:
                    connection.close()
            status = response_head.parse(data, "POST").status
        except TooLate:
            return f"no response within {DEADLINE:g} s"
        except BROKEN as error:
            return reason(error)
        return "" if 200 <= status < 300 else f"it answered HTTP {status}"
