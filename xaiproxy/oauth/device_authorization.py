"""RFC 8628, the device authorization grant: poll until the user has approved on some device.

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
from xaiproxy.oauth.causes import causes_of
from xaiproxy.oauth.session import Session

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:device_code"
DEFAULT_INTERVAL = 5.0  # seconds, section 3.2
MIN_INTERVAL = 1.0  # seconds between two polls, even if the issuer names a shorter interval
MAX_BACKOFF = 60.0  # seconds, up to which timeouts double the interval (section 3.5)
MAX_INTERVAL = 300.0  # seconds, limit for an interval of slow_down and for Retry-After
LAST_POLL = 1.0  # seconds before the code expires
DEFAULT_LIFETIME = 600.0  # seconds, if the response lacks expires_in, which section 3.2 requires
SLOW_DOWN = 5.0  # seconds that slow_down adds to the interval from then on, section 3.5
POLL_DEADLINE = 15.0  # seconds; the countdown is not updated meanwhile
# Section 3.5. Some servers send authorization_denied instead of access_denied.
KINDS = {
    "authorization_pending": errors.AuthorizationPending,
    "slow_down": errors.SlowDown,
    "access_denied": errors.AccessDenied,
    "authorization_denied": errors.AccessDenied,
    "expired_token": errors.ExpiredToken,
}
CODE_LIMIT = URL_LIMIT = 4096  # characters


@dataclasses.dataclass(frozen=True)
class Device:
    """The response of section 3.2, validated: safe to print except for device_code. In seconds."""

    device_code: str = dataclasses.field(repr=False)
    user_code: str
    verification_uri: str
    verification_uri_complete: str | None
    expires_in: float
    interval: float


def request(session: Session, metadata: discovery.Metadata, settings: config.Config) -> Device:
    """Request a device code and a user code (sections 3.1, 3.2). Raises as `refusal` classifies."""
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
        raise token_endpoint.refusal(
            answer, host, form, {"invalid_scope": token_endpoint.InvalidScope}
        )
    device_code, user_code = body.get("device_code"), body.get("user_code")
    if not (
        isinstance(device_code, str)
        and re.fullmatch(rf"[!-~]{{1,{CODE_LIMIT}}}", device_code)
        and isinstance(user_code, str)
        and re.fullmatch(r"[A-Za-z0-9-]{1,64}", user_code)
    ):
        raise errors.IssuerUnavailable(
            f"{host} answered {answer.summary}, but without a valid device_code and user_code; "
            "try again later"
        )
    page = discovery.check_endpoint(
        metadata.issuer, body.get("verification_uri", body.get("verification_url"))
    )
    if len(page) > URL_LIMIT:
        raise errors.IssuerUnavailable(
            f"{host} sent a verification_uri of {len(page)} characters, too long to type; "
            "try again later"
        )
    expires_in = _seconds(body.get("expires_in")) or DEFAULT_LIFETIME
    interval = max(MIN_INTERVAL, _seconds(body.get("interval"), DEFAULT_INTERVAL))
    # Such an interval would leave no time for a poll.
    if interval >= expires_in:
        interval = min(DEFAULT_INTERVAL, expires_in / 2)
    complete = _complete(metadata.issuer, body, device_code)
    return Device(device_code, user_code, page, complete, expires_in, interval)


def poll(
    session: Session,
    metadata: discovery.Metadata,
    settings: config.Config,
    device: Device,
    *,
    sleep: Callable[[float], Any] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    on_error: Callable[[errors.IssuerUnavailable], Any] = lambda error: None,
    deadline: float = POLL_DEADLINE,
) -> tokens.Login:
    """Wait for the approval (sections 3.4, 3.5). Raises AccessDenied, ExpiredToken, as `refusal`.

    A failed poll (no network, 5xx, an HTML page) counts as pending and calls `on_error`. A timeout
    doubles the wait until the next response, and Retry-After can lengthen it. Just before the code
    expires there is one more poll in any case.
    """
    end = clock() + device.expires_in
    interval = wait = device.interval
    form = {
        "grant_type": GRANT_TYPE,
        "device_code": device.device_code,
        "client_id": settings.client_id,
    }
    while True:
        # Before the first poll as well: for the issuer the interval begins with its response.
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
            interval = wait = max(interval + SLOW_DOWN, min(_seconds(error.interval), MAX_INTERVAL))
        except errors.AuthorizationPending:
            wait = interval
        except errors.ExpiredToken as error:
            raise errors.ExpiredToken(
                error.error,
                error.description,
                "the code expired before it was approved; start again for a new one",
            ) from None
        except errors.IssuerUnavailable as error:
            on_error(error)
            wait = max(interval, min(2 * wait, MAX_BACKOFF)) if _timed_out(error) else interval
            wait = max(wait, min(error.retry_after or 0.0, MAX_INTERVAL))


def _complete(issuer: str, body: dict[str, Any], device_code: str) -> str | None:
    """The URL that contains the user code, or None: it is optional, and only saves typing."""
    try:
        url = discovery.check_endpoint(issuer, body.get("verification_uri_complete"))
    except errors.IssuerUnavailable:
        return None
    # A device code is enough to fetch the tokens, so it must not be shown.
    if len(url) > URL_LIMIT or device_code in url or device_code in urllib.parse.unquote(url):
        return None
    return url


def _timed_out(error: errors.IssuerUnavailable) -> bool:
    kinds = TimeoutError, urllib3.exceptions.TimeoutError, requests.exceptions.Timeout
    return any(isinstance(cause, kinds) for cause in causes_of(error))


def _seconds(value: Any, default: float = 0.0) -> float:
    """A number, or digits in a string, as some servers send them; `default` for anything else."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        value = float(value)
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e6
    return float(value) if valid else default
