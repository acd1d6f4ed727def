"""Every exception of the package, grouped by what its handler does next.

`Error` is the one base: its text is one sentence (what happened, to what, what to do), and only a command's
`main` catches it, prints that sentence and ends with `exit_code` (sysexits.h). Below it stand three groups:

- what ends or blocks a command: `UsageError`, `ConfigurationError`, `LoginUnusable`, `StorageError`, `LockBusy`;
- what the issuer said: `IssuerUnavailable` (try again) and `OAuthError` (RFC 6749 section 5.2) with its kinds;
- what the proxy answers of its own: `Refusal`, which carries the HTTP status, a stable code and headers.
"""

import contextlib
import http
import json
import os
import shlex
import sys

EXIT_USAGE = 64
EXIT_UNAVAILABLE = 69
EXIT_TRY_AGAIN = 75
EXIT_SIGN_IN = 77
EXIT_CONFIGURATION = 78
EXIT_INTERRUPTED = 130

NO_RETRY = (
    ("x-should-retry", "false"),
)  # SDKs and Claude Code go by it, and would retry most of these for minutes
CHALLENGE = (
    ("WWW-Authenticate", 'Bearer realm="xaiproxy"'),
)  # every 401 has one (RFC 9110 section 15.5.2)

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def typed(line: str) -> str:
    """A command line of ours in backticks, so that it works when typed in a new shell.

    `line`: begins with the command's name. From a checkout that is bin/NAME, with the checkout's path unless this program
    writes to a terminal in that very folder. Otherwise the bare name if it is on PATH; or else, also in an activated virtual environment, the
    path of the folder that this program was started from.
    """
    name, space, arguments = line.partition(" ")
    script = f"{CHECKOUT}/bin/{name}"
    if os.path.exists(script):
        return f"`{_from_here('bin/' + name)}{space}{arguments}`"
    import shutil  # slow to import, and not needed in a checkout

    script = os.path.join(os.path.dirname(sys.argv[0]), name)
    on_path = shutil.which(name) and "VIRTUAL_ENV" not in os.environ
    return f"`{name if on_path or not os.path.exists(script) else shlex.quote(script)}{space}{arguments}`"


def _from_here(path: str) -> str:
    """A path below the checkout, as it can be typed where the messages of this program are read."""
    with contextlib.suppress(
        AttributeError, ValueError, OSError
    ):  # no stderr, or no working directory any more
        if sys.stderr.isatty() and os.path.samefile(".", CHECKOUT):
            return path
    return shlex.quote(f"{CHECKOUT}/{path}")


def _activate() -> str:
    """What to source so that the supervisord of this program's environment is found."""
    folder = os.path.dirname(sys.executable)
    return (
        _from_here(".venv/bin/activate")
        if folder == f"{CHECKOUT}/.venv/bin"
        else shlex.quote(f"{folder}/activate")
    )


SIGN_IN = f"run {typed('xai-login --device')} to sign in"
# What keeps a login alive and serves it.
SERVE = (
    f"`. {_activate()} && supervisord -c {_from_here('conf/supervisord.conf')}`"
    if os.path.exists(f"{CHECKOUT}/conf/supervisord.conf")
    else f"{typed('xai-proxy')} and {typed('xai-refresher')}"
)


class Error(Exception):
    exit_code = EXIT_TRY_AGAIN


class UsageError(Error):
    """A command was given something it cannot work with."""

    exit_code = EXIT_USAGE


class ConfigurationError(Error):
    """A setting that cannot be; names the variable, what it got and what it takes.

    `setting`: the variable that is wrong or was probably meant; None when it may be any.
    """

    exit_code = EXIT_CONFIGURATION

    def __init__(self, message: str, setting: str | None = None):
        super().__init__(message)
        self.setting = setting


class StorageError(Error):
    """The token folder would not take a file (full, read-only, not ours)."""


class LockBusy(Error):
    """Another process has held the token lock for longer than we were willing to wait."""


class LoginUnusable(Error):
    """There is no login that can be used as it is.

    `state` is one of missing, unreadable, corrupt, foreign, not_ours, symlink, replaced: a state to wait in, like signed out,
    not a reason to exit.
    """

    exit_code = EXIT_SIGN_IN

    def __init__(self, state: str, message: str):
        super().__init__(message)
        self.state = state


class LoginUnread(LoginUnusable):
    """The token file could not be read for a reason that says nothing about it (no descriptor free, a disk's error).

    The next read may succeed.
    """

    exit_code = EXIT_TRY_AGAIN

    def __init__(self, message: str):
        super().__init__("unreadable", message)


class IssuerUnavailable(Error):
    """The issuer gave no usable answer; the same request may be made again later.

    sent: whether the issuer may have acted on the request (its answer then being lost).
    retry_after: seconds that the issuer asked us to wait, or None.
    refused: whether it is a 400 or 401 whose error code, if any, we do not know.
    page: whether the answer was an HTML page.
    """

    exit_code = EXIT_UNAVAILABLE

    def __init__(
        self,
        message: str,
        *,
        sent: bool = False,
        retry_after: float | None = None,
        refused: bool = False,
        page: bool = False,
    ):
        super().__init__(message)
        self.sent = sent
        self.retry_after = retry_after
        self.refused = refused
        self.page = page


