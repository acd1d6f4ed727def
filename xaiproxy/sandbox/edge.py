"""The edge in front of authorization server and API, as Cloudflare is in front of xAI's.

It records every request, refuses a wrong Host or a missing User-Agent, and sends scripted
responses. It can delay, compress, throttle or cut a response.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs

from werkzeug.http import parse_accept_header

from xaiproxy.sandbox.knobs import NO_SCRIPT, Knobs
from xaiproxy.sandbox.replies import Answer, reply
from xaiproxy.sandbox.server import ClientGone, Handler
from xaiproxy.sandbox.witness import Witness
from xaiproxy.sandbox.xai_errors import error

NOT_XAI = [("X-Sandbox", "not xAI")]
EVERYWHERE = [
    *NOT_XAI,
    ("Server", "cloudflare"),
    ("CF-RAY", "0000000000000000-LO"),
    ("Set-Cookie", "__cf_bm=sandbox; Path=/; HttpOnly"),
]


Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Edge:
    """A WSGI application around another one."""

    def __init__(self, application: Application, host: str, knobs: Knobs, witness: Witness) -> None:
        self.application, self.host, self.knobs, self.witness = application, host, knobs, witness

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        handler: Handler = environ["sandbox.handler"]
        if environ["PATH_INFO"].startswith("/_sandbox"):
            response = self._handle(environ)
            response.headers.extend(NOT_XAI)
            return response(environ, start_response)
        record = self.witness.begin(handler)
        try:
            response = self._answer(environ, handler, record)
        except ClientGone:
            self.witness.count("cancelled_requests")
            raise
        record["status"] = response.status_code
        return response(environ, start_response)

    def _answer(self, environ: dict[str, Any], handler: Handler, record: dict[str, Any]) -> Answer:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if not any(script["early"] for script in self.knobs.matching(method, path)):
            body = self.witness.read_body(handler, record)
            environ["wsgi.input"], environ["wsgi.input_terminated"] = io.BytesIO(body), True
            if path == "/oauth2/token":
                record["grant_type"] = parse_qs(body.decode("latin-1")).get("grant_type", [""])[0]
        script = self.knobs.take_answer(method, path, record.get("grant_type")) or NO_SCRIPT
        scripted = response_of(script)
        if script["process"] or not (scripted or script["cut"]):
            response = self._refusal(handler) or self._handle(environ)
        if script["delay"]:
            handler.pause(script["delay"])
        if script["cut"]:
            handler.cut(script["cut"])
        response = scripted or response
        for name, value in script["headers"].items():
            response.headers[name] = value
        response.headers.extend(EVERYWHERE)
        if accepts_gzip(environ) and self._wants_gzip(response):
            compress(response)
        if script["drip"]:
            response.response = throttled(response.response, 1 / script["drip"], handler)
        return response

    def _refusal(self, handler: Handler) -> Answer | None:
        if handler.values("host") != [self.host]:
            return error("wrong_host")
        return None if any(handler.values("user-agent")) else error("no_user_agent")

    def _handle(self, environ: dict[str, Any]) -> Answer:
        head: list[Any] = []
        body = self.application(
            environ, lambda *status_and_headers: head.extend(status_and_headers)
        )
        return Answer(body, *head)

    def _wants_gzip(self, response: Answer) -> bool:
        refusal = response.is_json and response.status_code in (401, 403)
        chosen = self.knobs.gzip == "all" or (self.knobs.gzip == "refusals" and refusal)
        return chosen and "Content-Encoding" not in response.headers and response.status_code != 101


def response_of(script: dict[str, Any]) -> Answer | None:
    """The response that a script defines, or None if the request is to be handled."""
    if script["error"] is None and script["status"] is None and script["body"] is None:
        return None
    answer = error(script["error"]) if script["error"] else reply(script["body"] or "", 200)
    answer.status_code = script["status"] or answer.status_code
    answer.content_length = len(answer.get_data())
    return answer


def accepts_gzip(environ: dict[str, Any]) -> bool:
    return parse_accept_header(environ.get("HTTP_ACCEPT_ENCODING"))["gzip"] > 0


def compress(response: Answer) -> None:
    response.headers["Content-Encoding"] = "gzip"
    response.vary.add("Accept-Encoding")
    if response.content_length is None:
        response.response = compressed(response.response)
    else:
        # Sets Content-Length as well.
        response.set_data(gzip.compress(response.get_data()))


def compressed(parts: Any) -> Iterator[bytes]:
    """A stream as gzip, flushed after each part."""
    encoder = zlib.compressobj(wbits=31)
    with contextlib.closing(parts):
        for part in parts:
            yield encoder.compress(part) + encoder.flush(zlib.Z_SYNC_FLUSH)
    yield encoder.flush()


def throttled(parts: Any, interval: float, handler: Handler) -> Iterator[bytes]:
    for part in parts:
        for byte in part:
            yield bytes((byte,))
            handler.pause(interval)
