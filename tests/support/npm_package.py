"""Packages of npm, installed where node finds them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST_NODE = 20


def installed(package: str) -> Path:
    """Return a folder whose node_modules has `package`, such as "openai@6.1.0".

    It stays in .venv for the next run. Skips the test where node is missing or too old, or npm
    cannot fetch the package.
    """
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node or npm is not installed")
    version = subprocess.run(
        ["node", "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if int(version[1:].partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node {version} is too old for {package}")
    folder = Path(sys.prefix) / "npm" / package
    name = package.rpartition("@")[0]
    if not (folder / "node_modules" / name / "package.json").exists():
        command = [
            "npm",
            "install",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--fetch-retries=0",
            "--fetch-timeout=20000",
            "--prefix",
            folder,
            package,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"npm could not install {package}: {done.stderr.strip()[-200:]}")
    return folder
