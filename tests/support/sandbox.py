"""The sandbox as a separate process on a free port, observed and controlled over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import socket
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from checkout import ROOT, SUPPORT
from forked_process import ForkedProcess

CLIENT_ID = "b1a00492-073a-47ea-816f-4c329264a828"
SCOPE = "openid profile email offline_access grok-cli:access api:access"
CHAT = {"model": "grok-4.5", "messages": [], "stream": True}
FORM = "application/x-www-form-urlencoded"
DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"


class Sandbox:
    """A running sandbox. Its keywords are knobs: ``Sandbox(access_token_lifetime=3)``.

    close() ends it with SIGTERM and asserts exit code 0 and an empty stderr.
    """

    program: Sequence[str] = (str(SUPPORT / "sandbox_program.py"),)

    def __init__(self, *options: str, **knobs: Any) -> None:
        for name, value in knobs.items():
            options += (f"--{name.replace('_', '-')}", json.dumps(value))
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (close() closes it)
        read, write = os.pipe()
        self._stdout = os.fdopen(read)
        self.process = ForkedProcess(
            "sandbox_program",
            [*self.program, "--port", "0", *options],
            [0, write, self._stderr.fileno()],
            cwd=os.getcwd(),
            environ={**os.environ, "PYTHONPATH": str(ROOT)},
            new_session=False,
            traced=False,
        )
        os.close(write)
        lines = [shlex.split(self._stdout.readline()) for _ in range(3)]
        if not all(lines):
            self.process.wait()
            raise AssertionError(f"the sandbox did not start: {self.stderr()}")
        self.env: dict[str, str] = dict(setting.split("=", 1) for _export, setting in lines)
        self.url = self.env["XAI_PROXY_ISSUER"]
        self.host, self.port = (
            urllib.parse.urlsplit(self.url).hostname,
            urllib.parse.urlsplit(self.url).port,
        )

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        ended = self.process.wait(10)
        self._stdout.close()
        with self._stderr:
            written = "" if "--verbose" in self.process.args else self.stderr()
            assert (ended, written) == (0, "")

    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode()

    # requests

    def request(
        self, method: str, path: str, body: Any = None, token: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Send a request on a connection of its own. Return the status and the body, parsed if JSON.

        A dict is sent as a form to the authorization server, and as JSON elsewhere.

        `headers`: User_Agent="x" is User-Agent.
        """
        fields = {
            "User-Agent": "tests",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        if isinstance(body, dict) and path.startswith("/oauth2"):
            body = urllib.parse.urlencode(body)
            fields.setdefault("Content-Type", FORM)
        elif isinstance(body, dict):
            body = json.dumps(body)
            fields.setdefault("Content-Type", "application/json")
        if token:
            fields["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            connection.request(method, path.removeprefix(self.url), body, fields)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        kind = answer.getheader("Content-Type"), answer.getheader("Content-Encoding")
        return answer.status, json.loads(content) if kind == ("application/json", None) else content

    def get(self, path: str, token: str | None = None, **headers: str) -> tuple[int, Any]:
        return self.request("GET", path, None, token, **headers)

    def post(
        self, path: str, body: Any, token: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        return self.request("POST", path, body, token, **headers)

    def head(self, start: str, **fields: Any) -> bytes:
        """Return the head of a raw request. `fields`: replace the default values; None omits one."""
        fields = {
            "Host": f"{self.host}:{self.port}",
            "User-Agent": "raw",
            "Connection": "close",
            **{name.replace("_", "-"): value for name, value in fields.items()},
        }
        lines = (f"{name}: {value}" for name, value in fields.items() if value is not None)
        return "\r\n".join((f"{start} HTTP/1.1", *lines, "", "")).encode()

    def chat(self, token: str, **fields: Any) -> bytes:
        """Return a complete raw request for a streamed chat completion."""
        body = json.dumps(CHAT).encode()
        return (
            self.head(
                "POST /v1/chat/completions",
                Authorization=f"Bearer {token}",
                Content_Type="application/json",
                Content_Length=len(body),
                **fields,
            )
            + body
        )

    def raw(self, *sent: bytes) -> bytes:
        """Send these bytes. Return everything received until the sandbox closes the connection."""
        with socket.create_connection((self.host, self.port), timeout=10) as connection:
            for part in sent:
                connection.sendall(part)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    @contextlib.contextmanager
    def streaming(self, request: bytes) -> Iterator[tuple[socket.socket, Any]]:
        """Yield a connection and its response, a 200, as a file whose head has been read."""
        with (
            socket.create_connection((self.host, self.port), timeout=10) as connection,
            connection.makefile("rb") as answer,
        ):
            connection.sendall(request)
            assert status(answer.readline()) == 200
            while answer.readline() != b"\r\n":
                pass
            yield connection, answer

    def set(self, **knobs: Any) -> None:
        status, body = self.post("/_sandbox", knobs)
        assert status == 200, body

    def reset(self) -> None:
        """Reset the knobs, the counters and the recorded requests; logins stay."""
        self.request("DELETE", "/_sandbox")

    def counters(self) -> dict[str, int]:
        return self.get("/_sandbox")[1]

    def requests(self, path: str | None = None) -> list[dict[str, Any]]:
        """Return the recorded requests, oldest first. `path`: the beginning of their target."""
        seen = self.get("/_sandbox/requests")[1]
        return [request for request in seen if request["target"].startswith(path or "")]

    def wait(
        self, predicate: Callable[[dict[str, int]], Any], seconds: float = 20
    ) -> dict[str, int]:
        """Wait until ``predicate(counters)``, and return them."""
        return until(lambda: [seen for seen in [self.counters()] if predicate(seen)], seconds)[0]

    def kill(self, what: str = "access_tokens") -> None:
        """Revoke every access token at once, and with "logins" every refresh token as well."""
        assert self.post("/_sandbox/revoke", {"what": what})[0] == 200

    # logins

    def approve(self, user_code: str, decision: str = "allow") -> None:
        """Decide on the verification page, as a user does. `decision`: "allow" or "deny"."""
        status, body = self.post("/oauth2/device", {"user_code": user_code, "decision": decision})
        assert status == 200, body

    def consent(self, authorization_url: str, decision: str = "allow") -> str:
        """Decide on the consent page, as a user does. Return the URL that the page fetches then."""
        status, page = self.get(authorization_url)
        assert status == 200, page
        handle = re.search(rb'data-request="([^"]+)"', page)[1].decode()
        status, answer = self.post("/oauth2/authorize", {"request": handle, "decision": decision})
        assert status == 200, answer
        return answer["url"]

    def visit(self, authorization_url: str, decision: str = "allow") -> bool:
        """Do what a user and the browser do: consent(), a preflight, and a fetch of that URL.

        False is the page's "Enter this code to finish signing in".
        """
        url = self.consent(authorization_url, decision)
        try:
            status, allowed = self._fetch(
                "OPTIONS",
                url,
                {
                    "Access-Control-Request-Method": "GET",
                    "Access-Control-Request-Headers": "content-type",
                    "Access-Control-Request-Private-Network": "true",
                },
            )
            if not (
                200 <= status < 300
                and "content-type" in allowed["headers"].lower()
                and (allowed["origin"], allowed["private-network"]) == (self.url, "true")
            ):
                return False
            status, allowed = self._fetch("GET", url, {"Content-Type": "application/json"})
            return 200 <= status < 300 and allowed["origin"] == self.url
        except OSError:
            return False

    def _fetch(self, method: str, url: str, fields: dict[str, str]) -> tuple[int, dict[str, str]]:
        """Send a cross-origin request. Return its status and its Access-Control-Allow headers."""
        parts = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
        try:
            connection.request(
                method, f"{parts.path}?{parts.query}", headers={"Origin": self.url, **fields}
            )
            answer = connection.getresponse()
            answer.read()
        finally:
            connection.close()
        return answer.status, {
            name: answer.getheader(f"Access-Control-Allow-{name}", "")
            for name in ("origin", "headers", "private-network")
        }

    def token(self, grant_type: str, **fields: str) -> tuple[int, Any]:
        """Send one request to the token endpoint."""
        form = {"grant_type": grant_type, "client_id": CLIENT_ID, **fields}
        return self.post("/oauth2/token", form)

    def refresh(self, refresh_token: str) -> tuple[int, Any]:
        return self.token("refresh_token", refresh_token=refresh_token)

    def mint(self, scope: str = SCOPE) -> dict[str, Any]:
        """Return the token response of a new login by the device grant."""
        status, device = self.post("/oauth2/device/code", {"client_id": CLIENT_ID, "scope": scope})
        assert status == 200, device
        self.approve(device["user_code"])
        status, tokens = self.token(DEVICE_CODE, device_code=device["device_code"])
        assert status == 200, tokens
        return tokens

    def write_login(self, path: os.PathLike[str] | str, **members: Any) -> dict[str, Any]:
        """Write a new login as a tokens.json, mode 0600. `members`: added to it, or replaced in it."""
        tokens = self.mint()
        now = int(time.time())
        login = {
            "access_token": tokens["access_token"],
            "refresh_token": tokens["refresh_token"],
            "expires_at": now + tokens.get("expires_in", 3600),
            "token_endpoint": f"{self.url}/oauth2/token",
            "obtained_at": now,
            "issuer": self.url,
            "client_id": CLIENT_ID,
            "scope": SCOPE,
            **members,
        }
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(login, file, indent=2)
        return login


def until(happened: Callable[[], Any], seconds: float = 5) -> Any:
    """Wait until ``happened()`` is true, and return what it returned."""
    end = time.monotonic() + seconds
    while not (outcome := happened()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
    return outcome


def status(answer: bytes) -> int:
    """Return the status of a raw response."""
    return int(answer.split(b" ", 2)[1])


def body(answer: bytes) -> Any:
    """Return the JSON of a raw response."""
    return json.loads(answer.partition(b"\r\n\r\n")[2])
