"""A request under /v1 or /v2: to upstream with the access token, and the answer back as it comes.

The life of a request: who may call (access.py); a token, waited for when it has just expired; the request to
upstream; upstream's head, and once, if it says that the token is dead, the same request with another token; then
status, fields and every chunk as they came. No other status is retried, refreshed on or altered.

This is a WSGI layer around Flask's `app.wsgi_app`: a proxied request needs the raw target and fields, which Flask's
request context has lost, and nothing of what that context would cost.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gevent

from xaiproxy import config, errors, judgement, token_store, tokens
from xaiproxy.http1 import headers, message_head, response_head
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.handler import ClientWatch
from xaiproxy.http1.relay import Relay
from xaiproxy.http1.request_body import ReplayableBody, ReplayMemory, RequestBody, WholeBody
from xaiproxy.http1.request_head import Head
from xaiproxy.http1.tunnel import Tunnel
from xaiproxy.http1.upstream import SAFE, USER_AGENT, Exchange, Upstream
from xaiproxy.proxy import access, event_stream
from xaiproxy.proxy.outage import Outage
from xaiproxy.proxy.refused_token import is_refused_token

logger = logging.getLogger(__name__)

PREFIXES = ("/v1/", "/v2/")
WAIT = 10.0  # seconds that a request waits for the refresher
LOOK = 0.1  # seconds between two looks at the token file meanwhile
# A token younger than this was minted a moment ago: xAI has refused such ones once and then taken them.
YOUNG = 120  # seconds
YOUNG_PAUSE = 1.0  # seconds
IDEMPOTENCY_KEYS = {"idempotency-key", "x-idempotency-key"}
# What somebody may read as a segment . or .., in one pass: a segment ends at a slash or backslash, plain or encoded, and
# to some at a semicolon.
DOT_SEGMENT = re.compile(r"(?:\A|/|%2f|\\|%5c)(?:\.|%2e){1,2}(?=/|%2f|\\|%5c|;|\Z)", re.IGNORECASE)


class RefresherWatch:
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


class Proxy:
    """The WSGI layer: answers what is under PREFIXES and hands on everything else."""

    def __init__(
        self,
        otherwise: Callable[..., Iterable[bytes]],
        settings: config.Config,
        store: token_store.TokenStore,
        gate: access.Access,
        upstream: Upstream,
        login_due: Callable[[], bool],
    ):
        """`login_due`: whether the token file may have changed since it was last asked."""
        self._otherwise = otherwise
        self._settings = settings
        self._store = store
        self._gate = gate
        self._upstream = upstream
        self._memory = ReplayMemory(settings.replay_memory)
        self._login_due = login_due
        # In Via, so that a request which comes back is known. Upstreams of xAI get no Via: Cloudflare refuses some.
        hostname = urllib.parse.urlsplit(settings.upstream).hostname or ""
        self._pseudonym = (
            "" if f".{hostname}".endswith(".x.ai") else "xaiproxy-" + secrets.token_hex(8)
        )
        self._latest: tokens.Tokens | None = None  # what the last look found
        self._outage = Outage(lambda: judgement.of(store, time.time()).ready)
        store.refused = store.asked_for()  # by the proxy that ran before this one

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        head: Head = environ["xaiproxy.head"]
        if not head.path.startswith(PREFIXES):
            return self._otherwise(environ, start_response)
        handler = environ["xaiproxy.handler"]
        try:
            if head.method == "OPTIONS":
                preflight = self._gate.preflight(head)
                if preflight is not None:
                    start_response("204 No Content", preflight)
                    return []
            handler.key_name = self._gate.check(head, key_needed=True)
            handler.check_room()
            if "checked" not in head.derived:
                check_method(head.method)
                check_path(head.path)
                self._check_loop(head)
                head.derived["checked"] = True
            return self._forward(head, environ)
        except errors.Refusal as refusal:
            handler.ended_by = "proxy"
            if isinstance(refusal, (errors.LoginRequired, errors.TokenUnavailable)):
                self._outage.hit(str(refusal))
            status, fields, body = refusal.rendered()
            start_response(status, fields + self._gate.leave(head))
            return [body]

    def _check_loop(self, head: Head) -> None:
        """Raises LoopDetected when upstream sends to this proxy what came from it (RFC 9110 section 7.6.3)."""
        if self._pseudonym and any(self._pseudonym in value for value in head.values("via")):
            raise errors.LoopDetected(
                f"{self._upstream.origin} sends the request back to this proxy; set XAI_PROXY_UPSTREAM "
                "to the API"
            )

    def _forward(self, head: Head, environ: dict[str, Any]) -> Stream:
        body = environ["wsgi.input"]
        if isinstance(body, RequestBody):
            body = ReplayableBody(body, self._settings.replay_limit, self._memory)
        else:
            body.keep(self._settings.replay_limit, self._memory)
        handler = environ["xaiproxy.handler"]
        watch = handler.watch
        exchange = None
        try:
            watch.start()  # while we wait for a token; it stops at the first byte of a body
            login = self._login()
            exchange = self._send(head, body, login, handler)
            if is_refused_token(exchange):
                newer = self._other_login(login, WAIT if body.replayable else 0)
                if newer is not None and body.replayable:
                    exchange.close()
                    exchange = self._send(head, body, newer, handler)
                    if exchange.head.status in (401, 403) and is_refused_token(exchange):
                        self._store.remember_refusal(newer.access_token)
            if exchange.head.status < 400 and (self._store.refused or self._outage.lasts):
                self._store.withdraw(time.time())
                self._outage.end()
            body.forget()
            handler.start(
                exchange.head.status,
                self._head_text(exchange.head, exchange.length, head),
                has_length=exchange.length is not None,
                has_date="date" in exchange.head.values,
                uploads=exchange.uploads and exchange.head.keep_alive,
            )
            exchange.discard_upload()
            pause = self._settings.sse_keepalive
            pause = pause if pause and event_stream.is_event_stream(exchange.head) else 0
            return Stream(exchange, body, watch, pause)
        except BaseException:
            body.close()
            watch.stop()
            if exchange is not None:
                exchange.close()
            raise

    def _send(
        self, head: Head, body: ReplayableBody | WholeBody, login: tokens.Tokens, handler: Any
    ) -> Exchange:
        key = (
            login.access_token,
            bool(head.content_length),
        )  # equal heads may differ in that: see asks_for_websocket
        known, request, repeatable, upgrade = head.derived.get("request", (None, b"", False, False))
        if known != key:
            fields = headers.to_upstream(
                head.fields,
                host=self._upstream.host,
                user_agent=USER_AGENT,
                access_token=login.access_token,
                pseudonym=self._pseudonym,
            )
            if self._settings.sse_keepalive:  # a comment can be put into plain text only
                fields = [field for field in fields if field[0].lower() != "accept-encoding"]
                fields.append(("Accept-Encoding", "identity"))
            upgrade = asks_for_websocket(head)
            if upgrade:
                fields += [("Connection", "Upgrade"), ("Upgrade", "websocket")]
            lines = "".join([f"{name}: {value}\r\n" for name, value in fields])
            request = f"{head.method} {head.target} HTTP/1.1\r\n{lines}".encode("latin-1")
            repeatable = head.method in SAFE or not IDEMPOTENCY_KEYS.isdisjoint(head.by_name)
            head.derived["request"] = key, request, repeatable, upgrade
        exchange = self._upstream.send(
            request,
            body,
            method=head.method,
            repeatable=repeatable,
            upgrade=upgrade,
            on_sent=handler.watch.start,
        )  # again, since nothing else reads the socket then
        exchange.receive(
            lambda interim: handler.send_interim(
                interim.status, self._head_text(interim, None, head)
            )
        )
        return exchange

    def _head_text(self, answer: response_head.Head, length: int | None, head: Head) -> str:
        lines = headers.to_client(
            answer.lines, answer.values, length=length, origin=self._upstream.origin
        )
        if answer.status == 426 and "upgrade" in answer.values:
            lines += "\r\nConnection: Upgrade"  # beside every Upgrade (RFC 9110 section 7.8)
        leave = self._gate.leave(head)
        if leave and "access-control-allow-origin" not in answer.values:
            lines += "".join([f"\r\n{name}: {value}" for name, value in leave])
        return f"HTTP/1.1 {answer.status} {answer.reason}{lines}"

    # Which token

    def _login(self) -> tokens.Tokens:
        """A login whose token has not expired. Raises LoginRequired, TokenUnavailable."""
        deadline = time.monotonic() + WAIT
        refresher = None
        while True:
            login, now = self._known_login(), time.time()
            if login.expires_at > now:
                return login
            refresher = refresher or RefresherWatch(self._store)
            self._check_hope(login, now, refresher)
            if time.monotonic() >= deadline:
                raise errors.TokenUnavailable(
                    f"the access token has expired and {WAIT:g} s brought no new one; try again", 1
                )
            gevent.sleep(LOOK)

    def _known_login(self) -> tokens.Tokens:
        login = self._latest
        if self._login_due() or login is None:
            self._latest = None
            login = self._latest = self._current()
        return login

    def _current(self) -> tokens.Tokens:
        return _login_by(self._store.last_known)

    def _check_hope(self, login: tokens.Tokens, now: float, refresher: RefresherWatch) -> None:
        """Raise unless a new token may come within seconds."""
        error = login.refresh_error
        if error is not None and error.terminal:
            raise errors.LoginRequired(f"the login has ended ({error.code}); {errors.SIGN_IN}")
        if error is not None and error.code != tokens.UPSTREAM_REFUSES:
            wait = min(10, max(1, math.ceil((error.retry_at or now) - now)))
            raise errors.TokenUnavailable(
                f"the access token has expired and cannot be renewed at the moment: "
                f"{error.description or error.code}",
                wait,
            )
        if login.refresh_token is None:
            raise errors.TokenUnavailable(
                f"the access token has expired and {self._store.path} holds no refresh token; "
                "whoever puts the file there has to replace it",
                10,
            )
        if refresher.is_gone():
            raise errors.TokenUnavailable(
                "the access token has expired and no refresher runs; start "
                + errors.typed("xai-refresher"),
                10,
            )

    def _other_login(self, refused: tokens.Tokens, patience: float) -> tokens.Tokens | None:
        """A login to send a refused request again with, or None when the refusal is to go through.

        `patience`: seconds; with none the refresher is asked all the same, for those who come later. Raises
        LoginRequired when the login has ended.
        """
        login = _login_by(self._store.load)
        if login.access_token != refused.access_token:
            return login
        if login.age(time.time()) < YOUNG:
            gevent.sleep(min(YOUNG_PAUSE, patience))
            return _login_by(self._store.load)
        if login.refresh_token is None:
            self._store.remember_refusal(
                refused.access_token
            )  # for /readyz; there is no refresher to ask
            return None
        asked_at = time.time()
        try:
            self._store.ask_refresh(refused.access_token)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): the refresher cannot be told that a token was refused",
                self._store.refused_path,
                error.strerror,
            )
            return None
        deadline, refresher = time.monotonic() + patience, RefresherWatch(self._store)
        while self._may_come(login, asked_at, refresher) and time.monotonic() < deadline:
            gevent.sleep(LOOK)
            login = self._current()
            if login.access_token != refused.access_token:
                return login
        return None

    def _may_come(self, login: tokens.Tokens, asked_at: float, refresher: RefresherWatch) -> bool:
        """Whether to wait for another token: not when the refresher has failed since we asked, waits itself, or is gone."""
        error = login.refresh_error
        if error is not None and error.terminal:
            raise errors.LoginRequired(f"the login has ended ({error.code}); {errors.SIGN_IN}")
        # After a lost answer the refresher tries again as soon as it is asked.
        waits = (
            error is not None
            and error.code != tokens.ANSWER_LOST
            and (error.retry_at or 0) > time.time() + WAIT
        )
        if error is not None and (error.at >= asked_at or waits):
            return False
        return not refresher.is_gone()


class Stream:
    """The answer's body, content as it comes: what any WSGI server can send.

    A handler that finds `relay` in it can have it sent faster, in the framing of upstream.
    """

    def __init__(
        self, exchange: Exchange, body: ReplayableBody | WholeBody, watch: ClientWatch, pause: float
    ):
        """`pause`: seconds of silence after which an event stream gets a comment; 0 in all others."""
        self._exchange = exchange
        self._request_body = body
        self._watch = watch
        self._pause = pause

    def __iter__(self) -> Iterator[bytes]:
        if self._pause:
            return event_stream.kept_alive(self._exchange.parts(self._pause))
        return self._exchange.parts()

    @property
    def framing(self) -> type | None:
        """One of framing's; None when it cannot be upstream's, since something may come between."""
        return None if self._pause else type(self._exchange.body)

    @property
    def seems_ended(self) -> bool:
        """Whether an answer that was relayed so far would pass for a whole one."""
        return self._exchange.body.seems_ended

    def relay(self, client: Connection) -> Relay | Tunnel:
        if self._exchange.head.status == 101:
            self._watch.stop()  # the tunnel reads on that socket
            return Tunnel(self._exchange, client)
        return Relay(self._exchange, client)

    def finish(self) -> None:
        """To be called once all of it has been sent."""
        self._exchange.finish()

    def close(self) -> None:
        self._watch.stop()  # first, or it could break into the others
        self._exchange.close()
        self._request_body.close()


def _login_by(read: Callable[[], tokens.Tokens]) -> tokens.Tokens:
    """Raises TokenUnavailable if the next read may succeed, else LoginRequired."""
    try:
        return read()
    except errors.LoginUnread as error:
        raise errors.TokenUnavailable(str(error), 1) from error
    except errors.LoginUnusable as error:
        raise errors.LoginRequired(str(error)) from error


def check_method(method: str) -> None:
    """Refuse TRACE, whose answer repeats the request with the token in it, and CONNECT. Raises MethodNotAllowed."""
    if method in ("TRACE", "CONNECT"):
        raise errors.MethodNotAllowed(f"{method} is not passed on")


def asks_for_websocket(head: Head) -> bool:
    """RFC 6455 section 4.1."""
    return (
        head.method == "GET"
        and head.version == "HTTP/1.1"
        and not head.chunked
        and not head.content_length
        and [value.lower() for value in head.values("upgrade")] == ["websocket"]
        and "upgrade" in message_head.connection_options(",".join(head.values("connection")))
    )


def check_path(path: str) -> None:
    """Refuse what could leave /v1 further up, and a doubled /v1. Raises BadRequest, NotFound."""
    if DOT_SEGMENT.search(path):
        raise errors.BadRequest("the path has a dot segment; send the path that is meant")
    if (path + "/")[3:7] in PREFIXES:
        raise errors.NotFound(
            f"there is no {path[:200]}; {path[3:200]} is meant: the base URL ends with one /v1"
        )
