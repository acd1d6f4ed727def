"""XAI_PROXY_ADMIN_BIND: health checks and metrics on a listener of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import gevent.event
import pytest
from prometheus_client.parser import text_string_to_metric_families
from proxy_process import Client, ProxyProcess, refuse_to_start
from raw_connection import Message
from scripted_upstream import ScriptedUpstream

from xaiproxy import config, errors
from xaiproxy.proxy import listener

KEY = "xaip_of-alice"
BY_KEY = f"Authorization: Bearer {KEY}"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LIMIT = 4


def port_of(proxy: ProxyProcess) -> int:
    start = "health checks and metrics on http://"
    line = proxy.wait_for_log(lambda line: line["message"].startswith(start))
    return int(line["message"].rpartition(":")[2])


def ask(proxy: ProxyProcess, path: str, *fields: str, method: str = "GET") -> Message:
    with Client(port_of(proxy)) as client:
        return client.ask(method, path, *fields)


def samples(page: Message, name: str) -> list[tuple[dict[str, str], float]]:
    assert page.status == 200, page.body
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(page.body.decode())
        for sample in family.samples
        if sample.name == name
    ]


@pytest.fixture
def proxy(start_proxy: Callable[..., ProxyProcess]) -> ProxyProcess:
    """A proxy with an admin listener, which all tests share."""
    return start_proxy(admin_bind="127.0.0.1:0", max_connections=LIMIT)


@pytest.fixture
def keyed(proxy: ProxyProcess) -> ProxyProcess:
    """The same with a client key, from now on."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    proxy.token_path.with_name("client-keys").write_text(f"alice {digest}\n")
    return proxy


def test_it_serves_health_checks_and_metrics_and_nothing_else(proxy: ProxyProcess) -> None:
    assert json.loads(ask(proxy, "/healthz").body) == {"status": "ok"}
    assert ask(proxy, "/readyz").status == 200
    assert samples(ask(proxy, "/metrics"), "xaiproxy_connections_limit") == [({}, LIMIT)]
    for path in ("/", "/status.json", "/v1/models", "/v1/../metrics", "/%761/models"):
        answer = ask(proxy, path)
        assert answer.status == 404, path
        message = json.loads(answer.body)["error"]["message"]
        assert message.startswith("the admin listener serves /healthz, /readyz and /metrics;")
    assert ask(proxy, "/v1/chat/completions", method="POST").status == 404
    assert ask(proxy, "/metrics", method="POST").status == 405


