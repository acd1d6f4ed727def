"""Every exception of the package, grouped by what its handler does next.

`Error` is the base: its text is one sentence (what happened, to what, what to do). Only a command's
`main` catches it, prints the sentence and ends with `exit_code` (sysexits.h). There are three
groups:

- what ends or blocks a command: `UsageError`, `ConfigurationError`, `LoginUnusable`,
  `StorageError`, `LockBusy`;
- errors of the issuer: `IssuerUnavailable` (retry) and `OAuthError` (RFC 6749 section 5.2);
- errors that the proxy sends itself: `ErrorResponse`, with its HTTP status, code and fields.
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

# SDKs and Claude Code obey it, and would otherwise retry most of these errors for minutes.
NO_RETRY = (("x-should-retry", "false"),)
# Every 401 has one (RFC 9110 section 15.5.2).
CHALLENGE = (("WWW-Authenticate", 'Bearer realm="xaiproxy"'),)

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def typed(line: str) -> str:
    """A command line of ours in backticks, as it works when typed in a new shell.

    `line`: begins with the command's name.

    In a checkout that is bin/NAME, with the checkout's path unless this program writes to a
    terminal in that folder. Otherwise it is the name alone if it is on PATH, or else, also in an
    activated virtual environment, with the path of the folder that this program was started from.
    """
    name, space, arguments = line.partition(" ")
    script = f"{CHECKOUT}/bin/{name}"
    if os.path.exists(script):
        return f"`{_from_here('bin/' + name)}{space}{arguments}`"
    # Slow to import, and not needed in a checkout.
    import shutil

    script = os.path.join(os.path.dirname(sys.argv[0]), name)
    on_path = shutil.which(name) and "VIRTUAL_ENV" not in os.environ
    command = name if on_path or not os.path.exists(script) else shlex.quote(script)
    return f"`{command}{space}{arguments}`"


def _from_here(path: str) -> str:
    """A path below the checkout, as it can be typed where this program's messages are read."""
    # There may be no stderr, or no working directory any more.
    with contextlib.suppress(AttributeError, ValueError, OSError):
        if sys.stderr.isatty() and os.path.samefile(".", CHECKOUT):
            return path
    return shlex.quote(f"{CHECKOUT}/{path}")


SIGN_IN = f"run {typed('xai-login --device')} to sign in"
# Keeps a login alive and serves it.
SERVE = typed("xai-serve")


class Error(Exception):
    exit_code = EXIT_TRY_AGAIN


class UsageError(Error):
    """A command got an argument that it cannot use."""

    exit_code = EXIT_USAGE


class ConfigurationError(Error):
    """A wrong setting; the message names the variable, what it must be, and its value.

    `setting`: the variable that is wrong or was probably meant; None if it may be any
    """

    exit_code = EXIT_CONFIGURATION

    def __init__(self, message: str, setting: str | None = None):
        super().__init__(message)
        self.setting = setting


class StorageError(Error):
    """A file cannot be written to the token folder (full, read-only, another user's)."""


class LockBusy(Error):
    """Another process has held the token lock for longer than the timeout."""


class PublishError(Error):
    """The login cannot be published; what was published before stays.

    `retry_after`: seconds to wait, as the server requests, or None
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class NotClaimed(Error):
    """The refresh token could not be claimed in the cluster, so this process has not sent it.

    `sent`: whether another refresher has claimed it, and may have sent it
    `retry_after`: as for PublishError
    """

    def __init__(self, message: str, *, sent: bool = False, retry_after: float | None = None):
        super().__init__(message)
        self.sent = sent
        self.retry_after = retry_after


class LoginUnusable(Error):
    """No login can be used. This is a state to wait in, like signed out, not a reason to exit.

    `state`: missing, unreadable, corrupt, foreign, not_ours, symlink or replaced
    """

    exit_code = EXIT_SIGN_IN

    def __init__(self, state: str, message: str):
        super().__init__(message)
        self.state = state


class LoginUnread(LoginUnusable):
    """The token file could not be read, but the next read may succeed.

    The reason lies elsewhere: no free file descriptor, a disk error.
    """

    exit_code = EXIT_TRY_AGAIN

    def __init__(self, message: str):
        super().__init__("unreadable", message)


class IssuerUnavailable(Error):
    """The issuer gave no usable response; the request can be repeated later.

    `sent`: whether the issuer may have acted on the request, so that its response was lost
    `retry_after`: seconds to wait, as the issuer requests, or None
    `refused`: whether it is a 400 or 401 with an unknown error code, or none
    `page`: whether the response is an HTML page
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
    """An error response of RFC 6749 section 5.2, or one that is treated as such.

    `sent`: whether its status was 2xx, so that the issuer may have acted on the request
    """

    exit_code = EXIT_SIGN_IN
    sent = False

    def __init__(self, error: str, description: str = "", message: str = ""):
        super().__init__(message or (f"{error}: {description}" if description else error))
        self.error = error
        self.description = description


