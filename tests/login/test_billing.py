"""xai-login --status --quota: the question, the answer, odd answers, and what is remembered."""

from __future__ import annotations

import hashlib
import json
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from login_command import ACCOUNT, Login
from sandbox import Sandbox
from scripted_server import ScriptedServer, answer, read_request
from scripted_upstream import make_certificate

from xaiproxy import config, errors, quota, token_store
from xaiproxy.login import billing

PERIOD = {
    "type": "USAGE_PERIOD_TYPE_WEEKLY",
    "start": "2026-07-07T04:17:34.673127+00:00",
    "end": "2026-07-14T04:17:34.673127+00:00",
}
START, END = 1783397854.0, 1784002654.0


def answers_with(sandbox: Sandbox, body: Any, **script: Any) -> None:
    sandbox.set(answers=[{"path": "/v1/billing", "body": body, **script}])


def event(login: Login, *arguments: str) -> tuple[int, dict[str, Any]]:
    result = login.run("--status", "--json", *arguments)
    assert result.stderr == ""
    return result.returncode, json.loads(result.stdout)


def test_the_quota_is_shown_and_remembered(login: Login, sandbox: Sandbox):
    written = sandbox.write_login(login.path, account=ACCOUNT)
    before = login.path.read_bytes()
    sandbox.reset()
    sandbox.set(prepaid_balance=2550, credit_usage_percent=42.5)
    result = login.run("--status", "--quota")
    assert (result.returncode, result.stderr) == (0, "")
    shown = [line[12:] for line in result.stdout.splitlines()]
    asked = shown.index("42.5 % of the weekly pool used, asked just now")
    assert shown[asked + 1].startswith("resets at 20") and ", in " in shown[asked + 1]
    assert shown[asked + 2] == "plan SuperGrok, prepaid balance $25.50"
    (request,) = sandbox.requests()
    headers = {name.lower(): value for name, value in request["headers"]}
    digest = hashlib.sha256(written["access_token"].encode()).hexdigest()
    assert request["target"] == "/v1/billing?format=credits"
    assert headers["authorization"] == f"Bearer {digest}"
    assert headers["x-xai-token-auth"] == "xai-grok-cli"
    # The token is neither refreshed nor repeated.
    assert login.path.read_bytes() == before
    assert login.files() == ["tokens.json", "tokens.json.quota"]
    login.holds_no_secret(result.stdout, (login.path.parent / "tokens.json.quota").read_text())
    # Without --quota, what was last asked is shown.
    sandbox.reset()
    assert "42.5 % of the weekly pool used" in login.run("--status").stdout
    assert sandbox.requests() == []


def test_the_quota_as_members_of_the_json_object(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path)
    body = {"config": {"currentPeriod": PERIOD, "creditUsagePercent": 4.0}}
    answers_with(sandbox, body)
    code, found = event(login, "--quota")
    assert (code, found["quota_error"]) == (0, None)
    assert abs(found["quota"].pop("asked_at") - time.time()) < 30
    assert found["quota"] == {
        "used_percent": 4.0,
        "period": "weekly",
        "starts_at": START,
        "resets_at": END,
        "prepaid_cents": None,
        "tier": "",
    }
    again = event(login)[1]["quota"]
    assert again.pop("asked_at") and again == found["quota"]


