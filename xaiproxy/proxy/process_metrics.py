"""This process, under the names that Prometheus's clients share.

prometheus_client has a collector of these, which lists all descriptors at once: with 10,000
connections it would hold up the streams.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import Metric

from xaiproxy.proxy.metric_family import counter, gauge

PAGE = os.sysconf("SC_PAGE_SIZE")
DESCRIPTORS_AT_A_TIME = 100


def started_at() -> float:
    """The unix time at which the process was started."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def families(start_time: float, pause: Callable[[], object]) -> Iterator[Metric]:
    with open("/proc/self/statm", "rb") as file:
        size, resident = (int(pages) * PAGE for pages in file.read().split()[:2])
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield counter(
        "process_cpu_seconds", "User and system CPU time in seconds.", (), [(time.process_time(),)]
    )
    yield gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.", (), [(size,)])
    yield gauge("process_resident_memory_bytes", "Resident memory in bytes.", (), [(resident,)])
    yield gauge(
        "process_start_time_seconds", "Start of the process in unix time.", (), [(start_time,)]
    )
    yield gauge("process_open_fds", "Open file descriptors.", (), [(_open_descriptors(pause),)])
    yield gauge(
        "process_max_fds",
        "Limit of open file descriptors.",
        (),
        [(math.inf if limit == resource.RLIM_INFINITY else limit,)],
    )


def _open_descriptors(pause: Callable[[], object]) -> int:
    number = 0
    with os.scandir("/proc/self/fd") as entries:
        for number, _ in enumerate(entries, 1):
            if number % DESCRIPTORS_AT_A_TIME == 0:
                pause()
    # Without the one that lists them.
    return number - 1
