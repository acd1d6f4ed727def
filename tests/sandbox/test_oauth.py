"""The sandbox's authorization server: three grants, each as strict as its RFC."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import pathlib
import shutil
import subprocess
import threading
import time
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from sandbox import CLIENT_ID, DEVICE_CODE, FORM, Sandbox, until

CALLBACK = "http://127.0.0.1:56121/callback"


def challenge_of(verifier: str) -> str:
    return (
        base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    )


VERIFIER = "v" * 43
CHALLENGE = challenge_of(VERIFIER)

# The authorization server's refusals


@pytest.mark.parametrize("path", ["/oauth2/device/code", "/oauth2/token", "/oauth2/revoke"])
def test_the_authorization_server_accepts_forms_only(sandbox: Sandbox, path: str) -> None:
    assert sandbox.post(
        path, json.dumps({"client_id": CLIENT_ID}), Content_Type="application/json"
    ) == (415, b"Form requests must have `Content-Type: application/x-www-form-urlencoded`")
    refused, answer = sandbox.post(path, "a=b", Content_Type=FORM)
    assert refused == 422 and answer.startswith(b"Failed to deserialize form body: missing field `")
    field = answer.split(b"`")[1].decode()
    refused, answer = sandbox.post(path, f"{field}=a&{field}=b", Content_Type=FORM)
    assert refused == 422 and b"duplicate field" in answer


@pytest.mark.parametrize(
    "path, form",
    [
        ("/oauth2/device/code", {}),
        ("/oauth2/revoke", {"token": "x"}),
        ("/oauth2/token", {"grant_type": "refresh_token", "refresh_token": "x"}),
    ],
)
def test_another_client_is_refused(sandbox: Sandbox, path: str, form: dict[str, str]) -> None:
    refused, answer = sandbox.post(path, {**form, "client_id": "another"})
    assert (refused, answer) == (
        401,
        {"error": "invalid_client", "error_description": "Unknown client"},
    )


@pytest.mark.parametrize(
    "form, error, description",
    [
        ({"scope": "openid nonsense"}, "invalid_scope", "Unknown scope: nonsense"),
        ({"scope": "openid team:read"}, "invalid_scope", "not valid for User principals"),
        (
            {"code_challenge": CHALLENGE, "code_challenge_method": "plain"},
            "invalid_request",
            "S256",
        ),
    ],
)
def test_the_device_endpoint_refuses_a_bad_request(
    sandbox: Sandbox, form: dict[str, str], error: str, description: str
) -> None:
    refused, answer = sandbox.post("/oauth2/device/code", {"client_id": CLIENT_ID, **form})
    assert (
        refused == 400 and answer["error"] == error and description in answer["error_description"]
    )


@pytest.mark.parametrize(
    "grant_type, fields, error",
    [
        ("password", {}, "unsupported_grant_type"),
        ("refresh_token", {}, "invalid_request"),
        ("refresh_token", {"refresh_token": "x"}, "invalid_grant"),
        (DEVICE_CODE, {"device_code": "x"}, "invalid_grant"),
        (DEVICE_CODE, {}, "invalid_request"),
        (
            "authorization_code",
            {"code": "x", "redirect_uri": CALLBACK, "code_verifier": "x"},
            "invalid_grant",
        ),
        ("authorization_code", {"code": "x", "redirect_uri": CALLBACK}, "invalid_request"),
    ],
)
def test_the_token_endpoint_refuses_a_bad_request(
    sandbox: Sandbox, grant_type: str, fields: dict[str, str], error: str
) -> None:
    refused, answer = sandbox.token(grant_type, **fields)
    assert (refused, answer["error"]) == (400, error)


# Authorization code


def authorization_url(sandbox: Sandbox, **changed: str | None) -> str:
    query = {
        "response_type": "code",
        "client_id": CLIENT_ID,
        "redirect_uri": CALLBACK,
        "state": "s t&",
        "scope": "openid offline_access",
        "code_challenge": CHALLENGE,
        "code_challenge_method": "S256",
        "nonce": "n",
        **changed,
    }
    given = {name: value for name, value in query.items() if value is not None}
    return f"{sandbox.url}/oauth2/authorize?{urlencode(given)}"


def consented(sandbox: Sandbox, **changed: str | None) -> str:
    """A new authorization code."""
    return parse_qs(urlsplit(sandbox.consent(authorization_url(sandbox, **changed))).query)["code"][
        0
    ]


def exchange(sandbox: Sandbox, code: str, **changed: str) -> tuple[int, Any]:
    return sandbox.token(
        "authorization_code",
        **{"code": code, "redirect_uri": CALLBACK, "code_verifier": VERIFIER, **changed},
    )


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("client_id", "another", b"Unknown client"),
        ("response_type", "token", b"Unknown response_type"),
        ("redirect_uri", "http://localhost:56121/callback", b"Unknown redirect_uri"),
        ("redirect_uri", "http://127.0.0.1:56121/callback/", b"Unknown redirect_uri"),
        ("redirect_uri", "http://127.0.0.1/callback", b"Unknown redirect_uri"),
        ("redirect_uri", None, b"Unknown redirect_uri"),
        ("scope", "openid <b>", b"Unknown scope: &lt;b&gt;"),
        ("code_challenge", None, b"PKCE"),
        ("code_challenge", "short", b"PKCE"),
        ("code_challenge_method", "plain", b"PKCE"),
        ("code_challenge_method", None, b"PKCE"),
    ],
)
def test_a_bad_authorization_request_is_refused(
    sandbox: Sandbox, name: str, value: str, problem: bytes
) -> None:
    refused, page = sandbox.get(authorization_url(sandbox, **{name: value}))
    assert refused == 400 and problem in page and b"button" not in page


def test_a_repeated_parameter_is_refused(sandbox: Sandbox) -> None:
    refused, page = sandbox.get(authorization_url(sandbox) + "&state=two")
    assert refused == 400 and b"Repeated parameter: state" in page


def test_a_code_is_exchanged_once_and_a_second_exchange_ends_the_login(sandbox: Sandbox) -> None:
    url = sandbox.consent(authorization_url(sandbox))
    assert url.startswith(CALLBACK + "?code=") and parse_qs(urlsplit(url).query)["state"] == [
        "s t&"
    ]
    code = parse_qs(urlsplit(url).query)["code"][0]
    accepted, login = exchange(sandbox, code)
    assert (
        accepted == 200
        and claims(login["id_token"])["nonce"] == "n"
        and len(login["refresh_token"]) == 86
    )
    assert sandbox.get("/v1/models", login["access_token"])[0] == 200
    assert exchange(sandbox, code) == (400, {"error": "invalid_grant"})
    assert sandbox.get("/v1/models", login["access_token"])[0] == 403
    assert sandbox.refresh(login["refresh_token"])[0] == 400


@pytest.mark.parametrize(
    "changed",
    [
        {"code_verifier": "w" * 43},
        {"code_verifier": CHALLENGE},
        {"code_verifier": ""},
        {"redirect_uri": "http://127.0.0.1:56122/callback"},
    ],
)
def test_a_code_is_bound_to_verifier_and_redirect_uri_and_one_exchange(
    sandbox: Sandbox, changed: dict[str, str]
) -> None:
    code = consented(sandbox)
    assert exchange(sandbox, code, **changed) == (400, {"error": "invalid_grant"})
    assert exchange(sandbox, code) == (400, {"error": "invalid_grant"})


@pytest.mark.parametrize("verifier", ["v" * 42, "v" * 129, "v" * 42 + "+"])
def test_a_verifier_that_rfc_7636_does_not_allow_is_refused(
    sandbox: Sandbox, verifier: str
) -> None:
    code = consented(sandbox, code_challenge=challenge_of(verifier))
    assert exchange(sandbox, code, code_verifier=verifier) == (400, {"error": "invalid_grant"})


def test_an_authorization_code_expires(sandbox: Sandbox) -> None:
    sandbox.set(code_lifetime=0)
    assert exchange(sandbox, consented(sandbox)) == (400, {"error": "invalid_grant"})


def test_a_consent_is_accepted_once_and_from_the_own_page_only(sandbox: Sandbox) -> None:
    page = sandbox.get(authorization_url(sandbox))[1].decode()
    form = {"request": page.split('data-request="')[1].split('"')[0], "decision": "allow"}
    assert sandbox.post("/oauth2/authorize", form, Origin="http://evil.example")[0] == 403
    assert sandbox.post("/oauth2/authorize", form, Origin=sandbox.url)[0] == 200
    assert sandbox.post("/oauth2/authorize", form, Origin=sandbox.url)[0] == 400


def test_a_denied_consent_redirects_with_access_denied(sandbox: Sandbox) -> None:
    url = sandbox.consent(authorization_url(sandbox, state=None), "deny")
    assert url == CALLBACK + "?error=access_denied&error_description=User+denied"


class Listener:
    """A client's callback listener, with these CORS headers, that records the requests."""

    def __init__(self, allow: dict[str, str]) -> None:
        self.seen: list[tuple[str, str, str | None]] = []
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listener.seen.append((self.command, self.path, self.headers["Origin"]))
                self.send_response(200)
                for name, value in allow.items():
                    self.send_header(f"Access-Control-Allow-{name}", value)
                self.end_headers()

            do_OPTIONS = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.redirect_uri = f"http://127.0.0.1:{self.server.server_port}/callback"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def allowing(sandbox: Sandbox, **changed: str) -> dict[str, str]:
    return {"Origin": sandbox.url, "Headers": "Content-Type", "Private-Network": "true", **changed}


