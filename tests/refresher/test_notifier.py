"""Calls for a person reach a real receiver, once each, and hold up neither a refresh nor an end."""

import base64
import contextlib
import json
import logging
import os
import signal
import socket
import struct
import time
from collections.abc import Callable

import pytest
from refresher_process import Process, make_store, wait_until
from scripted_server import ScriptedServer, answer, read_request
from token_files import save

from xaiproxy import config, token_writer, tokens
from xaiproxy.refresher.notifier import RETRY_INTERVAL, Notifier
from xaiproxy.refresher.runtime import Runtime
from xaiproxy.refresher_status import Status
from xaiproxy.token_store import TokenStore

OK = b"HTTP/1.1 204 No Content\r\n\r\n"
TOKEN_ENDPOINT = "/oauth2/token"
SECRET = "/services/secret-path?key=secret-key"
NOW = 1_800_000_000.0
ENDED = tokens.Login(
    "access-token",
    NOW + 3600,
    "refresh-token",
    refresh_error=tokens.RefreshError("invalid_grant", "refused", NOW, terminal=True),
)
NEXT = tokens.Login("next-token", NOW + 90000, "next-refresh", obtained_at=NOW)


def bodies(server: ScriptedServer) -> list[dict]:
    return [json.loads(request.partition(b"\r\n\r\n")[2]) for request in list(server.requests)]


def events(server: ScriptedServer) -> list[str]:
    return [body["event"] for body in bodies(server)]


class Scene:
    """A notifier on a clock of its own. `seconds`: since the start."""

    def __init__(self, folder, url: str, **environ: str):
        self.settings = config.from_environ(
            {
                "XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json"),
                "XAI_PROXY_NOTIFY_URL": url,
                **environ,
            },
            dotenv_path=os.devnull,
        )
        self.store = TokenStore(self.settings)
        self.seconds = 0.0
        self.start()

    def start(self) -> None:
        """Start a new notifier, which remembers nothing."""
        runtime = Runtime(lambda: NOW + self.seconds, lambda: self.seconds, time.sleep)
        self.notifier = Notifier(self.settings, self.store, runtime)

    def poll(self) -> None:
        begun = time.monotonic()
        self.notifier.poll(Status(NOW))
        assert time.monotonic() - begun < 0.5

    def step(self, seconds: float = 1.0) -> None:
        """Poll, and wait for the delivery that this may have started."""
        self.seconds += seconds
        self.poll()
        # Each waits a moment, which on a loaded machine may be too short.
        for _ in range(5):
            self.notifier.close()


@pytest.fixture(autouse=True)
def nothing_secret_is_logged(caplog):
    caplog.set_level(logging.DEBUG, "xaiproxy")
    yield
    assert "secret" not in caplog.text and "pass-word" not in caplog.text


# what is sent, and when again


def test_a_call_is_a_post_with_four_members(tmp_path, caplog):
    with ScriptedServer(OK) as server:
        scene = Scene(tmp_path, server.url.replace("//", "//me:pass-word@") + SECRET)
        save(scene.store, ENDED)
        scene.step()
    [request] = server.requests
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST " + SECRET.encode() + b" HTTP/1.1\r\n")
    assert b"\r\nContent-Type: application/json" in head and b"\r\nUser-Agent: xaiproxy/" in head
    assert b"Authorization: Basic " + base64.b64encode(b"me:pass-word") in head
    found = json.loads(body)
    assert list(found) == ["event", "message", "at", "host"]
    assert (found["event"], found["at"]) == ("sign_in_needed", NOW + 1)
    assert found["host"] == socket.gethostname() and "xai-login --device" in found["message"]
    assert caplog.messages == [f"notified {server.url}: sign_in_needed"]


def test_each_call_is_made_once_also_after_a_restart(tmp_path):
    with ScriptedServer(OK) as server:
        scene = Scene(tmp_path, server.url)
        for login in (ENDED, NEXT, ENDED):
            save(scene.store, login)
            for _ in range(2):
                scene.step()
                scene.step(3600)
                scene.start()
        assert events(server) == ["sign_in_needed", "recovered", "sign_in_needed"]


