"""The benchmark: its arithmetic, its load client and upstream, and small runs against proxies."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from checkout import ROOT
from proxy_process import ProxyProcess
from raw_connection import Message, RawConnection
from scripted_server import ScriptedServer, read_request
from scripted_upstream import ScriptedUpstream

from tests.bench import machine, measurements, report, targets
from tests.bench.__main__ import Bench, parser
from tests.bench.measurements import Figure, Goal

needs_gcc = pytest.mark.skipif(
    not shutil.which("gcc"), reason="the load client is compiled with gcc"
)
needs_openssl = pytest.mark.skipif(
    not os.path.exists("/usr/include/openssl/ssl.h"),
    reason="the benchmark's upstream is compiled with libssl-dev",
)
needs_two_cores = pytest.mark.skipif(
    not {machine.TARGET_CORE, machine.OTHER_CORE} <= os.sched_getaffinity(0),
    reason="the benchmark runs its programs on two cores",
)


@pytest.fixture(scope="module")
def load() -> pathlib.Path:
    return machine.compile_program("load", [])


@pytest.fixture(scope="module")
def api(load: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[targets.Upstream]:
    """The benchmark's upstream."""
    machine.compile_program("upstream", machine.PROGRAMS["upstream"])
    with contextlib.closing(targets.Upstream(tmp_path_factory.mktemp("upstream"))) as running:
        yield running