def test_the_callback_is_fetched_after_a_preflight(sandbox: Sandbox) -> None:
    with Listener(allowing(sandbox)) as listener:
        assert sandbox.visit(authorization_url(sandbox, redirect_uri=listener.redirect_uri))
    assert [method for method, *_ in listener.seen] == ["OPTIONS", "GET"]
    assert {origin for *_, origin in listener.seen} == {sandbox.url}


@pytest.mark.parametrize("changed", [{"Origin": "*"}, {"Headers": ""}, {"Private-Network": ""}])
def test_a_listener_that_forbids_the_page_gets_only_the_preflight(
    sandbox: Sandbox, changed: dict[str, str]
) -> None:
    with Listener(allowing(sandbox, **changed)) as listener:
        assert not sandbox.visit(authorization_url(sandbox, redirect_uri=listener.redirect_uri))
    assert [method for method, *_ in listener.seen] == ["OPTIONS"]
    # By now, nothing is listening there.
    assert not sandbox.visit(authorization_url(sandbox, redirect_uri=listener.redirect_uri))


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize(
    "origin, shown",
    [
        (None, "Done. You can close this window."),
        ("http://another.example", "Enter this code to finish signing in"),
    ],
)
def test_the_consent_page_works_in_a_real_browser(
    sandbox: Sandbox, tmp_path: pathlib.Path, origin: str | None, shown: str
) -> None:
    """auto_approve presses "allow"; the page then shows the result."""
    sandbox.set(auto_approve=0)
    with Listener(allowing(sandbox, Origin=origin or sandbox.url)) as listener:
        page = subprocess.run(
            [
                "chromium",
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path}",
                "--virtual-time-budget=10000",
                "--dump-dom",
                authorization_url(sandbox, redirect_uri=listener.redirect_uri),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
            text=True,
        ).stdout
    assert f'<p id="outcome">{shown}</p>' in page
    assert [method for method, *_ in listener.seen] == ["OPTIONS", "GET"][: 1 if origin else 2]
    assert ('<pre id="code"></pre>' in page) == (origin is None)


