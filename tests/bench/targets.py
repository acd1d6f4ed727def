"""What is measured: the proxies, each in front of the same upstream, and the upstream itself."""

from __future__ import annotations

import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from . import machine

# As long as an access token.
TOKEN = "bench-" + "t" * 800
# The login's issuer, which is not contacted while the token is valid.
ISSUER = "http://127.0.0.1:1"
# The only client ID that the sandbox accepts.
CLIENT_ID = "b1a00492-073a-47ea-816f-4c329264a828"


class Upstream:
    """The server that all proxies forward to, with a certificate made for this run."""

    def __init__(self, folder: pathlib.Path):
        self.certificate, key = folder / "certificate.pem", folder / "key.pem"
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=localhost",
                "-addext",
                "subjectAltName=DNS:localhost,IP:127.0.0.1",
                # rustls rejects a server whose certificate is a CA's
                "-addext",
                "basicConstraints=critical,CA:FALSE",
                "-out",
                self.certificate,
                "-keyout",
                key,
            ],
            check=True,
            capture_output=True,
        )
        self.process = machine.Process(
            machine.OTHER_CORE,
            machine.FOLDER / "upstream",
            self.certificate,
            key,
            log=folder / "upstream.log",
            cwd=folder,
            stdout=subprocess.PIPE,
        )
        assert self.process.popen.stdout is not None
        self.port, self.tls_port = map(int, self.process.popen.stdout.readline().split())

    def origin(self, tls: bool) -> str:
        return f"https://localhost:{self.tls_port}" if tls else f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.process.close()


class Target:
    """A proxy in front of `upstream`.

    It is stopped between rest() and wake(), so that it does not disturb another's run.
    """

    name = ""

    def __init__(self, upstream: Upstream, tls: bool, folder: pathlib.Path):
        self.upstream, self.tls, self.folder = upstream, tls, folder
        self.port, self.startup_cpu = 0, 0.0
        self.processes: list[machine.Process] = []
        self.measured: machine.Process | None = None
        folder.mkdir(parents=True)

    def start(self) -> Target:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        self.startup_cpu = machine.cpu_seconds(self.pids())
        return self

    def _start(self) -> None:
        raise NotImplementedError

    def _run(
        self,
        *command: str | os.PathLike[str],
        core: int = machine.TARGET_CORE,
        environ: dict[str, str] | None = None,
        name: str | None = None,
    ) -> machine.Process:
        log = self.folder / f"{name or self.name}.log"
        process = machine.Process(core, *command, log=log, cwd=self.folder, environ=environ)
        self.processes.append(process)
        return process

    def pids(self) -> list[int]:
        return self.measured.family() if self.measured else []

    def wake(self) -> None:
        for process in self.processes:
            process.send(signal.SIGCONT)

    def rest(self) -> None:
        for process in self.processes:
            process.send(signal.SIGSTOP)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.close()


class Direct(Target):
    """No proxy: what load client and upstream can do together on one core."""

    name = "direct"

    def _start(self) -> None:
        self.port = self.upstream.port


class Nginx(Target):
    name = "nginx"
    CONFIGURATION = """
worker_processes 1; daemon off; pid nginx.pid; error_log stderr warn; worker_rlimit_nofile {files};
events {{ worker_connections 16000; }}
http {{
    access_log off; client_max_body_size 0; keepalive_requests 1000000000;
    client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    upstream api {{ server {address}; keepalive 8000; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass {scheme}://api; proxy_http_version 1.1; proxy_read_timeout 3600s;
            proxy_buffering off; proxy_request_buffering off;
            proxy_set_header Connection ""; proxy_set_header Host localhost;
            proxy_set_header Authorization "Bearer {token}";
            proxy_ssl_verify on; proxy_ssl_trusted_certificate {certificate};
            proxy_ssl_name localhost; proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3;
        }}
    }}
}}
"""

    def _start(self) -> None:
        scheme, _, address = (
            self.upstream.origin(self.tls).replace("localhost", "127.0.0.1").partition("://")
        )
        self.port = free_port()
        (self.folder / "nginx.conf").write_text(
            self.CONFIGURATION.format(
                port=self.port,
                scheme=scheme,
                address=address,
                token=TOKEN,
                certificate=self.upstream.certificate,
                files=os.sysconf("SC_OPEN_MAX"),
            )
        )
        self.measured = self._run("nginx", "-p", self.folder, "-c", "nginx.conf", "-e", "stderr")
        self.measured.wait_for("nginx", lambda: answers(self.port))


class ReverseProxy(Target):
    """A program in this folder that does what nginx's configuration does."""

    build: Callable[[], pathlib.Path]
    version: tuple[str, str]

    def _start(self) -> None:
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.measured = proxy = self._run(
            "prlimit",
            f"--nofile={files}",
            type(self).build(),
            self.upstream.origin(self.tls).replace("localhost", "127.0.0.1"),
            self.upstream.certificate,
            TOKEN,
        )
        self.port = proxy.port()


