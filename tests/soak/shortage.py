"""A proxy without file descriptors: too few for its settings from the start, or none left while it
runs.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

from tests.bench import machine

from .crowds import MODELS, connect
from .loaded import Load, Row
from .login import get
from .processes import Process, await_, open_files

LIMITED = (
    "-c",
    "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv.pop()),) * 2); "
    "runpy.run_module('xaiproxy', run_name='__main__', alter_sys=True)",
)
# Seconds for which the CPU time is measured.
SAMPLE = 2.0
# Share of a core, in an idle proxy.
SPINS = 0.3
# Lines that an idle proxy may log meanwhile.
LINES = 10


def few_descriptors(run: Load) -> Iterator[Row]:
    """More clients than the limit has room for: idle ones are closed for one that sends a request."""
    limit = run.counts.descriptors
    proxy = run.start("limited", *LIMITED, str(limit))
    port = proxy.port()
    lost = (
        []
        if f"limit of {limit} has room for" in proxy.log.read_text()
        else ["the limit is not in the log"]
    )
    with contextlib.ExitStack() as held:
        # The limit has room for at most half of them.
        for number in range(limit):
            held.enter_context(connect(port, number))
        late = held.enter_context(connect(port, 0))
        began = time.monotonic()
        late.send(MODELS)
        answered = late.recv(12) == b"HTTP/1.1 200"
        waited = time.monotonic() - began
        busy, lines = idle_cost(proxy)
    lost += after(proxy, port, busy, lines) + (
        [] if answered else ["a client with a request got no response"]
    )
    yield Row(
        "few descriptors",
        f"{limit} clients with {limit} descriptors; {busy:.0%} CPU while they stay; one with "
        f"a request waits {waited:.1f} s",
        lost,
    )
    proxy.kill()


def none_left(run: Load) -> Iterator[Row]:
    """The limit is lowered under a running proxy: not one connection more can be accepted or made."""
    proxy = run.start("exhausted", "-m", "xaiproxy")
    port = proxy.port()
    soft, hard = resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE)
    with connect(port, 0) as early:
        await_(lambda: get(port, "/readyz")[0] == "200")
        resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (open_files(proxy.pid), hard))
        early.sendall(MODELS)
        lost = []
        if not (answer := early.recv(65536)).startswith((b"HTTP/1.1 502", b"HTTP/1.1 200")):
            lost.append(f"a client without an upstream connection got {answer[:60]!r}")
        with contextlib.ExitStack() as held:
            for number in range(20):
                held.enter_context(connect(port, number)).send(MODELS)
            busy, lines = idle_cost(proxy)
            resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (soft, hard))
            await_(lambda: "accepted again" in proxy.log.read_text())
    text = proxy.log.read_text()
    lost += [] if "Too many open files, with" in text else ["the descriptors are not in the log"]
    lost += ["a traceback in the log"] if "Traceback" in text else []
    lost += after(proxy, port, busy, lines)
    yield Row(
        "no descriptors",
        f"none left under a running proxy; {busy:.0%} CPU and {lines} lines meanwhile",
        lost,
    )
    proxy.kill()


def idle_cost(proxy: Process) -> tuple[float, int]:
    """The share of a core that it uses, and the lines that it logs beside those of requests, in
    SAMPLE seconds.
    """

    def lines() -> int:
        return sum('"duration_ms"' not in line for line in proxy.log.read_text().splitlines())

    time.sleep(0.5)
    before, count = machine.cpu_seconds([proxy.pid]), lines()
    time.sleep(SAMPLE)
    return (machine.cpu_seconds([proxy.pid]) - before) / SAMPLE, lines() - count


def after(proxy: Process, port: int, busy: float, lines: int) -> list[str]:
    status = get(port, "/v1/models")[0]
    return (
        ([f"busy loop: {busy:.0%} CPU"] if busy > SPINS else [])
        + ([f"{lines} lines in {SAMPLE:g} s"] if lines > LINES else [])
        + ([f"afterwards a request failed: {status}"] if status != "200" else [])
    )
