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

from xaiproxy import kernel
from xaiproxy.proxy.metric_family import counter, gauge

DESCRIPTORS_AT_A_TIME = 100


def families(start_time: float, pause: Callable[[], object]) -> Iterator[Metric]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield counter(
        "process_cpu_seconds", "User and system CPU time in seconds.", (), [(time.process_time(),)]
    )
    if (memory := kernel.memory()) is not None:
        virtual, resident = memory
        yield gauge(
            "process_virtual_memory_bytes", "Virtual memory size in bytes.", (), [(virtual,)]
        )
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
    with os.scandir("/dev/fd") as entries:
        for number, _ in enumerate(entries, 1):
            if number % DESCRIPTORS_AT_A_TIME == 0:
                pause()
    # Without the one that lists them.
    return number - 1