class Go(ReverseProxy):
    """net/http/httputil's ReverseProxy."""

    name = "go"
    build = staticmethod(machine.go_proxy)
    version = ("go", "version")


class Rust(ReverseProxy):
    """hyper with rustls."""

    name = "rust"
    build = staticmethod(machine.rust_proxy)
    version = ("cargo", "--version")


REVERSE_PROXIES = (Go, Rust)


class Xaiproxy(Target):
    """xaiproxy of a checkout, by its own .venv, with its log lines on and a token that lasts."""

    name = "xaiproxy"
    checkout = machine.ROOT

    def _settings(self) -> dict[str, str]:
        settings = {
            "UPSTREAM": self.upstream.origin(self.tls),
            "ISSUER": ISSUER,
            "PORT": "0",
            "CLIENT_ID": CLIENT_ID,
            "TOKEN_PATH": str(self.folder / "tokens.json"),
        }
        return {f"XAI_PROXY_{name}": value for name, value in settings.items()} | {
            "SSL_CERT_FILE": str(self.upstream.certificate)
        }

    def _sign_in(self) -> None:
        path, now = self.folder / "tokens.json", int(time.time())
        path.touch(mode=0o600)
        path.write_text(
            json.dumps(
                {
                    "access_token": TOKEN,
                    "refresh_token": "bench",
                    "issuer": ISSUER,
                    "client_id": CLIENT_ID,
                    "obtained_at": now,
                    "expires_at": now + 86400,
                }
            )
        )

    def command(self, name: str) -> pathlib.Path:
        return self.checkout / ".venv/bin" / name

    def _start(self) -> None:
        self._sign_in()
        self.measured = self._run(self.command("xai-proxy"), environ=self._settings())
        self.port = self.measured.port()


class Other(Xaiproxy):
    """The checkout that --against names."""

    name = "other"


class Rotating(Xaiproxy):
    """xaiproxy whose access tokens last 3 s: its refresher renews them, and the sandbox plays the
    issuer.
    """

    name = "rotating"

    def _start(self) -> None:
        sandbox = self._run(
            self.command("xai-sandbox"),
            "--port",
            "0",
            "--auto-approve",
            "0",
            "--device-interval",
            "1",
            "--access-token-lifetime",
            "3",
            core=machine.OTHER_CORE,
            name="sandbox",
        )
        found = sandbox.wait_for(
            "the sandbox's settings", lambda: re.search(r"ISSUER=(\S+)", sandbox.log.read_text())
        )
        self.issuer = found[1]
        super()._start()
        self.refresher = self._run(
            self.command("xai-refresher"), environ=self._settings(), name="refresher"
        )
        self._until_fresh()

    def _settings(self) -> dict[str, str]:
        return super()._settings() | {"XAI_PROXY_ISSUER": self.issuer}

    def _sign_in(self) -> None:
        subprocess.run(
            [self.command("xai-login"), "--device"],
            check=True,
            capture_output=True,
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], **self._settings()},
        )

    def _until_fresh(self) -> None:
        path = self.folder / "tokens.json"
        self.refresher.wait_for(
            "a token that lasts",
            lambda: json.loads(path.read_text())["expires_at"] > time.time() + 1,
        )

    def refreshes(self) -> int:
        with urllib.request.urlopen(f"{self.issuer}/_sandbox") as answer:
            return int(json.load(answer)["refreshes"])

    def wake(self) -> None:
        super().wake()
        self._until_fresh()


class LiteLLM(Target):
    """LiteLLM's proxy with one worker, in a virtual environment of its own."""

    name = "litellm"

    def _start(self) -> None:
        folder = machine.venv("litellm", "litellm[proxy]")
        environ = {
            "SSL_CERT_FILE": str(self.upstream.certificate),
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            # without a key, as xaiproxy on loopback: the least work for both
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        }
        self.port = free_port()
        (self.folder / "config.yaml").write_text(
            "model_list:\n- model_name: grok-4.5\n  litellm_params:\n    model: openai/grok-4.5\n"
            f"    api_base: {self.upstream.origin(self.tls)}/v1\n    api_key: {TOKEN}\n"
            "litellm_settings:\n  telemetry: false\n  num_retries: 0\n"
        )
        self.measured = self._run(
            folder / "bin/litellm",
            "--config",
            self.folder / "config.yaml",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--num_workers",
            "1",
            environ=environ,
        )
        self.measured.wait_for("LiteLLM", lambda: answers(self.port, "/health/liveliness"), 180)


def free_port() -> int:
    """A port for programs that cannot listen on port 0 and print the one they got."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(port: int, path: str = "/v1/models") -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False