def test_a_new_installation_and_a_sign_out_cause_no_call(tmp_path):
    with ScriptedServer(OK) as server:
        scene = Scene(tmp_path, server.url)
        scene.step()
        scene.step(3600)
        save(scene.store, NEXT)
        scene.step()
        with token_writer.locked(scene.store, 0) as writer:
            writer.remove()
        scene.step()
        scene.step(3600)
        assert server.requests == []


def reset(connection: socket.socket) -> None:
    read_request(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize(
    "response, reason",
    [
        (answer(500, "secret"), "answered HTTP 500"),
        (answer(302, Location="http://127.0.0.1:1/secret"), "answered HTTP 302"),
        (reset, "closed the connection before its response was complete"),
        (b"secret\r\n\r\n", "closed the connection"),
    ],
    ids=["500", "redirect", "reset", "garbage"],
)
def test_a_failed_delivery_is_logged_once_and_retried_each_minute(
    tmp_path, caplog, response, reason
):
    with ScriptedServer(response, response, response, OK) as server:
        scene = Scene(tmp_path, server.url + SECRET)
        save(scene.store, ENDED)
        scene.step()
        scene.step(RETRY_INTERVAL - 1)
        [failure] = caplog.messages
        assert reason in failure and "tried again every 60 s" in failure
        scene.step(1)
        scene.step(RETRY_INTERVAL)
        assert caplog.messages == [failure]
        scene.step(RETRY_INTERVAL)
        assert caplog.messages[1:] == [f"notified {server.url}: sign_in_needed"]
        scene.step(3600)
        assert len(server.requests) == (1 if response is reset else 4)
        assert {body["at"] for body in bodies(server)} == {NOW + 1}


def test_an_address_that_refuses_is_named_without_its_path(tmp_path, caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        scene = Scene(tmp_path, f"http://me:pass-word@{host}{SECRET}")
        save(scene.store, ENDED)
        scene.step()
    assert f"{host} cannot be reached (Connection refused)" in caplog.text


def test_a_trouble_that_is_over_before_its_delivery_is_not_sent(tmp_path):
    with ScriptedServer(answer(500), OK) as server:
        scene = Scene(tmp_path, server.url)
        save(scene.store, ENDED)
        scene.step()
        save(scene.store, NEXT)
        scene.step(RETRY_INTERVAL)
        scene.step(RETRY_INTERVAL)
        assert events(server) == ["sign_in_needed"]


def endless(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")


def test_an_endless_response_body_is_not_read(tmp_path, caplog):
    with ScriptedServer(endless) as server:
        scene = Scene(tmp_path, server.url)
        save(scene.store, ENDED)
        scene.step()
        assert caplog.messages == [f"notified {server.url}: sign_in_needed"]
        scene.step(3600)
        assert len(caplog.messages) == 1


def test_without_a_file_for_the_record_each_process_calls_once(tmp_path):
    with ScriptedServer(OK) as server:
        scene = Scene(tmp_path, server.url)
        save(scene.store, ENDED)
        scene.store.notify_path.mkdir()
        for _ in range(3):
            scene.step(100)
        save(scene.store, NEXT)
        for _ in range(3):
            scene.step(100)
        assert events(server) == ["sign_in_needed", "recovered"]


# more than one refresher


class Held:
    """A receiver's script that responds once it is released."""

    def __init__(self, response: bytes = OK):
        self.requests: list[bytes] = []
        self._response = response
        self._mine, self._theirs = socket.socketpair()

    def __call__(self, connection: socket.socket) -> None:
        self.requests.append(read_request(connection))
        self._theirs.recv(1)
        connection.sendall(self._response)

    def release(self) -> None:
        self._mine.send(b".")

    def close(self) -> None:
        self._mine.close()
        self._theirs.close()


@pytest.fixture
def held():
    with contextlib.closing(Held()) as script:
        yield script


def test_two_notifiers_make_one_call(tmp_path, held):
    with ScriptedServer(held, OK) as server:
        first, second = Scene(tmp_path, server.url), Scene(tmp_path, server.url)
        save(first.store, ENDED)
        first.poll()
        wait_until(lambda: held.requests)
        # The other one delivers.
        second.step(0)
        second.step()
        held.release()
        first.notifier.close()
        for _ in range(3):
            second.step(RETRY_INTERVAL)
            first.step(RETRY_INTERVAL)
        assert len(held.requests) == 1 and server.requests == []
        save(first.store, NEXT)
        for _ in range(2):
            second.step()
            first.step()
        assert events(server) == ["recovered"]


# routes


def test_plain_http_goes_through_http_proxy_except_to_loopback(tmp_path, caplog):
    with ScriptedServer(OK) as proxy, ScriptedServer(OK) as server:
        environ = {"HTTP_PROXY": proxy.url.replace("//", "//user:pass-word@")}
        scene = Scene(tmp_path, f"http://me:pass-word@hook.example{SECRET}", **environ)
        save(scene.store, ENDED)
        scene.step()
        [request] = proxy.requests
        assert request.startswith(b"POST http://hook.example" + SECRET.encode() + b" HTTP/1.1\r\n")
        assert b"Proxy-Authorization: Basic " + base64.b64encode(b"user:pass-word") in request
        scene = Scene(tmp_path, server.url, **environ)
        save(scene.store, NEXT)
        scene.step()
        assert events(server) == ["recovered"] and len(proxy.requests) == 1
    assert caplog.messages[0] == "notified http://hook.example: sign_in_needed"


def test_https_goes_through_https_proxy(tmp_path, caplog):
    with ScriptedServer(answer(403)) as proxy:
        scene = Scene(
            tmp_path,
            f"https://me:pass-word@hook.example{SECRET}",
            HTTPS_PROXY=proxy.url.replace("//", "//user:pass-word@"),
        )
        save(scene.store, ENDED)
        scene.step()
        assert proxy.requests[0].startswith(b"CONNECT hook.example:443 HTTP/1.")
    assert (
        f"could not reach hook.example through the proxy 127.0.0.1:{proxy.port} (HTTP 403)"
        in caplog.text
    )


def test_no_proxy_exempts_the_receiver_whatever_its_userinfo(tmp_path):
    with ScriptedServer(OK) as proxy:
        url = f"http://me:pass-word@no-such-host.invalid{SECRET}"
        scene = Scene(tmp_path, url, HTTP_PROXY=proxy.url, NO_PROXY=".invalid")
        save(scene.store, ENDED)
        scene.step()
        assert proxy.requests == []


def test_a_receiver_with_tls_must_have_a_valid_certificate(tmp_path, caplog, certificate):
    file, context = certificate
    with ScriptedServer(OK, tls=context) as server:
        url = f"https://127.0.0.1:{server.port}"
        scene = Scene(tmp_path, url)
        save(scene.store, ENDED)
        scene.step()
        assert "cannot be verified" in caplog.text and server.requests == []
        scene = Scene(tmp_path, url, SSL_CERT_FILE=str(file))
        scene.step()
        assert events(server) == ["sign_in_needed"]


# the refresher as a process


@pytest.fixture
def start(sandbox):
    """start(path, url, ...) starts a refresher that ends with the test."""
    sandbox.set(device_interval=0)
    started: list[Process] = []

    def start(path, url: str, **keywords) -> Process:
        started.append(Process(sandbox, path, XAI_PROXY_NOTIFY_URL=url + SECRET, **keywords))
        return started[-1]

    yield start
    for process in started:
        process.close()
        assert "secret" not in "".join(process.lines)


def put_stale(sandbox, path) -> None:
    now = time.time()
    sandbox.write_login(path, obtained_at=now - 1000, expires_at=now + 100)


def refuse(sandbox, **fault) -> None:
    """Have the issuer answer each refresh with a fault."""
    sandbox.set(
        answers=[{"path": TOKEN_ENDPOINT, "grant_type": "refresh_token", "times": 999, **fault}]
    )


def hang(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def read_and_hang(requests: list[bytes]) -> Callable[[socket.socket], None]:
    def script(connection: socket.socket) -> None:
        requests.append(read_request(connection))
        hang(connection)

    return script


def test_a_refused_login_and_the_next_sign_in_are_called_once_over_restarts(
    sandbox, start, tmp_path
):
    path = tmp_path / "tokens.json"
    put_stale(sandbox, path)
    sandbox.kill("logins")
    with ScriptedServer(OK) as server:
        for _ in range(2):
            process = start(path, server.url)
            process.wait_for("no longer accepts this login")
            wait_until(lambda: events(server) == ["sign_in_needed"])
            time.sleep(0.6)
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
        sandbox.write_login(path)
        start(path, server.url)
        wait_until(lambda: len(server.requests) > 1)
        time.sleep(0.6)
        assert events(server) == ["sign_in_needed", "recovered"]
    message = bodies(server)[0]["message"]
    assert "the login has ended (invalid_grant)" in message


def test_a_kill_between_the_event_and_its_delivery_loses_no_call(sandbox, start, tmp_path):
    path = tmp_path / "tokens.json"
    put_stale(sandbox, path)
    sandbox.kill("logins")
    unanswered: list[bytes] = []
    with ScriptedServer(read_and_hang(unanswered), OK) as server:
        killed = start(path, server.url)
        wait_until(lambda: unanswered)
        killed.signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        start(path, server.url).wait_for("notified")
        [body] = bodies(server)
        # A receiver can see that it is the same call.
        assert body == json.loads(unanswered[0].partition(b"\r\n\r\n")[2])


def test_two_refreshers_make_one_call_each_time(sandbox, start, tmp_path):
    path = tmp_path / "tokens.json"
    put_stale(sandbox, path)
    sandbox.kill("logins")
    with ScriptedServer(OK) as server:
        both = [start(path, server.url), start(path, server.url)]
        for process in both:
            # The one that waits for the lock logs only the first.
            wait_until(lambda: process.logged("signed in") or process.logged("no longer accepts"))
        wait_until(lambda: server.requests)
        sandbox.write_login(path)
        wait_until(lambda: len(server.requests) > 1)
        # Longer than BUSY_INTERVAL.
        time.sleep(1.5)
        assert events(server) == ["sign_in_needed", "recovered"]
        assert sum(process.logged("notified") for process in both) == 2


def test_renewal_that_fails_for_half_of_what_was_left_and_its_recovery(sandbox, start, tmp_path):
    path = tmp_path / "tokens.json"
    now = time.time()
    sandbox.write_login(path, obtained_at=now - 100, expires_at=now + 6)
    refuse(sandbox, status=503)
    with ScriptedServer(OK) as server:
        process = start(path, server.url)
        process.wait_for("could not be refreshed")
        begun = time.time()
        wait_until(lambda: server.requests)
        assert time.time() - begun > 2
        [call] = bodies(server)
        assert call["event"] == "renewal_failing" and now + 2 < call["at"] < now + 5
        sandbox.set(answers=[])
        wait_until(lambda: len(server.requests) > 1, 30)
        assert events(server) == ["renewal_failing", "recovered"]


@pytest.mark.parametrize("script", [hang, endless], ids=["hanging", "endless"])
def test_a_receiver_delays_neither_a_refresh_nor_the_end(sandbox, start, tmp_path, script):
    path = tmp_path / "tokens.json"
    put_stale(sandbox, path)
    sandbox.kill("logins")
    called: list[socket.socket] = []

    def receive(connection: socket.socket) -> None:
        called.append(connection)
        script(connection)

    with ScriptedServer(receive) as server:
        process = start(path, server.url)
        wait_until(lambda: called)
        put_stale(sandbox, path)
        begun = time.monotonic()
        process.wait_for("refreshed")
        assert time.monotonic() - begun < 1
        begun = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait() == 0 and time.monotonic() - begun < 3
    login = make_store(sandbox, path).load()
    assert sandbox.request("GET", "/v1/models", token=login.access_token)[0] == 200


def test_once_makes_no_call(sandbox, tmp_path):
    path = tmp_path / "tokens.json"
    put_stale(sandbox, path)
    sandbox.kill("logins")
    with ScriptedServer(OK) as server:
        process = Process(sandbox, path, "--once", XAI_PROXY_NOTIFY_URL=server.url)
        assert process.wait() == 77
        assert server.requests == [] and not path.with_name("tokens.json.notify").exists()
