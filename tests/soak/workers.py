"""Two workers under load: rolling restarts, kills, and how connections and work spread over them."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tests.bench import machine, targets

from .load import report
from .loaded import Counts, Load, Row
from .login import get
from .processes import await_

BIN = pathlib.Path(sys.executable).parent
WORKERS = 2
# Clients of short requests, ten new connections a second each, and clients of streams.
CLIENTS, STREAMS = 4, 20
# Seconds: XAI_PROXY_DRAIN_TIMEOUT, and the length of a stream, which is shorter.
DRAIN, LENGTH = 10, 5
# Streams whose spread over the workers is counted.
SPREAD = 1000
# Seconds of each measurement of the throughput.
MEASURED = 4
FAILURES = (OSError, http.client.HTTPException, AssertionError)
HELP = (
    "two workers under 40 connections a second and 20 streams: N rolling restarts (default: 10), and a kill of a "
    "worker, of the refresher and of supervisord; how 1,000 streams spread, and the throughput of one worker and of "
    "two; compiles its client with gcc"
)


class Serving:
    """xai-serve --workers, with its own log, on a port that stays the same."""

    def __init__(self, run: Load, name: str, workers: int, **settings: str):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.folder = run.path.parent / "run"
        settings = {
            "XAI_PROXY_PORT": str(self.port),
            "XAI_PROXY_DRAIN_TIMEOUT": str(DRAIN),
            **settings,
        }
        self._environ = {**run.environ, **settings}
        self.process = run.start(
            name, str(BIN / "xai-serve"), "--workers", str(workers), **settings
        )
        run.running.callback(self.stop)
        await_(lambda: self._log().count('"message": "listening on ') == workers, 60)

    def _log(self) -> str:
        return self.process.log.read_text()

    def stop(self) -> None:
        """End it; may be called twice."""
        self.process.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)

    def pid(self, program: str) -> int:
        return int(re.findall(rf"spawned: '{program}' with pid (\d+)", self._log())[-1])

    def kill(self, program: str) -> None:
        """Kill a program; return once another runs in its place."""
        pid = self.pid(program)
        os.kill(pid, signal.SIGKILL)
        await_(lambda: self.pid(program) != pid, 30)

    def restart(self) -> str:
        """The error of an xai-restart, or ""."""
        done = subprocess.run(
            [BIN / "xai-restart"], env=self._environ, capture_output=True, text=True, timeout=300
        )
        return done.stderr if done.returncode else ""

    def gauges(self) -> list[dict[str, float]]:
        """Those that each worker has written last."""
        paths = sorted(self.folder.glob(f"127.0.0.1:{self.port}-*.json"))
        return [json.loads(path.read_text().splitlines()[1])["gauges"] for path in paths]


class Streams:
    """Clients that read one stream after the other, each by a connection of its own."""

    def __init__(self, port: int):
        self.complete = 0
        self.failed: collections.Counter[str] = collections.Counter()
        self._port, self._enough = port, threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(STREAMS)]
        for thread in self._threads:
            thread.start()
            time.sleep(LENGTH / STREAMS)

    def close(self) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def lost(self) -> list[str]:
        return [f"{count} streams: {text}" for text, count in self.failed.items()]

    def _run(self) -> None:
        while not self._enough.is_set():
            try:
                self._read()
                self.complete += 1
            except FAILURES as error:
                self.failed[type(error).__name__] += 1
                self._enough.wait(0.1)

    def _read(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        with contextlib.closing(connection):
            body = json.dumps({"model": "grok-4.5", "messages": [], "stream": True})
            fields = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, fields)
            answer = connection.getresponse()
            assert answer.status == 200
            assert answer.read().endswith(b"data: [DONE]\n\n")


class Counters:
    """Scrapes all the time, and compares each counter with its value before. `lost`: what fell."""

    def __init__(self, port: int):
        self.scrapes = 0
        self.lost: list[str] = []
        self._port, self._enough = port, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._enough.set()
        self._thread.join()

    def _run(self) -> None:
        before: dict[str, float] = {}
        while not self._enough.wait(0.2):
            status, text = get(self._port, "/metrics")
            if status != "200":
                continue
            self.scrapes += 1
            lines = re.findall(r"^(\w+_(?:total|count|sum|bucket)\S*) (\S+)$", text, re.M)
            now = {name: float(value) for name, value in lines}
            self.lost += [
                f"{name} fell from {value:g} to {now.get(name)}"
                for name, value in before.items()
                if now.get(name, -1.0) < value
            ]
            before = now


class Phase:
    """The load of a phase, and what it lost."""

    def __init__(self, run: Load, port: int):
        run.sandbox.set(events=2 * LENGTH, events_per_second=2, first_event_delay=0)
        self.streams, self.counters = Streams(port), Counters(port)

    def row(self, name: str, done: str, requests: Any, held: int = 0) -> Row:
        """`held`: the streams of a killed process, which it loses."""
        self.streams.close()
        self.counters.close()
        failed = requests.failed()
        done += (
            f"; {requests.count()} requests, {self.streams.complete} streams, "
            f"{self.counters.scrapes} scrapes"
        )
        lost = list(self.counters.lost[:5])
        if held:
            broken = self.streams.failed.total()
            done += (
                f"; lost with it: {broken} of the {held} streams that it held, {failed.total()} "
                "requests"
            )
            lost += [f"{broken} streams, but it held {held}"] * (broken > held)
            lost += [f"{failed.total()} requests"] * (failed.total() > CLIENTS)
        else:
            lost += self.streams.lost() + requests.lost()
        return Row(name, done, lost, "", requests.latency())


def soak(folder: pathlib.Path, running: contextlib.ExitStack, restarts: int) -> int:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run = Load(folder, running, Counts(), starts=False)
    rows: list[Row] = []
    for row in phases(run, restarts):
        rows.append(row)
        run.progress(f"{row.phase}: {row.done}; lost: {'; '.join(row.lost) or 'nothing'}")
    return report(rows, folder)


def phases(run: Load, restarts: int) -> Iterator[Row]:
    serving = Serving(run, "serve", WORKERS)
    yield rolling(run, serving, restarts)
    yield kill_worker(run, serving)
    yield kill_refresher(run, serving)
    yield spread(run, serving)
    yield kill_supervisord(run, serving)
    yield from throughput(run)


def rolling(run: Load, serving: Serving, restarts: int) -> Row:
    phase, errors, began = Phase(run, serving.port), [], time.monotonic()
    with run.requests(serving.port, CLIENTS) as requests:
        for _ in range(restarts):
            errors += filter(None, [serving.restart()])
        seconds = time.monotonic() - began
    row = phase.row("rolling", f"{restarts} rolling restarts in {seconds:.0f} s", requests)
    return row._replace(lost=row.lost + errors)


def kill_worker(run: Load, serving: Serving) -> Row:
    phase = Phase(run, serving.port)
    with run.requests(serving.port, CLIENTS) as requests:
        time.sleep(LENGTH)
        # A scrape has the worker that answers write its numbers; the other one does so each second.
        held = round(serving.gauges()[0]["in_flight"]) + 1
        serving.kill("proxy-0")
        time.sleep(LENGTH)
    return phase.row("worker, SIGKILL", "one of two", requests, held)


def kill_refresher(run: Load, serving: Serving) -> Row:
    phase = Phase(run, serving.port)
    with run.requests(serving.port, CLIENTS) as requests:
        saved = run.path.stat().st_mtime_ns
        # A new login in memory alone would be lost: see login.py.
        await_(lambda: run.path.stat().st_mtime_ns != saved)
        serving.kill("refresher")
        refreshes = run.sandbox.counters()["refreshes"]
        run.sandbox.wait(lambda seen: seen["refreshes"] > refreshes + 1)
    return phase.row("refresher, SIGKILL", "until it had refreshed twice again", requests)


def spread(run: Load, serving: Serving) -> Row:
    streams = run.streams(SPREAD, 15, serving.port)
    time.sleep(2)
    shares = [round(one["streams"]) for one in serving.gauges()]
    return Row("spread", f"{SPREAD} streams: {' and '.join(map(str, shares))}", streams.lost())


def kill_supervisord(run: Load, serving: Serving) -> Row:
    """The kernel sends both workers SIGTERM, and they drain; no other process serves then."""
    streams = run.streams(STREAMS, LENGTH, serving.port)
    with run.requests(serving.port, CLIENTS) as requests:
        os.kill(serving.process.pid, signal.SIGKILL)
        lost = streams.lost()
    failed = requests.failed()
    refused = failed.pop("ConnectionRefusedError ", 0)
    lost += [f"{count} requests: {text}" for text, count in failed.items()]
    done = f"{STREAMS} streams ended within the drain; {refused} later requests were refused"
    return Row("supervisord, SIGKILL", done, lost)


def throughput(run: Load) -> Iterator[Row]:
    """Load client, upstream and workers share the cores: a lower bound of what a second worker adds."""
    for name, libraries in machine.PROGRAMS.items():
        machine.compile_program(name, libraries)
    upstream = targets.Upstream(run.folder)
    run.running.callback(upstream.close)
    for workers in (1, 2, 1, 2):
        serving = Serving(
            run,
            f"measured-{time.monotonic_ns()}",
            workers,
            XAI_PROXY_UPSTREAM=upstream.origin(tls=False),
            XAI_PROXY_LOG_LEVEL="info",
        )
        requests = measured("requests", serving.port, connections=64)
        events = measured("streams", serving.port, connections=600, events=100, interval=20000)
        yield Row(
            f"{workers} worker{'s' * (workers > 1)}",
            f"{rate(requests, 'answers')} requests a second, "
            f"{rate(events, 'events')} events a second of 30,000 sent, delay p99 "
            f"{events['delay_p99'] / 1000:.1f} ms",
            [
                f"{one['errors']} errors: {one['error']}"
                for one in (requests, events)
                if one["errors"]
            ],
        )
        serving.stop()


def rate(found: dict[str, Any], what: str) -> str:
    # A machine that is too slow has no window.
    return f"{found[what] / found['seconds']:.0f}" if found["seconds"] else "no"


def measured(mode: str, port: int, **arguments: int) -> dict[str, Any]:
    options = [f"{name}={value}" for name, value in {**arguments, "seconds": MEASURED}.items()]
    done = subprocess.run(
        [machine.FOLDER / "load", mode, str(port), *options], capture_output=True, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))
