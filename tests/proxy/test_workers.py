"""Workers: several proxies that accept the connections of one listening socket."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from forked_process import run_python, start_python
from proxy_process import ARGUMENTS, ProxyProcess, environment
from raw_connection import TIMEOUT, RawConnection
from refresher_process import wait_until
from sandbox import CHAT as CONTENT
from sandbox import Sandbox
from scraped import Scraped, until

from xaiproxy import restart_command
from xaiproxy.inherited_socket import is_listening
from xaiproxy.proxy import paced_json
from xaiproxy.proxy.counters import KEYS, RouteCounters
from xaiproxy.proxy.numbers import Numbers
from xaiproxy.proxy.pace import Pace
from xaiproxy.proxy.usage import Usage

CHAT = ("/v1/chat/completions", "Content-Type: application/json")
NOTHING = ("GET", "/nowhere")


def start_worker(
    folder: Path, listener: socket.socket, slot: int = 0, workers: int = 2, **settings: Any
) -> ProxyProcess:
    return ProxyProcess(
        folder,
        arguments=("--slot", str(slot), "--workers", str(workers)),
        stdin=listener.fileno(),
        **settings,
    )


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def start(tmp_path: Path, listener: socket.socket) -> Iterator[Callable[..., ProxyProcess]]:
    """Start the worker of a slot, one of two, signed in."""
    started: list[ProxyProcess] = []

    def start_one(slot: int, **settings: Any) -> ProxyProcess:
        started.append(start_worker(tmp_path, listener, slot, **settings))
        started[-1].sign_in()
        return started[-1]

    yield start_one
    for proxy in started:
        if proxy.process.poll() is None:
            proxy.close()


def scrape_of(proxy: ProxyProcess, sibling: ProxyProcess) -> Scraped:
    """A scrape that `proxy` answers."""
    with stopped(sibling):
        return Scraped(proxy)


@contextlib.contextmanager
def stopped(proxy: ProxyProcess) -> Iterator[None]:
    """The others answer meanwhile."""
    proxy.process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: "\nState:\tT" in status_of(proxy), 5)
        yield
    finally:
        proxy.process.send_signal(signal.SIGCONT)


def status_of(proxy: ProxyProcess) -> str:
    return Path(f"/proc/{proxy.process.pid}/status").read_text()


# The listening socket


def serves(folder: Path, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
    with start_worker(folder, listener, workers=1) as proxy:
        proxy.sign_in()
        with RawConnection(connect()) as client:
            client.sock.settimeout(TIMEOUT)
            client.send(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.message().status == 200


def test_a_worker_serves_on_an_inherited_ipv6_socket(tmp_path):
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        serves(tmp_path, listener, lambda: socket.create_connection(listener.getsockname()[:2]))


@pytest.mark.parametrize("keyed", [False, True])
def test_the_address_of_an_inherited_socket_counts_for_keys(tmp_path, keyed):
    """Not the setting, which is loopback."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        if keyed:
            (tmp_path / "client-keys").write_text(f"alice {'0' * 64}\n")
            port = listener.getsockname()[1]
            serves(tmp_path, listener, lambda: socket.create_connection(("127.0.0.1", port)))
        else:
            assert "0.0.0.0 is reachable from other machines" in refused(tmp_path, listener)


def refused(folder: Path, stdin: Any, **settings: Any) -> str:
    """The one line of a worker that does not start."""
    process = start_python(
        "xaiproxy",
        [*ARGUMENTS, "--slot", "0"],
        cwd=folder,
        environ=environment(folder, **settings),
        stdin=stdin.fileno(),
    )
    with process.stderr:
        [line] = process.stderr.read().decode().splitlines()
    assert process.wait(10) == 78
    return line


def test_a_worker_without_a_listening_socket_is_refused(tmp_path):
    with socket.socket() as unbound, open(os.devnull) as file:
        for stdin in (unbound, file):
            assert "the standard input of a worker (--slot) is not a listening" in refused(
                tmp_path, stdin
            )


def test_a_slot_must_be_less_than_the_number_of_workers(tmp_path):
    done = run_python(
        "xaiproxy",
        [*ARGUMENTS, "--slot", "2", "--workers", "2"],
        cwd=tmp_path,
        environ=environment(tmp_path),
        timeout=20,
    )
    assert (done.returncode, "--slot must be less than --workers" in done.stderr) == (64, True)


