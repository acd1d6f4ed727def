"""A request under /v1 or /v2: sent upstream with the access token, its response streamed back.

The life of a request: who may call (access.py); a token, waited for when it has just expired
(current_login.py); the request to upstream; upstream's head, and once, if it means that the token
is dead, the same request with another token; then status, fields and every chunk as they came. No
other status is retried, refreshed on or altered.
"""

from __future__ import annotations

import re
import secrets
import time
import urllib.parse
from typing import TYPE_CHECKING

from xaiproxy import __version__, config, errors, judgement, provider, token_store, tokens
from xaiproxy.http1 import exchange, headers, message_head, response_head
from xaiproxy.http1.client_request import ClientRequest
from xaiproxy.http1.client_response import Answer
from xaiproxy.http1.exchange import Exchange
from xaiproxy.http1.memory_budget import MemoryBudget
from xaiproxy.http1.pool import Pool
from xaiproxy.http1.request_head import Head
from xaiproxy.proxy import access, event_stream, routes, usage
from xaiproxy.proxy.conversation import ConversationIds
from xaiproxy.proxy.current_login import WAIT, CurrentLogin
from xaiproxy.proxy.outage import Outage
from xaiproxy.proxy.refused_token import is_refused_token
from xaiproxy.proxy.remote_refresher import RemoteRefresher
from xaiproxy.proxy.routes import PREFIXES

if TYPE_CHECKING:
    from xaiproxy.proxy.spans import Spans

USER_AGENT = f"xaiproxy/{__version__}"  # the proxy's own: Cloudflare refuses some clients'
IDEMPOTENCY_KEYS = {"idempotency-key", "x-idempotency-key"}
# What a server may read as a segment . or .., in one pass: a segment ends at a slash or backslash,
# plain or encoded, and for some servers at a semicolon.
DOT_SEGMENT = re.compile(r"(?:\A|/|%2f|\\|%5c)(?:\.|%2e){1,2}(?=/|%2f|\\|%5c|;|\Z)", re.IGNORECASE)


