"""The WSGI application: Flask for what is ours, the proxy for /v1 and /v2."""

import time
from typing import Any

import flask
import werkzeug.exceptions

from xaiproxy import client_keys, config, errors, judgement, token_store
from xaiproxy.http1.upstream import Upstream
from xaiproxy.proxy import access
from xaiproxy.proxy import forward as proxy
from xaiproxy.proxy.file_watch import FileWatch

OPEN_TO_ALL = frozenset(("/healthz", "/readyz"))


def create_app(
    settings: config.Config, keys: client_keys.ClientKeys, upstream: Upstream
) -> flask.Flask:
    app = flask.Flask("xaiproxy", static_folder=None, template_folder=None)
    store = token_store.TokenStore(settings)
    gate = access.Access(settings, keys, FileWatch(keys.path).due)

    @app.before_request
    def check_access() -> None:
        environ = flask.request.environ
        if environ["xaiproxy.head"].path not in OPEN_TO_ALL:
            environ["xaiproxy.handler"].key_name = gate.check(
                environ["xaiproxy.head"], key_needed=False
            )
            environ["xaiproxy.handler"].check_room()
            if flask.request.path in OPEN_TO_ALL:  # in another spelling, such as //healthz
                flask.abort(404)

    @app.get("/healthz", provide_automatic_options=False)
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", provide_automatic_options=False)
    def readiness() -> Any:
        ready, reason = readiness_of(store, time.time(), gate.admits_nobody())
        return {
            "status": "ready" if ready else "not ready",
            "reason": reason,
        }, 200 if ready else 503

    @app.errorhandler(errors.Refusal)
    def refuse(refusal: errors.Refusal) -> flask.Response:
        flask.request.environ["xaiproxy.handler"].ended_by = "proxy"
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
            return refuse(errors.NotFound(hint(flask.request.environ["xaiproxy.head"].path)))
        if isinstance(
            error, werkzeug.exceptions.InternalServerError
        ):  # Flask has logged what happened
            return refuse(errors.Refusal("the proxy failed; its log has the details"))
        return refuse(errors.BadRequest(error.description or error.name))

    app.wsgi_app = proxy.Proxy(
        app.wsgi_app, settings, store, gate, upstream, FileWatch(store.path).due
    )
    return app


def hint(path: str) -> str:
    """What to say of a path that is nobody's: most miss the /v1, or bring something before it."""
    shown = path[:200]
    for prefix in proxy.PREFIXES:
        _, found, rest = path.partition(prefix)
        if found:
            return f"there is no {shown}; {prefix}{rest[:200]} is meant"
    if path.rstrip("/") in ("", "/v1", "/v2"):
        return f"there is nothing at {shown}; the API begins with /v1/, for instance /v1/models"
    return f"there is no {shown}; perhaps /v1{shown} is meant: the base URL ends with /v1"


def readiness_of(
    store: token_store.TokenStore, now: float, admits_nobody: bool = False
) -> tuple[bool, str]:
    """Whether a request could be served now, and the reason, for everybody to read; never asks upstream."""
    if admits_nobody:
        return (
            False,
            "there is no client key that can be used, so every request is refused; see the log",
        )
    verdict = judgement.of(store, now)
    return verdict.ready, verdict.reason
