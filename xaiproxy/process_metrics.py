"""This process, or all workers together, under the names that Prometheus's clients share.

prometheus_client has a collector of these, which lists all descriptors at once: with 10,000
connections it would hold up the streams.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.metrics_core import Metric

from xaiproxy import kernel
from xaiproxy.metric_family import counter, gauge

DESCRIPTORS_AT_A_TIME = 100
GAUGES = {
    "process_virtual_memory_bytes": "Virtual memory size in bytes.",
    "process_resident_memory_bytes": "Resident memory in bytes.",
    "process_open_fds": "Open file descriptors.",
    "process_max_fds": "Limit of open file descriptors.",
}


def measure(pause: Callable[[], object]) -> dict[str, float]:
    """Gauges of this process, by name. `pause`: called between descriptors."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    virtual, resident = kernel.memory() or (None, None)
    measured = {
        "process_virtual_memory_bytes": virtual,
        "process_resident_memory_bytes": resident,
        "process_open_fds": _open_descriptors(pause),
        "process_max_fds": math.inf if limit == resource.RLIM_INFINITY else limit,
    }
    return {name: number for name, number in measured.items() if number is not None}


def families(
    measured: Mapping[str, float], cpu_seconds: float, started_at: float
) -> Iterator[Metric]:
    """`measured`: the gauges that `measure` has returned, or sums of them."""
    yield counter(
        "process_cpu_seconds", "User and system CPU time in seconds.", (), [(cpu_seconds,)]
    )
    yield gauge(
        "process_start_time_seconds", "Start of the process in unix time.", (), [(started_at,)]
    )
    for name, number in measured.items():
        yield gauge(name, GAUGES[name], (), [(number,)])


def _open_descriptors(pause: Callable[[], object]) -> int:
    number = 0
    with os.scandir("/dev/fd") as entries:
        for number, _ in enumerate(entries, 1):
            if number % DESCRIPTORS_AT_A_TIME == 0:
                pause()
    # Without the one that lists them.
    return number - 1
