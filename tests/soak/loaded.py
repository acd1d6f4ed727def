"""A proxy and its refresher under load, the clients that cause it, and the measurements."""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from sandbox import Sandbox

from tests.bench import machine

from .login import Client, get
from .processes import PROXY, REFRESHER, Process, await_, environment

# Seconds of an access token: the sandbox, busy with thousands of streams, takes some to issue
# one.
LIFETIME = 8
# Clients of short requests, ten a second each.
CLIENTS = 10
# Streams opened a second.
RAMP = 500
# KiB that memory may grow by in the last half of a phase: a leak of a few bytes an event is more.
FLAT = 4096


class Counts(NamedTuple):
    """How many of each."""

    streams: int = 1000
    idle_streams: int = 5000
    crowd: int = 20000
    # The limit of the proxy that runs out of descriptors.
    descriptors: int = 512
    # Streams under each restart.
    restarted: int = 200
    # Seconds.
    churn: float = 20.0
    # XAI_PROXY_CLIENT_TIMEOUT, for which the crowd occupies the proxy.
    wait: float = 30.0

    def files(self) -> int:
        """Descriptors that a process needs: each stream has two in the proxy."""
        return 2 * max(self.streams, self.idle_streams) + 500


class Row(NamedTuple):
    phase: str
    done: str
    lost: list[str]
    memory: str = ""
    latency: str = ""


class Streams:
    """Streams through a proxy, each read to its end and checked by the benchmark's load client."""

    def __init__(self, run: Load, port: int, count: int, events: int, seconds: float):
        program = machine.compile_program("load", [], run.folder)
        self._process = subprocess.Popen(
            [
                program,
                "streams",
                str(port),
                f"connections={count}",
                f"events={events}",
                "repeat=1",
                "stamps=0",
                f"ramp={RAMP}",
                f"limit={seconds + count / RAMP + 60}",
            ],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.count = count
        self._result: dict[str, Any] | None = None
        run.running.callback(self.kill)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def over(self) -> bool:
        return self._process.poll() is not None

    def result(self) -> dict[str, Any]:
        """`answers`: complete streams; `errors`, and `error`, the first of them: streams that broke
        visibly.
        """
        if self._result is None:
            self._result = json.loads(self._process.communicate()[0].splitlines()[-1])
        return self._result

    def lost(self) -> list[str]:
        found = self.result()
        missing = self.count - found["answers"]
        return (
            [f"{missing} of {self.count} streams: {found['error']}"]
            if missing or found["errors"]
            else []
        )


class Load:
    """The sandbox, a proxy and a refresher, and what all phases do with them.

    `starts`: whether there are a proxy and a refresher.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        running: contextlib.ExitStack,
        counts: Counts,
        *,
        starts: bool = True,
    ):
        self.folder, self.running, self.counts = folder, running, counts
        self.sandbox = running.enter_context(
            Sandbox(access_token_lifetime=LIFETIME, device_interval=0)
        )
        self.path = folder / "login" / "tokens.json"
        self.sandbox.write_login(self.path)
        self.environ = environment(
            folder,
            {
                **self.sandbox.env,
                "XAI_PROXY_TOKEN_PATH": str(self.path),
                "XAI_PROXY_CLIENT_TIMEOUT": str(counts.wait),
            },
        )
        self._began = time.monotonic()
        if starts:
            self.refresher = self.start("refresher", *REFRESHER)
            self.proxy = self.start("proxy", *PROXY)
            self.port = self.proxy.port()
            await_(lambda: get(self.port, "/readyz")[0] == "200")

    def start(self, name: str, *command: str, **settings: str) -> Process:
        return Process(
            self.running, self.folder / f"{name}.log", {**self.environ, **settings}, *command
        )

    def progress(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:.0f} s] {text}", flush=True)

    def streams(self, count: int, seconds: float, port: int = 0, **knobs: Any) -> Streams:
        """Return when all of them are open; each then stays for at least `seconds`."""
        seconds = round(seconds + count / RAMP)
        knobs = {
            "events": seconds,
            "event_size": None,
            "events_per_second": 1,
            "first_event_delay": 0,
            **knobs,
        }
        self.sandbox.set(**knobs)
        before = self.sandbox.counters()["streams"]
        streams = Streams(self, port or self.port, count, knobs["events"], seconds)
        await_(
            lambda: self.sandbox.counters()["streams"] - before >= count or streams.over(),
            30 + 2 * count / RAMP,
        )
        return streams

    @contextlib.contextmanager
    def requests(self, port: int = 0, count: int = CLIENTS) -> Iterator[Requests]:
        requests = Requests(port or self.port, count)
        with contextlib.closing(requests):
            yield requests

    def resident(self) -> int:
        """The proxy's resident memory in KiB."""
        return round(machine.memory([self.proxy.pid])["rss"])


class Requests:
    """Clients that request the models, ten times a second each, until this is closed."""

    def __init__(self, port: int, count: int):
        self._enough = threading.Event()
        self._clients = [Client(port, self._enough) for _ in range(count)]
        for client in self._clients:
            client.start()

    def close(self) -> None:
        self._enough.set()
        for client in self._clients:
            client.join()

    def count(self) -> int:
        return sum(client.requests for client in self._clients)

    def failed(self) -> collections.Counter[str]:
        return sum((client.failed for client in self._clients), collections.Counter())

    def lost(self) -> list[str]:
        return [
            f"{count} of {self.count()} requests: {text}" for text, count in self.failed().items()
        ]

    def latency(self) -> str:
        return latency([second for client in self._clients for second in client.seconds])


def latency(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
    return (
        f"p50 {1000 * cuts[49]:.0f}, p99 {1000 * cuts[98]:.0f}, most {1000 * max(seconds):.0f} ms"
    )


class Memory:
    """Samples of the memory of a process."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []

    def sample(self, kib: int) -> None:
        self._samples.append((time.monotonic(), kib))

    def growth(self) -> tuple[float, float]:
        """KiB a minute over the last half of the samples, and KiB over that half."""
        half = self._samples[len(self._samples) // 2 :]
        if len(half) < 2:
            return 0.0, 0.0
        slope = statistics.linear_regression(*zip(*half)).slope
        return 60 * slope, slope * (half[-1][0] - half[0][0])

    def text(self) -> str:
        return f"{self._samples[-1][1] / 1024:.0f} MiB, {self.growth()[0] / 1024:+.2f} MiB/min"

    def lost(self) -> list[str]:
        grown = self.growth()[1]
        return [f"memory grew by {grown:.0f} KiB in the last half"] if grown > FLAT else []
