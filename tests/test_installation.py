"""The wheel, installed into an environment that is not on PATH, in an empty home and folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from checkout import ROOT
from proxy_process import Client
from sandbox import Sandbox
from terminal import CTRL_C, Terminal


def pip(*arguments: object) -> None:
    # Nothing is downloaded: the requirements are those of the tests.
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PIP_NO_INDEX": "1"})


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands that the wheel installs."""
    folder = tmp_path_factory.mktemp("installation")
    source = folder / "source"
    # With its links, as git has it, and without the folders that a build leaves.
    shutil.copytree(
        ROOT / "xaiproxy",
        source / "xaiproxy",
        symlinks=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copytree(ROOT / "conf", source / "conf", symlinks=True)
    for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    [wheel] = folder.glob("xaiproxy-*.whl")
    venv = folder / "a venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    [packages] = venv.glob("lib/python*/site-packages")
    pip("--python", venv / "bin" / "python", "install", "--no-deps", wheel)
    # An editable installation of the checkout, which a .pth file names, is not found this way.
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    return venv / "bin"


def test_an_installed_wheel_signs_in_and_serves_from_an_empty_folder(
    scripts: Path, tmp_path: Path
) -> None:
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    home.mkdir()
    cwd.mkdir()
    with Sandbox("--auto-approve", "0", "--device-interval", "1") as sandbox:
        environ = {"PATH": os.defpath, "HOME": str(home), "XAI_PROXY_PORT": "0", **sandbox.env}
        del environ["XAI_PROXY_TOKEN_PATH"]
        with Terminal([str(scripts / "xai-login"), "--device"], cwd=cwd, env=environ) as terminal:
            # As it can be typed in a new shell.
            terminal.expect(f"keep it alive with `'{scripts}/xai-serve'`", 30)
            assert terminal.end() == 0
        with Terminal([str(scripts / "xai-serve")], cwd=cwd, env=environ) as terminal:
            port = terminal.expect(r"ready: http://127\.0\.0\.1:(\d+)/v1; try: curl ", 30)[1]
            with Client(int(port)) as client:
                assert client.ask("GET", "/v1/models").status == 200
            terminal.type(CTRL_C)
            assert terminal.end(20) == 0
    assert os.listdir(cwd) == [] and os.listdir(home) == [".xai-proxy"]
    names = {path.name for path in (home / ".xai-proxy").iterdir()}
    assert names <= {"tokens.json", "tokens.json.lock", "tokens.json.status"}


def test_an_installed_wheel_has_completions_and_man_pages(scripts: Path) -> None:
    files = {
        path.relative_to(ROOT / "conf" / "share")
        for path in (ROOT / "conf" / "share").rglob("*")
        if path.is_file()
    }
    assert len(files) == 4 * len([path for path in scripts.iterdir() if path.name[:4] == "xai-"])
    for path in files:
        installed = scripts.parent / "share" / path
        assert installed.read_text() == (ROOT / "conf" / "share" / path).read_text()


def test_an_installed_wheel_has_the_files_of_the_clients(scripts: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [scripts / "xai-launch", "--print", "codex"],
        cwd=tmp_path,
        env={"PATH": os.defpath, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (ROOT / "conf" / "clients" / "codex.toml").read_text() in done.stdout
    assert os.listdir(tmp_path) == []