def test_a_table_without_results_is_one_sentence_and_69(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--table", "--out", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 69 and done.stdout == ""
    [sentence] = done.stderr.splitlines()
    assert f"{tmp_path}/bench.json does not exist; run bin/bench" in sentence


def start(load: pathlib.Path, mode: str, port: int, **arguments: Any) -> subprocess.Popen[str]:
    options = [f"{name}={value}" for name, value in arguments.items()]
    return subprocess.Popen([load, mode, str(port), *options], stdout=subprocess.PIPE, text=True)


def result(client: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON."""
    out, _ = client.communicate(timeout=20)
    return client.returncode, json.loads(out.splitlines()[-1])


# The load client

EVENT = b'data: {"content":"T=%019d "}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_ON = b"HTTP/1.1 200 OK\r\nX-Bench-Connection: %s\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


DONE, END = chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"
ON_A_POOLED_CONNECTION = (
    b"HTTP/1.1 200 OK\r\nX-Bench-Connection: reused\r\nContent-Length: 0\r\n\r\n"
)
WRONG = {
    "status": ("requests", b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "status 500"),
    "cut": ("requests", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok", "connection broke"),
    "no framing": ("requests", b"HTTP/1.1 200 OK\r\n\r\nok", "neither Content-Length"),
    "too long": ("requests", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nok", "after the end"),
    "event missing": ("streams", STREAM + chunk(EVENT % 1) + DONE + END, "1 of 2 events"),
    "no [DONE]": ("streams", STREAM + 2 * chunk(EVENT % 1) + END, "without [DONE]"),
    "stream cut": ("streams", STREAM + 2 * chunk(EVENT % 1) + DONE, "connection broke"),
    "download too short": (
        "download",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "2 bytes instead",
    ),
    "upload not taken whole": (
        "upload",
        b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"bytes":6}',
        "6}",
    ),
    "pooled connection": ("reconnects", ON_A_POOLED_CONNECTION, "is reused, not new"),
    "any connection": (
        "reconnects",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "is unknown, not new",
    ),
}


@needs_gcc
@pytest.mark.parametrize("mode, answer, complaint", WRONG.values(), ids=WRONG)
def test_a_wrong_response_is_counted_and_fails_the_run(
    load: pathlib.Path, upstream: ScriptedUpstream, mode: str, answer: bytes, complaint: str
) -> None:
    client = start(load, mode, upstream.port, repeat=1, events=2, size=7)
    upstream.receive().answer(answer).connection.close()
    code, found = result(client)
    assert (code, found["errors"]) == (1, 1) and complaint in found["error"]


@needs_gcc
def test_a_stream_on_a_pooled_connection_is_wrong(
    load: pathlib.Path, upstream: ScriptedUpstream
) -> None:
    client = start(load, "streams", upstream.port, repeat=1, close=1)
    request = upstream.receive()
    assert request.head.startswith(b"POST /v1/chat/completions?close ")
    request.answer(STREAM_ON % b"reused" + chunk(EVENT % 1) + DONE + END)
    code, found = result(client)
    assert (code, found["errors"]) == (1, 1) and "is reused, not new" in found["error"]


@needs_gcc
def test_the_delay_of_a_split_event_counts_from_its_time_stamp(
    load: pathlib.Path, upstream: ScriptedUpstream
) -> None:
    client = start(load, "streams", upstream.port, repeat=1, events=2)
    connection = upstream.receive().connection
    events = [chunk(EVENT % (time.monotonic_ns() - age)) for age in (100_000_000, 200_000_000)]
    answer = STREAM + b"".join(events) + DONE + END
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for begin in range(0, len(answer), 7):
        connection.send(answer[begin : begin + 7])
    code, found = result(client)
    assert (code, found["events"], found["answers"]) == (0, 2, 1), found
    assert 100_000 < found["delay_p50"] < 1_000_000
    assert 0 < found["first_event_p50"] < found["latency_p50"] < 1_000_000


def small_answer(mode: str, request: Message) -> bytes:
    if mode == "streams":
        return STREAM_ON % b"new" + chunk(EVENT % 1) + DONE + END
    body = b'{"bytes":%d}' % len(request.body) if mode == "upload" else b"7 bytes"
    return b"HTTP/1.1 200 OK\r\nX-Bench-Connection: new\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


@needs_gcc
@pytest.mark.parametrize(
    "mode, arguments, method, sized",
    [
        ("requests", {}, "GET", False),
        ("reconnects", {}, "GET", False),
        ("completions", {}, "POST", True),
        ("streams", {}, "POST", True),
        ("streams", {"close": 1}, "POST", True),
        ("upload", {"size": 7}, "POST", True),
        ("upload", {"size": 7, "chunked": 1}, "POST", False),
        ("download", {"size": 7}, "GET", False),
    ],
)
def test_no_two_requests_have_the_same_head(
    load: pathlib.Path,
    upstream: ScriptedUpstream,
    mode: str,
    arguments: dict[str, Any],
    method: str,
    sized: bool,
) -> None:
    requests = []
    # A proxy may cache the heads of the run before, too.
    for _ in range(2):
        client = start(load, mode, upstream.port, repeat=4, **arguments)
        for _ in range(4):
            requests.append(upstream.receive())
            requests[-1].answer(small_answer(mode, requests[-1]))
        assert result(client)[0] == 0
    assert {request.method for request in requests} == {method}
    assert len({request.head for request in requests}) == 8
    assert len({request.value("X-Client-Request-Id") for request in requests}) == 8
    lengths = {request.value("Content-Length") for request in requests}
    assert len(lengths) > 1 if sized else lengths == {None}


SMALL: dict[str, dict[str, Any]] = {
    "requests": {"connections": 4, "seconds": 0.3},
    "reconnects": {"connections": 4, "seconds": 0.3},
    "completions": {"connections": 4, "seconds": 0.3},
    "streams": {"connections": 20, "events": 20, "interval": 10_000, "seconds": 0.3},
    "upload": {"size": 3_000_000, "chunked": 1, "repeat": 2},
    "download": {"size": 3_000_000, "repeat": 2},
}


def check_small_runs(load: pathlib.Path, port: int, pid: int) -> None:
    runs = {
        mode: result(start(load, mode, port, pids=pid, **arguments))
        for mode, arguments in SMALL.items()
    }
    assert {code for code, _ in runs.values()} == {0}, runs
    assert all(found["answers"] and found["cpu"] > 0 for _, found in runs.values()), runs
    streams = runs["streams"][1]
    assert 300 < streams["events"] < 900  # 2,000 a second
    assert 0 < streams["delay_p50"] < streams["delay_p99"] < 1_000_000


@needs_gcc
@needs_openssl
@needs_two_cores
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_a_small_run_through_the_program(
    load: pathlib.Path, api: targets.Upstream, tmp_path: pathlib.Path, tls: bool
) -> None:
    with ProxyProcess(
        tmp_path, upstream=api.origin(tls), environ={"SSL_CERT_FILE": str(api.certificate)}
    ) as proxy:
        proxy.sign_in()
        check_small_runs(load, proxy.port, proxy.process.pid)


@needs_gcc
@needs_openssl
@needs_two_cores
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("kind", targets.REVERSE_PROXIES)
def test_a_small_run_through_a_reverse_proxy(
    load: pathlib.Path,
    api: targets.Upstream,
    tmp_path: pathlib.Path,
    tls: bool,
    kind: type[targets.ReverseProxy],
) -> None:
    try:
        kind.build()
    except machine.Unavailable as missing:
        pytest.skip(f"{kind.name} {missing}")
    with contextlib.closing(kind(api, tls, tmp_path / "proxy").start()) as proxy:
        check_small_runs(load, proxy.port, *proxy.pids())


class Absent(targets.Target):
    name = "nginx"
    attempts = 0

    def _start(self) -> None:
        Absent.attempts += 1
        raise machine.Unavailable("the program did not come")


@needs_gcc
@needs_openssl
def test_what_does_not_start_is_not_started_again(
    api: targets.Upstream, tmp_path: pathlib.Path
) -> None:
    options = parser().parse_args(["--rounds", "2", "--only", "requests_1", "held_1000"])
    with contextlib.closing(Bench(tmp_path, options)) as bench:
        bench.classes = {"nginx": Absent}
        bench.measure()
    wrong = [record["wrong"] for record in bench.records]
    assert Absent.attempts == 1 and wrong[0] == "the program did not come"
    assert len(wrong) > 4 and set(wrong[1:]) == {"it did not start for an earlier run"}


# The upstream

# Header fields that differ between answers of api.x.ai.
DIFFER = {
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-remaining-requests",
    "x-request-id",
    "traceparent",
    "Set-Cookie",
    "CF-RAY",
}


def connect(
    port: int, context: ssl.SSLContext | None = None, session: ssl.SSLSession | None = None
) -> RawConnection:
    sock = socket.create_connection(("127.0.0.1", port))
    return RawConnection(
        context.wrap_socket(sock, server_hostname="localhost", session=session) if context else sock
    )


def ask(connection: RawConnection, target: str = "/v1/models") -> Message:
    connection.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return connection.message()


@needs_gcc
@needs_openssl
@needs_two_cores
def test_no_two_responses_have_the_same_head(api: targets.Upstream) -> None:
    with connect(api.port) as connection:
        answers = [ask(connection) for _ in range(1000)]
    for name in DIFFER:
        assert len({answer.value(name) for answer in answers}) == 1000, name


@needs_gcc
@needs_openssl
@needs_two_cores
def test_a_response_names_the_kind_of_its_connection(
    api: targets.Upstream,
) -> None:
    context = ssl.create_default_context(cafile=str(api.certificate))

    def kind(connection: RawConnection) -> str | None:
        answer = ask(connection, "/v1/models?close")
        assert answer.value("Connection") == "close"
        return answer.value("X-Bench-Connection")

    with connect(api.port) as connection:
        assert kind(connection) == "new"
        assert kind(connection) == "reused"
    with connect(api.tls_port, context) as connection:
        assert kind(connection) == "new by a full handshake"
        assert kind(connection) == "reused"
        session = connection.sock.session
    with connect(api.tls_port, context, session) as connection:
        assert kind(connection) == "new"
    with connect(api.tls_port, context, session) as connection:
        assert ask(connection).value("Connection") is None
        assert kind(connection) == "reused"


@needs_gcc
@needs_openssl
@needs_two_cores
def test_the_upstream_refuses_tls_1_2(api: targets.Upstream) -> None:
    context = ssl.create_default_context(cafile=str(api.certificate))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", api.tls_port)) as sock,
        pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
    ):
        context.wrap_socket(sock, server_hostname="localhost")


# A run


class Forwarder:
    """A proxy that opens a TLS connection for each request; `resumes`: whether it resumes the
    session of the first.
    """

    def __init__(self, api: targets.Upstream, resumes: bool):
        self._port, self._resumes = api.tls_port, resumes
        self._context = ssl.create_default_context(cafile=str(api.certificate))
        self._session: ssl.SSLSession | None = None

    def __call__(self, client: socket.socket) -> None:
        while request := read_request(client):
            with connect(self._port, self._context, self._session) as upstream:
                upstream.send(request)
                answer = upstream.message()
                if self._resumes and not self._session:
                    self._session = upstream.sock.session
            client.sendall(answer.head.replace(b"Connection: close\r\n", b"") + answer.body)


class Running(targets.Target):
    """A target on `port` that this process runs itself."""

    def __init__(self, api: targets.Upstream, folder: pathlib.Path, port: int):
        super().__init__(api, True, folder / "target")
        self.port = port

    def pids(self) -> list[int]:
        return [os.getpid()]


@needs_gcc
@needs_openssl
@needs_two_cores
@pytest.mark.parametrize("resumes", [True, False])
def test_a_run_whose_sessions_are_not_resumed_is_wrong(
    api: targets.Upstream, tmp_path: pathlib.Path, resumes: bool
) -> None:
    run = next(run for run in measurements.RUNS if run.mode == "reconnects")
    assert run.quick
    with ScriptedServer(Forwarder(api, resumes)) as forwarder:
        target = Running(api, tmp_path, forwarder.port)
        if resumes:
            assert measurements.measure(run, target, 0.3)["answers"] > 0
        else:
            with pytest.raises(
                measurements.Wrong,
                match="that is new by a full handshake, not new with its session",
            ):
                measurements.measure(run, target, 0.3)


# The report


def record(target: str, round: int, value: float, **members: Any) -> dict[str, Any]:
    return {
        "target": target,
        "round": round,
        "tls": True,
        "run": "requests_16",
        "busy": 0.97,
        "disturbed": 0,
        "figures": {"requests_16": value},
        **members,
    }


def test_ratios_compare_runs_of_the_same_round() -> None:
    records = report.Records(
        [
            record("nginx", 1, 10),
            record("nginx", 2, 100),
            record("nginx", 3, 50),
            record("xaiproxy", 1, 5),
            record("xaiproxy", 2, 40),
            record("xaiproxy", 3, 35),
            record("xaiproxy", 4, 1),
        ]
    )
    assert records.ratio("requests_16", "xaiproxy", "nginx", True) == report.Spread(0.5, 0.4, 0.7)
    assert records.spread("requests_16", "xaiproxy", True) == report.Spread(20, 1, 40)
    assert records.ratio("requests_16", "xaiproxy", "nginx", False) is None


@pytest.mark.parametrize("value, verdict", [(39.9, "**missed**"), (40, "met")])
def test_a_figure_is_reported_beside_its_goal(value: float, verdict: str) -> None:
    records = [record("nginx", 1, 100), record("xaiproxy", 1, value)]
    text = report.markdown({"machine": {"cpu": "any"}, "records": records})
    assert f"| ≥ 0.4 x nginx | {verdict} | 97% / 97% |" in text


def test_a_goal_is_a_limit_on_one_side() -> None:
    assert Goal(1.2).met(1.2) and not Goal(1.2).met(1.21)
    assert Goal(0.4, at_least=True).met(0.4) and not Goal(0.4, at_least=True).met(0.39)
    assert (str(Goal(1.2)), str(Goal(45, "")), str(Goal(1 / 500, "litellm"))) == (
        "≤ 1.2 x nginx",
        "≤ 45",
        "≤ litellm / 500",
    )


def test_the_report_names_wrong_and_disturbed_runs() -> None:
    records = report.Records(
        [
            record("nginx", 1, 1, disturbed=0.2),
            record("xaiproxy", 1, 1, figures={}, wrong="2 wrong answers"),
        ]
    )
    wrong, disturbed = records.faults()
    assert wrong == "TLS requests_16 xaiproxy round 1: 2 wrong answers"
    assert "1 of 2 runs: TLS requests_16 nginx round 1" in disturbed


def test_the_names_of_figures_are_unique() -> None:
    names = [figure.name for figure in report.figures()]
    assert len(set(names)) == len(names) and all(
        isinstance(figure, Figure) for figure in report.figures()
    )


# The cost of processes


def test_the_cpu_time_of_another_process_is_measured() -> None:
    with (
        subprocess.Popen(["sh", "-c", "while :; do :; done"]) as busy,
        subprocess.Popen(["sleep", "60"]) as idle,
    ):
        while machine.cpu_seconds([busy.pid]) < 0.1:
            time.sleep(0.01)
        both, one = machine.cpu_seconds([busy.pid, idle.pid]), machine.cpu_seconds([idle.pid])
        busy.kill()
        idle.kill()
    assert one < 0.1 <= both < 10


def test_the_memory_of_this_process_is_measured() -> None:
    sizes = machine.memory([os.getpid()])
    assert 1000 < sizes["pss"] <= sizes["rss"]
