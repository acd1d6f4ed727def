"""Files that another user has planted in the working directory or the token folder send no token
to another host.
"""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_process import run_python
from proxy_process import COMMAND, PYTHON, ProxyProcess, environment, refuse_to_start
from sandbox import Sandbox, until
from scripted_upstream import ScriptedUpstream

from xaiproxy import config

STRANGER = 12345
XAI = {"issuer": config.DEFAULT_ISSUER, "client_id": config.DEFAULT_CLIENT_ID}
SECRETS = "the-token", "the-refresh-token"
# The modules whose imports include those of a command.
IMPORTED = {
    "xaiproxy.login": "xaiproxy.login.sign_in",
    "xaiproxy.refresher": "xaiproxy.refresher.process",
}
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a file to another user"
)


class Server(socketserver.ThreadingTCPServer):
    """Records what is sent to it, up to an empty line, and refuses it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.heard: list[str] = []


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        head = "".join(iter(lambda: self.rfile.readline().decode("latin-1").rstrip("\r\n"), ""))
        self.server.heard.append(head)
        self.wfile.write(
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    """Another user's server, and a proxy of the network through which all https goes."""
    running = Server(), Server()
    threads = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        for server in running
    ]
    for thread in threads:
        thread.start()
    yield running
    for server, thread in zip(running, threads):
        server.shutdown()
        server.server_close()
        thread.join()


def put(folder: Path, **members: object) -> Path:
    """Write a login that is due for a refresh at once."""
    path = folder / "tokens.json"
    login = {
        "access_token": SECRETS[0],
        "refresh_token": SECRETS[1],
        "expires_at": 1,
        "obtained_at": 0,
        **XAI,
        **members,
    }
    path.write_text(json.dumps(login))
    path.chmod(0o600)
    return path


