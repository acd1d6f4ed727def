"""The measurements: a table of runs of the load client, and of the figures of each."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import machine
from .targets import Rotating, Target, Xaiproxy


class Wrong(Exception):
    """Answers were wrong or missing, so that the run's figures mean nothing."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a figure should be: at most (or at least) `limit` times that of `against`; `limit`
    itself if "".
    """

    limit: float
    against: str = "nginx"
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        if self.against and self.limit < 0.1:
            return f"{sign} {self.against} / {1 / self.limit:g}"
        return f"{sign} {self.limit:g}{f' x {self.against}' if self.against else ''}"


@dataclasses.dataclass(frozen=True)
class Figure:
    name: str
    title: str
    value: Callable[[dict[str, Any]], float]
    goal: Goal | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the load client.

    `seconds`: its approximate duration; `quick`: a standard row, measured with --quick and for all
    reverse proxies; `fresh`: against a proxy just started; `saturates`: the proxy should be the
    limit, so that its core should be busy.
    """

    name: str
    mode: str
    arguments: dict[str, Any]
    figures: tuple[Figure, ...]
    seconds: float = 2
    quick: bool = False
    fresh: bool = False
    saturates: bool = False
    targets: tuple[str, ...] = ("direct", "nginx", "xaiproxy", "other")


def at_most(limit: float, against: str = "nginx") -> Goal:
    return Goal(limit, against)


def at_least(limit: float, against: str = "nginx") -> Goal:
    return Goal(limit, against, at_least=True)


def per(total: str, count: str, factor: float = 1) -> Callable[[dict[str, Any]], float]:
    return lambda result: factor * result[total] / result[count]


def of(name: str, factor: float = 1) -> Callable[[dict[str, Any]], float]:
    return lambda result: factor * result[name]


def per_stream(streams: int) -> Callable[[dict[str, Any]], float]:
    return lambda result: (result["held_pss"] - result["idle_pss"]) / streams


PROXIES = ("nginx", "xaiproxy", "other")
RIVALS = ("litellm", "xaiproxy", "other")
MB = 1_000_000
# 100 streams of 50 events a second each
EACH_50 = {"connections": 100, "interval": 20_000, "ramp": 500}

