"""RFC 8628, the device authorization grant: a person approves on any device, and we ask until they have.

device = request(session, metadata, settings)
show device.verification_uri and device.user_code
login = poll(session, metadata, settings, device)       blocks
"""

import dataclasses
import re
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import requests
import urllib3

from xaiproxy import config, errors, tokens
from xaiproxy.oauth import discovery, token_endpoint
from xaiproxy.oauth.session import Session, causes_of

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:device_code"
DEFAULT_INTERVAL = 5.0  # seconds, section 3.2
SHORTEST = 1.0  # seconds between two polls, also if the issuer names a shorter interval
SLOWEST = 60.0  # seconds, up to which timeouts double the interval (section 3.5)
LONGEST = 300.0  # seconds, the most that an interval of slow_down or Retry-After counts for
LAST_POLL = 1.0  # seconds before the code expires
DEFAULT_LIFETIME = 600.0  # seconds, when the answer has no expires_in, which section 3.2 requires
SLOWER = 5.0  # seconds that slow_down adds for good, section 3.5
POLL_DEADLINE = 15.0  # seconds; the countdown stands still meanwhile
KINDS = {  # section 3.5; authorization_denied is what some servers say instead
    "authorization_pending": errors.AuthorizationPending,
    "slow_down": errors.SlowDown,
    "access_denied": errors.AccessDenied,
    "authorization_denied": errors.AccessDenied,
    "expired_token": errors.ExpiredToken,
}
CODE_LIMIT = ADDRESS_LIMIT = 4096  # characters


@dataclasses.dataclass(frozen=True)
class Device:
    """Section 3.2's answer, checked: all of it but device_code is safe to show. Times are seconds."""

    device_code: str = dataclasses.field(repr=False)
    user_code: str
    verification_uri: str
    verification_uri_complete: str | None
    expires_in: float
    interval: float


def request(session: Session, metadata: discovery.Metadata, settings: config.Config) -> Device:
    """Ask for a device code and a user code (sections 3.1, 3.2). Raises what token_endpoint.refusal makes."""
    endpoint = metadata.device_authorization_endpoint
    if endpoint is None:
        raise errors.IssuerUnavailable(
            f"{metadata.issuer} offers no device login; use " + errors.typed("xai-login --browser")
        )
    form = {"client_id": settings.client_id, "scope": settings.scope}
    answer = session.post(endpoint, form)
    host = urllib.parse.urlsplit(endpoint).netloc
    body = answer.json()
    if answer.status != 200 or body is None:
        raise token_endpoint.refusal(answer, host, form, {"invalid_scope": _InvalidScope})
    device_code, user_code = body.get("device_code"), body.get("user_code")
    if not (
        isinstance(device_code, str)
        and re.fullmatch(rf"[!-~]{{1,{CODE_LIMIT}}}", device_code)
        and isinstance(user_code, str)
        and re.fullmatch(r"[A-Za-z0-9-]{1,64}", user_code)
    ):
        raise errors.IssuerUnavailable(
            f"{host} answered {answer.summary}, but without a device_code and a "
            "user_code that can be shown; try again later"
        )
    page = body.get("verification_uri", body.get("verification_url"))
    discovery.check_endpoint(metadata.issuer, page)
    if len(page) > ADDRESS_LIMIT:
        raise errors.IssuerUnavailable(
            f"{host} named a verification_uri of {len(page)} characters, which nobody can type; "
            "try again later"
        )
    expires_in = _seconds(body.get("expires_in")) or DEFAULT_LIFETIME
    interval = max(SHORTEST, _seconds(body.get("interval"), DEFAULT_INTERVAL))
    if interval >= expires_in:  # nonsense, since it leaves no time for a poll
        interval = min(DEFAULT_INTERVAL, expires_in / 2)
    return Device(
        device_code,
        user_code,
        page,
        _complete(metadata.issuer, body, device_code),
        expires_in,
        interval,
    )


def poll(
    session: Session,
    metadata: discovery.Metadata,
    settings: config.Config,
    device: Device,
    *,
    sleep: Callable[[float], Any] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    trouble: Callable[[errors.IssuerUnavailable], Any] = lambda error: None,
    deadline: float = POLL_DEADLINE,
) -> tokens.Tokens:
    """Wait for the approval (sections 3.4, 3.5). Raises AccessDenied, ExpiredToken, and others of `refusal`.

    An answer that is none (no network, 5xx, a page) counts as pending; `trouble` is told of it. A timeout doubles the
    wait until the next answer, and Retry-After can lengthen it, but one poll just before the end is made all the same.
    """
    end = clock() + device.expires_in
    interval = wait = device.interval
    form = {
        "grant_type": GRANT_TYPE,
        "device_code": device.device_code,
        "client_id": settings.client_id,
    }
    while True:
        # Before the first poll, too: the issuer counts from its answer.
        left = max(0.0, end - clock())
        sleep(min(wait, left, max(interval, left - LAST_POLL)))
        try:
            if clock() >= end:
                raise errors.ExpiredToken("expired_token")
            return token_endpoint.request(
                session,
                metadata.token_endpoint,
                form,
                issuer=metadata.issuer,
                scope=settings.scope,
                kinds=KINDS,
                deadline=deadline,
            )
        except errors.SlowDown as error:
            interval = wait = max(interval + SLOWER, min(_seconds(error.interval), LONGEST))
        except errors.AuthorizationPending:
            wait = interval
        except errors.ExpiredToken as error:
            raise errors.ExpiredToken(
                error.error,
                error.description,
                "the code expired before it was approved; start again for a new one",
            ) from None
        except errors.IssuerUnavailable as error:
            trouble(error)
            wait = max(interval, min(2 * wait, SLOWEST)) if _timed_out(error) else interval
            wait = max(wait, min(error.retry_after or 0.0, LONGEST))


class _InvalidScope(errors.OAuthError):
    exit_code = errors.EXIT_CONFIGURATION

    def __init__(self, error: str, description: str, message: str):
        super().__init__(
            error,
            description,
            f"the issuer refuses the scope ({description or error}); correct XAI_PROXY_SCOPE",
        )


def _complete(issuer: str, body: dict[str, Any], device_code: str) -> str | None:
    url = body.get("verification_uri_complete")
    try:
        discovery.check_endpoint(issuer, url)
    except errors.IssuerUnavailable:
        return None  # it only saves typing
    if len(url) > ADDRESS_LIMIT:
        return None
    # Whoever has the device code can take the login: it must not stand on a screen.
    return None if device_code in url or device_code in urllib.parse.unquote(url) else url


def _timed_out(error: errors.IssuerUnavailable) -> bool:
    kinds = TimeoutError, urllib3.exceptions.TimeoutError, requests.exceptions.Timeout
    return any(isinstance(cause, kinds) for cause in causes_of(error))


def _seconds(value: Any, default: float = 0.0) -> float:
    """A number, or a string of digits as some servers send it; `default` for anything else."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        value = float(value)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e6
    return float(value) if good else default
