"""The benchmark: its arithmetic, its load client's honesty, and a small run of both against the program."""
from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import subprocess
import time
from typing import Any, Iterator

import pytest
from bench import machine, report
from bench.measurements import Figure, Goal
from proxy_process import ProxyProcess
from scripted_upstream import ScriptedUpstream, make_certificate

needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="the load client is compiled with gcc")
needs_openssl = pytest.mark.skipif(not os.path.exists("/usr/include/openssl/ssl.h"),
                                   reason="the benchmark's upstream is compiled with libssl-dev")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return machine.compile_program("load", [], tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="module")
def api_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the benchmark's upstream."""
    folder = tmp_path_factory.mktemp("upstream")
    program = machine.compile_program("upstream", ["-lssl", "-lcrypto"], folder)
    make_certificate(folder, "127.0.0.1")
    with subprocess.Popen([program, folder / "server.pem", folder / "server.key"],
                          stdout=subprocess.PIPE) as process:
        yield int(process.stdout.readline().split()[0])
        process.kill()


def start(load: pathlib.Path, mode: str, port: int, **arguments: Any) -> "subprocess.Popen[str]":
    options = [f"{name}={value}" for name, value in arguments.items()]
    return subprocess.Popen([load, mode, str(port), *options], stdout=subprocess.PIPE, text=True)


def result(client: "subprocess.Popen[str]") -> "tuple[int, dict[str, Any]]":
    """Exit status and JSON."""
    out, _ = client.communicate(timeout=20)
    return client.returncode, json.loads(out.splitlines()[-1])


# The load client

EVENT = b'data: {"content":"T=%019d "}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