@pytest.mark.parametrize(
    "body, expected",
    [
        # xAI omits a member that is 0.
        ({"config": {"currentPeriod": PERIOD}}, {"used_percent": 0}),
        (
            {"config": {"creditUsagePercent": 100, "billingPeriodEnd": "2026-07-14T04:17:34Z"}},
            {"used_percent": 100, "period": "", "resets_at": END},
        ),
        ({"config": {"creditUsagePercent": "37.5"}}, {"used_percent": 37.5, "resets_at": None}),
        ({"config": {"creditUsagePercent": 103.2}}, {"used_percent": 103.2}),
        (
            {"config": {"creditUsagePercent": 1, "prepaidBalance": {"val": "2500"}}},
            {"prepaid_cents": 2500},
        ),
        ({"config": {"creditUsagePercent": 1, "prepaidBalance": {}}}, {"prepaid_cents": 0}),
        ({"config": {"creditUsagePercent": 1, "subscriptionTier": "XBasic"}}, {"tier": "XBasic"}),
        # An odd member that is not needed makes nothing void.
        (
            {
                "config": {
                    "creditUsagePercent": 1,
                    "currentPeriod": {"type": 7, "start": "soon", "end": "9999-99-99T00:00:00Z"},
                    "prepaidBalance": {"val": "much"},
                },
                "subscriptionTier": "<b>Heavy</b>",
            },
            {"period": "", "starts_at": None, "resets_at": None, "prepaid_cents": None, "tier": ""},
        ),
        ({"config": {"creditUsagePercent": 1, "currentPeriod": [], "prepaidBalance": 7}}, {}),
    ],
)
def test_the_members_of_a_response(body: dict[str, Any], expected: dict[str, Any]):
    found = billing.quota_of(body, 5.0)
    assert found.asked_at == 5 and found.is_valid()
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    "script, message",
    [
        ({"error": "cloudflare_challenge"}, "HTTP 403, text/html): Cloudflare, or a proxy"),
        ({"status": 200, "body": "<html>"}, "HTTP 200, text/html): Cloudflare, or a proxy"),
        (
            {"status": 401, "body": {"code": "x"}},
            "(HTTP 401, application/json): it refuses the access token",
        ),
        ({"status": 403, "body": {}}, "it refuses the access token, or the account's plan has no"),
        ({"status": 404, "body": "404"}, "it has no such endpoint for this account"),
        ({"status": 426, "body": {"error": "outdated"}}, "HTTP 426, application/json): it answers"),
        ({"status": 429, "body": {}}, "too many requests"),
        ({"status": 503, "body": {}}, "it has a failure; try again later"),
        (
            {"status": 302, "body": "", "headers": {"Location": "/elsewhere"}},
            "a redirect is not followed with an access token",
        ),
        ({"body": "ok"}, "its body has no config"),
        ({"body": []}, "its body has no config"),
        ({"body": {}}, "its body has no config"),
        ({"body": {"config": {"onDemandCap": {"val": 0}}}}, "its creditUsagePercent is missing"),
        ({"body": {"config": {"creditUsagePercent": "half"}}}, "missing, or no number"),
        ({"body": {"config": {"creditUsagePercent": True}}}, "missing, or no number"),
        ({"body": {"config": {"creditUsagePercent": -1}}}, "its numbers make no sense"),
        ({"body": {"config": {"creditUsagePercent": 1e9}}}, "its numbers make no sense"),
        ({"body": '{"config": {"creditUsagePercent": NaN}}'}, "its numbers make no sense"),
        ({"body": "x" * (2 << 20)}, "is longer than 1048576 bytes"),
        ({"cut": "reset"}, "closed the connection before its response was complete"),
    ],
    ids=str,
)
def test_an_odd_answer_is_a_clear_error_and_loses_nothing(
    login: Login, sandbox: Sandbox, script: dict[str, Any], message: str
):
    sandbox.write_login(login.path)
    assert event(login, "--quota")[0] == 0
    remembered = (login.path.parent / "tokens.json.quota").read_bytes()
    sandbox.set(answers=[{"path": "/v1/billing", **script}])
    code, found = event(login, "--quota")
    assert code == 69 and found["usable"] and found["quota"]["used_percent"] == 37.5
    assert message in found["quota_error"]
    assert (login.path.parent / "tokens.json.quota").read_bytes() == remembered
    assert sandbox.requests("/elsewhere") == []
    text = login.run("--status", "--quota").stdout
    assert "37.5 % of the weekly pool used" in text and message in text


def test_a_response_that_does_not_end_times_out(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path)
    answers_with(sandbox, {"config": {"creditUsagePercent": 1}}, drip=2)
    store = token_store.TokenStore(config.from_environ(login.env))
    begun = time.monotonic()
    found, error = billing.ask(store, time.time(), deadline=0.5)
    assert found is None and time.monotonic() - begun < 5
    assert isinstance(error, errors.IssuerUnavailable)
    assert "sent no complete response within 0.5 s" in str(error)


