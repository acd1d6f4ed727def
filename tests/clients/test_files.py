"""conf/clients: every file parses in its format, and the examples that are programs run."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import npm_package
import pytest
import yaml
from checkout import ROOT
from proxy_process import ProxyProcess
from sandbox import Sandbox

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = ROOT / "conf" / "clients"
# They set up no client by themselves.
OTHERS = {"README.md", "launch.ini"}
FILES = sorted({path.name for path in FOLDER.iterdir()} - OTHERS)
BASE_URL = "http://127.0.0.1:9090"
NEEDS_NODE = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
# These have their own names for the key; conf/clients/README.md lists them.
WITHOUT_VARIABLE = {"n8n.json", "zed.json", "open-webui.env", "llm.yaml"}


def check_shell(text: str) -> None:
    subprocess.run(["sh", "-eun"], input=text, text=True, check=True)


def check_environment(text: str) -> None:
    for line in text.splitlines():
        assert re.fullmatch(r"#.*|[A-Z_]+=\S+", line)


CHECKS: dict[str, Any] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".py": ast.parse,
    ".sh": check_shell,
    ".env": check_environment,
}


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("js")])
def test_a_file_parses_in_its_format(name: str) -> None:
    CHECKS[Path(name).suffix]((FOLDER / name).read_text())


@NEEDS_NODE
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("js")])
def test_the_javascript_parses(name: str, tmp_path: Path) -> None:
    # pi takes a module that is called .js, which node takes for another kind.
    module = tmp_path / "module.mjs"
    shutil.copy(FOLDER / name, module)
    subprocess.run(["node", "--check", module], check=True)


@pytest.mark.parametrize("name", FILES)
def test_a_file_names_the_address_and_the_source_of_the_key(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert re.search(
        re.escape(BASE_URL) + (r"(?!/v1)" if name == "claude-code.sh" else r"/v1\b"), text
    )
    assert "XAIPROXY_KEY" in text or name in WITHOUT_VARIABLE


def test_the_table_lists_every_file() -> None:
    assert (
        sorted(
            re.findall(r"^\| .* \| \[([^]]+)\]\(\1\) \|", (FOLDER / "README.md").read_text(), re.M)
        )
        == FILES
    )


def test_claude_codes_variables_have_the_key_once(tmp_path: Path) -> None:
    """The key goes into Authorization, and no other key may remain."""
    script = f". {FOLDER}/claude-code.sh; env"
    environ = {
        "PATH": os.environ["PATH"],
        "XAIPROXY_KEY": "the-key",
        "ANTHROPIC_API_KEY": "left-over",
    }
    printed = subprocess.run(
        ["sh", "-euc", script], env=environ, capture_output=True, text=True, check=True
    ).stdout
    variables = dict(line.split("=", 1) for line in printed.splitlines())
    assert variables["ANTHROPIC_AUTH_TOKEN"] == "the-key" and "ANTHROPIC_API_KEY" not in variables


@pytest.fixture(scope="session")
def openai_js() -> Path:
    """A folder in which node finds OpenAI's library."""
    return npm_package.installed(npm_package.OPENAI)


@pytest.mark.parametrize("name", ["openai_python.py", "langchain.py", "openai.mjs"])
def test_an_example_runs(
    name: str,
    endpoint: ProxyProcess,
    sandbox: Sandbox,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    # Its import takes seconds.
    if name.endswith(".py") and not importlib.util.find_spec("langchain_openai"):
        pytest.skip("langchain-openai is not installed")
    folder, command = tmp_path, [sys.executable, "-W", "error"]
    if name.endswith(".mjs"):
        folder, command = request.getfixturevalue("openai_js"), ["node"]
    example = folder / name
    example.write_text((FOLDER / name).read_text().replace(BASE_URL, endpoint.url))
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XAIPROXY_KEY": "none"}
    done = subprocess.run(
        [*command, example], env=environ, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(
        "This is the sandbox, not xAI"
    )
    assert sandbox.counters()["streams"] == 1