class GrantRefused(OAuthError):
    """The code or refresh token is dead (invalid_grant and the like): only a new login helps.

    `certain`: whether spelling, place and status are those of RFC 6749 section 5.2. If not, the
    refresh token is dead once several tries in a row get the same response.
    """

    certain = True


class ForeignLogin(OAuthError):
    """The login was begun by another program (OpenID Connect Core section 3.1.3.7, nonce)."""


class ClientRejected(OAuthError):
    """The issuer rejects our client_id (invalid_client, unauthorized_client) for the moment."""


class NotEntitled(OAuthError):
    """403 in JSON: the account's plan is refused, so that a new login does not help."""


class AuthorizationPending(OAuthError):
    """RFC 8628 section 3.5: poll again after the interval."""


class SlowDown(AuthorizationPending):
    """RFC 8628 section 3.5: pending, and the interval grows by 5 seconds for good.

    `interval`: the response's own member of this name, of any type
    """

    interval: object = None


class AccessDenied(OAuthError):
    """The user denied the login."""


class ExpiredToken(OAuthError):
    """The device code expired before it was approved."""


class ErrorResponse(Error):
    """A response of the proxy itself: {"error": {message, type, code}} and X-XAI-Proxy-Error: code.

    Each 4xx tells clients not to retry, which would not help.

    `kind`: of the fault at upstream that caused it: dns, connect, tls, timeout, reset_before_head
    or egress_proxy; "" if it has another cause
    """

    status = 500
    code = "internal_error"
    type = "api_error"
    kind = ""
    headers: tuple[tuple[str, str], ...] = ()

    def __init__(self, message: str, *, headers: tuple[tuple[str, str], ...] = ()):
        super().__init__(message)
        self.headers = type(self).headers + tuple(headers)

    def rendered(self) -> tuple[str, list[tuple[str, str]], bytes]:
        """The WSGI status, the header fields and the body."""
        error = {"message": str(self), "type": self.type, "code": self.code}
        body = json.dumps({"error": error}).encode() + b"\n"
        fields = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("X-XAI-Proxy-Error", self.code),
            *(NO_RETRY if self.status < 500 else ()),
            *self.headers,
        ]
        return f"{self.status} {http.HTTPStatus(self.status).phrase}", fields, body


class BadRequest(ErrorResponse):
    status, code, type = 400, "bad_request", "invalid_request_error"


class HeadTooLarge(BadRequest):
    status = 431


class LoginRequired(ErrorResponse):
    status, code, type = 401, "login_required", "authentication_error"
    headers = CHALLENGE


class ClientKeyRequired(ErrorResponse):
    status, code, type = 401, "client_key_required", "authentication_error"
    headers = CHALLENGE


class HostNotAllowed(ErrorResponse):
    status, code, type = 403, "host_not_allowed", "permission_error"


class OriginNotAllowed(ErrorResponse):
    status, code, type = 403, "origin_not_allowed", "permission_error"


class NotFound(ErrorResponse):
    status, code, type = 404, "not_found", "invalid_request_error"


class MethodNotAllowed(ErrorResponse):
    status, code, type = 405, "method_not_allowed", "invalid_request_error"


class ClientTimeout(ErrorResponse):
    status, code, type = 408, "client_timeout", "invalid_request_error"


class UpstreamUnreachable(ErrorResponse):
    """502. `may_retry`: whether SDKs may repeat the request, since that repeats no paid work."""

    status, code = 502, "upstream_unreachable"

    def __init__(self, message: str, *, kind: str = "connect", may_retry: bool = False):
        super().__init__(message, headers=(("x-should-retry", "true" if may_retry else "false"),))
        self.kind = kind


class TokenUnavailable(ErrorResponse):
    """503: the access token has expired or is refused, and there is no new one yet.

    `retry_after`: seconds, 1 to 10, or more for a token that comes from another machine
    """

    status, code = 503, "token_unavailable"

    def __init__(self, message: str, retry_after: int):
        super().__init__(
            message, headers=(("Retry-After", str(retry_after)), ("x-should-retry", "true"))
        )


class TooManyConnections(ErrorResponse):
    status, code = 503, "too_many_connections"
    headers = (("Retry-After", "5"), ("x-should-retry", "true"))


class UpstreamTimeout(ErrorResponse):
    status, code, kind = 504, "upstream_timeout", "timeout"
    headers = NO_RETRY


class LoopDetected(ErrorResponse):
    status, code = 508, "loop_detected"
    headers = NO_RETRY


class ClientGone(Exception):
    """The client closed its side.

    Thrown into the greenlet that serves it, so that the upstream connection is closed at once.
    """


class UpstreamBroken(Exception):
    """Upstream broke in the middle of a response: the client's framing must stay unfinished.

    `kind`: timeout or reset_in_answer
    """

    def __init__(self, message: str, kind: str = "reset_in_answer"):
        super().__init__(message)
        self.kind = kind