def test_only_listening_stream_sockets_count(tmp_path):
    with contextlib.ExitStack() as stack:
        datagrams = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(tmp_path / "socket"))
        assert not is_listening(datagrams.fileno()) and not is_listening(unix.fileno())
        unix.listen()
        assert is_listening(unix.fileno()) and not is_listening(10**6)


def test_streams_spread_over_workers(start, tmp_path, sandbox: Sandbox):
    """Also connections that come all at once, and stay."""
    proxies = [start(slot, issuer=sandbox.url, upstream=sandbox.url) for slot in range(2)]
    sandbox.write_login(proxies[0].token_path)
    sandbox.set(events=1_000, events_per_second=1)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxies[0].client()) for _ in range(110)]
        for client in clients:
            client.request("POST", *CHAT, body=json.dumps(CONTENT).encode())
        for client in clients:
            assert client.head().status == 200
        until(proxies[0], 110, "xaiproxy_streams_open")
        numbers = [lasting(path)["gauges"]["streams"] for path in (tmp_path / "run").glob("*.json")]
    assert sum(numbers) == 110 and min(numbers) >= 35, numbers


def test_a_full_worker_leaves_connections_to_one_that_has_room(start, sandbox: Sandbox):
    proxies = [
        start(slot, issuer=sandbox.url, upstream=sandbox.url, max_connections=80)
        for slot in range(2)
    ]
    sandbox.write_login(proxies[0].token_path)
    sandbox.set(events=1_000, events_per_second=1)
    with contextlib.ExitStack() as stack:

        def open_stream() -> int:
            client = stack.enter_context(proxies[0].client())
            client.request("POST", *CHAT, body=json.dumps(CONTENT).encode())
            return client.head().status

        with stopped(proxies[1]):
            assert [open_stream() for _ in range(40)] == [200] * 40
        statuses = [open_stream() for _ in range(60)]
        # On a loaded machine the other one may be late now and then; by chance, half of them pass.
        assert statuses[:40].count(200) >= 28 and statuses[-1] == 503, statuses
        assert proxies[0].ask("GET", "/healthz").status == 200


def lasting(path: Path) -> dict[str, Any]:
    """The second line of a file of numbers."""
    return json.loads(path.read_text().splitlines()[1])


# Limits and log


def test_limits_are_divided_and_lines_name_the_slot(start):
    proxies = [start(slot, max_connections=7) for slot in range(2)]
    scraped = until(proxies[0], 2, "xaiproxy_workers")
    assert scraped("xaiproxy_connections_limit") == 6
    for slot, proxy in enumerate(proxies):
        assert {line["slot"] for line in proxy.log_lines()} == {slot}


def test_a_single_proxy_writes_no_numbers_and_names_no_slot(tmp_path):
    with ProxyProcess(tmp_path) as proxy:
        assert Scraped(proxy)("xaiproxy_workers") == 1
        assert not any("slot" in line for line in proxy.log_lines())
    assert not (tmp_path / "run").exists()


def test_a_worker_opens_no_admin_listener(tmp_path, listener):
    """It would not be that of its siblings."""
    line = refused(tmp_path, listener, admin_bind="127.0.0.1:0")
    assert "XAI_PROXY_ADMIN_BIND was not set when xai-serve was started" in line


# Numbers


def test_any_worker_answers_for_all(start):
    proxies = [start(slot) for slot in range(2)]
    until(proxies[0], 2, "xaiproxy_workers")
    for proxy in (*proxies, *proxies, *proxies):
        assert proxy.ask(*NOTHING).status == 404
    # Once one worker shows all of them, the files have them.
    until(proxies[0], 6, "xaiproxy_requests_total", status=404)
    shown = [scrape_of(*pair) for pair in (proxies, proxies[::-1])]
    assert [one("xaiproxy_requests_total", status=404) for one in shown] == [6, 6]
    # Without the scrapes, also the one during which the other worker wrote its numbers.
    assert [one("xaiproxy_requests_in_flight") for one in shown] == [0, 0]
    for proxy in proxies:
        assert json.loads(proxy.ask("GET", "/status.json").body)["workers"] == 2


