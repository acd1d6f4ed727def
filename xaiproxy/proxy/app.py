"""The WSGI application: the proxy's own pages, and the API for other WSGI servers.

Under http1.handler the API's requests do not come here: the handler gives them to forward.Proxy
directly, which needs the raw target and fields, and nothing of what Flask's request context would
cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import flask
import werkzeug.exceptions

from xaiproxy import errors, judgement, token_store
from xaiproxy.http1.client_request import ClientRequest
from xaiproxy.http1.client_response import Answer
from xaiproxy.proxy import access, status_page, wsgi_request
from xaiproxy.proxy.forward import Proxy
from xaiproxy.proxy.routes import PREFIXES

OPEN_TO_ALL = frozenset(("/healthz", "/readyz"))
# They need a client key where keys are required.
KEYED = frozenset(("/metrics", "/status.json"))
# They are served while every connection has a request: to see what happens.
RESERVED = KEYED | {"/"}
ADMIN_HINT = (
    "the admin listener serves /healthz, /readyz and /metrics; the API is at the proxy's own "
    "address (XAI_PROXY_BIND)"
)


class Passed(flask.Response):
    """A response without header fields of Flask's own."""

    default_mimetype = None


def create_app(
    proxy: Proxy | None,
    store: token_store.TokenStore,
    gate: access.Access,
    metrics: Callable[[str, bool], tuple[bytes, str]] | None = None,
    status: Callable[[], dict[str, Any]] | None = None,
    trouble: Callable[[], str] = lambda: "",
    is_stopping: Callable[[], bool] = lambda: False,
) -> flask.Flask:
    """Of what is None there is no page. Without `proxy`, no page requires a client key.

    `metrics`: returns the content and the media type of /metrics by an Accept header, and whether
    names of client keys may be in it.
    `status`: returns the members of /status.json.
    `trouble`: returns what is wrong although requests can be served, or "".
    `is_stopping`: returns whether clients should go elsewhere, because the proxy will end.
    """
    app = flask.Flask("xaiproxy", static_folder=None, template_folder=None)
    page = status_page.StatusPage(store.settings)

    @app.before_request
    def check_access() -> flask.Response | None:
        request = wsgi_request.of(flask.request.environ)
        if proxy is not None and request.head.path.startswith(PREFIXES):
            # Here, since the path that counts is the raw one, which Flask's routes do not see.
            return api(proxy, request)
        if request.head.path not in OPEN_TO_ALL:
            path = flask.request.path
            key_needed = proxy is not None and path in KEYED
            request.key = gate.check(request.head, key_needed=key_needed)
            if path not in RESERVED:
                request.check_room()
            if path in OPEN_TO_ALL:
                # In another spelling, such as /%68ealthz.
                flask.abort(404)
        return None

    def api(proxy: Proxy, request: ClientRequest) -> flask.Response:
        preflight = gate.preflight(request.head)
        if preflight is not None:
            return Passed(status="204 No Content", headers=preflight)
        try:
            answer = proxy.forward(request)
        except BaseException:
            request.body.close()
            raise
        status_line, *lines = answer.text.split("\r\n")
        fields = [line.partition(":")[::2] for line in lines]
        response = Passed(
            _content(answer),
            status_line.partition(" ")[2],
            [(name, value.strip(" \t")) for name, value in fields],
        )
        response.call_on_close(answer.exchange.close)
        response.call_on_close(request.body.close)
        return response

    @app.get("/healthz", provide_automatic_options=False)
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", provide_automatic_options=False)
    def readiness() -> Any:
        if is_stopping():
            ready, reason = False, "the proxy is stopping"
        else:
            ready, reason = readiness_of(store, time.time(), gate.admits_nobody())
        members = {"status": "ready" if ready else "not ready", "reason": reason}
        if ready and (warning := trouble()):
            members["warning"] = warning
        return members, 200 if ready else 503

    @app.get("/metrics", provide_automatic_options=False)
    def metrics_page() -> flask.Response:
        if metrics is None:
            raise not_found("/metrics")
        has_key = wsgi_request.of(flask.request.environ).key is not None
        with_names = proxy is not None or has_key
        content, media_type = metrics(flask.request.headers.get("Accept", ""), with_names)
        return flask.Response(content, content_type=media_type)

    @app.get("/", provide_automatic_options=False)
    def status_shell() -> flask.Response:
        if status is None or not status_page.is_wanted(flask.request):
            raise not_found("/")
        return page.response(flask.request)

    @app.get("/status.json", provide_automatic_options=False)
    def status_data() -> flask.Response:
        if status is None:
            raise not_found("/status.json")
        answer = flask.jsonify(status())
        answer.headers["Cache-Control"] = "no-store"
        answer.headers["X-Content-Type-Options"] = "nosniff"
        return answer

    def not_found(path: str) -> errors.NotFound:
        return errors.NotFound(ADMIN_HINT if proxy is None else hint(path))

    @app.errorhandler(errors.ErrorResponse)
    def refuse(refusal: errors.ErrorResponse) -> flask.Response:
        wsgi_request.of(flask.request.environ).refusal = refusal
        status, fields, body = refusal.rendered()
        return flask.Response(body, status, fields)

    @app.errorhandler(werkzeug.exceptions.HTTPException)
    def not_here(error: werkzeug.exceptions.HTTPException) -> flask.Response:
        if isinstance(error, werkzeug.exceptions.MethodNotAllowed):
            allowed = ", ".join(sorted(error.valid_methods or ()))
            return refuse(
                errors.MethodNotAllowed("only GET is answered here", headers=(("Allow", allowed),))
            )
        if isinstance(error, werkzeug.exceptions.NotFound):
            return refuse(not_found(wsgi_request.of(flask.request.environ).head.path))
        if isinstance(error, werkzeug.exceptions.InternalServerError):
            # Flask has logged what happened.
            return refuse(errors.ErrorResponse("the proxy failed; its log has the details"))
        return refuse(errors.BadRequest(error.description or error.name))

    return app


def _content(answer: Answer) -> Iterator[bytes]:
    yield from answer.content or answer.exchange.parts()
    answer.exchange.finish()


def hint(path: str) -> str:
    """The message about a path that is not served: most lack /v1, or have something before it."""
    shown = path[:200]
    for prefix in PREFIXES:
        _, found, rest = path.partition(prefix)
        if found:
            return f"there is no {shown}; {prefix}{rest[:200]} is meant"
    if path.rstrip("/") in ("", "/v1", "/v2"):
        return f"there is nothing at {shown}; the API begins with /v1/, for instance /v1/models"
    return f"there is no {shown}; perhaps /v1{shown} is meant: the base URL ends with /v1"


def readiness_of(
    store: token_store.TokenStore, now: float, admits_nobody: bool = False
) -> tuple[bool, str]:
    """Whether a request could be served now, and the reason; never asks upstream."""
    if admits_nobody:
        return (
            False,
            "there is no client key that can be used, so every request is refused; see the log",
        )
    verdict = judgement.of(store, now)
    return verdict.ready, verdict.reason
