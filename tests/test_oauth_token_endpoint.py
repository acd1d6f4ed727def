"""oauth/token_endpoint.py: what every kind of answer means, and what of it reaches a message."""
from __future__ import annotations

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


def make_login(**members: Any) -> tokens.Tokens:
    return tokens.Tokens(**{"access_token": "at-old", "expires_at": 1000, "refresh_token": "rt-old",
                            "account": "a@b.example",
                            "scope": "openid", "extra": {"theirs": 1}, **members})


def refresh(reply: bytes, login: "tokens.Tokens | None" = None) -> tokens.Tokens:
    with ScriptedServer(reply) as server:
        return token_endpoint.refresh(Session(config.from_environ({})), server.url + "/t",
                                      login or make_login(), deadline=5,
                                      now=lambda: 5000.0)


def refused(kind: "type[errors.Error]", reply: bytes) -> Any:
    with pytest.raises(errors.Error) as caught:
        refresh(reply)
    assert type(caught.value) is kind
    return caught.value


def test_what_a_refresh_sends_and_gives():
    body = {"access_token": "at-new", "refresh_token": "rt-new", "expires_in": 60, "token_type": "Bearer",
            "id_token": "x.y.z"}
    with ScriptedServer(answer(200, body)) as server:
        login = token_endpoint.refresh(Session(config.from_environ({})), server.url + "/t", make_login(),
                                       now=lambda: 5000.0)
    assert server.requests[0].startswith(b"POST /t HTTP/1.1\r\n")
    assert server.requests[0].endswith(b"\r\n\r\ngrant_type=refresh_token&refresh_token=rt-old&client_id="
                                       + config.DEFAULT_CLIENT_ID.encode())
    assert login == make_login(access_token="at-new", refresh_token="rt-new", expires_at=5060,
                               obtained_at=5000.0,
                               token_endpoint=server.url + "/t")


def test_an_answer_without_refresh_token_keeps_the_former():
    assert refresh(answer(201, {"access_token": "at-new"})).refresh_token == "rt-old"


@pytest.mark.parametrize("code", ["invalid_grant", "refresh_token_reused", "revoked_token",
                                  "unauthorized_client", "invalid_token"])
@pytest.mark.parametrize("status", [400, 401])
def test_a_dead_refresh_token(code: str, status: int):
    body = {"error": code, "error_description": "Refresh token has been revoked"}
    error = refused(errors.GrantRefused, answer(status, body))
    assert (error.error, error.description, error.exit_code) == (code, "Refresh token has been revoked", 77)
    assert f"does not take this login any more ({code}: Refresh token has been revoked)" in str(error)


@pytest.mark.parametrize("status", [400, 401])
def test_a_client_that_is_not_known(status: int):
    error = refused(errors.ClientRejected, answer(status, {"error": "invalid_client",
                                                           "error_description": "Unknown client"}))
    assert (error.error, error.description) == ("invalid_client", "Unknown client")


@pytest.mark.parametrize("body", [{"error": "access_denied"}, {"code": "x", "error": "User is blocked"},
                                  {"error": "invalid_grant"},
                                  {"message": "no"}])
def test_a_403_in_json_is_about_the_account_and_not_the_login(body: "dict[str, str]"):
    refused(errors.NotEntitled, answer(403, body))


@pytest.mark.parametrize("reply, retry_after", [
    (answer(400, {"error": "temporarily_unavailable"}), None),
    (answer(400, {"error": "access_denied"}), None),  # means nothing at a refresh
    (answer(400, {"error": {"message": "invalid_grant"}}), None),
    (answer(400, {}), None), (answer(400), None), (answer(404), None),
    (answer(302, "", Location="http://127.0.0.1:1/"), None),
    (answer(403, PAGE, HTML, cf_mitigated="challenge"), None),
    (answer(403, "error code: 1010", TEXT), None),
    (answer(200, PAGE, HTML), None), (answer(400, PAGE, "application/json"), None),
    (answer(415, "Form requests must", TEXT), None), (answer(422, "Failed to deserialize", TEXT), None),
    (answer(429, {"error": "invalid_grant"}, Retry_After="7"), 7),
    (answer(429, "", Retry_After="soon"), None),
    (answer(500, {"error": "invalid_grant"}), None), (answer(503, "", Retry_After="0"), 0),
    (answer(521, PAGE, HTML, Retry_After="60"), 60), (answer(530, "", TEXT), None),
])
def test_a_definite_answer_that_spent_nothing(reply: bytes, retry_after: "float | None"):
    error = refused(errors.IssuerUnavailable, reply)
    assert (error.sent, error.retry_after) == (False, retry_after)
    assert "Just a moment" not in str(error) and error.exit_code == 69


@pytest.mark.parametrize("reply", [
    answer(200, {}), answer(200, {"access_token": ""}), answer(200, {"access_token": "two words"}),
    answer(200, []),
    answer(200, "", TEXT), answer(204), answer(200, {"access_token": "at", "refresh_token": 3}),
    b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"])
def test_a_success_that_cannot_be_used_may_have_spent_the_token(reply: bytes):
    error = refused(errors.IssuerUnavailable, reply)
    assert error.sent


def test_415_is_said_to_be_our_fault():
    assert "a fault of xaiproxy" in str(refused(errors.IssuerUnavailable,
                                                answer(415, "Form requests must", TEXT)))


def test_what_the_issuer_says_is_made_safe_before_it_is_repeated():
    description = ("rt-old and " + "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln and " + "a1B2-_" * 8
                   + "\x1b[31m\r\nforged\u202e: " + "word " * 99)
    error = refused(errors.GrantRefused, answer(400, {"error": "invalid_grant",
                                                      "error_description": description}))
    assert error.description.startswith("[secret] and [secret] and [secret] [31m forged : word word")
    assert len(error.description) <= 200 and error.description in str(error)
    error = refused(errors.IssuerUnavailable, answer(400, {"error": "\x1b" + "x" * 500,
                                                           "error_description": ["rt-old"]}))
    assert "\x1b" not in str(error) and "rt-old" not in str(error) and len(str(error)) < 300


def test_the_sandbox_rotates_and_revokes(sandbox: Sandbox):
    web, endpoint = Session(config.from_environ({})), sandbox.url + "/oauth2/token"
    first = make_login(refresh_token=sandbox.mint()["refresh_token"], issuer=sandbox.url)
    second = token_endpoint.refresh(web, endpoint, first)
    assert second.refresh_token != first.refresh_token and second.issuer == sandbox.url
    with pytest.raises(errors.GrantRefused, match="has been revoked"):
        token_endpoint.refresh(web, endpoint, first)
    with pytest.raises(errors.GrantRefused, match="has been revoked"):
        token_endpoint.refresh(web, endpoint, second)  # its family is dead
    assert sandbox.counters()["reuses"] == 1