RUNS = (
    Run(
        "requests_1",
        "requests",
        {"connections": 1},
        quick=True,
        figures=(
            Figure("requests_1", "requests/s, c=1", per("answers", "seconds"), at_least(0.85)),
        ),
    ),
    Run(
        "requests_16",
        "requests",
        {"connections": 16},
        quick=True,
        saturates=True,
        figures=(
            Figure("requests_16", "requests/s, c=16", per("answers", "seconds"), at_least(0.40)),
            Figure("requests_16_cpu", "CPU µs a request, c=16", per("cpu", "answers", 1e6)),
            Figure("requests_16_p99", "request p99 µs, c=16", of("latency_p99")),
        ),
    ),
    Run(
        "requests_64",
        "requests",
        {"connections": 64},
        saturates=True,
        figures=(Figure("requests_64", "requests/s, c=64", per("answers", "seconds")),),
    ),
    # c=1: with more connections, one in twenty of nginx 1.22's TLS 1.3 handshakes is a full one.
    Run(
        "reconnects_1",
        "reconnects",
        {"connections": 1, "warm": 0.5},
        quick=True,
        targets=PROXIES,
        figures=(
            Figure(
                "reconnects_1_p50", "request p50 µs, c=1, new connection each", of("latency_p50")
            ),
            Figure(
                "reconnects_1_p99", "request p99 µs, c=1, new connection each", of("latency_p99")
            ),
            Figure(
                "reconnects_1_cpu",
                "CPU µs a request, c=1, new connection each",
                per("cpu", "answers", 1e6),
            ),
        ),
    ),
    Run(
        "first_1",
        "streams",
        {"connections": 1, "events": 1},
        quick=True,
        figures=(
            Figure("first_1_p50", "first event p50 µs, c=1", of("first_event_p50"), at_most(1.2)),
            Figure("first_1_p99", "first event p99 µs, c=1", of("first_event_p99")),
        ),
    ),
    Run(
        "first_new_1",
        "streams",
        {"connections": 1, "events": 1, "close": 1, "warm": 0.5},
        quick=True,
        targets=PROXIES,
        figures=(
            Figure(
                "first_new_1_p50",
                "first event p50 µs, c=1, new connection each",
                of("first_event_p50"),
                at_most(1.5),
            ),
            Figure(
                "first_new_1_p99",
                "first event p99 µs, c=1, new connection each",
                of("first_event_p99"),
            ),
        ),
    ),
    Run(
        "first_100",
        "streams",
        {**EACH_50, "events": 25, "warm": 1},
        quick=True,
        seconds=3.5,
        figures=(
            Figure(
                "first_100_p50",
                "first event p50 µs, 100 streams",
                of("first_event_p50"),
                at_most(1.5),
            ),
            Figure("first_100_p99", "first event p99 µs, 100 streams", of("first_event_p99")),
        ),
    ),
    Run(
        "events_100",
        "streams",
        {**EACH_50, "events": 150},
        quick=True,
        seconds=3.5,
        figures=(
            Figure("delay_p50", "event delay p50 µs, 100 x 50/s", of("delay_p50"), at_most(1.1)),
            Figure("delay_p99", "event delay p99 µs, 100 x 50/s", of("delay_p99"), at_most(1.3)),
            Figure(
                "event_cpu", "CPU µs an event, 100 x 50/s", per("cpu", "events", 1e6), at_most(1.2)
            ),
        ),
    ),
    Run(
        "saturation",
        "streams",
        {"connections": 100, "interval": 1000, "events": 1000},
        seconds=5,
        saturates=True,
        figures=(
            Figure("saturation", "events/s of 100,000 offered", per("events", "seconds")),
            Figure("saturation_cpu", "CPU µs an event, then", per("cpu", "events", 1e6)),
        ),
    ),
    Run(
        "upload_length",
        "upload",
        {"size": 20 * MB, "repeat": 10},
        seconds=1,
        quick=True,
        figures=(
            Figure(
                "upload_length_cpu",
                "CPU ms a 20 MB upload, length",
                of("cpu", 1e3 / 10),
                at_most(0.5),
            ),
        ),
    ),
    Run(
        "upload_chunked",
        "upload",
        {"size": 20 * MB, "repeat": 10, "chunked": 1},
        seconds=1,
        quick=True,
        figures=(
            Figure(
                "upload_chunked_cpu",
                "CPU ms a 20 MB upload, chunked",
                of("cpu", 1e3 / 10),
                at_most(1),
            ),
        ),
    ),
    Run(
        "upload_200_length",
        "upload",
        {"size": 200 * MB, "repeat": 1},
        seconds=1,
        figures=(
            Figure("upload_200_length_time", "ms a 200 MB upload, length", of("seconds", 1e3)),
            Figure("upload_200_length_cpu", "CPU ms of that", of("cpu", 1e3)),
        ),
    ),
    Run(
        "upload_200_chunked",
        "upload",
        {"size": 200 * MB, "repeat": 1, "chunked": 1},
        seconds=1,
        figures=(
            Figure("upload_200_chunked_time", "ms a 200 MB upload, chunked", of("seconds", 1e3)),
            Figure("upload_200_chunked_cpu", "CPU ms of that", of("cpu", 1e3)),
        ),
    ),
    Run(
        "download_200",
        "download",
        {"size": 200 * MB, "repeat": 1},
        seconds=1,
        figures=(
            Figure("download_200_time", "ms a 200 MB download", of("seconds", 1e3)),
            Figure("download_200_cpu", "CPU ms of that", of("cpu", 1e3)),
        ),
    ),
    Run(
        "rotation",
        "requests",
        {"connections": 16, "seconds": 6},
        seconds=9,
        targets=("xaiproxy", "rotating"),
        figures=(
            Figure(
                "rotation_p99",
                "request p99 µs, c=16; tokens rotate",
                of("latency_p99"),
                at_most(1.1, "xaiproxy"),
            ),
        ),
    ),
)

# Once is enough for these: memory hardly varies, and they take long.
HELD = (
    Run(
        "held_1000",
        "streams",
        {"connections": 1000, "ramp": 1000, "events": 5, "interval": 1_000_000, "seconds": 1},
        seconds=8,
        quick=True,
        fresh=True,
        targets=PROXIES,
        figures=(
            Figure("startup_cpu", "CPU s until it listens", of("startup_cpu"), at_most(0.5, "")),
            Figure("idle_pss", "idle process, MB (PSS)", of("idle_pss", 1.024e-3)),
            Figure("idle_rss", "idle process, MB (RSS)", of("idle_rss", 1.024e-3), at_most(45, "")),
            Figure("held_1000", "KiB a stream, 1,000 held", per_stream(1000), at_most(22, "")),
        ),
    ),
    Run(
        "held_5000",
        "streams",
        {"connections": 5000, "ramp": 500, "events": 8, "interval": 2_000_000, "seconds": 1},
        seconds=28,
        fresh=True,
        targets=PROXIES,
        figures=(
            Figure(
                "held_5000",
                "KiB a stream, 5,000 held and ended well",
                per_stream(5000),
                at_most(22, ""),
            ),
        ),
    ),
)