# Device grant


def device(sandbox: Sandbox, **fields: str) -> dict[str, Any]:
    return sandbox.post("/oauth2/device/code", {"client_id": CLIENT_ID, **fields})[1]


def poll(sandbox: Sandbox, code: dict[str, Any], **fields: str) -> str:
    """The response to one poll: the error, or "" for tokens."""
    return sandbox.token(DEVICE_CODE, device_code=code["device_code"], **fields)[1].get("error", "")


def test_a_device_code_waits_for_its_user_and_is_used_once(sandbox: Sandbox) -> None:
    sandbox.set(device_interval=0)
    code = device(sandbox)
    assert set(code["user_code"][:4] + code["user_code"][5:]) <= set("BCDFGHJKLMNPQRSTVWXZ23456789")
    assert len(code["user_code"]) == 9 and code["user_code"][4] == "-" and code["expires_in"] == 900
    assert (
        code["verification_uri_complete"]
        == f"{code['verification_uri']}?user_code={code['user_code']}"
    )
    assert sandbox.token(DEVICE_CODE, device_code=code["device_code"]) == (
        400,
        {"error": "authorization_pending", "error_description": "User has not yet authorized"},
    )
    assert (
        code["user_code"].encode()
        in sandbox.get(f"/oauth2/device?user_code={code['user_code']}")[1]
    )
    sandbox.approve(code["user_code"])
    assert [poll(sandbox, code), poll(sandbox, code)] == ["", "invalid_grant"]


def test_an_early_poll_lengthens_the_interval_for_good(sandbox: Sandbox) -> None:
    code = device(sandbox)
    assert code["interval"] == 5
    # The first poll has to wait for the interval, too.
    assert [poll(sandbox, code), poll(sandbox, code)] == ["slow_down"] * 2
    sandbox.set(device_interval=0, slow_downs=1)
    code = device(sandbox)
    # Now the interval is 5 s again.
    assert [poll(sandbox, code), poll(sandbox, code)] == ["slow_down"] * 2
    sandbox.approve(code["user_code"])
    sandbox.set(slow_downs=1)
    assert [poll(sandbox, code), poll(sandbox, code)] == ["slow_down", ""]
    assert sandbox.counters()["slow_downs"] == 5


def test_a_denied_device_code_is_refused(sandbox: Sandbox) -> None:
    code = device(sandbox)
    sandbox.approve(code["user_code"], "deny")
    assert sandbox.token(DEVICE_CODE, device_code=code["device_code"]) == (
        400,
        {"error": "access_denied", "error_description": "The user rejected the request"},
    )