def counted(scraped: Scraped) -> dict[tuple[Any, ...], float]:
    """Each sample of a counter or histogram."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in scraped.families.values()
        if family.type in ("counter", "histogram")
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def assert_not_fallen(before: Scraped, after: Scraped) -> None:
    later = counted(after)
    fallen = {
        name: (value, later.get(name))
        for name, value in counted(before).items()
        if later.get(name, -1) < value
    }
    assert not fallen


@pytest.mark.parametrize("end", [ProxyProcess.close, ProxyProcess.kill])
def test_counters_do_not_fall_when_a_worker_is_replaced(start, end):
    proxies = [start(slot) for slot in range(2)]
    before = until(proxies[0], 2, "xaiproxy_workers")
    for _ in range(2):
        for _ in range(20):
            assert proxies[0].ask(*NOTHING).status == 404
        after = Scraped(proxies[0])
        assert_not_fallen(before, after)
        end(proxies[1])
        alone = Scraped(proxies[0])
        assert_not_fallen(after, alone)
        assert alone("xaiproxy_workers") == 1
        proxies[1] = start(1)
        before = until(proxies[0], 2, "xaiproxy_workers")
        assert_not_fallen(alone, before)
    number = before("xaiproxy_requests_total", status=404)
    # A killed one loses what it counted since its last write.
    assert number == 40 if end is ProxyProcess.close else 20 <= number <= 40


def test_numbers_are_written_within_a_second_and_not_again_while_idle(start, tmp_path, listener):
    # A scrape writes them, too.
    Scraped(start(0))
    [path] = (tmp_path / "run").glob("*-0.json")
    assert path.name == f"127.0.0.1:{listener.getsockname()[1]}-0.json"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    time.sleep(1.2)
    written = path.stat().st_ino
    time.sleep(1.2)
    assert path.stat().st_ino == written


@pytest.mark.parametrize("content", [b"", b"{}\n{}\n", b"[" * 10_000, b'{"format": 1}\n3\n'])
def test_a_broken_file_of_a_sibling_is_ignored(start, tmp_path, listener, content):
    proxy = start(0)
    assert Scraped(proxy)("xaiproxy_workers") == 1
    [path] = (tmp_path / "run").glob("*-0.json")
    path.with_name(path.name.replace("-0.", "-1.")).write_bytes(content)
    assert Scraped(proxy)("xaiproxy_workers") == 1


def test_the_keys_of_all_workers_are_limited_as_those_of_one(start, tmp_path):
    proxy = start(0)
    Scraped(proxy)
    [path] = (tmp_path / "run").glob("*-0.json")
    first, second = path.read_text().splitlines()
    chat, numbers = RouteCounters(), json.loads(second)
    for key in range(KEYS + 50):
        chat.requests[200, f"key-{key:03}"] = 1
    numbers["counters"]["routes"]["chat"] = chat.plain()
    sibling = path.with_name(path.name.replace("-0.", "-1."))
    sibling.write_text(f"{first}\n{json.dumps(numbers)}\n")
    scraped = Scraped(proxy)
    assert scraped("xaiproxy_requests_total", route="chat", key="other") == 50
    assert scraped("xaiproxy_requests_total", route="chat") == KEYS + 50


def test_where_nothing_can_be_written_each_worker_shows_its_own_numbers(start, tmp_path):
    (tmp_path / "run").write_text("not a folder")
    proxies = [start(slot) for slot in range(2)]
    assert proxies[0].ask(*NOTHING).status == 404
    shown = [scrape_of(*pair) for pair in (proxies, proxies[::-1])]
    assert sum(one("xaiproxy_requests_total", status=404) for one in shown) == 1
    assert [one("xaiproxy_workers") for one in shown] == [1, 1]
    for proxy in proxies:
        lines = [line for line in proxy.log_lines() if "cannot be written" in line["message"]]
        assert len(lines) == 1


def test_numbers_do_not_fall_while_they_cannot_be_written(start, tmp_path):
    """As on a full disk. Workers that start meanwhile have those of their slots, too."""

    def limit(proxy: ProxyProcess, size: int) -> None:
        resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    proxies = [start(slot) for slot in range(2)]
    for _ in range(10):
        assert proxies[0].ask(*NOTHING).status == 404
    until(proxies[0], 10, "xaiproxy_requests_total", status=404)
    shown = [until(proxies[1], 2, "xaiproxy_workers")]
    for proxy in proxies:
        limit(proxy, 0)
    with stopped(proxies[1]):
        for _ in range(5):
            assert proxies[0].ask(*NOTHING).status == 404
    shown += [scrape_of(*pair) for pair in (proxies, proxies[::-1])]
    for slot in range(2):
        proxies[slot].close()
        proxies[slot] = start(slot, prefix=("sh", "-c", 'ulimit -S -f 0; exec "$@"', "sh"))
        pid = proxies[slot].process.pid
        wait_until(lambda: restart_command.is_serving(tmp_path / "run", str(slot), pid), 10)
        shown += [scrape_of(*pair) for pair in (proxies, proxies[::-1])]
    for before, after in itertools.pairwise(shown):
        assert_not_fallen(before, after)
    # Neither has written that it runs.
    assert after("xaiproxy_workers") == 1
    assert proxies[0].ask(*NOTHING).status == 404
    for proxy in proxies:
        limit(proxy, resource.RLIM_INFINITY)
    until(proxies[0], 11, "xaiproxy_requests_total", status=404)
    until(proxies[1], 2, "xaiproxy_workers")
    lines = [line for line in proxies[0].log_lines() if "cannot be written" in line["message"]]
    assert len(lines) == 1


def test_a_removed_run_folder_is_made_again(start, tmp_path):
    proxies = [start(slot) for slot in range(2)]
    until(proxies[0], 2, "xaiproxy_workers")
    until(proxies[1], 2, "xaiproxy_workers")
    shutil.rmtree(tmp_path / "run")
    until(proxies[0], 2, "xaiproxy_workers")
    assert len(list((tmp_path / "run").glob("*.json"))) == 2


def test_an_orphan_does_not_write_numbers(tmp_path, listener):
    """While it drains, its file may be of a worker of the next xai-serve."""
    # The shell does not replace itself with its last command.
    proxy = start_worker(tmp_path, listener, prefix=("sh", "-c", '"$@"; :', "sh"))
    shell = proxy.process.pid
    orphan = int(Path(f"/proc/{shell}/task/{shell}/children").read_text())
    end = os.pidfd_open(orphan)
    try:
        # A scrape writes the file.
        assert Scraped(proxy)("xaiproxy_workers") == 1
        [path] = (tmp_path / "run").glob("*.json")
        proxy.process.kill()
        proxy.process.wait()
        path.write_text("of another worker")
        assert proxy.ask(*NOTHING).status == 404
        Scraped(proxy)
    finally:
        signal.pidfd_send_signal(end, signal.SIGTERM)
        assert select.select([end], [], [], 10)[0]
        os.close(end)
    assert path.read_text() == "of another worker"


def test_only_one_worker_watches_the_refresher(start):
    proxies = [start(slot) for slot in range(2)]
    proxies[0].refresher_lives(False)
    proxies[0].wait_for_log(lambda line: "xai-refresher is not running" in line["message"], 30)
    assert not [line for line in proxies[1].log_lines() if "refresher" in line["message"]]


def test_numbers_of_many_keys_hold_up_no_streams():
    """200 keys with 50 models each: other greenlets run while they are written and added up."""
    numbers, pauses = Numbers(), 0
    for key in range(200):
        for model in range(50):
            numbers.counters.add_usage(f"model-{model}", f"key-{key}", Usage("x", 5, 4, 3, 2))
    plain = numbers.plain()

    def run() -> None:
        nonlocal pauses
        while True:
            gevent.sleep(0.001)
            pauses += 1

    other = gevent.spawn(run)
    text = paced_json.dumps(plain, Pace())
    assert pauses > 4 and json.loads(text) == json.loads(json.dumps(plain))
    pauses = 0
    total = Numbers()
    total.add_plain(json.loads(text), Pace())
    other.kill()
    assert pauses > 4 and total.plain() == plain
