"""The same programs with another OpenID provider and another API, by settings alone.

The provider is oidc-provider for Node.js. Its access tokens mean nothing to anything but the API of
tests/support/openid_provider.mjs, its refresh tokens rotate, and a spent one ends the login.
"""

from __future__ import annotations

import contextlib
import html.parser
import http.cookiejar
import json
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import npm_package
import pytest
from checkout import SUPPORT
from login_command import Login
from proxy_process import ProxyProcess
from refresher_process import Process, wait_until

from xaiproxy import config, errors, provider
from xaiproxy.oauth import loopback, token_endpoint
from xaiproxy.oauth.session import Answer

CLIENT = "an-agent"
# Names of our commands, settings and header fields are no words about xAI.
OURS = re.compile(r"xai-(login|proxy|serve|refresher|client-key|launch)|X-XAI-Proxy-\w+", re.I)
XAI = re.compile(r"\bx\.?ai\b|grok", re.IGNORECASE)


class Provider:
    """A running provider and API. `env`: the settings for them."""

    def __init__(self, folder: Path):
        self._process = subprocess.Popen(
            ["node", SUPPORT / "openid_provider.mjs", folder, CLIENT],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        addresses = json.loads(self._process.stdout.readline())
        self.url, self.api = addresses["issuer"], addresses["api"]
        self.env = {
            "XAI_PROXY_ISSUER": self.url,
            "XAI_PROXY_UPSTREAM": self.api,
            "XAI_PROXY_CLIENT_ID": CLIENT,
            "XAI_PROXY_SCOPE": "openid email offline_access",
        }

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def refresh(self, refresh_token: str) -> tuple[int, dict[str, Any]]:
        form = {
            "grant_type": "refresh_token",
            "client_id": CLIENT,
            "refresh_token": refresh_token,
        }
        try:
            data = urllib.parse.urlencode(form).encode()
            with urllib.request.urlopen(f"{self.url}/token", data) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


class Form(html.parser.HTMLParser):
    """The first form of a page, filled in by a user called "jo"."""

    def __init__(self, page: str):
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        if tag == "form" and self.action is None:
            self.action = about["action"]
        elif tag == "input":
            self.fields[about["name"] or ""] = about.get("value") or "jo"


def approve(url: str) -> str:
    """Follow the redirects and submit the forms that a user would; return the last page."""
    jar = http.cookiejar.CookieJar()
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
    data = None
    while True:
        with opener.open(url, data, timeout=10) as answer:
            page, url = answer.read().decode(), answer.url
        form = Form(page)
        if form.action is None:
            return page
        url = urllib.parse.urljoin(url, form.action)
        data = urllib.parse.urlencode(form.fields).encode()


@pytest.fixture(scope="module")
def issuer() -> Iterator[Provider]:
    running = Provider(npm_package.installed(npm_package.OIDC_PROVIDER))
    yield running
    running.close()


@pytest.fixture
def login(issuer: Provider, tmp_path: Path) -> Login:
    login: Any = Login(issuer, tmp_path)  # type: ignore[arg-type]  # it has a url
    login.env |= issuer.env
    return login


def sign_in(login: Login, way: str) -> list[str]:
    """Sign in; return the lines of JSON that xai-login printed."""
    running = login.start(way, "--json")
    assert running.stdout is not None
    lines = [running.stdout.readline()]
    begun = json.loads(lines[0])
    page = approve(begun.get("verification_uri_complete") or begun["url"])
    assert "Sign-in Success" in page or "Approved." in page
    rest, faults = running.communicate(timeout=20)
    assert running.returncode == 0 and faults == ""
    return [*lines, *rest.splitlines()]


def names_xai(*texts: str) -> list[str]:
    return [line for text in texts for line in text.splitlines() if XAI.search(OURS.sub("", line))]


def edit(path: Path, **members: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | members))


