"""What the refresher answers to proxies on other machines and to probes.

    POST /refused   the API refuses an access token: its SHA-256, as 64 hexadecimal digits
    GET /healthz, /readyz, /metrics   of the refresher

No response has anything secret. If the digest is that of the current access token, the report goes
the way of a proxy's on this machine, through tokens.json.refused, so the same limits hold
(schedule.py). Any other digest has no effect, and gets the same response.
"""

import hmac
import json
import logging
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from xaiproxy import config, errors, judgement
from xaiproxy.refresher.metrics import Metrics
from xaiproxy.token_store import FINGERPRINT_LENGTH, TokenStore
from xaiproxy.tokens import fingerprint

DIGEST = re.compile(rb"[0-9a-f]{%d}" % FINGERPRINT_LENGTH)
METHODS = {"/refused": "POST", "/healthz": "GET", "/readyz": "GET", "/metrics": "GET"}


class Page(NamedTuple):
    """`status`: with its phrase."""

    status: str
    fields: list[tuple[str, str]]
    body: bytes


class Pages:
    """`log`: called with a level of logging and a message."""

    def __init__(self, settings: config.Config, log: Callable[[int, str], object]):
        # Of its own, because that of the refresher's loop is in use by another thread.
        self._store = TokenStore(settings)
        self._metrics = Metrics(self._store)
        self._log = log
        self._reported = ""

    def answer(self, method: str, path: str, accept: str, body: bytes) -> Page:
        """`accept`: the Accept header. Raises ErrorResponse."""
        allowed = METHODS.get(path)
        if allowed is None:
            raise errors.NotFound("the refresher serves only " + ", ".join(METHODS))
        if method != allowed:
            raise errors.MethodNotAllowed(
                f"only {allowed} is answered here", headers=(("Allow", allowed),)
            )
        if path == "/refused":
            self._report(body)
            return _json("202 Accepted", {"status": "accepted"})
        if path == "/healthz":
            return _json("200 OK", {"status": "ok"})
        if path == "/readyz":
            verdict = judgement.of(self._store, time.time())
            members = {"status": "ready" if verdict.ready else "not ready"}
            status = "200 OK" if verdict.ready else "503 Service Unavailable"
            return _json(status, {**members, "reason": verdict.reason})
        content, media_type = self._metrics.page(accept)
        return Page("200 OK", [("Content-Type", media_type)], content)

    def _report(self, body: bytes) -> None:
        """Ask for a refresh if `body` is the digest of the current access token."""
        if not DIGEST.fullmatch(body):
            raise errors.BadRequest(
                "POST /refused takes the SHA-256 of an access token: 64 hexadecimal digits in "
                "lower case"
            )
        try:
            login = self._store.current()
        except errors.LoginUnusable:
            return
        mark = fingerprint(login.access_token)
        if login.refresh_token is None or not hmac.compare_digest(body, mark.encode()):
            return
        try:
            self._store.ask_refresh(login.access_token)
        except OSError as error:
            path = self._store.refused_path
            self._log(logging.WARNING, f"{path} cannot be written ({error.strerror})")
            raise errors.TokenUnavailable("no refresh can be requested; see the log", 30) from error
        if mark != self._reported:
            self._reported = mark
            self._log(logging.INFO, "a proxy reports that the API refuses the access token")


def _json(status: str, members: dict[str, str]) -> Page:
    body = json.dumps(members).encode() + b"\n"
    return Page(status, [("Content-Type", "application/json")], body)