def test_the_requests_of_the_main_listener_are_counted_without_its_own(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    name = "xaiproxy_requests_in_flight"
    assert samples(ask(proxy, "/metrics"), name) == [({}, 0)]
    with proxy.client() as client:
        client.request()
        request = upstream.receive()
        assert samples(ask(proxy, "/metrics"), name) == [({}, 1)]
        request.answer()
        assert client.message().status == 200


def test_it_answers_while_every_connection_has_a_request(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with contextlib.ExitStack() as stack:
        streams = []
        for _ in range(LIMIT):
            client = stack.enter_context(proxy.client()).request()
            streams.append(upstream.receive().answer(STREAM))
            client.head()
        assert proxy.ask().status == 503
        ready = ask(proxy, "/readyz")
        assert ready.status == 200
        assert "connections have a request" in json.loads(ready.body)["warning"]
        # More connections than it has, and each is answered.
        waiting = [stack.enter_context(Client(port_of(proxy))) for _ in range(40)]
        assert waiting[-1].ask("GET", "/healthz").status == 200
        assert samples(ask(proxy, "/metrics"), "xaiproxy_connections") == [({}, LIMIT)]
        for stream in streams:
            stream.answer(b"0\r\n\r\n")


def test_names_of_keys_need_a_key(keyed: ProxyProcess, upstream: ScriptedUpstream) -> None:
    for fields in ((), ("X-Other: 1",)):
        with keyed.client() as client:
            client.request("GET", "/v1/models", BY_KEY, *fields)
            upstream.receive().answer()
            assert client.message().status == 200
    assert keyed.ask("GET", "/metrics").status == 401

    def requests(*fields: str) -> list[tuple[str, float]]:
        page = ask(keyed, "/metrics", *fields)
        assert ("alice" in page.body.decode()) is bool(fields == (BY_KEY,))
        return sorted(
            (labels["key"], value)
            for labels, value in samples(page, "xaiproxy_requests_total")
            if labels["route"] == "models" and labels["status"] == "200"
        )

    named = dict(requests(BY_KEY))
    assert named["alice"] == 2
    total = sum(named.values())
    assert requests() == requests("Authorization: Bearer xaip_wrong") == [("", total)]
    assert ask(keyed, "/readyz").status == 200


@pytest.mark.parametrize(
    ("path", "field", "status"),
    [
        ("/metrics", "Host: evil.example", 403),
        ("/metrics", "Origin: http://evil.example", 403),
        ("/metrics", "Sec-Fetch-Site: cross-site", 403),
        ("/healthz", "Sec-Fetch-Site: cross-site", 200),
        ("/readyz", "Origin: http://evil.example", 200),
    ],
)
def test_a_foreign_web_page_reads_no_metrics(
    proxy: ProxyProcess, path: str, field: str, status: int
) -> None:
    with Client(port_of(proxy)) as client:
        host = "" if field.startswith("Host:") else "Host: localhost\r\n"
        client.send(f"GET {path} HTTP/1.1\r\n{host}{field}\r\n\r\n".encode())
        answer = client.message()
    assert answer.status == status
    assert answer.value("Access-Control-Allow-Origin") is None


@pytest.mark.parametrize("bind", ["0.0.0.0", "[::]"])
def test_it_may_be_exposed_without_a_key(tmp_path: Path, bind: str) -> None:
    with ProxyProcess(tmp_path, admin_bind=f"{bind}:0") as proxy:
        with Client(port_of(proxy), "::1" if bind == "[::]" else "127.0.0.1") as client:
            assert client.ask("GET", "/healthz").status == 200
        messages = [line["message"] for line in proxy.log_lines()]
        assert f"health checks and metrics on http://{bind}:{port_of(proxy)}" in messages


@pytest.mark.parametrize(
    ("bind", "admin"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("::", "[::1]")]
)
def test_the_address_of_the_main_listener_is_refused_at_once(
    tmp_path: Path, bind: str, admin: str
) -> None:
    code, text = refuse_to_start(
        tmp_path, bind=bind, port=9, admin_bind=f"{admin}:9", allow_anonymous=1
    )
    assert code == 78
    assert "XAI_PROXY_ADMIN_BIND names port 9, on which the proxy itself listens" in text


def test_the_address_of_an_inherited_socket_is_refused_at_once(tmp_path: Path) -> None:
    """Not that of the settings, where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as inherited, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
        port = inherited.getsockname()[1]
        same, other = (
            config.from_environ(
                {"XAI_PROXY_PORT": "9", "XAI_PROXY_ADMIN_BIND": f"127.0.0.1:{number}"}
            )
            for number in (port, 9)
        )
        with pytest.raises(errors.ConfigurationError, match=f"port {port}, on which the proxy"):
            listener.check_distinct(same, inherited)
        listener.check_distinct(other, inherited)
        for settings in (same, other):
            listener.check_distinct(settings, unix)


def test_an_address_that_is_not_available_is_named_with_its_setting() -> None:
    """It is tried again for some time, as that of the main listener."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for address, reason in (
            (("127.0.0.1", port), "Address already in use; stop the program that listens there,"),
            (("192.0.2.1", 9), "Cannot assign requested address; set XAI_PROXY_ADMIN_BIND to what"),
        ):
            with pytest.raises(errors.ConfigurationError) as caught:
                listener.listen_for_admin(address, gevent.event.Event(), 2 * listener.INTERVAL)
            place = f"cannot listen on {address[0]} port {address[1]}: "
            assert str(caught.value).startswith(place + reason)
            assert "XAI_PROXY_ADMIN_BIND" in str(caught.value)


def test_a_request_that_has_begun_at_the_end_is_answered(tmp_path: Path) -> None:
    """The end does not wait for idle connections."""
    with ProxyProcess(tmp_path, admin_bind="127.0.0.1:0") as proxy:
        port = port_of(proxy)
        with Client(port) as client, Client(port) as idle:
            client.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
            # Connections are accepted in their order.
            assert idle.ask("GET", "/healthz").status == 200
            proxy.terminate()
            assert idle.closed_within()
            client.send(b"\r\n")
            assert client.message().status == 200
            assert client.closed_within()
        assert proxy.wait() == 0


def test_a_process_without_descriptors_gives_up_an_idle_connection_for_it(
    tmp_path: Path,
) -> None:
    with ProxyProcess(tmp_path, admin_bind="127.0.0.1:0", max_connections=50) as proxy:
        port = port_of(proxy)
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(proxy.client()) for _ in range(10)]
            for client in idle:
                assert client.ask("GET", "/healthz").status == 200
            _, hard = resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (proxy.open_files(), hard))
            with Client(port) as client:
                assert client.ask("GET", "/healthz").status == 200
            assert idle[0].closed_within()
            assert idle[-1].silent()