class Proxy:
    """Forwards what is under PREFIXES."""

    def __init__(
        self,
        settings: config.Config,
        store: token_store.TokenStore,
        gate: access.Access,
        pool: Pool,
        spans: Spans | None = None,
    ):
        """`spans`: None without OTEL_EXPORTER_OTLP_ENDPOINT."""
        self._settings = settings
        self._store = store
        self._gate = gate
        self._pool = pool
        self._spans = spans
        remote = RemoteRefresher(settings) if settings.refresher else None
        self._login = CurrentLogin(store, remote)
        self.is_token_pending = self._login.is_replacement_pending
        self._memory = MemoryBudget(settings.replay_memory)
        # In Via, so that a request which comes back is recognised. xAI gets no Via: Cloudflare
        # refuses some.
        hostname = urllib.parse.urlsplit(settings.upstream).hostname or ""
        is_xai = f".{hostname}".endswith(".x.ai")
        self._pseudonym = "" if is_xai else "xaiproxy-" + secrets.token_hex(8)
        affinity = is_xai and settings.cache_affinity
        self._conversation_ids = ConversationIds() if affinity else None
        self._of_xai = provider.is_xai(settings.client_id, settings.issuer)
        self._outage = Outage(
            lambda: judgement.of(store, time.time()).ready and not self.is_token_pending()
        )
        # By the proxy that ran before this one.
        store.refused = store.asked_for()

    def serves(self, head: Head) -> bool:
        """Whether `forward` serves this request; a CORS preflight is not for upstream."""
        return head.path.startswith(PREFIXES) and not access.is_preflight(head)

    def forward(self, request: ClientRequest) -> Answer:
        """Raises errors.ErrorResponse, to be sent instead; ClientGone; and what is thrown in."""
        head = request.head
        if self._spans is not None:
            request.span = self._spans.begin(head)
        try:
            request.key = self._gate.check(head, key_needed=True)
            request.check_room()
            check_method(head.method)
            check_path(head.path)
            self._check_loop(head)
            return self._answer(request)
        except errors.ErrorResponse as refusal:
            if isinstance(refusal, (errors.LoginRequired, errors.TokenUnavailable)):
                self._outage.hit(str(refusal))
            refusal.headers += tuple(self._gate.cors_headers(head))
            raise

    def _check_loop(self, head: Head) -> None:
        """Raises LoopDetected if the request has passed this proxy (RFC 9110 section 7.6.3)."""
        if self._pseudonym and any(self._pseudonym in value for value in head.values("via")):
            raise errors.LoopDetected(
                f"{self._pool.origin} sends the request back to this proxy; set XAI_PROXY_UPSTREAM "
                "to the API"
            )

    def _answer(self, request: ClientRequest) -> Answer:
        body = request.body
        body.keep(self._settings.replay_limit, self._memory)
        login = self._login.valid()
        sent = self._send(request, login)
        try:
            if is_refused_token(sent, self._of_xai):
                newer = self._login.other_than(login, WAIT if body.replayable else 0)
                request.token_refused = "passed_on"
                if newer is not None and body.replayable:
                    request.token_refused = "replayed"
                    sent.close()
                    sent = self._send(request, newer)
                    if is_refused_token(sent, self._of_xai):
                        self._login.refused(newer)
                        request.token_refused = "passed_on"
            if sent.head.status < 400 and (self._store.refused or self._outage.lasts):
                self._store.withdraw(time.time())
                self._outage.end()
            body.forget()
            text = self._head_text(sent.head, sent.length, request.head)
            sample = usage.sample_for(routes.of(request.head.path), sent.head)
            pause = self._settings.sse_keepalive
            if pause and event_stream.is_event_stream(sent.head):
                return Answer(sent, text, event_stream.with_comments(sent.parts(pause)), sample)
            return Answer(sent, text, None, sample)
        except BaseException:
            sent.close()
            raise

    def _send(self, request: ClientRequest, login: tokens.Login) -> Exchange:
        head = request.head

        def on_interim(interim: response_head.Head) -> None:
            request.send_interim(interim.status, self._head_text(interim, None, head))

        sent = exchange.perform(
            self._pool,
            self._request_to_upstream(request, login),
            # The watch stopped at the first byte of the body; from now on nothing else reads.
            on_sent=request.watch.start,
            on_interim=on_interim,
        )
        request.waited += sent.waited
        return sent

    def _request_to_upstream(self, request: ClientRequest, login: tokens.Login) -> exchange.Request:
        head = request.head
        fields = headers.to_upstream(
            head.fields,
            host=self._pool.host,
            user_agent=USER_AGENT,
            access_token=login.access_token,
            pseudonym=self._pseudonym,
        )
        if self._conversation_ids:
            fields += self._conversation_ids.fields(head, request.key, login)
        if self._settings.sse_keepalive:
            # A comment can be put into plain text only.
            fields = [field for field in fields if field[0].lower() != "accept-encoding"]
            fields.append(("Accept-Encoding", "identity"))
        if self._spans is not None:
            fields = self._spans.propagated(request.span, fields)
        upgrade = asks_for_websocket(head)
        if upgrade:
            fields += [("Connection", "Upgrade"), ("Upgrade", "websocket")]
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields])
        return exchange.Request(
            f"{head.method} {head.target} HTTP/1.1\r\n{lines}".encode("latin-1"),
            request.body,
            head.method,
            head.method in exchange.SAFE or not IDEMPOTENCY_KEYS.isdisjoint(head.by_name),
            upgrade,
        )

    def _head_text(self, answer: response_head.Head, length: int | None, head: Head) -> str:
        lines = headers.to_client(
            answer.lines, answer.values, length=length, origin=self._pool.origin
        )
        if answer.status == 426 and "upgrade" in answer.values:
            # Beside every Upgrade (RFC 9110 section 7.8).
            lines += "\r\nConnection: Upgrade"
        if "access-control-allow-origin" not in answer.values:
            fields = self._gate.cors_headers(head)
            lines += "".join([f"\r\n{name}: {value}" for name, value in fields])
        return f"HTTP/1.1 {answer.status} {answer.reason}{lines}"


def check_method(method: str) -> None:
    """Refuse TRACE, whose response repeats the request with the token in it, and CONNECT.

    Raises MethodNotAllowed.
    """
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
