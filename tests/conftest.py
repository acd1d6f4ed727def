"""Fixtures for all tests."""
from __future__ import annotations

from typing import Iterator

import pytest

pytest.register_assert_rewrite("sandbox")
from sandbox import Sandbox  # noqa: E402


@pytest.fixture(scope="session")
def shared_sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    """A simulated xAI as good as new: default knobs, counters at zero. One process serves all tests."""
    shared_sandbox.reset()
    yield shared_sandbox
    shared_sandbox.reset()


@pytest.fixture
def token(sandbox: Sandbox) -> str:
    """An access token of a new login, with the counters at zero again."""
    token = sandbox.mint()["access_token"]
    sandbox.reset()
    return token
