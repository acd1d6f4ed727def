"""Fixtures for all tests."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import signal
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# The same examples every time: a change fails its own tests and no others. bin/fuzz
# tries new ones.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")
# A shell starts background jobs with SIGINT ignored, and nohup SIGHUP, which programs inherit: the
# tests of both would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
pytest.register_assert_rewrite("sandbox")
from checkout import ONE_CA
from forked_process import folder
from proxy_process import ProxyProcess
from sandbox import Sandbox
from scripted_upstream import ScriptedUpstream, make_certificate

# Programs and client libraries inherit it.
os.environ["SSL_CERT_FILE"] = str(ONE_CA)
# Workers inherit it, and so share the fork servers.
folder()

# The files that take longest, in that order, which begin first: no worker is left alone with one at
# the end.
LONGEST = (
    "clients/test_files.py",
    "login/test_command.py",
    "test_serve_command.py",
    "test_without_linux.py",
    "test_installation.py",
    "test_supervision.py",
    "test_restart_command.py",
    "test_launch_command.py",
    "test_other_issuer.py",
    "http1/test_handler.py",
    "proxy/test_cut_streams.py",
    "test_planted.py",
    "proxy/test_server.py",
    "refresher/test_refresh_faults.py",
    "refresher/test_published_secret.py",
    "refresher/test_process.py",
    "test_command.py",
    "test_properties.py",
    "http1/test_relay.py",
    "http1/test_dead_paths.py",
    "proxy/test_slow_clients.py",
    "test_secrets.py",
    "test_log.py",
    "proxy/test_rotation.py",
    "refresher/test_running.py",
    "proxy/test_intruders.py",
    "test_imports.py",
    "http1/test_exchange.py",
    "http1/test_tunnel.py",
    "proxy/test_both_directions.py",
    "refresher/test_model.py",
    "proxy/test_last_bytes.py",
    "test_soak.py",
    "http1/test_dialler.py",
    "test_storage.py",
)


class Scheduling(LoadFileScheduling):
    """Files run beside each other, but all of some folders in one worker.

    The libraries of clients, and the modules of programs that are forked, take seconds to import.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        folder = str(Path(file).parent)
        return folder if folder in ("tests/clients", "tests/login", "tests/oauth") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ranks = {here / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage meanwhile: there is almost none, and it takes a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def shared_sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    """A simulated xAI in its initial state: default knobs, counters at zero.

    One process serves all tests.
    """
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
    """An upstream that a test scripts step by step; the proxies of `start_proxy` send to it."""
    yield scripted
    scripted.hang_up()


@pytest.fixture
def way() -> str:
    """How the proxy sends responses; a test marked with both_ways runs once for each way."""
    return "relayed"


@pytest.fixture(scope="module")
def start_proxy(
    scripted: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ProxyProcess]]:
    """Start the module's one proxy for these settings, signed in."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(**settings: Any) -> ProxyProcess:
            proxy = ProxyProcess(
                tmp_path_factory.mktemp("proxy"), upstream=scripted.origin, **settings
            )
            stack.enter_context(proxy).sign_in()
            return proxy

        yield start


@pytest.fixture
def running(start_proxy: Callable[..., ProxyProcess], way: str) -> ProxyProcess:
    return start_proxy(way=way)


@pytest.fixture(scope="module", params=["plain", "tls"])
def start_either(
    request: pytest.FixtureRequest,
    certificate: tuple[Path, ssl.SSLContext],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., tuple]]:
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(**settings: Any) -> tuple[ProxyProcess, ScriptedUpstream]:
            upstream = stack.enter_context(
                ScriptedUpstream(certificate[1] if request.param == "tls" else None)
            )
            proxy = ProxyProcess(
                tmp_path_factory.mktemp("proxy"),
                upstream=upstream.origin,
                environ={"SSL_CERT_FILE": str(certificate[0])},
                **settings,
            )
            return stack.enter_context(proxy), upstream

        yield start


@pytest.fixture
def either(
    start_either: Callable[..., tuple],
) -> Iterator[Callable[..., tuple[ProxyProcess, ScriptedUpstream]]]:
    """Start the module's one proxy for these settings, signed in anew, and its upstream.

    Once with an upstream in the clear, and once over TLS.
    """
    used = []

    def start(**settings: Any) -> tuple[ProxyProcess, ScriptedUpstream]:
        used.append(start_either(**settings))
        used[-1][0].sign_in()
        return used[-1]

    yield start
    for _, upstream in used:
        upstream.hang_up()


@pytest.fixture(scope="session")
def shared_endpoint(
    shared_sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProxyProcess]:
    origin = shared_sandbox.url
    with ProxyProcess(tmp_path_factory.mktemp("endpoint"), issuer=origin, upstream=origin) as proxy:
        yield proxy


@pytest.fixture
def endpoint(sandbox: Sandbox, shared_endpoint: ProxyProcess) -> ProxyProcess:
    """The proxy before `sandbox`, for real clients: signed in anew, and without client keys."""
    sandbox.write_login(shared_endpoint.token_path)
    sandbox.reset()
    return shared_endpoint


@pytest.fixture
def many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"the file descriptor limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A CA's file, and the context of a server that it has signed a certificate for."""
    return make_certificate(tmp_path_factory.mktemp("ca"), "127.0.0.1", "upstream.test")
