"""conf/systemd: systemd's own checks of the units, and the proxy on a socket that systemd opened."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from proxy_process import COMMAND, Client, ProxyProcess, UnixClient, environment
from raw_connection import TIMEOUT

from xaiproxy import config
from xaiproxy.proxy.server import BACKLOG
from xaiproxy.refresher import renewal

UNITS = ROOT / "conf" / "systemd"
SERVICES = ("xaiproxy.service", "xaiproxy-refresher.service")
HIGHEST_EXPOSURE = 2.5
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd is not installed"
)


def default(name: str) -> Any:
    about = config.SETTINGS[f"XAI_PROXY_{name}"].metadata
    return about["parse"](about["default"])


def unit(name: str) -> configparser.RawConfigParser:
    parsed = configparser.RawConfigParser(strict=False)
    parsed.read(UNITS / name)
    return parsed


@pytest.fixture
def installed(tmp_path: Path) -> list[Path]:
    """The units with the commands of this environment, which systemd looks for."""
    for name in (*SERVICES, "xaiproxy.socket"):
        text = (UNITS / name).read_text()
        own = f"ExecStart={Path(sys.executable).parent}/"
        (tmp_path / name).write_text(text.replace("ExecStart=/opt/xaiproxy/bin/", own))
    return sorted(tmp_path.iterdir())


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)],
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
    )


@needs_systemd
def test_systemd_accepts_every_line(installed: list[Path]) -> None:
    """It exits with 0 also after a message about an unknown key."""
    done = analyze("verify", "--man=no", *installed)
    assert (done.returncode, done.stderr) == (0, "")
    service = installed[0]
    service.write_text(service.read_text().replace("UMask=", "UMaks="))
    assert "UMaks" in analyze("verify", "--man=no", *installed).stderr


@needs_systemd
def test_the_services_are_hardened(installed: list[Path]) -> None:
    for path in installed:
        if path.name in SERVICES:
            done = analyze("security", "--offline=true", "--no-pager", path)
            assert done.stderr == ""
            level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
            assert float(level[1]) <= HIGHEST_EXPOSURE, done.stdout


def test_the_stop_timeouts_fit() -> None:
    """The proxy drains, and a refresh that has begun is completed and saved."""
    proxy, refresher = (unit(name).getfloat("Service", "TimeoutStopSec") for name in SERVICES)
    assert proxy >= default("DRAIN_DELAY") + default("DRAIN_TIMEOUT") + 10
    assert refresher >= renewal.DEADLINE + 10


def test_the_units_fit_the_defaults() -> None:
    needed = config.descriptors_for(default("MAX_CONNECTIONS"))
    assert unit(SERVICES[0]).getint("Service", "LimitNOFILE") >= needed
    bind, port = default("BIND"), default("PORT")
    assert unit("xaiproxy.socket")["Socket"]["ListenStream"] == f"{bind}:{port}"
    assert unit("xaiproxy.socket").getint("Socket", "Backlog") == BACKLOG
    for name in SERVICES:
        service = unit(name)["Service"]
        assert service["RestartPreventExitStatus"] == "78"
        assert service["Environment"] == "XAI_PROXY_TOKEN_PATH=/var/lib/xaiproxy/tokens.json"
        command = Path(service["ExecStart"])
        assert (
            command.parent == Path("/opt/xaiproxy/bin") and (ROOT / "bin" / command.name).exists()
        )


def test_the_service_manager_is_notified_once_the_proxy_listens(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(TIMEOUT)
        with ProxyProcess(tmp_path, environ={"NOTIFY_SOCKET": str(path)}) as proxy:
            assert manager.recv(100) == b"READY=1"
            assert proxy.ask("GET", "/healthz").status == 200


@needs_systemd
@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_the_proxy_serves_on_a_socket_that_systemd_has_opened(tmp_path: Path, family: str) -> None:
    """It is started by the first connection, and leaves the file of the socket alone."""
    path = tmp_path / "socket"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # The settings name another address, which is not used.
    settings = environment(tmp_path, bind="127.0.0.1", port=port + 1 if port < 65535 else 1)
    with subprocess.Popen(
        [
            "systemd-socket-activate",
            f"--listen={path if family == 'unix' else f'127.0.0.1:{port}'}",
            "env",
            *(f"{name}={value}" for name, value in settings.items()),
            *COMMAND,
        ],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert "Listening on" in process.stderr.readline()
        with UnixClient(path) if family == "unix" else Client(port) as client:
            assert client.ask("GET", "/healthz").status == 200
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read()
        assert process.wait(TIMEOUT) == 0
    place = f"unix:{path}" if family == "unix" else f"http://127.0.0.1:{port}/v1"
    assert f"listening on {place}; no client key required" in log
    assert path.exists() == (family == "unix")
