"""oauth/device_authorization.py: the user code, the poll interval, and when polling ends."""

from __future__ import annotations

import socket
import urllib.parse
from typing import Any

import pytest
from sandbox import CLIENT_ID, SCOPE, Sandbox
from scripted_server import ScriptedServer, answer

from xaiproxy import config, errors, tokens
from xaiproxy.oauth import device_authorization, discovery
from xaiproxy.oauth.session import Session

SETTINGS = config.from_environ({})
GOOD = {
    "device_code": "dc-1",
    "user_code": "4XWJ-JJAZ",
    "verification_uri": "http://127.0.0.1/device",
    "verification_uri_complete": "http://127.0.0.1/device?user_code=4XWJ-JJAZ",
    "expires_in": 900,
    "interval": 5,
}
PENDING = answer(
    400, {"error": "authorization_pending", "error_description": "User has not yet authorized"}
)
SLOW_DOWN = answer(400, {"error": "slow_down"})
TOKENS = answer(200, {"access_token": "at", "refresh_token": "rt", "expires_in": 60})


class Clock:
    """Time that passes only in sleep()."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sleeps: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


def ask(body: Any, issuer: str = "http://127.0.0.1:9191") -> device_authorization.Device:
    with ScriptedServer(body if isinstance(body, bytes) else answer(200, body)) as server:
        metadata = discovery.Metadata(
            issuer, server.url, device_authorization_endpoint=server.url + "/device/code"
        )
        device = device_authorization.request(Session(SETTINGS), metadata, SETTINGS)
    assert server.requests[0].startswith(b"POST /device/code HTTP/1.1\r\n")
    form = urllib.parse.urlencode({"client_id": CLIENT_ID, "scope": SCOPE})
    assert server.requests[0].endswith(f"\r\n\r\n{form}".encode())
    return device


def poll(
    *answers: Any,
    clock: Clock,
    on_error: Any = lambda error: None,
    deadline: float = 15,
    **members: Any,
) -> tokens.Login:
    device = device_authorization.Device(
        **{
            "device_code": "dc-1",
            "user_code": "A",
            "verification_uri": "http://127.0.0.1/",
            "verification_uri_complete": None,
            "expires_in": 900,
            "interval": 5.0,
            **members,
        }
    )
    with ScriptedServer(*answers) as server:
        metadata = discovery.Metadata("http://127.0.0.1:9191", server.url + "/t")
        try:
            return device_authorization.poll(
                Session(SETTINGS),
                metadata,
                SETTINGS,
                device,
                sleep=clock.sleep,
                clock=lambda: clock.now,
                on_error=on_error,
                deadline=deadline,
            )
        finally:
            clock.requests = server.requests


def test_the_code_and_its_address_are_shown():
    device = ask(GOOD)
    assert (
        device.user_code,
        device.verification_uri,
        device.verification_uri_complete,
        device.expires_in,
        device.interval,
    ) == (
        "4XWJ-JJAZ",
        "http://127.0.0.1/device",
        "http://127.0.0.1/device?user_code=4XWJ-JJAZ",
        900,
        5,
    )
    assert "dc-1" not in repr(device)


@pytest.mark.parametrize(
    "without, interval, expires_in",
    [(("interval",), 5, 900), (("expires_in",), 5, 600), (("verification_uri_complete",), 5, 900)],
)
def test_a_response_may_omit_optional_members(
    without: tuple[str], interval: float, expires_in: float
):
    device = ask({name: value for name, value in GOOD.items() if name not in without})
    assert (device.interval, device.expires_in) == (interval, expires_in)


@pytest.mark.parametrize(
    "value", ["five", "-5", "", "\u0661", "9" * 5000, True, -1, None, float("nan"), 1e300, [5]]
)
def test_a_time_that_is_no_number_has_its_default(value: Any):
    device = ask(GOOD | {"interval": value, "expires_in": value})
    assert (device.interval, device.expires_in) == (5, 600)


@pytest.mark.parametrize(
    "named, interval, expires_in",
    [
        ({"interval": "7", "expires_in": "1800"}, 7, 1800),
        ({"interval": "7.5"}, 7.5, 900),
        ({"interval": 0}, 1, 900),
        ({"interval": "0"}, 1, 900),
        ({"interval": 0.05}, 1, 900),
        ({"interval": 900}, 5, 900),
        ({"interval": 3600}, 5, 900),
        ({"interval": 60, "expires_in": 8}, 4, 8),
        ({"interval": 1, "expires_in": 1}, 0.5, 1),
    ],
)
def test_times_are_kept_within_bounds(named: dict[str, Any], interval: float, expires_in: float):
    """Numbers may be strings; no poll in a hot loop; and at least one before the code expires."""
    device = ask(GOOD | named)
    assert (device.interval, device.expires_in) == (interval, expires_in)


def test_verification_url_is_accepted_as_an_older_name():
    body = GOOD | {"verification_url": GOOD["verification_uri"]}
    del body["verification_uri"]
    assert ask(body).verification_uri == GOOD["verification_uri"]


@pytest.mark.parametrize(
    "complete",
    [
        "http://127.0.0.1/?code=dc-1",
        "http://127.0.0.1/?code=%64c-1",
        "https://evil example/",
        3,
        "http://127.0.0.1/?code=" + "A" * 4096,
    ],
)
def test_an_unsafe_complete_address_is_not_shown(complete: Any):
    assert ask(GOOD | {"verification_uri_complete": complete}).verification_uri_complete is None


def test_the_pages_of_xai_are_on_xai():
    xai = {"verification_uri": "https://accounts.x.ai/oauth2/device"}
    assert (
        # This complete address is on loopback.
        ask(GOOD | xai, "https://auth.x.ai").verification_uri_complete is None
    )
    with pytest.raises(errors.IssuerUnavailable, match="not https on"):
        ask(GOOD, "https://auth.x.ai")


@pytest.mark.parametrize(
    "change",
    [
        {"user_code": "\x1b[2J"},
        {"user_code": "A B"},
        {"user_code": ""},
        {"user_code": None},
        {"user_code": "A" * 65},
        {"device_code": ""},
        {"device_code": 3},
        {"verification_uri": "javascript:alert(1)"},
        {"verification_uri": None},
        {"device_code": "d" * 4097},
        {"verification_uri": "http://127.0.0.1/" + "A" * 4096},
    ],
)
def test_a_response_that_cannot_be_shown_is_refused(change: dict[str, Any]):
    with pytest.raises(errors.IssuerUnavailable) as caught:
        ask(GOOD | change)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "reply, kind, exit_code, message",
    [
        (
            answer(
                400,
                {
                    "error": "invalid_scope",
                    "error_description": "Scope team:read is not valid for User principals",
                },
            ),
            errors.OAuthError,
            78,
            "Scope team:read is not valid for User principals\\); correct XAI_PROXY_SCOPE",
        ),
        (
            answer(400, {"error": "invalid_client"}),
            errors.ClientRejected,
            77,
            "XAI_PROXY_CLIENT_ID",
        ),
        (
            answer(403, "<html>", "text/html"),
            errors.IssuerUnavailable,
            69,
            "an HTML page",
        ),
        (answer(429), errors.IssuerUnavailable, 69, "HTTP 429"),
        (answer(200, []), errors.IssuerUnavailable, 69, "HTTP 200"),
    ],
)
def test_a_refused_authorization_request_is_reported(
    reply: bytes, kind: type, exit_code: int, message: str
):
    with pytest.raises(kind, match=message) as caught:
        ask(reply)
    assert caught.value.exit_code == exit_code


def test_an_issuer_without_device_endpoint_is_refused():
    with pytest.raises(
        errors.IssuerUnavailable, match=r"offers no device login; use `\S*bin/xai-login --browser`"
    ):
        device_authorization.request(
            Session(SETTINGS),
            discovery.Metadata("http://127.0.0.1:1", "http://127.0.0.1:1/t"),
            SETTINGS,
        )


# polling


def test_every_poll_comes_after_the_interval():
    clock = Clock()
    login = poll(PENDING, PENDING, TOKENS, clock=clock)
    assert clock.sleeps == [5, 5, 5] and len(clock.requests) == 3
    assert clock.requests[0].endswith(
        b"\r\n\r\ngrant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3A"
        b"device_code&device_code=dc-1&client_id=" + CLIENT_ID.encode()
    )
    assert (login.access_token, login.issuer, login.scope) == (
        "at",
        "http://127.0.0.1:9191",
        SETTINGS.scope,
    )


def test_slow_down_adds_five_seconds_to_every_further_interval():
    clock = Clock()
    poll(SLOW_DOWN, PENDING, answer(200, {"error": "slow_down"}), TOKENS, clock=clock)
    assert clock.sleeps == [5, 10, 10, 15]


def test_no_optional_member_costs_the_approval():
    odd = {
        "access_token": "at",
        "refresh_token": "rt",
        "expires_in": 60,
        "scope": ["openid", "api:access"],
        "id_token": {},
    }
    login = poll(PENDING, answer(200, odd, "text/html"), clock=Clock())
    assert (login.access_token, login.refresh_token, login.scope) == (
        "at",
        "rt",
        "openid api:access",
    )


@pytest.mark.parametrize(
    "named, interval", [(30, 30), (10, 10), (7, 10), ("60", 60), (-1, 10), ("x", 10), (1e5, 300)]
)
def test_slow_down_may_name_a_longer_interval(named: Any, interval: float):
    clock = Clock()
    poll(answer(400, {"error": "slow_down", "interval": named}), TOKENS, clock=clock)
    assert clock.sleeps == [5, interval]


def test_an_unusable_response_counts_as_pending():
    clock, troubles = Clock(), []
    poll(
        answer(502, "<html>", "text/html"),
        answer(403, "<html>", "text/html"),
        answer(500, {"error": "invalid_grant"}),
        lambda connection: None,
        answer(400, {"error": "temporarily_unavailable"}),
        answer(200, {}),
        TOKENS,
        clock=clock,
        on_error=troubles.append,
    )
    assert clock.sleeps == [5] * 7 and len(troubles) == 6


def silent(connection: socket.socket) -> None:
    """Read the request, and send nothing until the client closes the connection."""
    while connection.recv(65536):
        pass


def test_a_timeout_halves_the_frequency_of_polls():
    """RFC 8628 section 3.5, a MUST; after a response the interval is the usual one."""
    clock, refused = Clock(), answer(502, "<html>", "text/html")
    poll(
        silent,
        silent,
        refused,
        silent,
        PENDING,
        silent,
        silent,
        silent,
        silent,
        silent,
        TOKENS,
        clock=clock,
        # Long enough for the responses that are sent.
        deadline=0.5,
    )
    assert clock.sleeps == [5, 10, 20, 5, 10, 5, 10, 20, 40, 60, 60]


def test_retry_after_is_honoured_within_bounds_and_never_shortens_the_interval():
    clock = Clock()
    poll(
        answer(429, Retry_After="30"),
        answer(503, Retry_After="1"),
        answer(503, Retry_After="100000"),
        TOKENS,
        clock=clock,
    )
    assert clock.sleeps == [5, 30, 5, 300]


def test_a_lengthened_interval_leaves_one_poll_before_the_code_expires():
    clock = Clock()
    poll(answer(503, Retry_After="300"), TOKENS, clock=clock, expires_in=60)
    assert clock.sleeps == [5, 54]
    with pytest.raises(errors.ExpiredToken):
        poll(answer(503, Retry_After="300"), clock=(clock := Clock()), expires_in=60)
    assert clock.sleeps == [5, 54, 1] and len(clock.requests) == 2


@pytest.mark.parametrize(
    "body, kind",
    [
        (
            {"error": "access_denied", "error_description": "The user rejected the request"},
            errors.AccessDenied,
        ),
        ({"error": "authorization_denied"}, errors.AccessDenied),
        ({"error": "expired_token"}, errors.ExpiredToken),
        ({"error": "invalid_grant"}, errors.GrantRefused),
        ({"error": "invalid_client"}, errors.ClientRejected),
    ],
)
@pytest.mark.parametrize("status", [400, 200])
def test_a_final_error_ends_the_polling(body: dict[str, str], kind: type, status: int):
    clock = Clock()
    with pytest.raises(kind) as caught:
        poll(PENDING, answer(status, body), TOKENS, clock=clock)
    assert len(clock.requests) == 2 and caught.value.exit_code == 77


def test_an_expired_code_is_not_polled_for():
    clock = Clock()
    with pytest.raises(errors.ExpiredToken, match="expired before it was approved"):
        poll(PENDING, clock=clock, expires_in=12)
    assert clock.sleeps == [5, 5, 2] and len(clock.requests) == 2


def test_the_sandbox_issues_a_login_after_the_approval(sandbox: Sandbox):
    sandbox.set(device_interval=0.05)
    metadata = discovery.discover(Session(SETTINGS), sandbox.url)
    device = device_authorization.request(Session(SETTINGS), metadata, SETTINGS)
    assert device.interval == 1
    sandbox.set(answers=[{"path": "/oauth2/token", "cut": "close", "times": 1}])
    login = device_authorization.poll(
        Session(SETTINGS),
        metadata,
        SETTINGS,
        device,
        on_error=lambda error: sandbox.approve(device.user_code),
    )
    assert (login.account, login.issuer, len(login.refresh_token)) == (
        "sandbox@example.invalid",
        sandbox.url,
        86,
    )
    assert sandbox.counters()["slow_downs"] == 0
