"""XAI_PROXY_BIND=unix:/path: the mode and the life of its file, and the clients that use it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent.event
import pytest
from checkout import ROOT
from client_library import ClientLibrary
from login_command import Login
from proxy_process import ProxyProcess, UnixClient, both_ways, refuse_to_start
from raw_connection import TIMEOUT
from sandbox import Sandbox
from scripted_upstream import ScriptedUpstream

from xaiproxy import config, errors, judgement, launch_command
from xaiproxy.addresses import UnixSocket
from xaiproxy.login import doctor_files, doctor_network
from xaiproxy.proxy import listener, socket_file

openai = ClientLibrary("openai")
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def settings(path: Path, folder: Path, **values: str) -> config.Config:
    environ = {"XAI_PROXY_BIND": f"unix:{path}", "XAI_PROXY_TOKEN_PATH": str(folder / "t" / "t")}
    return config.from_environ(environ | values, dotenv_path=os.devnull)


def listening(path: Path, folder: Path) -> socket_file.SocketFile:
    return listener.listen(settings(path, folder), gevent.event.Event(), 2 * listener.INTERVAL)


def refusal(path: Path, folder: Path) -> str:
    with pytest.raises(errors.ConfigurationError) as caught:
        listening(path, folder)
    return str(caught.value)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def connect(path: Path) -> socket.socket:
    return UnixClient(path).sock


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "a socket"


@pytest.fixture(scope="module")
def serving(
    scripted: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ProxyProcess]]:
    """Start the module's one proxy for a way of relaying, on a Unix socket, signed in."""
    running: dict[str, ProxyProcess] = {}
    with contextlib.ExitStack() as stack:

        def start(way: str = "relayed") -> ProxyProcess:
            if way not in running:
                folder = tmp_path_factory.mktemp("unix")
                running[way] = stack.enter_context(
                    ProxyProcess(
                        folder, way=way, bind=f"unix:{folder}/socket", upstream=scripted.origin
                    )
                )
                running[way].sign_in()
            return running[way]

        yield start


# Its mode


@pytest.fixture
def umask_0() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask_0")
@pytest.mark.parametrize("by_number", [None, False, True])
def test_the_mode_is_right_before_anything_can_connect(place: Path, by_number: bool | None) -> None:
    grp = pytest.importorskip("grp")
    group = None if by_number is None else (os.getgroups() or [os.getgid()])[-1]
    name = None if group is None else str(group) if by_number else grp.getgrgid(group).gr_name
    with socket_file.SocketFile(socket.AF_UNIX) as bound:
        bound.bind_to(UnixSocket(place, name))
        assert mode(place) == (0o600 if group is None else 0o660)
        assert group is None or place.stat().st_gid == group
        with pytest.raises(ConnectionRefusedError):
            connect(place)
        bound.listen()
        connect(place).close()
    assert os.umask(0) == 0


@pytest.mark.usefixtures("umask_0")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_cannot_connect_and_those_of_the_group_can(tmp_path: Path) -> None:
    """The proxy itself runs with umask 0."""

    def outcome(path: Path) -> str:
        command = [sys.executable, "-c", CONNECT, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    # Those above tmp_path have mode 0700.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        own, shared = folder / "own", folder / "shared"
        with (
            ProxyProcess(tmp_path, bind=f"unix:{own}"),
            ProxyProcess(tmp_path, bind=f"unix:{shared},group=65533"),
        ):
            assert mode(own) == 0o600 and mode(shared) == 0o660
            assert outcome(own) == "Permission denied"
            assert outcome(shared) == "connected"


# Another user may not be able to start this Python.
CONNECT = """
import os, socket, sys

os.setgroups([])
os.setgid(65533)
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as sock:
    try:
        sock.connect(sys.argv[1])
        print("connected", end="")
    except OSError as error:
        print(error.strerror, end="")
"""


def test_a_group_that_does_not_exist_is_an_error(tmp_path: Path, place: Path) -> None:
    code, text = refuse_to_start(tmp_path, bind=f"unix:{place},group=nosuchgroup")
    assert code == 78 and not place.exists()
    assert "XAI_PROXY_BIND names the group 'nosuchgroup', which does not exist" in text


# The life of its file


def test_a_socket_that_a_process_listens_on_is_not_taken(tmp_path: Path, place: Path) -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as other:
            other.bind(str(place))
            if kind == socket.SOCK_STREAM:
                # Its queue is full after one connection.
                other.listen(0)
            identity = place.stat()
            assert refusal(place, tmp_path) == (
                f"cannot listen on unix:{place}: Address already in use; stop the program that "
                "listens there, or set XAI_PROXY_BIND (--bind)"
            )
            assert place.stat().st_ino == identity.st_ino
        place.unlink()


def test_a_dead_socket_is_replaced_and_ours_is_removed(tmp_path: Path, place: Path) -> None:
    ProxyProcess(tmp_path, bind=f"unix:{place}").kill()
    assert place.is_socket()
    with ProxyProcess(tmp_path, bind=f"unix:{place}") as proxy:
        assert proxy.ask("GET", "/healthz").status == 200
    assert not place.exists()


def test_a_file_that_has_replaced_ours_is_not_removed(tmp_path: Path, place: Path) -> None:
    with ProxyProcess(tmp_path, bind=f"unix:{place}"):
        place.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(place))
    assert place.is_socket()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_never_removed(tmp_path: Path, place: Path, kind: str) -> None:
    if kind == "link":
        place.symlink_to(tmp_path / "nothing")
    elif kind == "folder":
        # Config refuses a folder that exists at the start.
        given = settings(place, tmp_path)
        place.mkdir()
        with pytest.raises(errors.ConfigurationError, match="exists and is not a socket; remove"):
            listener.listen(given, gevent.event.Event())
        assert place.is_dir()
        return
    else:
        place.write_text("kept")
    assert refusal(place, tmp_path).startswith(f"{place} exists and is not a socket; remove it")
    assert place.is_symlink() or place.read_text() == "kept"


