"""Streams that stay open: many with events beside short requests, and more without events."""

from __future__ import annotations

import time
from collections.abc import Iterator

from .loaded import Load, Memory, Row
from .processes import await_, open_files

# Seconds between two lines of progress.
PROGRESS = 10
# Samples of memory, at least.
SAMPLES = 20


def streams(run: Load, seconds: float) -> Iterator[Row]:
    refreshes, count = run.sandbox.counters()["refreshes"], run.counts.streams
    # What the proxy keeps of each, to read its usage, has its full size long before the last half.
    held, memory = run.streams(count, seconds, event_size=4096), Memory()
    began = printed = time.monotonic()
    with run.requests() as requests:
        while time.monotonic() < began + seconds - 1 and not held.over():
            memory.sample(run.resident())
            if time.monotonic() > printed + PROGRESS:
                printed += PROGRESS
                run.progress(
                    f"{count} streams, {requests.count()} requests, of which {requests.failed().total()} failed; "
                    + memory.text()
                )
            time.sleep(min(1, seconds / SAMPLES))
        rate = requests.count() / (time.monotonic() - began)
        lost = held.lost()
    renewed = run.sandbox.counters()["refreshes"] - refreshes
    yield Row(
        "streams",
        f"{count} for {seconds:.0f} s beside {rate:.0f} requests a second, {renewed} new tokens",
        lost + requests.lost() + memory.lost() + (["no token rotated"] if not renewed else []),
        memory.text(),
        requests.latency(),
    )


def idle_streams(run: Load) -> Iterator[Row]:
    count, quiet = run.counts.idle_streams, 5 + run.counts.idle_streams / 250
    before, files = run.resident(), open_files(run.proxy.pid)
    held = run.streams(count, quiet, events=3, events_per_second=0, first_event_delay=quiet)
    most = run.resident()
    with run.requests() as requests:
        lost = held.lost()
    # Connections to upstream are pooled.
    await_(lambda: open_files(run.proxy.pid) < files + count + 50, 20)
    yield Row(
        "idle streams",
        f"{count}, silent for {quiet:.0f} s",
        lost + requests.lost(),
        f"{most / 1024:.0f} MiB, {(most - before) / count:.0f} KiB each",
        requests.latency(),
    )