def run(
    folder: Path, module: str, *arguments: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    return run_python(
        IMPORTED.get(module, module),
        ["-m", module, *arguments],
        cwd=folder,
        timeout=30,
        environ=environment(folder, environ, issuer="", upstream=""),
    )


@pytest.mark.parametrize("names", [["UPSTREAM"], ["UPSTREAM", "ISSUER"], ["ISSUER"]])
def test_a_dotenv_that_names_another_host_gets_no_token(
    tmp_path: Path, servers: tuple[Server, Server], names: list[str]
) -> None:
    stranger, network = servers
    (tmp_path / ".env").write_text("".join(f"XAI_PROXY_{name}={stranger.url}\n" for name in names))
    with ProxyProcess(
        tmp_path, command=COMMAND, issuer="", upstream="", environ={"HTTPS_PROXY": network.url}
    ) as proxy:
        proxy.sign_in(**XAI)
        for fields in ([], ["Connection: Upgrade", "Upgrade: websocket"]):
            answer = proxy.ask("GET", "/v1/models", *fields)
            assert answer.status == 401 and answer.value("X-XAI-Proxy-Error") == "login_required"
    put(tmp_path)
    for module, *arguments in (("xaiproxy.refresher", "--once"), ("xaiproxy.login", "--status")):
        done = run(tmp_path, module, *arguments, HTTPS_PROXY=network.url)
        assert (
            done.returncode == 77
            and f"holds a login of {config.DEFAULT_ISSUER}" in done.stderr + done.stdout
        )
    if "ISSUER" in names:
        done = run(tmp_path, "xaiproxy.login", "--logout", HTTPS_PROXY=network.url)
        assert done.returncode == 78 and "was not changed" in done.stderr
    assert stranger.heard == network.heard == []


def test_a_dotenv_redirects_no_connection(tmp_path: Path, servers: tuple[Server, Server]) -> None:
    """Only its XAI_PROXY_* count, also where the environment has no such variable."""
    stranger, network = servers
    (tmp_path / ".env").write_text(
        "".join(f"{name}={stranger.url}\n" for name in ("HTTPS_PROXY", "https_proxy", "http_proxy"))
        + "SSL_CERT_FILE=/none\nNO_PROXY=*\nAUTH_PROXY_TOKEN_PATH=/none\n"
    )
    with ProxyProcess(
        tmp_path, command=COMMAND, issuer="", upstream="", environ={"ALL_PROXY": network.url}
    ) as proxy:
        proxy.sign_in(**XAI)
        assert proxy.ask("GET", "/v1/models").status == 502
    put(tmp_path)
    assert run(tmp_path, "xaiproxy.refresher", "--once", ALL_PROXY=network.url).returncode == 69
    assert stranger.heard == []
    assert [heard.split()[:2] for heard in network.heard] == [
        ["CONNECT", "api.x.ai:443"],
        ["CONNECT", "auth.x.ai:443"],
    ]
    assert not any(secret in heard for secret in SECRETS for heard in network.heard)


ENDPOINTS = [
    "STRANGER/oauth2/token",
    "https://evil.example/oauth2/token",
    "https://auth.x.ai.evil.example/oauth2/token",
    "https://auth.x.ai@evil.example/",
    "https://evil.example\\.x.ai/",
    "https://auth.x.ai:8443/oauth2/token",
]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_token_endpoint_on_another_site_is_not_used(
    tmp_path: Path, servers: tuple[Server, Server], endpoint: str
) -> None:
    stranger, network = servers
    path = put(tmp_path, token_endpoint=endpoint.replace("STRANGER", stranger.url))
    assert run(tmp_path, "xaiproxy.refresher", "--once", HTTPS_PROXY=network.url).returncode == 69
    assert stranger.heard == [] and {heard.split()[1] for heard in network.heard} == {
        "auth.x.ai:443"
    }
    assert json.loads(path.read_text())["refresh_token"] == SECRETS[1]


@pytest.mark.parametrize("plant", ["issuer", "link", "owner"])
def test_a_token_file_of_another_user_is_not_used(
    tmp_path: Path, servers: tuple[Server, Server], plant: str
) -> None:
    """With the account of another user, that user could read the requests."""
    stranger, network = servers
    path = put(
        tmp_path,
        **({"issuer": stranger.url, "token_endpoint": stranger.url} if plant == "issuer" else {}),
    )
    if plant == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file to another user")
        os.chown(path, STRANGER, STRANGER)
    if plant == "link":
        path.rename(tmp_path / "elsewhere.json")
        path.symlink_to("elsewhere.json")
    with ProxyProcess(
        tmp_path, issuer="", upstream="", environ={"HTTPS_PROXY": network.url}
    ) as proxy:
        assert proxy.ask("GET", "/v1/models").value("X-XAI-Proxy-Error") == "login_required"
    for module, *arguments in (("xaiproxy.refresher", "--once"), ("xaiproxy.login", "--status")):
        assert run(tmp_path, module, *arguments, HTTPS_PROXY=network.url).returncode == 77
    assert stranger.heard == network.heard == []


@needs_root
def test_a_dotenv_of_another_user_starts_nothing(tmp_path: Path) -> None:
    """It could set the clients that are admitted, and the issuer of the next login."""
    (tmp_path / ".env").write_text("XAI_PROXY_BIND=0.0.0.0\nXAI_PROXY_ALLOW_ANONYMOUS=1\n")
    os.chown(tmp_path / ".env", STRANGER, STRANGER)
    code, message = refuse_to_start(tmp_path)
    assert code == 78 and f"{tmp_path}/.env belongs to user {STRANGER}" in message
    put(tmp_path)
    for module, *arguments in (
        ("xaiproxy.refresher",),
        ("xaiproxy.login", "--device"),
        ("xaiproxy.login", "--status"),
        ("xaiproxy.client_key_command", "list"),
    ):
        done = run(tmp_path, module, *arguments)
        assert (
            done.returncode == 78 and f"{tmp_path}/.env belongs to user {STRANGER}" in done.stderr
        ), done
    assert "belongs to user" in run(tmp_path, "xaiproxy.login", "--doctor").stdout


@needs_root
def test_a_folder_of_another_user_is_reported_at_the_start(tmp_path: Path) -> None:
    put(tmp_path, refresh_token=None, expires_at=4e9)
    os.chown(tmp_path, STRANGER, STRANGER)
    done = run(tmp_path, "xaiproxy.refresher", "--once")
    assert (
        done.returncode == 0
        and f"{tmp_path} belongs to user {STRANGER}, who could replace the login" in done.stderr
    )


def test_a_redirect_of_upstream_is_forwarded_and_not_followed(
    tmp_path: Path, servers: tuple[Server, Server]
) -> None:
    stranger, _ = servers
    with (
        ScriptedUpstream() as upstream,
        ProxyProcess(tmp_path, upstream=upstream.origin) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        for status in (301, 302, 303, 307, 308):
            client.request("GET", "/v1/models")
            upstream.receive().answer(
                f"HTTP/1.1 {status} x\r\nLocation: {stranger.url}/v1/models\r\n"
                "Content-Length: 0\r\n\r\n".encode()
            )
            answer = client.message()
            assert (answer.status, answer.value("Location")) == (
                status,
                f"{stranger.url}/v1/models",
            )
            assert SECRETS[0] not in answer.head.decode("latin-1")
    assert stranger.heard == []


def test_a_module_in_the_working_directory_is_not_run(tmp_path: Path, sandbox: Sandbox) -> None:
    """The browser is opened by a Python process of its own, which would import this module first."""
    for name in ("webbrowser", "sitecustomize", "subprocess", "xaiproxy", "certifi"):
        (tmp_path / f"{name}.py").write_text(f"open('{name}-was-run', 'w')\n")
    browser = tmp_path / "browser"
    browser.write_text('#!/bin/sh\necho "$1" >opening && mv opening opened\n')
    browser.chmod(0o755)
    # As a console script has it.
    code = "import sys; del sys.path[0]; from xaiproxy.login.command import main; sys.exit(main())"
    process = subprocess.Popen(
        [*PYTHON, "-c", code, "--browser"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(
            tmp_path, {"BROWSER": str(browser)}, issuer=sandbox.url, upstream=sandbox.url
        ),
    )
    try:
        until(lambda: (tmp_path / "opened").exists() or list(tmp_path.glob("*-was-run")), 20)
    finally:
        process.kill()
        process.wait()
    assert not list(tmp_path.glob("*-was-run")) and (tmp_path / "opened").read_text().startswith(
        sandbox.url
    )
