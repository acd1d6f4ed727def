"""Is the load client the bottleneck? It and wrk send the same request to the same servers, in turn.

wrk sends one head again and again; those of the load client differ in their X-Client-Request-Id.
"""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Iterator
from typing import Any

from . import machine, measurements
from .targets import Target

ROUNDS, SECONDS = 3, 1


def ask_with_load(target: Target, connections: int) -> tuple[float, float]:
    """Requests a second, and the share of core 0 that the target used."""
    arguments = {"connections": connections, "seconds": SECONDS}
    result = measurements.load(target.port, "requests", arguments, target.pids())
    return result["answers"] / result["seconds"], result["cpu"] / result["seconds"]


def ask_with_wrk(target: Target, connections: int) -> tuple[float, float]:
    head = subprocess.run(
        [machine.FOLDER / "load", "head", str(target.port)],
        check=True,
        capture_output=True,
        text=True,
    )
    fields = [
        argument for line in head.stdout.split("\r\n")[1:] if line for argument in ("-H", line)
    ]
    cpu = machine.cpu_seconds(target.pids())
    command = machine.pinned(
        machine.OTHER_CORE,
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{SECONDS}",
        *fields,
        f"http://127.0.0.1:{target.port}/v1/models",
    )
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise measurements.Wrong(done.stdout)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    assert rate is not None, done.stdout
    return float(rate[1]), (machine.cpu_seconds(target.pids()) - cpu) / SECONDS


def report(bench: Any) -> str:
    """Markdown: requests a second by load and by wrk. `bench` runs one target at a time."""
    lines = [
        "| upstream, target | c | load, requests/s | wrk, requests/s | load : wrk | core 0 busy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *_rows(bench)])


def _rows(bench: Any) -> Iterator[str]:
    for name, tls in (("direct", False), ("nginx", False), ("nginx", True)):
        for connections in (1, 16, 64):
            ours, theirs = [], []
            with bench.turn(name, tls, fresh=False) as target:
                for _ in range(ROUNDS):
                    ours.append(ask_with_load(target, connections))
                    theirs.append(ask_with_wrk(target, connections))
            rate, busy = map(statistics.median, zip(*ours))
            wrk_rate, wrk_busy = map(statistics.median, zip(*theirs))
            machine.log(f"{name} c={connections}: {rate:,.0f} and {wrk_rate:,.0f} requests/s")
            yield (
                f"| {'TLS' if tls else 'plain'}, {name} | {connections} | {rate:,.0f} | {wrk_rate:,.0f} | "
                f"{rate / wrk_rate:.2f} | {busy:.0%} / {wrk_busy:.0%} |"
            )
