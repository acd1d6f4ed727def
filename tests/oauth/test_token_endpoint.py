"""oauth/token_endpoint.py: what each kind of response means, and what of it a message repeats."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sandbox import Sandbox
from scripted_server import ScriptedServer, answer

from xaiproxy import config, errors, tokens
from xaiproxy.oauth import token_endpoint
from xaiproxy.oauth.session import Session

PAGE = "<!DOCTYPE html><title>Just a moment...</title>"
HTML = "text/html; charset=UTF-8"
TEXT = "text/plain; charset=utf-8"


def make_login(**members: Any) -> tokens.Login:
    return tokens.Login(
        **{
            "access_token": "at-old",
            "expires_at": 1000,
            "refresh_token": "rt-old",
            "account": "a@b.example",
            "scope": "openid",
            "salt": "the salt",
            "extra": {"theirs": 1},
            **members,
        }
    )


def refresh(reply: bytes, login: tokens.Login | None = None) -> tokens.Login:
    with ScriptedServer(reply) as server:
        return token_endpoint.refresh(
            Session(config.from_environ({})),
            server.url + "/t",
            login or make_login(),
            deadline=5,
            now=lambda: 5000.0,
        )


def refused(kind: type[errors.Error], reply: bytes) -> Any:
    with pytest.raises(errors.Error) as caught:
        refresh(reply)
    assert type(caught.value) is kind
    return caught.value


def test_a_refresh_sends_the_grant_and_returns_a_login():
    body = {
        "access_token": "at-new",
        "refresh_token": "rt-new",
        "expires_in": 60,
        "token_type": "Bearer",
        "id_token": "x.y.z",
    }
    with ScriptedServer(answer(200, body)) as server:
        login = token_endpoint.refresh(
            Session(config.from_environ({})), server.url + "/t", make_login(), now=lambda: 5000.0
        )
    assert server.requests[0].startswith(b"POST /t HTTP/1.1\r\n")
    assert server.requests[0].endswith(
        b"\r\n\r\ngrant_type=refresh_token&refresh_token=rt-old&client_id="
        + config.DEFAULT_CLIENT_ID.encode()
    )
    assert login == make_login(
        access_token="at-new",
        refresh_token="rt-new",
        expires_at=5060,
        obtained_at=5000.0,
        token_endpoint=server.url + "/t",
    )


def test_a_response_without_refresh_token_keeps_the_former():
    assert refresh(answer(201, {"access_token": "at-new"})).refresh_token == "rt-old"


@pytest.mark.parametrize(
    "code",
    [
        "invalid_grant",
        "refresh_token_reused",
        "refresh_token_expired",
        "bad_refresh_token",
        "token_expired",
        "token_revoked",
    ],
)
@pytest.mark.parametrize("status", [400, 401])
def test_a_revoked_refresh_token_is_grant_refused(code: str, status: int):
    body = {"error": code, "error_description": "Refresh token has been revoked"}
    error = refused(errors.GrantRefused, answer(status, body))
    assert (error.error, error.description, error.exit_code) == (
        code,
        "Refresh token has been revoked",
        77,
    )
    assert f"no longer accepts this login ({code}: Refresh token has been revoked)" in str(error)
    assert (error.certain, error.sent) == (code == "invalid_grant", False)


@pytest.mark.parametrize("status", [200, 400, 401, 403])
@pytest.mark.parametrize(
    "body",
    [
        {"code": "invalid_grant", "error": "Refresh token has been revoked"},
        {"error": {"code": "token_expired"}},
        {"error": {"code": 400, "message": "invalid_grant"}},
        {"error": "INVALID_GRANT"},
        {"error": "Bad_Refresh_Token"},
    ],
)
def test_invalid_grant_in_another_spelling_is_not_certain(body: dict[str, Any], status: int):
    error = refused(errors.GrantRefused, answer(status, body))
    assert (error.certain, error.sent) == (False, status == 200)


def test_a_200_with_an_error_member_is_no_success():
    error = refused(
        errors.GrantRefused,
        answer(200, {"error": "invalid_grant", "access_token": "at", "expires_in": 60}),
    )
    assert (error.certain, error.sent) == (False, True)
    for nothing in (None, "", 0, False, []):
        assert refresh(answer(200, {"error": nothing, "access_token": "at"})).access_token == "at"


@pytest.mark.parametrize("error", ["invalid_client", "unauthorized_client"])
@pytest.mark.parametrize("status", [400, 401])
def test_an_unknown_client_is_named(status: int, error: str):
    refusal = refused(
        errors.ClientRejected,
        answer(status, {"error": error, "error_description": "Unknown client"}),
    )
    assert (refusal.error, refusal.description) == (error, "Unknown client")


@pytest.mark.parametrize(
    "body",
    [
        {"error": "access_denied"},
        {"code": "x", "error": "User is blocked"},
        {"error": {"code": "tier_denied", "message": "Upgrade"}},
    ],
)
def test_a_403_in_json_is_about_the_account_and_not_the_login(body: dict[str, str]):
    refused(errors.NotEntitled, answer(403, body))


@pytest.mark.parametrize(
    "reply, retry_after",
    [
        (answer(400, {"error": "temporarily_unavailable"}), None),
        # An error code without a meaning at a refresh.
        (answer(400, {"error": "access_denied"}), None),
        (answer(400, {"error": {"message": "what?"}}), None),
        (answer(403, {"message": "no"}), None),
        (answer(403, {"error": "Blocked by the firewall"}), None),
        (answer(403, {"error": True}), None),
        (answer(400, {}), None),
        (answer(400), None),
        (answer(404), None),
        (answer(302, "", Location="http://127.0.0.1:1/"), None),
        (answer(403, PAGE, HTML, cf_mitigated="challenge"), None),
        (answer(403, "error code: 1010", TEXT), None),
        (answer(400, PAGE, "application/json"), None),
        (answer(401, PAGE, HTML), None),
        (answer(415, "Form requests must", TEXT), None),
        (answer(422, "Failed to deserialize", TEXT), None),
        (answer(429, {"error": "invalid_grant"}, Retry_After="7"), 7),
        (answer(429, "", Retry_After="soon"), None),
        (answer(500, {"error": "invalid_grant"}), None),
        (answer(503, "", Retry_After="0"), 0),
        (answer(503, PAGE, HTML, Retry_After="9"), 9),
        (answer(503, {"error": "temporarily_unavailable"}), None),
        (answer(521, PAGE, HTML, Retry_After="60"), 60),
        (answer(523, PAGE, HTML), None),
        (answer(525, "", TEXT), None),
        (answer(526, "", TEXT), None),
    ],
)
def test_a_definite_error_response_spends_no_token(reply: bytes, retry_after: float | None):
    error = refused(errors.IssuerUnavailable, reply)
    assert (error.sent, error.retry_after) == (False, retry_after)
    assert "Just a moment" not in str(error) and error.exit_code == 69


@pytest.mark.parametrize(
    "reply",
    [
        answer(200, {}),
        answer(200, {"access_token": ""}),
        answer(200, {"access_token": "two words"}),
        answer(200, []),
        answer(200, "", TEXT),
        answer(204),
        answer(200, PAGE, HTML),
        answer(200, {"error": "slow_down_please"}),
        answer(500, "oops", TEXT),
        answer(502, PAGE, HTML),
        answer(502, {"error": "bad_gateway"}),
        answer(502, {"error": {"message": "upstream timed out", "code": "server_error"}}),
        answer(504, {"code": "temporarily_unavailable"}),
        answer(503, PAGE, HTML),
        answer(504, "", TEXT, Retry_After="5"),
        answer(520, PAGE, HTML),
        answer(522, PAGE, HTML),
        answer(524, PAGE, HTML),
        answer(530, "", TEXT),
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
    ],
)
def test_after_an_uncertain_response_the_token_may_be_spent(reply: bytes):
    error = refused(errors.IssuerUnavailable, reply)
    assert error.sent and error.page is (PAGE.encode() in reply)


@pytest.mark.parametrize(
    "member",
    [
        {"scope": ["api:access", "openid"]},
        {"scope": "api:access\nopenid"},
        {"scope": "\u00e9"},
        {"scope": {}},
        {"scope": ["a", 1]},
        {"id_token": {}},
        {"id_token": "no.jwt"},
        {"refresh_token": 3},
        {"expires_in": "soon"},
        {"expires_in": 1e99},
        {"token_type": None},
        {"error": None},
        {"error_description": "none"},
    ],
)
@pytest.mark.parametrize("label", ["application/json", HTML, TEXT])
def test_no_optional_member_and_no_media_type_spoils_a_response(member: dict[str, Any], label: str):
    body = {"access_token": "at-new", "refresh_token": "rt-new", "expires_in": 60, **member}
    login = refresh(answer(200, json.dumps(body), label))
    assert login.access_token == "at-new"
    assert login.refresh_token == ("rt-old" if "refresh_token" in member else "rt-new")
    assert login.scope == (
        "api:access openid" if member.get("scope") == ["api:access", "openid"] else "openid"
    )
    assert login.account == "a@b.example"


def test_415_is_reported_as_a_bug_of_xaiproxy():
    assert "a bug of xaiproxy" in str(
        refused(errors.IssuerUnavailable, answer(415, "Form requests must", TEXT))
    )


def test_an_error_description_is_redacted_before_it_is_repeated():
    description = (
        "rt-old and "
        + "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln and "
        + "a1B2-_" * 8
        + "\x1b[31m\r\nforged\u202e: "
        + "word " * 99
    )
    error = refused(
        errors.GrantRefused,
        answer(400, {"error": "invalid_grant", "error_description": description}),
    )
    assert error.description.startswith(
        "[secret] and [secret] and [secret] [31m forged : word word"
    )
    assert len(error.description) <= 200 and error.description in str(error)
    error = refused(
        errors.IssuerUnavailable,
        answer(400, {"error": "\x1b" + "x" * 500, "error_description": ["rt-old"]}),
    )
    assert "\x1b" not in str(error) and "rt-old" not in str(error) and len(str(error)) < 300


def test_the_sandbox_rotates_and_revokes(sandbox: Sandbox):
    web, endpoint = Session(config.from_environ({})), sandbox.url + "/oauth2/token"
    first = make_login(refresh_token=sandbox.mint()["refresh_token"], issuer=sandbox.url)
    second = token_endpoint.refresh(web, endpoint, first)
    assert second.refresh_token != first.refresh_token and second.issuer == sandbox.url
    with pytest.raises(errors.GrantRefused, match="has been revoked"):
        token_endpoint.refresh(web, endpoint, first)
    with pytest.raises(errors.GrantRefused, match="has been revoked"):
        # The whole token family is revoked.
        token_endpoint.refresh(web, endpoint, second)
    assert sandbox.counters()["reuses"] == 1