def test_a_login_by_device_is_served_renewed_and_revoked(login: Login, issuer: Provider) -> None:
    said = sign_in(login, "--device")
    # The proxy does not ask for another token in the first minutes of one.
    edit(login.path, obtained_at=login.saved()["obtained_at"] - 1000)
    first = login.saved()
    assert first["account"] == "jo@example.org"
    settings = {name.removeprefix("XAI_PROXY_").lower(): of for name, of in issuer.env.items()}
    with (
        ProxyProcess(login.path.parent, **settings) as proxy,
        contextlib.closing(Process(issuer, login.path)) as refresher,
    ):
        wait_until(lambda: proxy.ask("GET", "/readyz").status == 200)
        answer = proxy.ask("GET", "/v1/anything?a=b", "Authorization: Bearer the-client's")
        assert (answer.status, json.loads(answer.body)["account"]) == (200, "jo")
        assert not any("grok" in name for name in json.loads(answer.body)["headers"])
        # This 403 has the words of xAI's for a dead token, which mean something else here.
        assert proxy.ask("GET", "/v1/forbidden").status == 403
        assert login.saved() == first
        # The API refuses the token from now on, with a 401 of RFC 6750.
        assert proxy.ask("GET", "/v1/revoke").status == 200
        assert proxy.ask("GET", "/v1/anything").status == 200
        second = login.saved()
        assert not {first["refresh_token"], first["access_token"]} & set(map(str, second.values()))
        page = proxy.ask("GET", "/", "Accept: text/html").body.decode()
        said += [
            page,
            proxy.ask("GET", "/status.json").body.decode(),
            proxy.ask("GET", "/metrics").body.decode(),
        ]
        refused = proxy.ask("GET", "/v1/chat/../x")
        assert refused.status == 400
        said += [refused.body.decode()]
        assert json.loads(proxy.ask("GET", "/status.json").body)["asks_quota"] is False
        for arguments in (["--status"], ["--status", "--quota"], ["--doctor"], ["--help"]):
            port = {} if "--quota" in arguments else {"XAI_PROXY_PORT": str(proxy.port)}
            shown = login.run(*arguments, **port)
            assert shown.returncode == (69 if "--quota" in arguments else 0), shown
            said += [shown.stdout, shown.stderr]
        said += [json.dumps(line) for line in proxy.log_lines()] + refresher.lines
    out = login.run("--logout")
    assert out.returncode == 0 and "Signed out" in out.stdout
    assert issuer.refresh(second["refresh_token"])[1]["error"] == "invalid_grant"
    said += [out.stdout, out.stderr]
    assert names_xai(*said) == [] and '"name": "Codex"' in page


def test_a_login_by_browser_can_be_renewed(login: Login, issuer: Provider) -> None:
    """The provider issues a refresh token only if the user is asked for consent."""
    said = sign_in(login, "--browser")
    before = login.saved()
    edit(login.path, expires_at=1)
    assert Process(issuer, login.path, "--once").wait() == 0
    assert login.saved()["refresh_token"] != before["refresh_token"]
    # The spent token is refused, and so is its successor from now on: the login has ended.
    assert issuer.refresh(before["refresh_token"])[0] == 400
    edit(login.path, expires_at=1)
    assert Process(issuer, login.path, "--once").wait() == 77
    shown = login.run("--status")
    assert shown.returncode == 77
    assert names_xai(*said, shown.stdout, shown.stderr) == []


def test_an_unknown_client_is_named_as_the_cause(login: Login) -> None:
    done = login.run("--device", XAI_PROXY_CLIENT_ID="unknown")
    assert done.returncode == 77 and "check XAI_PROXY_CLIENT_ID" in done.stderr
    assert names_xai(done.stdout, done.stderr) == []


def test_its_token_does_not_go_to_xai_because_a_setting_is_missing(
    login: Login, tmp_path: Path
) -> None:
    login.path.parent.mkdir()
    about = {"issuer": login.env["XAI_PROXY_ISSUER"], "client_id": CLIENT}
    content = {"access_token": "a-token", "refresh_token": "b", "expires_at": 4_000_000_000}
    login.path.write_text(json.dumps(content | about))
    login.path.chmod(0o600)
    assert login.run("--status").returncode == 0
    shown = login.run("--status", XAI_PROXY_UPSTREAM="")
    assert shown.returncode == 77 and "set XAI_PROXY_UPSTREAM to the API" in shown.stdout


def test_an_account_that_is_refused_is_not_sent_to_xai() -> None:
    answer = Answer(403, {"Content-Type": "application/json"}, b'{"error": "no_plan"}')
    for client_id, place in (
        (config.DEFAULT_CLIENT_ID, "https://grok.com"),
        (CLIENT, provider.ITS_PAGES),
    ):
        error = token_endpoint.refusal(answer, "id.example", {"client_id": client_id})
        assert isinstance(error, errors.NotEntitled) and f"see {place} " in str(error)


def test_only_pages_of_the_issuer_itself_may_read_the_redirect() -> None:
    for url, allowed, refused in (
        ("https://id.example/tenant", "https://id.example", "https://accounts.x.ai"),
        (config.DEFAULT_ISSUER, "https://accounts.x.ai", "https://id.example"),
    ):
        with loopback.Listener(0, url) as listener:
            assert allowed in listener.origins and refused not in listener.origins
