"""No secret leaves except where it must: all output, files and process data of a complete run are
searched for every secret.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import signal
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import ONE_CA, SUPPORT
from proxy_process import PYTHON
from raw_connection import Message
from sandbox import Sandbox, until
from supervised import Supervised
from terminal import Terminal

LOGIN = [*PYTHON, "-c", "import sys; from xaiproxy.login.command import main; sys.exit(main())"]
KEY_COMMAND = [
    *PYTHON,
    "-c",
    "import sys; from xaiproxy.client_key_command import main; sys.exit(main())",
]
# Faults of the issuer and the API; the texts that they quote come in addition.
ISSUER_FAULTS: list[dict[str, Any]] = [
    {"status": 500, "body": "<html>"},
    {"cut": "reset"},
    {"status": 429},
    {"status": 200, "body": {"access_token": "not one"}},
]
API_FAULTS: list[dict[str, Any]] = [
    {"status": 429, "body": {"error": "slow down"}},
    {"status": 500, "body": "<html>"},
    {"cut": "reset", "times": 9},
]


class RecordingSandbox(Sandbox):
    def __init__(self, file: Path, **knobs: Any) -> None:
        self.program = [str(SUPPORT / "secret_recording_sandbox.py"), str(file)]
        super().__init__(**knobs)


class Run:
    """The outputs, responses, processes and files of a complete run, by name."""

    def __init__(self, folder: Path, sandbox: Sandbox) -> None:
        self.folder = folder
        self.sandbox = sandbox
        self.token_path = folder / "login" / "tokens.json"
        # It records its own command line and environment, and those of the process that started it.
        self.browser = folder / "browser"
        self.browser.write_text(
            "#!/bin/sh\ncat /proc/$$/cmdline /proc/$$/environ /proc/$PPID/cmdline "
            "/proc/$PPID/environ >browser-saw.new\nmv browser-saw.new browser-saw\n"
        )
        self.browser.chmod(0o755)
        self.env = {
            "PATH": os.environ["PATH"],
            "SSL_CERT_FILE": str(ONE_CA),
            "HOME": str(folder),
            "XAI_PROXY_LOG_LEVEL": "debug",
            "BROWSER": str(self.browser),
            "PYTHONFAULTHANDLER": "1",
            **sandbox.env,
            "XAI_PROXY_TOKEN_PATH": str(self.token_path),
        }
        self.outputs: dict[str, str] = {}
        self.answers: list[Message] = []
        # Command lines and environments.
        self.processes: dict[str, str] = {}
        self.files: dict[str, str] = {}
        # The client's secrets; the sandbox writes those of the login.
        self.own: dict[str, list[str]] = {
            kind: [f"{kind}-{secrets.token_hex(16)}"]
            for kind in ("query", "body", "cookie", "basic", "frame")
        }
        # In a path it is returned to the client that sent it, but must not be in a log.
        self.own["key in a path"] = ["xaip_" + secrets.token_urlsafe(32)]

    def record_process(self, pid: int, name: str) -> None:
        self.processes[name] = "".join(
            Path(f"/proc/{pid}/{what}").read_text() for what in ("cmdline", "environ")
        )

    def record_files(self, when: str) -> None:
        for path in self.folder.rglob("*"):
            if path.is_file() and path != self.token_path:
                self.files[f"{path.relative_to(self.folder)} {when}"] = path.read_bytes().decode(
                    "latin-1"
                )

    def command(self, *arguments: str, **environ: str) -> None:
        done = subprocess.run(
            [*LOGIN, *arguments],
            cwd=self.folder,
            env=self.env | environ,
            timeout=30,
            text=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        self.outputs[f"xai-login {' '.join(arguments)} {done.returncode}"] = (
            done.stdout + done.stderr
        )

    def key_command(self, *arguments: str) -> str:
        done = subprocess.run(
            [*KEY_COMMAND, *arguments],
            cwd=self.folder,
            env=self.env,
            timeout=30,
            text=True,
            capture_output=True,
            check=True,
        )
        self.outputs[f"xai-client-key {arguments}"] = done.stderr
        return done.stdout.strip()

    # Signing in

    def start_login(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*LOGIN, *arguments, "--json"],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def sign_in_by_device(self) -> None:
        self.sign_in(
            "--device", "user_code", lambda event: self.sandbox.approve(event["user_code"])
        )

    def sign_in_by_browser(self) -> None:
        def visit(event: dict[str, str]) -> None:
            assert self.sandbox.visit(event["url"])

        self.sign_in("--browser", "authorization_url", visit)
        saw = self.folder / "browser-saw"
        until(saw.exists, 20)
        self.processes["browser"] = saw.read_text()

    def sign_in(self, way: str, awaited: str, allow: Callable[[dict[str, str]], object]) -> None:
        process, name = self.start_login(way), f"xai-login {way}"
        lines = [process.stdout.readline()]
        while awaited not in lines[-1]:
            lines.append(process.stdout.readline())
        self.record_process(process.pid, name)
        allow(json.loads(lines[-1]))
        self.outputs[name] = "".join(lines) + process.communicate(timeout=20)[0]
        assert process.returncode == 0

    def sign_in_by_paste(self) -> None:
        with Terminal([*LOGIN, "--browser"], cwd=self.folder, env=self.env) as terminal:
            url = self.sandbox.consent(terminal.expect(r"    (http://127\S+)\r\n")[1])
            code = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)["code"][0]
            terminal.type(f"{code}\n")
            assert terminal.end(20) == 0
            # This removes the terminal's own echo.
            self.outputs["xai-login, pasted"] = terminal.screen.replace(code, "", 1)

    # Requests

    def requests(self, supervised: Supervised, start: int, key: str, removed: str) -> None:
        own = {kind: values[0] for kind, values in self.own.items()}
        in_path = own["key in a path"]
        good = f"Authorization: Bearer {key}"
        chat = json.dumps(
            {"model": "grok-4.5", "messages": [{"role": "user", "content": own["body"]}]}
        ).encode()
        basic = base64.b64encode(f"user:{own['basic']}".encode()).decode()
        json_type = "Content-Type: application/json"
        websocket = [
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ]
        for method, target, fields, body in [
            ("GET", f"/v1/models?q={own['query']}", [good, f"Cookie: a={own['cookie']}"], b""),
            (
                "GET",
                f"/v1/models?key={key}",
                [f"X-Api-Key: {key}", f"Authorization: Basic {basic}"],
                b"",
            ),
            ("POST", "/v1/chat/completions", [good, json_type], chat),
            ("POST", "/v1/chat/completions", [good, json_type], chat[:-3]),
            ("POST", f"/v1/nothing?{own['query']}", [good, "Content-Type: text/plain"], chat),
            ("GET", "/v1/models", [f"X-Api-Key: {removed}", f"Authorization: Basic {basic}"], b""),
            ("GET", f"/v1/models?{own['query']}", [good, good], b""),
            ("GET", f"/v1/{in_path}", [good], b""),
            ("GET", f"/v1/../{in_path}", [good], b""),
            ("GET", f"/nowhere/{in_path}?{own['query']}", [good], b""),
            (in_path, "/v1/models", [good], b""),
            ("TRACE", "/v1/models", [good], b""),
            ("GET", "/metrics", [f"Cookie: {own['cookie']}"], b""),
            ("GET", "/readyz", [good], b""),
            ("GET", "/healthz", [f"Origin: http://{own['cookie']}.example"], b""),
            ("GET", f"/v1/nothing?{own['query']}", [good, *websocket], b""),
            # Messages that are no requests.
            ("GET", f"http://user:{own['basic']}@localhost/v1/models", [good], b""),
            ("GET", "/v1/models", [f"{own['cookie']} : {key}"], b""),
            ("GET", "/v1/models", [f"Cookie: {own['cookie']}\0"], b""),
            ("GET", f"/v1/models?{own['query']}", [good, f"Host: {own['cookie']}"], b""),
            ("POST", "/v1/models", [good, f"Transfer-Encoding: {own['cookie']}"], chat),
            ("POST", f"/v1/models HTTP/3 {own['query']}", [good], chat),
            ("GET", "/v1/models", [good, f"X: {key * 2000}"], b""),
        ]:
            with supervised.client(start) as client:
                self.answers.append(client.request(method, target, *fields, body=body).message())
        # A client that disconnects in the middle of its body.
        with supervised.client(start) as client:
            client.send(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{good}\r\n{json_type}\r\n"
                f"Content-Length: 9999\r\n\r\n{own['body']}".encode()
            )

    def everything(self) -> None:
        sandbox = self.sandbox
        for name in ("laptop", "phone"):
            self.own.setdefault("key", []).append(self.key_command("add", name))
        key, removed = self.own["key"]
        self.key_command("remove", "phone")
        with Supervised(
            self.folder,
            sandbox,
            XAI_PROXY_LOG_LEVEL="debug",
            PYTHONFAULTHANDLER="1",
            prefix=("sh", "-c", 'ulimit -S -c "$(ulimit -H -c)"; exec "$@"', "sh"),
        ) as supervised:
            with supervised.client() as client:
                port = client.sock.getpeername()[1]
            self.sign_in_by_browser()
            self.sign_in_by_paste()
            self.sign_in_by_device()
            self.requests(supervised, 1, key, removed)
            for fault in API_FAULTS:
                sandbox.set(answers=[{"path": "/v1/models", "times": 1, **fault}])
                with supervised.client() as client:
                    self.answers.append(client.ask("GET", "/v1/models", f"X-Api-Key: {key}"))
            sandbox.set(answers=[])
            sandbox.kill()
            with supervised.client() as client:
                self.answers.append(client.ask("GET", "/v1/models", f"X-Api-Key: {key}"))
            for options in (
                ("--status",),
                ("--status", "--json", "--quota"),
                ("--doctor",),
                ("--doctor", "--json"),
            ):
                self.command(*options, XAI_PROXY_PORT=str(port))
            # tokens that are soon to end, and an issuer with troubles of its own, which quotes what
            # it got
            refresher = int(supervised.wait_for_line(r"spawned: 'refresher' with pid (\d+)")[1])
            sandbox.set(access_token_lifetime=4)
            self.sign_in_by_device()
            quoting = {
                "status": 400,
                "body": {
                    "error": "temporarily_unavailable",
                    "error_description": f"not {self.refresh_token()}",
                },
            }
            for fault in [*ISSUER_FAULTS, quoting]:
                sandbox.set(
                    answers=[
                        {
                            "path": "/oauth2/token",
                            "grant_type": "refresh_token",
                            "times": 1,
                            **fault,
                        }
                    ]
                )
                os.kill(refresher, signal.SIGHUP)
                until(lambda: not sandbox.get("/_sandbox/knobs")[1]["answers"], 20)
                self.command("--status", "--json")
            # A client gets these, too, once the token has expired.
            sandbox.set(
                answers=[{"path": "/oauth2/token", "grant_type": "refresh_token", **quoting}]
            )
            with supervised.client() as client:
                until(
                    lambda: client.ask("GET", "/v1/models", f"X-Api-Key: {key}").status == 503, 20
                )
                self.answers.append(client.ask("GET", "/v1/models", f"X-Api-Key: {key}"))
            sandbox.set(answers=[])
            os.kill(refresher, signal.SIGHUP)
            refreshes = sandbox.counters()["refreshes"]
            sandbox.wait(lambda counters: counters["refreshes"] > refreshes)
            # a crash of each
            supervised.wait_for_line("success: proxy entered RUNNING state")
            proxy = int(supervised.wait_for_line(r"spawned: 'proxy' with pid (\d+)")[1])
            for pid, name in (
                (supervised.process.pid, "supervisord"),
                (proxy, "proxy"),
                (refresher, "refresher"),
            ):
                self.record_process(pid, name)
            for pid in proxy, refresher:
                os.kill(pid, signal.SIGABRT)
            self.requests(supervised, 2, key, removed)
            self.record_files("while it ran")
            self.command("--logout")
            self.record_files("after the logout")
            with supervised.client(2) as client:
                self.answers.append(client.ask("GET", "/v1/models", f"X-Api-Key: {key}"))
        self.outputs["supervisord"] = "".join(supervised.lines)

    def refresh_token(self) -> str:
        return json.loads(self.token_path.read_text())["refresh_token"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    written = tmp_path_factory.mktemp("secrets") / "secrets"
    with RecordingSandbox(written, device_interval=0.05) as sandbox:
        run = Run(tmp_path_factory.mktemp("run"), sandbox)
        run.everything()
        for line in written.read_text().splitlines():
            kind, secret = line.split(" ")
            run.own.setdefault(kind, []).append(secret)
        yield run


def traces(secret: str) -> Iterator[str]:
    """The forms of a secret that betray it: itself and its first characters, also in the encodings
    that it may be sent in.
    """
    # Many JWTs have the same beginning.
    distinct = secret.rpartition(".")[2].removeprefix("xaip_")
    distinct = re.sub("^(query|body|cookie|basic|frame)-", "", distinct)
    yield distinct[:12]
    yield secret
    yield urllib.parse.quote(secret, safe="")
    # Base64 of a text that begins after so many bytes.
    for before, start in (0, 0), (1, 2), (2, 3):
        yield base64.b64encode(b" " * before + secret.encode()).decode()[start : start + 16]


def found(run: Run, text: str, *without: str) -> list[str]:
    return [
        kind
        for kind, known in run.own.items()
        if kind not in without
        for secret in known
        if any(trace in text for trace in traces(secret))
    ]


def test_the_run_had_secrets_of_every_kind_and_they_can_be_found(run: Run) -> None:
    kinds = {kind: len(set(known)) for kind, known in run.own.items()}
    assert kinds.keys() >= {
        "access_token",
        "refresh_token",
        "id_token",
        "device_code",
        "code",
        "verifier",
        "key",
    }
    assert (
        kinds["refresh_token"] > 4
        and kinds["access_token"] > 4
        and kinds["code"] == kinds["verifier"] == 2
    ), kinds
    for kind, known in run.own.items():
        for encode in (
            str,
            lambda text: urllib.parse.quote(text, safe=""),
            lambda text: text[:-5],
            lambda text: base64.b64encode(b"a:" + text.encode()).decode(),
        ):
            assert kind in found(run, f"found {encode(known[0])} there")


def test_no_output_contains_a_secret(run: Run) -> None:
    log = run.outputs["supervisord"]
    assert "temporarily_unavailable: not [secret]" in log + "".join(run.outputs.values())
    assert (
        log.count("Fatal Python error: Aborted") == 2
        and '"level": "debug"' in log
        and '"status": 401' in log
    )
    for name, text in run.outputs.items():
        assert text and found(run, text) == [], name


def test_no_response_contains_a_secret(run: Run) -> None:
    assert {answer.status for answer in run.answers} >= {
        200,
        400,
        401,
        403,
        404,
        405,
        429,
        431,
        500,
        502,
        503,
    }
    assert any(
        b"temporarily_unavailable: not [secret]" in answer.body
        for answer in run.answers
        if answer.status == 503
    )
    for answer in run.answers:
        text = answer.head.decode("latin-1") + answer.body.decode("latin-1")
        # A 200 is upstream's, and may quote the body that it got.
        assert (
            found(run, text, "key in a path", *(["body"] if answer.status == 200 else [])) == []
        ), text


def test_no_process_shows_a_secret(run: Run) -> None:
    assert run.processes.keys() >= {
        "proxy",
        "refresher",
        "supervisord",
        "xai-login --device",
        "xai-login --browser",
        "browser",
    }
    for name, shown in run.processes.items():
        assert "XAI_PROXY_ISSUER" in shown and found(run, shown) == [], name


def test_no_file_except_the_token_file_contains_a_secret(run: Run) -> None:
    assert {
        "login/client-keys while it ran",
        "login/tokens.json.lock while it ran",
    } <= run.files.keys()
    for name, content in run.files.items():
        assert found(run, content) == [], name
    assert not run.token_path.exists()


def test_a_crash_left_no_core(run: Run) -> None:
    assert (
        "terminated by SIGABRT" in run.outputs["supervisord"]
        and "core dumped" not in run.outputs["supervisord"]
    )
