"""oauth/revocation.py: which token is revoked, and what a refused revocation raises."""

from __future__ import annotations

import pytest
from sandbox import CLIENT_ID, Sandbox
from scripted_server import ScriptedServer, answer

from xaiproxy import config, errors, tokens
from xaiproxy.oauth import discovery, revocation
from xaiproxy.oauth.session import Session

LOGIN = tokens.Login("at-1", 1000, refresh_token="rt-1")


def revoke(reply: bytes, login: tokens.Login = LOGIN) -> bytes:
    with ScriptedServer(reply) as server:
        metadata = discovery.Metadata(
            server.url, server.url + "/t", revocation_endpoint=server.url + "/revoke"
        )
        revocation.revoke(Session(config.from_environ({})), metadata, login, deadline=5)
    return server.requests[0]


def test_the_refresh_token_is_revoked():
    sent = revoke(answer(200))
    assert sent.endswith(
        f"\r\n\r\ntoken=rt-1&token_type_hint=refresh_token&client_id={CLIENT_ID}".encode()
    )


def test_without_a_refresh_token_the_access_token_is_revoked():
    sent = revoke(answer(200), tokens.Login("at-1", 1000))
    assert sent.endswith(
        f"\r\n\r\ntoken=at-1&token_type_hint=access_token&client_id={CLIENT_ID}".encode()
    )


@pytest.mark.parametrize(
    "reply, kind",
    [
        (answer(503, "", Retry_After="5"), errors.IssuerUnavailable),
        (answer(200, "<html>", "text/html"), errors.IssuerUnavailable),
        (
            answer(400, {"error": "unsupported_token_type", "error_description": "not rt-1"}),
            errors.IssuerUnavailable,
        ),
        (answer(401, {"error": "invalid_client"}), errors.ClientRejected),
    ],
)
def test_a_refused_revocation_is_reported(reply: bytes, kind: type):
    with pytest.raises(kind) as caught:
        revoke(reply)
    assert "rt-1" not in str(caught.value)


def test_an_issuer_without_revocation_endpoint_is_refused():
    with pytest.raises(errors.IssuerUnavailable, match="offers no revocation"):
        revocation.revoke(
            Session(config.from_environ({})),
            discovery.Metadata("http://127.0.0.1:1", "http://127.0.0.1:1/t"),
            LOGIN,
        )


def test_the_sandbox_revokes_a_token_twice(sandbox: Sandbox):
    web = Session(config.from_environ({}))
    minted = sandbox.mint()
    metadata = discovery.discover(web, sandbox.url)
    # Revoking an unknown token succeeds, so the second call does too.
    for _ in range(2):
        revocation.revoke(
            web,
            metadata,
            tokens.Login(minted["access_token"], 1000, refresh_token=minted["refresh_token"]),
        )
    assert sandbox.refresh(minted["refresh_token"])[0] == 400
