"""oauth/discovery.py: which endpoints are used, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
from sandbox import Sandbox
from scripted_server import ScriptedServer, answer

from xaiproxy import config, errors
from xaiproxy.oauth import discovery
from xaiproxy.oauth.session import Session

XAI = "https://auth.x.ai"


def discover(issuer: str) -> discovery.Metadata:
    return discovery.discover(Session(config.from_environ({})), issuer)


def test_the_sandbox_has_every_endpoint(sandbox: Sandbox):
    assert discover(sandbox.url) == discovery.Metadata(
        issuer=sandbox.url,
        token_endpoint=f"{sandbox.url}/oauth2/token",
        authorization_endpoint=f"{sandbox.url}/oauth2/authorize",
        device_authorization_endpoint=f"{sandbox.url}/oauth2/device/code",
        revocation_endpoint=f"{sandbox.url}/oauth2/revoke",
    )


def test_only_a_token_endpoint_is_required():
    with ScriptedServer() as server:
        server.answers.append(
            answer(
                200,
                {"issuer": server.url, "token_endpoint": server.url + "/t", "scopes_supported": []},
            )
        )
        assert discover(server.url) == discovery.Metadata(server.url, server.url + "/t")
    assert server.requests[0].startswith(b"GET /.well-known/openid-configuration HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "document, message",
    [
        ({"issuer": XAI}, f"is for the issuer '{XAI}', not ISSUER"),
        ({"issuer": "http://user:pass@127.0.0.1/"}, "is for the issuer 'http://***@127.0.0.1/'"),
        ({"issuer": 3}, "is for the issuer (not a string)"),
        ({}, "is for the issuer (none)"),
        ({"issuer": "ISSUER"}, "names no token_endpoint"),
        ({"issuer": "ISSUER", "token_endpoint": None}, "names no token_endpoint"),
        (
            {"issuer": "ISSUER", "token_endpoint": ["ISSUER/t"]},
            "names the address (not a string)",
        ),
        (
            {"issuer": "ISSUER", "token_endpoint": "http://192.0.2.1/t"},
            "names the address 'http://192.0.2.1/t', which is not https",
        ),
        (
            {
                "issuer": "ISSUER",
                "token_endpoint": "ISSUER/t",
                "revocation_endpoint": "ftp://127.0.0.1/",
            },
            "'ftp://127.0.0.1/'",
        ),
    ],
)
def test_a_document_that_is_not_the_issuers_is_refused(document: dict[str, Any], message: str):
    with ScriptedServer() as server:
        document = {
            name: value.replace("ISSUER", server.url) if isinstance(value, str) else value
            for name, value in document.items()
        }
        server.answers.append(answer(200, document))
        with pytest.raises(errors.IssuerUnavailable) as caught:
            discover(server.url)
        assert message.replace("ISSUER", server.url) in str(caught.value) and not caught.value.sent


@pytest.mark.parametrize(
    "reply, retry_after",
    [
        (answer(404), None),
        (answer(200, "<html>", "text/html"), None),
        (answer(200, []), None),
        (answer(302, "", Location="/elsewhere"), None),
        (answer(503, "", Retry_After="9"), 9),
    ],
)
def test_a_missing_document_is_issuer_unavailable(reply: bytes, retry_after: float | None):
    with (
        ScriptedServer(reply) as server,
        pytest.raises(errors.IssuerUnavailable, match="check XAI_PROXY_ISSUER") as caught,
    ):
        discover(server.url)
    assert (caught.value.retry_after, caught.value.sent) == (retry_after, False)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "issuer, url",
    [
        (XAI, "https://auth.x.ai/oauth2/token"),
        (XAI, "https://accounts.x.ai:443/oauth2/device?user_code=AB-CD"),
        (XAI, "https://x.ai"),
        ("https://login.example", "https://elsewhere.example:8443/t"),
        ("http://127.0.0.1:9191", "http://127.0.0.1:9191/t"),
        ("http://localhost:1", "http://[::1]:2/t"),
        ("http://127.0.0.1:9191", "https://login.example/t"),
    ],
)
def test_an_address_of_the_issuers_site_may_be_used(issuer: str, url: str):
    discovery.check_endpoint(issuer, url)


@pytest.mark.parametrize(
    "issuer, url",
    [
        (XAI, "http://auth.x.ai/t"),
        (XAI, "https://evilx.ai/t"),
        (XAI, "https://x.ai.evil.example/t"),
        (XAI, "https://auth.x.ai@evil.example/t"),
        (XAI, "https://evil.example\\.x.ai/t"),
        (XAI, "https://evil.example\\@auth.x.ai/"),
        (XAI, "https://user@auth.x.ai/t"),
        (XAI, "https://auth.x.ai:8443/t"),
        (XAI, "https://auth.x.ai:port/t"),
        (XAI, "https://auth.x.ai/ t"),
        (XAI, "https://auth.x.ai/\x1b[31m"),
        (XAI, "https://auth.x.ai/t#fragment"),
        (XAI, "https://[auth.x.ai/t"),
        (XAI, "https:///t"),
        (XAI, "//auth.x.ai/t"),
        (XAI, ""),
        (XAI, None),
        (XAI, 3),
        (XAI, "http://127.0.0.1/t"),
        ("https://login.example", "http://127.0.0.1/t"),
        ("https://login.example", "https://user@login.example/t"),
        ("https://login.example", "https://login%2eexample/t"),
        ("https://login.example", "https://evil.example\\.login.example/t"),
        ("http://127.0.0.1:9191", "http://192.0.2.1/t"),
        ("http://127.0.0.1:9191", "http://localhost.evil.example/t"),
    ],
)
def test_an_address_of_another_site_may_not_be_used(issuer: str, url: object):
    with pytest.raises(errors.IssuerUnavailable) as caught:
        discovery.check_endpoint(issuer, url)
    assert "\x1b" not in str(caught.value) and "user@" not in str(caught.value)
