"""oauth/authorization_code.py: the request, the response, received or pasted, and the exchange."""

from __future__ import annotations

import base64
import json
import urllib.parse
from typing import Any

import pytest
from sandbox import CLIENT_ID, Sandbox
from scripted_server import ScriptedServer, answer

from xaiproxy import config, errors, tokens
from xaiproxy.oauth import discovery
from xaiproxy.oauth.authorization_code import (
    Attempt,
    Incomplete,
    InvalidResponse,
    authorization_url,
    code_from_paste,
    code_from_query,
    exchange,
)
from xaiproxy.oauth.session import Session

SETTINGS = config.from_environ({})
CALLBACK = "http://127.0.0.1:56121/callback"
STATE = "state-1"


def test_the_challenge_is_s256_of_the_verifier():
    """The example of RFC 7636 appendix B."""
    attempt = Attempt("", "", "", verifier="dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
    assert attempt.code_challenge() == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


def test_every_attempt_has_its_own_state_and_verifier():
    first, second = Attempt.begin(CALLBACK), Attempt.begin(CALLBACK)
    values = [first.state, first.nonce, first.verifier, second.state, second.nonce, second.verifier]
    assert len(set(values)) == 6 and all(43 <= len(value) <= 128 for value in values)
    assert not any(value in repr(first) for value in values)


def test_the_authorization_request_has_every_parameter():
    attempt = Attempt.begin(CALLBACK)
    metadata = discovery.Metadata(
        "https://auth.x.ai", "https://auth.x.ai/t", "https://auth.x.ai/oauth2/authorize"
    )
    address, _, query = authorization_url(metadata, SETTINGS, attempt).partition("?")
    assert address == "https://auth.x.ai/oauth2/authorize"
    assert (
        "scope=openid%20profile%20email%20offline_access%20grok-cli%3Aaccess%20api%3Aaccess&"
        in query
    )
    assert "redirect_uri=http%3A%2F%2F127.0.0.1%3A56121%2Fcallback&" in query
    assert dict(urllib.parse.parse_qsl(query)) == {
        "response_type": "code",
        "client_id": CLIENT_ID,
        "redirect_uri": CALLBACK,
        "scope": SETTINGS.scope,
        "state": attempt.state,
        "nonce": attempt.nonce,
        "code_challenge": attempt.code_challenge(),
        "code_challenge_method": "S256",
        "plan": "generic",
        "referrer": "xaiproxy",
    }


def test_an_authorization_endpoint_with_a_query_keeps_it():
    metadata = discovery.Metadata(
        "https://a.example", "https://a.example/t", "https://a.example/authorize?tenant=1"
    )
    assert authorization_url(metadata, SETTINGS, Attempt.begin(CALLBACK)).startswith(
        "https://a.example/authorize?tenant=1&resp"
    )


def test_an_issuer_without_authorization_endpoint_is_refused():
    with pytest.raises(errors.IssuerUnavailable, match=r"use `\S*bin/xai-login --device`"):
        authorization_url(
            discovery.Metadata("https://a.example", "https://a.example/t"),
            SETTINGS,
            Attempt.begin(CALLBACK),
        )


def test_a_redirect_with_our_state_gives_the_code():
    assert code_from_query("code=c-1&state=state-1&iss=https%3A%2F%2Fauth.x.ai", STATE) == "c-1"


@pytest.mark.parametrize(
    "query, message",
    [
        ("code=c-1&state=other", "another attempt"),
        ("code=c-1", "another attempt"),
        ("code=c-1&state=", "another attempt"),
        ("error=access_denied", "another attempt"),
        ("error=access_denied&state=other", "another attempt"),
        ("state=state-1", "no 'code'"),
        ("code=&state=state-1", "no 'code'"),
        ("code=a%20b&state=state-1", "no 'code'"),
        ("code=%1b&state=state-1", "no 'code'"),
        ("code=a&code=b&state=state-1", "repeats"),
        ("", "another attempt"),
        ("&".join(f"a{n}=1" for n in range(99)), "too many"),
    ],
)
def test_a_redirect_without_our_state_or_a_code_is_invalid(query: str, message: str):
    with pytest.raises(InvalidResponse, match=message):
        code_from_query(query, STATE)


def test_a_denied_redirect_is_access_denied():
    with pytest.raises(
        errors.AccessDenied, match=r"denied \(access_denied: User denied\)"
    ) as caught:
        code_from_query("error=access_denied&error_description=User+denied&state=state-1", STATE)
    assert caught.value.exit_code == 77


def test_another_error_in_the_redirect_is_reported():
    with pytest.raises(errors.OAuthError, match=r"invalid_scope: Unknown scope: x \[31m") as caught:
        code_from_query(
            "error=invalid_scope&error_description=Unknown+scope%3A+x%1b[31m&state=state-1", STATE
        )
    assert caught.value.error == "invalid_scope" and caught.value.exit_code == 78


@pytest.mark.parametrize(
    "text",
    [
        f"{CALLBACK}?code=nqnd-q3_Y&state=state-1",
        f"  '{CALLBACK}?state=state-1&code=nqnd-q3_Y'\r",
        "127.0.0.1:56121/callback?code=nqnd-q3_Y&state=state-1",
        f"{CALLBACK}?code=nqnd-q3_Y&state=state-1&iss=https://a.example#",
        "?code=nqnd-q3_Y&state=state-1",
        "code=nqnd-q3_Y&state=state-1",
        "state=state-1&code=nqnd-q3_Y",
        "nqnd-q3_Y",
        " nqnd-q3_Y\n",
        '"nqnd-q3_Y"',
    ],
)
def test_an_address_or_its_query_may_be_pasted(text: str):
    assert code_from_paste(text, STATE) == "nqnd-q3_Y"


@pytest.mark.parametrize("code", ["abcdefg=", "abcdef==", "a.b~c+d/e", "12345678", "x" * 4096])
def test_a_bare_code_may_have_padding_and_punctuation(code: str):
    assert code_from_paste(code, STATE) == code


def test_an_empty_line_gives_no_code():
    assert code_from_paste(" \r\n", STATE) is None


@pytest.mark.parametrize(
    "text, message",
    [
        (f"{CALLBACK}?state=state-1", "no 'code'"),
        ("?state=state-1", "no 'code'"),
        (f"{CALLBACK}?code=c&state=other", "another attempt"),
        ("what now?", "neither a URL nor a code"),
        ("ls", "too short for a code"),
        ("y", "too short"),
        ("1234567", "too short"),
        ("rest&state=state-1", "neither"),
        ("x" * 4097, "neither"),
        (f"{CALLBACK}?code=c&state=other&error=x", "another attempt"),
        ("\x1b[A", "neither"),
        ("https://auth.x.ai/oauth2/authorize?response_type=code&state=state-1", "no 'code'"),
    ],
)
def test_a_pasted_text_without_a_code_is_invalid(text: str, message: str):
    with pytest.raises(InvalidResponse, match=message):
        code_from_paste(text, STATE)


@pytest.mark.parametrize(
    "text",
    [
        "http://",
        CALLBACK,
        f"{CALLBACK}?",
        f"{CALLBACK}?co",
        f"{CALLBACK}?code=nqnd",
        f"{CALLBACK}?code=nqnd-q3_Y&state=",
        f"{CALLBACK}?code=nqnd-q3_Y&state=sta",
        "?code=nqnd-q3_Y",
        "code=nqnd-q3_Y",
        "state=sta",
    ],
)
def test_an_address_without_our_whole_state_is_incomplete(text: str):
    with pytest.raises(Incomplete, match="it ends before its state"):
        code_from_paste(text, STATE)


def test_a_pasted_denial_is_access_denied():
    with pytest.raises(errors.AccessDenied):
        code_from_paste(f"{CALLBACK}?error=access_denied", STATE)


# the exchange


def id_token(**claims: Any) -> str:
    payload = (
        base64.urlsafe_b64encode(json.dumps({"email": "a@b.example", **claims}).encode())
        .rstrip(b"=")
        .decode()
    )
    return f"e30.{payload}.c2ln"


def trade(*answers: Any, sleeps: list[float] | None = None) -> tuple[tokens.Login, list[bytes]]:
    attempt = Attempt(CALLBACK, STATE, "nonce-1", "verifier-1")
    with ScriptedServer(*answers) as server:
        metadata = discovery.Metadata("https://auth.x.ai", server.url + "/t")
        login = exchange(
            Session(SETTINGS),
            metadata,
            SETTINGS,
            attempt,
            "c-1",
            sleep=([] if sleeps is None else sleeps).append,
        )
    return login, server.requests


def test_the_exchange_sends_the_verifier_and_returns_a_login():
    login, requests = trade(
        answer(
            200,
            {"access_token": "at", "refresh_token": "rt", "id_token": id_token(nonce="nonce-1")},
        )
    )
    assert requests[0].endswith(
        "\r\n\r\ngrant_type=authorization_code&code=c-1&redirect_uri=http%3A%2F%2F"
        f"127.0.0.1%3A56121%2Fcallback&client_id={CLIENT_ID}&code_verifier="
        "verifier-1".encode()
    )
    assert (login.access_token, login.refresh_token, login.account, login.scope) == (
        "at",
        "rt",
        "a@b.example",
        SETTINGS.scope,
    )


def test_a_response_without_id_token_is_a_login():
    assert trade(answer(200, {"access_token": "at"}))[0].account is None


@pytest.mark.parametrize("token", [id_token(nonce="nonce-2"), id_token(), "nonsense"])
def test_an_id_token_with_another_nonce_is_refused(token: str):
    with pytest.raises(errors.ForeignLogin, match="nonce"):
        trade(answer(200, {"access_token": "at", "id_token": token}))


def test_an_exchange_is_retried_after_a_bad_response():
    sleeps: list[float] = []
    trade(
        answer(502, "<html>", "text/html"),
        lambda connection: None,
        answer(200, {"access_token": "at"}),
        sleeps=sleeps,
    )
    assert sleeps == [2, 2]
    with pytest.raises(errors.IssuerUnavailable, match="HTTP 503"):
        trade(answer(503))


@pytest.mark.parametrize(
    "status, body, kind",
    [
        (400, {"error": "invalid_grant"}, errors.GrantRefused),
        (403, {"error": "tier"}, errors.NotEntitled),
        (401, {"error": "invalid_client"}, errors.ClientRejected),
    ],
)
def test_a_refusal_is_final(status: int, body: dict[str, str], kind: type):
    sleeps: list[float] = []
    with pytest.raises(kind):
        trade(answer(status, body), sleeps=sleeps)
    assert sleeps == []


def test_the_sandbox_exchanges_a_code_once(sandbox: Sandbox):
    web = Session(SETTINGS)
    metadata = discovery.discover(web, sandbox.url)
    attempt = Attempt.begin(CALLBACK)
    redirect = sandbox.consent(authorization_url(metadata, SETTINGS, attempt))
    code = code_from_query(urllib.parse.urlsplit(redirect).query, attempt.state)
    assert exchange(web, metadata, SETTINGS, attempt, code).account == "sandbox@example.invalid"
    with pytest.raises(errors.GrantRefused, match="no longer accepts this code"):
        exchange(web, metadata, SETTINGS, attempt, code)
