"""The Dockerfile and the image's health check. bin/image-check checks a built image."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from proxy_process import ProxyProcess
from scripted_server import ScriptedServer, answer

import xaiproxy
from xaiproxy import config

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
FINAL = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
CPU_LIMIT = 0.05  # seconds for one health check


def values(instruction: str, text: str = FINAL) -> list[str]:
    return re.findall(rf"(?m)^{instruction} (.+)$", text)


def environment() -> dict[str, str]:
    return dict(value.split("=", 1) for value in values("ENV"))


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not installed")
def test_hadolint_finds_nothing_and_one_rule_is_excepted() -> None:
    done = subprocess.run(
        [HADOLINT, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (0, "")
    # Its DL3064 takes the path of a token for a secret.
    assert re.findall("hadolint (?:global )?ignore=(.*)", DOCKERFILE) == ["DL3064"]


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [ROOT / line.removeprefix("!") for line in lines if line.startswith("!")]
    sources = [
        ROOT / source
        for value in values("COPY", DOCKERFILE)
        if not value.startswith("--from=")
        for source in value.split()[:-1]
    ]
    for source in sources:
        assert source.exists() and source in kept, source
    assert sorted(kept) == sorted(set(sources))


def test_no_step_depends_on_the_architecture() -> None:
    assert not re.search("amd64|arm64|x86_64|aarch64|TARGETARCH|--platform", DOCKERFILE)


def test_both_stages_have_the_base_that_requirements_are_pinned_for() -> None:
    assert set(values("FROM", DOCKERFILE)) == {"${BASE} AS build", "${BASE}"}
    [base] = re.findall(r"ARG BASE=python:(3\.\d+)-slim", DOCKERFILE)
    assert f"--python-version {base} " in (ROOT / "conf" / "requirements.txt").read_text()
    assert f"Python :: {base}\n" in SETUP["metadata"]["classifiers"] + "\n"


def test_labels_settings_and_command_agree_with_the_package() -> None:
    assert values("ARG") == [f"VERSION={xaiproxy.__version__}", "SOURCE"]
    assert f"image.licenses={SETUP['metadata']['license']} " in values("LABEL")[0]
    assert {name for name in environment() if name.startswith(config.PREFIX)} <= set(
        config.SETTINGS
    )
    assert config.from_environ(environment(), dotenv_path=os.devnull)
    [command] = values("CMD")
    assert json.loads(command) == ["supervisord", "-c", "/etc/xaiproxy/supervisord.conf"]
    assert "conf/supervisord.conf /etc/xaiproxy/" in values("COPY")


# The health check.


def health_command() -> list[str]:
    """The image's, with this Python and the checkout's file."""
    [check] = values("HEALTHCHECK")
    python, *options, path = json.loads(check.partition(" CMD ")[2])
    assert python == "python" and path == "/opt/xaiproxy/healthcheck.py"
    return [sys.executable, *options, str(ROOT / "conf" / "healthcheck.py")]


def health(address: str | None) -> tuple[int, str, float]:
    """Exit status, stderr and seconds of CPU time."""
    environ = {} if address is None else {"XAI_PROXY_ADMIN_BIND": address}
    with subprocess.Popen(
        health_command(), env=environ, cwd="/", stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        printed = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, printed, usage.ru_utime + usage.ru_stime


def admin_address(proxy: ProxyProcess) -> str:
    start = "health checks and metrics on http://"
    line = proxy.wait_for_log(lambda line: line["message"].startswith(start))
    return str(line["message"].removeprefix(start))


@pytest.mark.parametrize("admin", ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"])
def test_the_health_check_succeeds_wherever_the_listeners_are(admin: str, tmp_path: Path) -> None:
    bind = f"unix:{tmp_path}/proxy.sock" if admin == "[::1]" else "127.0.0.1"
    with ProxyProcess(tmp_path, bind=bind, port=0, admin_bind=f"{admin}:0") as proxy:
        port = admin_address(proxy).rpartition(":")[2]
        assert health(f"{admin}:{port}")[:2] == (0, "")


def test_the_health_check_costs_little(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path, admin_bind="127.0.0.1:0") as proxy:
        address = admin_address(proxy)
        assert min(health(address)[2] for _ in range(5)) < CPU_LIMIT


def test_the_health_check_fails_while_the_proxy_hangs_and_after_it_has_ended(
    tmp_path: Path,
) -> None:
    with ProxyProcess(tmp_path, admin_bind="127.0.0.1:0") as proxy:
        address = admin_address(proxy)
        proxy.process.send_signal(signal.SIGSTOP)
        hanging = health(address)
        proxy.process.send_signal(signal.SIGCONT)
    assert hanging[:2] == (1, f"{address}: timed out\n")
    assert health(address)[:2] == (1, f"{address}: Connection refused\n")


@pytest.mark.parametrize("response", [answer(503, "{}"), b"", b"no HTTP"])
def test_the_health_check_fails_at_any_other_response(response: bytes) -> None:
    with ScriptedServer(response) as server:
        address = f"127.0.0.1:{server.port}"
        code, printed, _ = health(address)
    assert code == 1 and printed.startswith(f"{address}: ")


@pytest.mark.parametrize("address", [None, ""])
def test_the_health_check_names_the_setting_that_is_missing(address: str | None) -> None:
    code, printed, _ = health(address)
    assert code == 1 and "XAI_PROXY_ADMIN_BIND" in printed
