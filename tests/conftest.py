"""Fixtures for all tests."""
from __future__ import annotations

from typing import Iterator

import pytest

pytest.register_assert_rewrite("sandbox")
from flow import flow  # noqa: E402, F401
from proxy_process import ProxyProcess  # noqa: E402
from sandbox import Sandbox  # noqa: E402
from scripted_upstream import ScriptedUpstream  # noqa: E402


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


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as running:
        yield running


@pytest.fixture
def upstream(scripted: ScriptedUpstream) -> Iterator[ScriptedUpstream]:
    """One that does step by step what the test says. `running` and what a module makes for itself send to it."""
    yield scripted
    scripted.hang_up()


@pytest.fixture(scope="module")
def running(scripted: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyProcess]:
    """A proxy, signed in."""
    with ProxyProcess(tmp_path_factory.mktemp("proxy"), upstream=scripted.origin) as proxy:
        proxy.sign_in()
        yield proxy