class OAuthError(Error):
    """An error response of RFC 6749 section 5.2 (`error`, `description`), or one that we classed as such.

    sent: whether its status was 2xx, so that the issuer may have acted on the request all the same.
    """

    exit_code = EXIT_SIGN_IN
    sent = False

    def __init__(self, error: str, description: str = "", message: str = ""):
        super().__init__(message or (f"{error}: {description}" if description else error))
        self.error = error
        self.description = description


class GrantRefused(OAuthError):
    """The code or refresh token is dead (invalid_grant and its kin): only a new login helps.

    certain: whether that is the issuer's own word (RFC 6749 section 5.2's spelling, place and status). A refresh token
    that is refused in another way is dead once several tries in a row got the same answer.
    """

    certain = True


class ForeignLogin(OAuthError):
    """The issuer answered with a login that another program began (OpenID Connect Core section 3.1.3.7, nonce)."""


class ClientRejected(OAuthError):
    """invalid_client, unauthorized_client: the issuer rejects our client_id at the moment; seen to heal by itself."""


class NotEntitled(OAuthError):
    """403 in JSON: the account's plan is refused, not the login; signing in again does not help."""


class AuthorizationPending(OAuthError):
    """RFC 8628 section 3.5: ask again after the interval."""


class SlowDown(AuthorizationPending):
    """RFC 8628 section 3.5: pending, and the interval grows by 5 seconds for good.

    interval: what the issuer named along with it, whatever that is.
    """

    interval: object = None


class AccessDenied(OAuthError):
    """The person said no."""


class ExpiredToken(OAuthError):
    """The device code ended before it was approved."""


class Refusal(Error):
    """An answer that the proxy makes itself: JSON {"error": {message, type, code}} and X-XAI-Proxy-Error: code.

    With a 4xx nothing would be won by a retry, and each says so.
    close: the connection ends with it, since what follows on it cannot be trusted or was never read.
    """

    status = 500
    code = "internal_error"
    type = "api_error"
    headers: tuple[tuple[str, str], ...] = ()

    def __init__(
        self, message: str, *, headers: tuple[tuple[str, str], ...] = (), close: bool = False
    ):
        super().__init__(message)
        self.headers = type(self).headers + tuple(headers)
        self.close = close

    def rendered(self) -> tuple[str, list[tuple[str, str]], bytes]:
        """The WSGI status, the header fields and the body."""
        body = (
            json.dumps(
                {"error": {"message": str(self), "type": self.type, "code": self.code}}
            ).encode()
            + b"\n"
        )
        fields = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("X-XAI-Proxy-Error", self.code),
            *(NO_RETRY if self.status < 500 else ()),
            *self.headers,
        ]
        return f"{self.status} {http.HTTPStatus(self.status).phrase}", fields, body


class BadRequest(Refusal):
    status, code, type = 400, "bad_request", "invalid_request_error"


class HeadTooLarge(BadRequest):
    status = 431


class LoginRequired(Refusal):
    status, code, type = 401, "login_required", "authentication_error"
    headers = CHALLENGE


class ClientKeyRequired(Refusal):
    status, code, type = 401, "client_key_required", "authentication_error"
    headers = CHALLENGE


class HostNotAllowed(Refusal):
    status, code, type = 403, "host_not_allowed", "permission_error"


class OriginNotAllowed(Refusal):
    status, code, type = 403, "origin_not_allowed", "permission_error"


class NotFound(Refusal):
    status, code, type = 404, "not_found", "invalid_request_error"


class MethodNotAllowed(Refusal):
    status, code, type = 405, "method_not_allowed", "invalid_request_error"


class ClientTimeout(Refusal):
    status, code, type = 408, "client_timeout", "invalid_request_error"


class UpstreamUnreachable(Refusal):
    """502. may_retry: whether SDKs shall send the request again by themselves, since that repeats no paid work."""

    status, code = 502, "upstream_unreachable"

    def __init__(self, message: str, *, may_retry: bool = False):
        super().__init__(message, headers=(("x-should-retry", "true" if may_retry else "false"),))


class TokenUnavailable(Refusal):
    """503: expired, and the refresher has no new token yet. retry_after: seconds, 1 to 10."""

    status, code = 503, "token_unavailable"

    def __init__(self, message: str, retry_after: int):
        super().__init__(
            message, headers=(("Retry-After", str(retry_after)), ("x-should-retry", "true"))
        )


class TooManyConnections(Refusal):
    status, code = 503, "too_many_connections"
    headers = (("Retry-After", "5"), ("x-should-retry", "true"))


class UpstreamTimeout(Refusal):
    status, code = 504, "upstream_timeout"
    headers = NO_RETRY


class LoopDetected(Refusal):
    status, code = 508, "loop_detected"
    headers = NO_RETRY


class ClientGone(Exception):
    """The client closed its side. Thrown into the greenlet that serves it, so that upstream is closed at once."""


class UpstreamBroken(Exception):
    """Upstream died in mid-answer: the client's framing must be left unfinished."""
