"""Fixtures for all tests."""
from __future__ import annotations

from typing import Iterator

import pytest
from sandbox import Sandbox


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
