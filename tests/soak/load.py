"""One proxy and its refresher under every kind of load, phase by phase, and a table of what was
lost.
"""

from __future__ import annotations

import contextlib
import pathlib
import resource

from . import crowds, held, restarts, shortage
from .loaded import Counts, Load, Row
from .processes import warnings

# EX_UNAVAILABLE of sysexits.h.
UNAVAILABLE = 69
HELP = (
    "a proxy under load, with tokens that rotate: 1,000 streams for MIN minutes (default: 5) beside 100 "
    "requests a second, 5,000 idle streams, connection churn, no descriptors left, 20,000 clients, and restarts "
    "under supervisord, which take another three minutes; compiles its client with gcc"
)


def table(rows: list[Row]) -> str:
    lines = [("phase", "what was done", "lost", "proxy's memory", "latency of short requests")]
    lines += [
        (row.phase, row.done, str(len(row.lost) or "nothing"), row.memory, row.latency)
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def soak(
    folder: pathlib.Path,
    running: contextlib.ExitStack,
    seconds: float,
    counts: Counts | None = None,
) -> int:
    counts = counts or Counts()
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < counts.files():
        print(
            f"soak: the file descriptor limit of {hard} is too low; raise it with ulimit -Hn {counts.files()}"
        )
        return UNAVAILABLE
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows: list[Row] = []
    run = Load(folder, running, counts)
    for phase in (
        lambda: held.streams(run, seconds),
        lambda: held.idle_streams(run),
        lambda: crowds.churn(run),
        lambda: shortage.few_descriptors(run),
        lambda: shortage.none_left(run),
        lambda: crowds.crowd(run),
        lambda: restarts.restarts(run),
    ):
        for row in phase():
            rows.append(row)
            run.progress(f"{row.phase}: {row.done}; lost: {'; '.join(row.lost) or 'nothing'}")
    if reuses := run.sandbox.counters()["reuses"]:
        rows.append(
            Row("login", "tokens rotated", [f"{reuses} former refresh tokens presented again"])
        )
    return report(rows, folder)


def report(rows: list[Row], folder: pathlib.Path) -> int:
    """Print the table and the losses; return the exit status."""
    print("\n" + table(rows))
    for row in rows:
        for text in row.lost:
            print(f"lost, {row.phase}: {text}")
    for text in warnings(folder)[:20]:
        print(f"logged: {text[:300]}")
    return 1 if any(row.lost for row in rows) else 0
