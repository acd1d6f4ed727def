"""The login that a request is sent with: tokens.json, waited for while it is renewed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import gevent

from xaiproxy import errors, judgement, refresher_status, token_store, tokens
from xaiproxy.proxy.remote_refresher import ASKED_TIME, RemoteRefresher

logger = logging.getLogger(__name__)

WAIT = 10.0  # seconds that a request waits for the refresher
POLL_INTERVAL = 0.1  # seconds between two reads of tokens.json meanwhile
# A token younger than this was issued a moment ago: xAI has refused such tokens once and then taken
# them.
YOUNG = 120  # seconds
YOUNG_PAUSE = 1.0  # seconds
# Seconds, for a token that comes from another machine. A kubelet mounts it after 79 s at most, and
# the OpenAI libraries retry twice.
RETRY_AFTER = 45


class RefresherPresence:
    """Whether there is a refresher, for one request that waits for it."""

    def __init__(self, store: token_store.TokenStore):
        self._store = store
        self._overdue_since: float | None = None

    def is_gone(self) -> bool:
        if self._store.refresher_alive(time.time()):
            self._overdue_since = None
            return False
        now = time.monotonic()
        if self._overdue_since is None:
            self._overdue_since = now
        return now - self._overdue_since >= token_store.OVERDUE


class CurrentLogin:
    """`remote`: the refresher on another machine, if there is one."""

    def __init__(self, store: token_store.TokenStore, remote: RemoteRefresher | None = None):
        self._store = store
        self._remote = remote

    def valid(self) -> tokens.Login:
        """A login whose token has not expired. Raises LoginRequired, TokenUnavailable."""
        deadline = time.monotonic() + WAIT
        refresher = None
        while True:
            login, now = _login_by(self._store.last_known), time.time()
            if login.expires_at > now:
                if self._remote is not None and self._remote.is_asked(login):
                    raise _replacement_pending(login)
                return login
            refresher = refresher or RefresherPresence(self._store)
            self._check_renewable(login, now, refresher)
            if time.monotonic() >= deadline:
                raise errors.TokenUnavailable(
                    f"the access token has expired and {WAIT:g} s brought no new one; try again", 1
                )
            gevent.sleep(POLL_INTERVAL)

    def _check_renewable(
        self, login: tokens.Login, now: float, refresher: RefresherPresence
    ) -> None:
        """Raise unless a new token may come within seconds."""
        error = login.refresh_error
        _check_ended(error)
        if error is not None and error.code != tokens.UPSTREAM_REFUSES:
            raise errors.TokenUnavailable(
                f"the access token has expired and cannot be renewed at the moment: "
                f"{error.description or error.code}",
                _wait(error.retry_at, now),
            )
        status = refresher_status.read(self._store, login, now)
        if status is not None and status.no_room:
            # On a full disk, tokens.json cannot have the error.
            raise errors.TokenUnavailable(
                judgement.of(self._store, now).reason, _wait(status.next_try, now)
            )
        if login.refresh_token is None:
            raise errors.TokenUnavailable(
                f"the access token has expired and {self._store.path} holds no refresh token; "
                "whatever put the file there has to replace it",
                10 if self._remote is None else RETRY_AFTER,
            )
        if refresher.is_gone():
            raise errors.TokenUnavailable(
                "the access token has expired and no refresher runs; start "
                + errors.typed("xai-refresher"),
                10,
            )

    def other_than(self, refused: tokens.Login, wait: float) -> tokens.Login | None:
        """A login to repeat a refused request with, or None if the refusal is to be forwarded.

        `wait`: seconds; also with 0 the refresher is asked, for later requests. Raises
        LoginRequired when the login has ended.
        """
        login = _login_by(self._store.load)
        if login.access_token != refused.access_token:
            return login
        if login.age(time.time()) < YOUNG:
            gevent.sleep(min(YOUNG_PAUSE, wait))
            return _login_by(self._store.load)
        if login.refresh_token is None:
            self.refused(login)
            return None
        asked_at = time.time()
        try:
            self._store.ask_refresh(refused.access_token)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): the refresher cannot be asked for a new token",
                self._store.refused_path,
                error.strerror,
            )
            return None
        deadline, refresher = time.monotonic() + wait, RefresherPresence(self._store)
        while self._may_come(login, asked_at, refresher) and time.monotonic() < deadline:
            gevent.sleep(POLL_INTERVAL)
            login = _login_by(self._store.last_known)
            if login.access_token != refused.access_token:
                return login
        return None

    def refused(self, login: tokens.Login) -> None:
        """Record for /readyz that upstream refuses this login, which nothing here can replace.

        If a refresher on another machine is asked to replace it, /readyz stays as it is, and
        TokenUnavailable is raised. Raises LoginRequired when the login has ended.
        """
        if login.refresh_token is None and self._remote is not None:
            _check_ended(login.refresh_error)
            if self._remote.is_accepted(login):
                return
            if self._remote.ask(login):
                raise _replacement_pending(login)
        self._store.remember_refusal(login.access_token)

    def is_replacement_pending(self) -> bool:
        """Whether requests get 503 until a token comes from a refresher on another machine."""
        try:
            return self._remote is not None and self._remote.is_asked(self._store.last_known())
        except errors.LoginUnusable:
            return False

    def _may_come(self, login: tokens.Login, asked_at: float, refresher: RefresherPresence) -> bool:
        """Whether to wait for another token.

        Not if the refresher has failed since it was asked, waits itself, or is gone."""
        error = login.refresh_error
        _check_ended(error)
        # After a lost response the refresher retries as soon as it is asked.
        waits = (
            error is not None
            and error.code != tokens.ANSWER_LOST
            and (error.retry_at or 0) > time.time() + WAIT
        )
        if error is not None and (error.at >= asked_at or waits):
            return False
        return not refresher.is_gone()


def _replacement_pending(login: tokens.Login) -> errors.ErrorResponse:
    """The response while another access token is on its way from another machine.

    Raises LoginRequired if the login has ended.
    """
    _check_ended(login.refresh_error)
    return errors.TokenUnavailable(
        f"the API refuses the access token, and another one was asked for: it is expected within "
        f"{ASKED_TIME:g} s",
        RETRY_AFTER,
    )


def _wait(retry_at: float | None, now: float) -> int:
    """Return the seconds of a Retry-After. `retry_at`: the refresher's next try, if known."""
    return min(10, max(1, math.ceil((retry_at or now) - now)))


def _check_ended(error: tokens.RefreshError | None) -> None:
    if error is not None and error.terminal:
        raise errors.LoginRequired(f"the login has ended ({error.code}); {errors.SIGN_IN}")


def _login_by(read: Callable[[], tokens.Login]) -> tokens.Login:
    """Raises TokenUnavailable if the next read may succeed, else LoginRequired."""
    try:
        return read()
    except errors.LoginUnread as error:
        raise errors.TokenUnavailable(str(error), 1) from error
    except errors.LoginUnusable as error:
        raise errors.LoginRequired(str(error)) from error