@pytest.mark.parametrize("refresh_token, code", [("rt", 75), (None, 77)])
def test_an_expired_token_is_not_sent(
    login: Login, sandbox: Sandbox, refresh_token: str | None, code: int
):
    sandbox.write_login(login.path, expires_at=1000, refresh_token=refresh_token)
    sandbox.reset()
    status, found = event(login, "--quota")
    assert (status, found["quota"]) == (code, None)
    assert found["quota_error"] == "not asked, because the access token has expired"
    assert sandbox.requests() == [] and login.files() == ["tokens.json"]


def test_without_a_login_nothing_is_asked(login: Login, sandbox: Sandbox):
    sandbox.reset()
    status, found = event(login, "--quota")
    assert status == 77
    assert found["quota_error"] == "not asked, because no login can be used (missing)"
    assert sandbox.requests() == [] and not login.path.parent.exists()


def test_the_quota_of_a_former_account_is_not_shown(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path, account=ACCOUNT)
    assert event(login, "--quota")[1]["quota"]
    sandbox.write_login(login.path, account="another@example.org")
    assert event(login)[1]["quota"] is None
    answers_with(sandbox, {}, status=503)
    assert event(login, "--quota")[1]["quota"] is None


def test_a_quota_that_cannot_be_remembered_is_shown(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path)
    (login.path.parent / "tokens.json.quota").mkdir()
    status, found = event(login, "--quota")
    assert (status, found["quota"]["used_percent"]) == (75, 37.5)
    assert found["quota_error"].startswith("not remembered: ")
    assert "tokens.json.quota cannot be written" in found["quota_error"]
    assert login.files() == ["tokens.json", "tokens.json.quota"]


def test_a_token_of_xai_goes_to_its_billing_host_alone(
    login: Login, sandbox: Sandbox, tmp_path: Path
):
    """Through the proxy of HTTPS_PROXY, and with the CA certificates of SSL_CERT_FILE."""
    ca, context = make_certificate(tmp_path, "cli-chat-proxy.grok.com")
    asked: list[bytes] = []

    def tunnel(connection: Any) -> None:
        asked.append(read_request(connection))
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with context.wrap_socket(connection, server_side=True) as inside:
            asked.append(read_request(inside))
            body = {"config": {"creditUsagePercent": 12}, "subscriptionTier": "SuperGrok"}
            inside.sendall(answer(200, body))

    sandbox.write_login(login.path, issuer=config.DEFAULT_ISSUER)
    sandbox.reset()
    login.env |= {"XAI_PROXY_ISSUER": "", "XAI_PROXY_UPSTREAM": ""}
    with ScriptedServer(tunnel) as proxy:
        login.env |= {"HTTPS_PROXY": proxy.url, "SSL_CERT_FILE": str(ca)}
        code, found = event(login, "--quota")
        assert (code, found["quota"]["used_percent"]) == (0, 12)
        # Without that CA, the certificate is not accepted, and no token is sent.
        login.env["SSL_CERT_FILE"] = ssl.get_default_verify_paths().cafile or ""
        del asked[2:]
        code, found = event(login, "--quota")
        assert code == 69 and "the certificate of cli-chat-proxy.grok.com" in found["quota_error"]
    connect, request, *again = asked
    assert connect.startswith(b"CONNECT cli-chat-proxy.grok.com:443 ")
    head = request.split(b"\r\n")
    assert head[0] == b"GET /v1/billing?format=credits HTTP/1.1"
    token = login.saved()["access_token"].encode()
    assert b"Host: cli-chat-proxy.grok.com" in head and b"Bearer " + token in request
    assert not any(token in part for part in [connect, *again]) and sandbox.requests() == []


def test_an_unreachable_host_is_an_error(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path)
    login.env["XAI_PROXY_UPSTREAM"] = "http://127.0.0.1:1"
    code, found = event(login, "--quota")
    assert code == 69
    assert found["quota_error"] == (
        "127.0.0.1:1 cannot be reached (Connection refused); check the network, or "
        "XAI_PROXY_UPSTREAM"
    )


def test_the_remembered_quota_can_be_read_by_the_proxy(login: Login, sandbox: Sandbox):
    sandbox.write_login(login.path)
    found = event(login, "--quota")[1]["quota"]
    store = token_store.TokenStore(config.from_environ(login.env))
    assert quota.read(store) == quota.Quota(**found)