DONE, END = chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"
WRONG = {
    "status": ("requests", b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "status 500"),
    "cut": ("requests", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok", "connection broke"),
    "no framing": ("requests", b"HTTP/1.1 200 OK\r\n\r\nok", "neither Content-Length"),
    "too long": ("requests", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nok", "after the end"),
    "event missing": ("streams", STREAM + chunk(EVENT % 1) + DONE + END, "1 of 2 events"),
    "no [DONE]": ("streams", STREAM + 2 * chunk(EVENT % 1) + END, "without [DONE]"),
    "stream cut": ("streams", STREAM + 2 * chunk(EVENT % 1) + DONE, "connection broke"),
    "download too short": ("download", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "2 bytes instead"),
    "upload not taken whole": ("upload", b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"bytes":6}', '6}'),
}


@needs_gcc
@pytest.mark.parametrize("mode, answer, complaint", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_counted_and_fails_the_run(load: pathlib.Path, upstream: ScriptedUpstream,
                                                     mode: str, answer: bytes, complaint: str) -> None:
    client = start(load, mode, upstream.port, repeat=1, events=2, size=7)
    upstream.receive().answer(answer).connection.close()
    code, found = result(client)
    assert (code, found["errors"]) == (1, 1) and complaint in found["error"]


@needs_gcc
def test_a_delay_is_counted_from_the_stamp_of_an_event_that_comes_in_pieces(
        load: pathlib.Path, upstream: ScriptedUpstream) -> None:
    client = start(load, "streams", upstream.port, repeat=1, events=2)
    connection = upstream.receive().connection
    events = [chunk(EVENT % (time.monotonic_ns() - age)) for age in (100_000_000, 200_000_000)]
    answer = STREAM + b"".join(events) + DONE + END
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for begin in range(0, len(answer), 7):
        connection.send(answer[begin:begin + 7])
    code, found = result(client)
    assert (code, found["events"], found["answers"]) == (0, 2, 1), found
    assert 100_000 < found["delay_p50"] < 1_000_000
    assert 0 < found["first_event_p50"] < found["latency_p50"] < 1_000_000


@needs_gcc
@pytest.mark.parametrize("vary, different", [(0, 1), (1, 3)])
def test_heads_vary_if_they_are_told_to(load: pathlib.Path, upstream: ScriptedUpstream, vary: int,
                                        different: int) -> None:
    client = start(load, "requests", upstream.port, repeat=3, vary=vary)
    heads = [upstream.receive().answer().head for _ in range(3)]
    assert result(client)[0] == 0 and len(set(heads)) == different


SMALL = {
    "requests": {"connections": 4, "seconds": 0.3},
    "completions": {"connections": 4, "seconds": 0.3},
    "streams": {"connections": 20, "events": 20, "interval": 10_000, "seconds": 0.3},
    "upload": {"size": 3_000_000, "chunked": 1, "repeat": 2},
    "download": {"size": 3_000_000, "repeat": 2},
}


@needs_gcc
@needs_openssl
def test_a_small_run_through_the_program(load: pathlib.Path, api_port: int, tmp_path: pathlib.Path) -> None:
    with ProxyProcess(tmp_path, upstream=f"http://127.0.0.1:{api_port}") as proxy:
        proxy.sign_in()
        runs = {mode: result(start(load, mode, proxy.port, pids=proxy.process.pid, **arguments))
                for mode, arguments in SMALL.items()}
    assert {code for code, _ in runs.values()} == {0}, runs
    assert all(found["answers"] and found["cpu"] > 0 for _, found in runs.values()), runs
    streams = runs["streams"][1]
    assert 300 < streams["events"] < 900  # 2,000 a second
    assert 0 < streams["delay_p50"] < streams["delay_p99"] < 1_000_000


# What the report makes of it

def record(target: str, round: int, value: float, **members: Any) -> "dict[str, Any]":
    return {"target": target, "round": round, "tls": True, "run": "requests_16", "busy": 0.97, "disturbed": 0,
            "figures": {"requests_16": value}, **members}


def test_ratios_are_of_the_same_round_with_median_and_spread() -> None:
    records = report.Records([record("nginx", 1, 10), record("nginx", 2, 100), record("nginx", 3, 50),
                              record("xaiproxy", 1, 5), record("xaiproxy", 2, 40), record("xaiproxy", 3, 35),
                              record("xaiproxy", 4, 1)])
    assert records.ratio("requests_16", "xaiproxy", "nginx", True) == report.Spread(0.5, 0.4, 0.7)
    assert records.spread("requests_16", "xaiproxy", True) == report.Spread(20, 1, 40)
    assert records.ratio("requests_16", "xaiproxy", "nginx", False) is None


@pytest.mark.parametrize("value, verdict", [(39.9, "**missed**"), (40, "met")])
def test_a_figure_stands_beside_its_goal(value: float, verdict: str) -> None:
    records = [record("nginx", 1, 100), record("xaiproxy", 1, value)]
    text = report.markdown({"machine": {"cpu": "any"}, "records": records})
    assert f"| ≥ 0.4 x nginx | {verdict} | 97% / 97% |" in text


def test_a_goal_is_a_limit_on_one_side() -> None:
    assert Goal(1.2).met(1.2) and not Goal(1.2).met(1.21)
    assert Goal(0.4, at_least=True).met(0.4) and not Goal(0.4, at_least=True).met(0.39)
    assert (str(Goal(1.2)), str(Goal(45, "")), str(Goal(1 / 500, "litellm"))) == (
        "≤ 1.2 x nginx", "≤ 45", "≤ litellm / 500")


def test_wrong_and_disturbed_runs_are_told() -> None:
    records = report.Records([record("nginx", 1, 1, disturbed=0.2),
                              record("xaiproxy", 1, 1, figures={}, wrong="2 wrong answers")])
    wrong, disturbed = records.faults()
    assert wrong == "TLS requests_16 xaiproxy round 1: 2 wrong answers"
    assert "1 of 2 runs: TLS requests_16 nginx round 1" in disturbed


def test_the_names_of_figures_are_unique() -> None:
    names = [figure.name for figure in report.figures()]
    assert len(set(names)) == len(names) and all(isinstance(figure, Figure) for figure in report.figures())


# What the machine tells

def test_the_cpu_time_of_another_process() -> None:
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as busy, \
            subprocess.Popen(["sleep", "60"]) as idle:
        while machine.cpu_seconds([busy.pid]) < 0.1:
            time.sleep(0.01)
        both, one = machine.cpu_seconds([busy.pid, idle.pid]), machine.cpu_seconds([idle.pid])
        busy.kill()
        idle.kill()
    assert one < 0.1 <= both < 10


def test_memory_of_this_process() -> None:
    sizes = machine.memory([os.getpid()])
    assert 1000 < sizes["pss"] <= sizes["rss"]
