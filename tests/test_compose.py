"""conf/compose.yaml and conf/compose.loopback.yaml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT

from xaiproxy import addresses, config

BASE, LOOPBACK = ROOT / "conf" / "compose.yaml", ROOT / "conf" / "compose.loopback.yaml"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# Where Debian's docker-compose, from version 2 on, and Docker's packages have it.
PLUGINS = [
    f"{folder}/docker/cli-plugins"
    for folder in ("/usr/libexec", "/usr/lib", "/usr/local/lib", "/usr/local/libexec")
]


def services(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["services"]
    return found


def compose() -> str | None:
    """The program of compose v2."""
    found = shutil.which("docker-compose", path=os.pathsep.join([*PLUGINS, os.environ["PATH"]]))
    if found is None:
        return None
    version = subprocess.run(
        [found, "version", "--short"], capture_output=True, text=True, timeout=30
    )
    return found if re.match("v?[2-9]", version.stdout) else None


@pytest.mark.parametrize("files", [[BASE], [BASE, LOOPBACK]], ids=["network", "loopback"])
def test_compose_accepts_the_files(files: list[Path]) -> None:
    program = compose()
    if program is None:
        pytest.skip("needs docker-compose 2")
    options = [option for file in files for option in ("--file", file)]
    done = subprocess.run(
        [program, *options, "config", "--quiet"],
        env={"PATH": os.defpath},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_setting_exists_and_is_valid() -> None:
    for file in (BASE, LOOPBACK):
        environ = services(file)["proxy"]["environment"]
        assert (
            config.from_environ(environ, dotenv_path=os.devnull).bind == environ["XAI_PROXY_BIND"]
        )


def test_the_volume_is_where_the_image_has_the_login_and_only_the_proxy_has_it() -> None:
    [token_path] = re.findall("XAI_PROXY_TOKEN_PATH=(.*)", DOCKERFILE)
    assert services(BASE)["proxy"]["volumes"] == [f"login:{Path(token_path).parent}"]
    for file in (BASE, LOOPBACK):
        assert not {"volumes", "volumes_from", "pid", "ipc"} & services(file)["agent"].keys()


def test_the_proxy_has_no_privileges_and_nothing_is_published() -> None:
    proxy = services(BASE)["proxy"]
    assert proxy["read_only"] and proxy["cap_drop"] == ["ALL"]
    assert proxy["security_opt"] == ["no-new-privileges:true"]
    assert "ports" not in proxy and not {"user", "privileged", "cap_add"} & proxy.keys()


def test_the_agent_calls_the_address_at_which_the_proxy_listens() -> None:
    agent, proxy = services(BASE)["agent"], services(BASE)["proxy"]
    port = config.SETTINGS["XAI_PROXY_PORT"].metadata["default"]
    assert proxy["environment"]["XAI_PROXY_BIND"] == "0.0.0.0"
    assert agent["environment"]["OPENAI_BASE_URL"] == f"http://proxy:{port}/v1"
    assert agent["depends_on"]["proxy"]["condition"] == "service_healthy"

    agent, proxy = services(LOOPBACK)["agent"], services(LOOPBACK)["proxy"]
    address = proxy["environment"]["XAI_PROXY_BIND"]
    assert addresses.is_loopback(address) and agent["network_mode"] == "service:proxy"
    assert agent["environment"]["OPENAI_BASE_URL"] == f"http://{address}:{port}/v1"
    # It would keep the network of the container that is gone.
    assert agent["depends_on"]["proxy"]["restart"]