def test_only_one_of_several_that_start_at_once_replaces_a_dead_socket(place: Path) -> None:
    """None takes another's new file for the dead one."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RACE, str(place)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


RACE = """
import os, pathlib, socket, sys
from xaiproxy.addresses import UnixSocket
from xaiproxy.proxy import socket_file

path = pathlib.Path(sys.argv[1])
for _ in range(60):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    go, start = os.pipe()
    stop, end = os.pipe()
    result, report = os.pipe()
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            os.close(start)
            os.close(end)
            os.read(go, 1)
            try:
                listener = socket_file.listen(UnixSocket(path), 1)
            except OSError:
                os.write(report, b"0")
            else:
                os.write(report, b"1")
                os.read(stop, 1)
                is_ours = path.is_socket()
                listener.close()
                os._exit(0 if is_ours and not path.exists() else 1)
            os._exit(0)
    os.close(start)
    results = b"".join(os.read(result, 1) for _ in children)
    assert sorted(results) == sorted(b"0001"), results
    os.close(end)
    assert not any(os.waitpid(pid, 0)[1] for pid in children)
    assert not os.listdir(path.parent)
    for descriptor in (go, stop, result, report):
        os.close(descriptor)
"""


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "socket"
    assert refusal(path, tmp_path) == (
        f"cannot listen on unix:{path}: No such file or directory; the folder of the socket must "
        "exist, and this user must be able to write to it; or set XAI_PROXY_BIND"
    )


# Clients


@needs_curl
def test_the_command_line_in_the_log_works_as_printed(
    serving: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    proxy = serving()
    messages = [line["message"] for line in proxy.log_lines()]
    assert f"listening on unix:{proxy.path}; no client key required" in messages
    line = next(message for message in messages if "try: " in message).partition("try: ")[2]
    assert line == f"curl --unix-socket {proxy.path} http://localhost/v1/models"
    with subprocess.Popen(f"{line} -s", shell=True, stdout=subprocess.PIPE) as curl:
        upstream.receive().answer()
        assert curl.communicate(timeout=TIMEOUT)[0] == b"ok"
    logged = proxy.wait_for_request("/v1/models")
    assert (logged["client"], logged["status"]) == ("unix", 200)


def test_openai_over_httpx(tmp_path: Path, sandbox: Sandbox) -> None:
    import httpx

    sandbox.set(events=3)
    with ProxyProcess(
        tmp_path, bind=f"unix:{tmp_path}/socket", issuer=sandbox.url, upstream=sandbox.url
    ) as proxy:
        sandbox.write_login(proxy.token_path)
        with openai.OpenAI(
            base_url="http://localhost/v1",
            api_key="none",
            http_client=httpx.Client(transport=httpx.HTTPTransport(uds=proxy.path)),
        ) as client:
            assert "grok-4.5" in [model.id for model in client.models.list()]
            stream = client.chat.completions.create(
                model="grok-4.5", messages=[{"role": "user", "content": "Hello"}], stream=True
            )
            parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert "".join(part or "" for part in parts) == "This is the."


def test_the_host_rule_holds_for_what_a_web_server_forwards(
    serving: Callable[..., ProxyProcess],
) -> None:
    with serving().client() as client:
        client.send(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert client.message().status == 403


@both_ways
def test_a_client_that_closes_ends_its_request(
    serving: Callable[..., ProxyProcess], upstream: ScriptedUpstream, way: str
) -> None:
    """Also while bytes of the client are unread, which hide its close."""
    for more in (b"", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with serving(way).client() as client:
            client.request("GET", "/v1/waits").send(more)
            request = upstream.receive()
        assert request.connection.closed_within(3)


@both_ways
def test_cut_content_without_a_length_ends(
    serving: Callable[..., ProxyProcess], upstream: ScriptedUpstream, way: str
) -> None:
    """A Unix socket has no reset that would show an HTTP/1.0 client that content is missing."""
    with serving(way).client() as client:
        client.request("GET", "/v1/old", version="HTTP/1.0")
        upstream.receive().answer(STREAM).connection.close()
        assert client.message().body == b"ok"
    assert serving(way).wait_for_request("/v1/old")["ended_by"] == "upstream"


def test_connections_that_wait_at_the_stop_are_served(
    tmp_path: Path, place: Path, upstream: ScriptedUpstream
) -> None:
    """The file is gone by then, so that no later connection is lost."""
    with (
        ProxyProcess(tmp_path, bind=f"unix:{place}", upstream=upstream.origin) as proxy,
        contextlib.ExitStack() as stack,
    ):
        proxy.sign_in()
        with proxy.client() as open_stream:
            open_stream.request()
            stream = upstream.receive().answer(STREAM)
            open_stream.head()
            proxy.process.send_signal(signal.SIGSTOP)
            waiting = [stack.enter_context(proxy.client()) for _ in range(20)]
            for client in waiting:
                client.request("GET", "/healthz")
            proxy.terminate()
            proxy.process.send_signal(signal.SIGCONT)
            assert {client.message().status for client in waiting} == {200}
            proxy.wait_for_log(lambda line: line["message"].startswith("stopping"))
            with pytest.raises(FileNotFoundError):
                UnixClient(place)
            stream.answer(b"0\r\n\r\n")
            assert open_stream.rest().endswith(b"0\r\n\r\n")
        assert proxy.wait() == 0


# The other commands


def test_status_and_doctor_ask_over_the_socket(
    serving: Callable[..., ProxyProcess], tmp_path: Path
) -> None:
    proxy = serving()
    verdict = judgement.Judgement(judgement.Verdict.GOOD, True, 0, "signed in")
    found = doctor_network.proxy(settings(Path(proxy.path), tmp_path), verdict)
    assert found.message.startswith(f"serving unix:{proxy.path}, and ready: ")
    path = tmp_path / "other"
    found = doctor_network.proxy(settings(path, tmp_path), verdict)
    assert found.message.startswith(f"not running: nothing is listening on unix:{path}; start ")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        found = doctor_network.proxy(settings(path, tmp_path), verdict)
        assert f"unix:{path} does not answer as the proxy does (unix:{path}: " in found.message
        assert "set XAI_PROXY_BIND if it is another program" in found.message
    found = doctor_network.proxy(settings(path, tmp_path), verdict)
    assert found.message.startswith("not running: nothing is listening on")
    keys = doctor_files.keys(settings(path, tmp_path))
    assert keys.message == f"no client key required: any program that may write to {path} may call"


def test_status_names_the_socket(tmp_path: Path, sandbox: Sandbox) -> None:
    login = Login(sandbox, tmp_path)
    bind = f"unix:{tmp_path}/socket"
    with ProxyProcess(
        login.path.parent.parent, bind=bind, issuer=sandbox.url, token_path=login.path
    ) as proxy:
        login.path.parent.mkdir(0o700, exist_ok=True)
        sandbox.write_login(login.path)
        text = login.run("--status", XAI_PROXY_BIND=bind, XAI_PROXY_PORT="0").stdout
        assert f"serving unix:{proxy.path}" in text
        started = login.run("--status", XAI_PROXY_BIND=bind + "2").stdout
        assert f"nothing is listening on {bind}2" in started


def test_a_second_xai_serve_is_refused(
    serving: Callable[..., ProxyProcess], tmp_path: Path
) -> None:
    from xaiproxy import serve_command

    proxy = serving()
    with pytest.raises(errors.ConfigurationError) as caught:
        serve_command.check_address(settings(Path(proxy.path), tmp_path))
    assert str(caught.value) == (
        f"an xaiproxy already serves unix:{proxy.path}; use that one, or stop it, or choose "
        "another path with --bind"
    )
    serve_command.check_address(settings(tmp_path / "free", tmp_path))


def test_xai_launch_explains_that_clients_need_tcp(place: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="these clients need a TCP address"):
        launch_command.origin_of(settings(place, tmp_path))


@needs_curl
def test_smoke_uses_the_socket(tmp_path: Path, sandbox: Sandbox) -> None:
    bind = f"unix:{tmp_path}/a socket,group={os.getgid()}"
    environ = {"PATH": os.environ["PATH"], "XAI_PROXY_BIND": bind}
    smoke = [ROOT / "bin" / "smoke"]
    with ProxyProcess(tmp_path, bind=bind, issuer=sandbox.url, upstream=sandbox.url) as proxy:
        sandbox.write_login(proxy.token_path)
        done = subprocess.run(smoke, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    done = subprocess.run(smoke, env=environ, capture_output=True, text=True)
    assert done.returncode == 69
    assert f"nothing answers at {tmp_path}/a socket;" in done.stderr
