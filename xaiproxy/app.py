"""The WSGI application: Flask for what is ours, the proxy for /v1 and /v2."""

import time
from typing import Any

import flask
import werkzeug.exceptions

from xaiproxy import access, client_keys, config, errors, proxy, token_store
from xaiproxy.file_watch import FileWatch
from xaiproxy.upstream import Upstream

OPEN_TO_ALL = frozenset(("/healthz", "/readyz"))


def create_app(settings: config.Config, keys: client_keys.ClientKeys, upstream: Upstream) -> flask.Flask:
    app = flask.Flask("xaiproxy", static_folder=None, template_folder=None)
    store = token_store.TokenStore(settings)
    gate = access.Access(settings, keys, FileWatch(keys.path).due)

    @app.before_request
    def check_access() -> None:
        environ = flask.request.environ
        if environ["xaiproxy.head"].path not in OPEN_TO_ALL:
            environ["xaiproxy.handler"].key_name = gate.check(environ["xaiproxy.head"], key_needed=False)
            environ["xaiproxy.handler"].check_room()
            if flask.request.path in OPEN_TO_ALL:  # in another spelling, such as //healthz
                flask.abort(404)

    @app.get("/healthz", provide_automatic_options=False)
    def health() -> "dict[str, str]":
        return {"status": "ok"}

    @app.get("/readyz", provide_automatic_options=False)
    def readiness() -> Any:
        ready, reason = readiness_of(store, time.time())
        return {"status": "ready" if ready else "not ready", "reason": reason}, 200 if ready else 503

    @app.errorhandler(errors.Refusal)
    def refuse(refusal: errors.Refusal) -> flask.Response:
        flask.request.environ["xaiproxy.handler"].ended_by = "proxy"
        status, fields, body = refusal.rendered()
        return flask.Response(body, status, fields)

    @app.errorhandler(werkzeug.exceptions.HTTPException)
    def not_here(error: werkzeug.exceptions.HTTPException) -> flask.Response:
        if isinstance(error, werkzeug.exceptions.MethodNotAllowed):
            allowed = ", ".join(sorted(error.valid_methods or ()))
            return refuse(errors.MethodNotAllowed("only GET is answered here", headers=(("Allow", allowed),)))
        if isinstance(error, werkzeug.exceptions.NotFound):
            return refuse(errors.NotFound(hint(flask.request.environ["xaiproxy.head"].path)))
        if isinstance(error, werkzeug.exceptions.InternalServerError):  # Flask has logged what happened
            return refuse(errors.Refusal("the proxy failed; its log has the details"))
        return refuse(errors.BadRequest(error.description or error.name))

    app.wsgi_app = proxy.Proxy(app.wsgi_app, settings, store, gate, upstream, FileWatch(store.path).due)
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


def readiness_of(store: token_store.TokenStore, now: float) -> "tuple[bool, str]":
    """Whether a request could be served now, and the reason; never asks upstream.

    The reason is for everybody to read: states and codes, but no path and nothing that others wrote.
    """
    try:
        login = store.last_known()
    except errors.LoginUnread:
        return False, "the token file cannot be read at the moment; see the log"
    except errors.LoginUnusable as error:
        return False, f"no login that can be used ({error.state}); {errors.SIGN_IN}, or see the log"
    error = login.refresh_error
    expiry = time.strftime("%Y-%m-%d %H:%M", time.localtime(login.expires_at))
    if login.expires_at <= now:
        if error is not None and error.terminal:
            return False, f"the login has ended ({error.code}); {errors.SIGN_IN}"
        return False, f"the access token expired at {expiry} and " + (
            f"cannot be renewed ({error.code})" if error else "has not been renewed yet")
    if login.refresh_token is None:
        return True, f"the token file holds no refresh token; the login lapses at {expiry}"
    if not store.refresher_alive(now):
        return True, f"no refresher; the login lapses at {expiry}"
    if error is not None:
        return True, f"the token is good until {expiry}, but its renewal fails ({error.code})"
    return True, "signed in"