LITELLM = (
    Run(
        "completions_16",
        "completions",
        {"connections": 16},
        targets=RIVALS,
        figures=(
            Figure(
                "completions_16",
                "completions/s, c=16",
                per("answers", "seconds"),
                at_least(150, "litellm"),
            ),
        ),
    ),
    Run(
        "litellm_first_1",
        "streams",
        {"connections": 1, "events": 1},
        targets=RIVALS,
        figures=(
            Figure(
                "litellm_first_1",
                "first event p50 µs, c=1",
                of("first_event_p50"),
                at_most(1 / 500, "litellm"),
            ),
        ),
    ),
    Run(
        "litellm_events",
        "streams",
        {"connections": 20, "interval": 40_000, "events": 90},
        seconds=5,
        targets=RIVALS,
        figures=(
            Figure(
                "litellm_event_cpu",
                "CPU µs an event, 20 x 25/s",
                per("cpu", "events", 1e6),
                at_most(1 / 15, "litellm"),
            ),
        ),
    ),
)

# Numbers of streams that share 5,000 events a second
STREAMS = (1, 10, 100, 1000, 5000)
BODIES = (1_000, 10_000, 100_000, 1 * MB, 20 * MB)
FLATNESS = tuple(
    Run(
        f"flat_streams_{streams}",
        "streams",
        {
            "connections": streams,
            "interval": streams * 200,
            "seconds": 3,
            "ramp": 500,
            "events": int((streams / 500 + 5) * 5000 / streams),
        },
        seconds=7 + streams / 400,
        targets=PROXIES,
        figures=(
            Figure(
                f"flat_streams_{streams}",
                f"CPU µs an event, {streams:,} streams",
                per("cpu", "events", 1e6),
            ),
        ),
    )
    for streams in STREAMS
) + tuple(
    Run(
        f"flat_body_{size}",
        "upload",
        {"size": size, "repeat": max(5, min(2000, 100 * MB // size))},
        seconds=1,
        targets=PROXIES,
        figures=(
            Figure(
                f"flat_body_{size}",
                f"CPU µs a request of {size:,} bytes",
                per("cpu", "answers", 1e6),
            ),
        ),
    )
    for size in BODIES
)


def load(
    port: int,
    mode: str,
    arguments: dict[str, Any],
    pids: Sequence[int] = (),
    on_begin: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Run the load client; `on_begin` is called when its window begins. Raises Wrong."""
    command = machine.pinned(
        machine.OTHER_CORE,
        machine.FOLDER / "load",
        mode,
        str(port),
        *(f"{name}={value}" for name, value in arguments.items()),
        *([f"pids={','.join(map(str, pids))}"] if pids else []),
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None
            for line in client.stdout:
                if line == "begin\n":
                    on_begin()
                else:
                    result: dict[str, Any] = json.loads(line)
        finally:
            client.kill()
    if client.returncode != 0:
        raise Wrong(f"{result['errors']} wrong answers, the first: {result['error']}")
    return result


def measure(run: Run, target: Target, seconds: float) -> dict[str, Any]:
    """Run it against `target`, while the other targets are stopped.

    Windows last `seconds` unless the run has a length of its own.
    """
    result: dict[str, Any] = {}
    pids = target.pids()
    if run.fresh:
        # The first requests load what a process loads lazily.
        load(target.port, "requests", {"connections": 4, "repeat": 50})
        result |= {f"idle_{name}": value for name, value in machine.memory(pids).items()}
        result["startup_cpu"] = target.startup_cpu
    rotated = target.refreshes() if isinstance(target, Rotating) else 0

    def on_begin() -> None:
        if run.fresh:
            result.update({f"held_{name}": value for name, value in machine.memory(pids).items()})

    known = pids + target.upstream.process.family()
    before, began = machine.busy_seconds(), time.monotonic()
    own = machine.cpu_seconds(known)
    result |= load(target.port, run.mode, {"seconds": seconds, **run.arguments}, pids, on_begin)
    own = machine.cpu_seconds(known) - own + result["client_cpu_whole"]
    lasted, after = time.monotonic() - began, machine.busy_seconds()
    cores = (machine.TARGET_CORE, machine.OTHER_CORE)
    result["busy"] = result["cpu"] / result["seconds"]
    result["disturbed"] = max(0.0, sum(after[core] - before[core] for core in cores) - own) / lasted
    if isinstance(target, Rotating) and target.refreshes() - rotated < 2:
        raise Wrong("no token was refreshed during the run")
    return result


def help_cpu(target: Xaiproxy) -> float:
    """CPU seconds of `xai-login --help`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [target.command("xai-login"), "--help"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=target.folder,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