def test_an_expired_device_code_is_refused(sandbox: Sandbox) -> None:
    sandbox.set(device_lifetime=1, device_interval=0)
    code = device(sandbox)
    assert (
        until(lambda: poll(sandbox, code).replace("authorization_pending", "")) == "expired_token"
    )
    assert sandbox.post("/oauth2/device", {"user_code": code["user_code"]})[0] == 404


def test_auto_approve_approves_a_device_code(sandbox: Sandbox) -> None:
    sandbox.set(auto_approve=0.3, device_interval=0)
    begun = time.time()
    code = device(sandbox)
    assert poll(sandbox, code) == "authorization_pending"
    until(lambda: poll(sandbox, code) == "")
    assert time.time() > begun + 0.3


def test_a_device_code_with_pkce_needs_its_verifier(sandbox: Sandbox) -> None:
    for verifier, expected in (
        ({}, "invalid_grant"),
        ({"code_verifier": "x"}, "invalid_grant"),
        ({"code_verifier": VERIFIER}, ""),
    ):
        code = device(sandbox, code_challenge=CHALLENGE, code_challenge_method="S256")
        sandbox.approve(code["user_code"])
        assert poll(sandbox, code, **verifier) == expected


def test_the_device_page_refuses_a_form_of_another_page(sandbox: Sandbox) -> None:
    form = {"user_code": device(sandbox)["user_code"], "decision": "allow"}
    assert sandbox.post("/oauth2/device", form, Origin="http://evil.example")[0] == 403
    assert sandbox.post("/oauth2/device", {**form, "user_code": "AAAA-AAAA"})[0] == 404


# Login


def claims(jwt: str) -> dict[str, Any]:
    part = jwt.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


def test_an_access_token_has_the_claims_of_a_real_one(sandbox: Sandbox) -> None:
    login = sandbox.mint()
    assert list(login) == [
        "access_token",
        "token_type",
        "expires_in",
        "refresh_token",
        "id_token",
        "scope",
    ]
    issued = claims(login["access_token"])
    assert (issued["iss"], issued["client_id"]) == (sandbox.url, CLIENT_ID)
    assert issued["exp"] - issued["iat"] == login["expires_in"] == 21600
    assert claims(login["id_token"])["email"] == "sandbox@example.invalid"
    # A refresh token is for offline_access.
    assert "refresh_token" not in sandbox.mint(scope="openid")


def test_a_refresh_token_is_rotated_and_a_former_one_ends_the_login(sandbox: Sandbox) -> None:
    first = sandbox.mint()
    accepted, second = sandbox.refresh(first["refresh_token"])
    assert (
        accepted == 200
        and second["refresh_token"] != first["refresh_token"]
        and "id_token" not in second
    )
    for login in (first, second):
        assert sandbox.get("/v1/models", login["access_token"])[0] == 200
    revoked = (
        400,
        {"error": "invalid_grant", "error_description": "Refresh token has been revoked"},
    )
    assert sandbox.refresh(first["refresh_token"]) == revoked
    assert sandbox.refresh(second["refresh_token"]) == revoked
    for login in (first, second):
        assert sandbox.get("/v1/models", login["access_token"])[0] == 403
    seen = sandbox.counters()
    assert (seen["refreshes"], seen["reuses"], seen["revoked_families"]) == (1, 1, 1)


def test_logins_are_independent(sandbox: Sandbox) -> None:
    ended, other = sandbox.mint(), sandbox.mint()
    sandbox.refresh(ended["refresh_token"])
    sandbox.refresh(ended["refresh_token"])
    assert sandbox.refresh(other["refresh_token"])[0] == 200


def test_an_unknown_refresh_token_is_refused(sandbox: Sandbox) -> None:
    assert sandbox.refresh("never-issued") == (
        400,
        {"error": "invalid_grant", "error_description": "Invalid or unknown refresh token"},
    )


def test_a_revoked_token_ends_the_login(sandbox: Sandbox) -> None:
    login = sandbox.mint()
    for refresh_token in (login["refresh_token"], "never-issued"):
        form = {"token": refresh_token, "client_id": CLIENT_ID}
        assert sandbox.post("/oauth2/revoke", form) == (200, b"")
    assert sandbox.refresh(login["refresh_token"])[0] == 400
    assert sandbox.get("/v1/models", login["access_token"])[0] == 403


def test_userinfo_and_keys_are_served(sandbox: Sandbox, token: str) -> None:
    assert sandbox.get("/oauth2/userinfo")[0] == 401
    assert sandbox.get("/oauth2/userinfo", "x")[0] == 401
    assert sandbox.get("/oauth2/userinfo", token)[1]["email"] == "sandbox@example.invalid"
    assert sandbox.get("/.well-known/jwks.json")[1] == {"keys": []}
