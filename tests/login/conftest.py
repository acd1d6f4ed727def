"""Fixtures of the tests of xai-login."""

from __future__ import annotations

from pathlib import Path

import pytest
from login_command import Login
from sandbox import Sandbox


@pytest.fixture
def login(sandbox: Sandbox, tmp_path: Path) -> Login:
    return Login(sandbox, tmp_path)
