"""The numbers that /metrics and the status page have, of this process or of all workers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from xaiproxy import kernel, log
from xaiproxy.http1.pool import Pool
from xaiproxy.proxy.counters import Counters
from xaiproxy.proxy.history import History
from xaiproxy.proxy.loop_lag import LoopLag
from xaiproxy.proxy.pace import Pace
from xaiproxy.proxy.recorder import Recorder
from xaiproxy.proxy.trouble import Trouble


@dataclasses.dataclass
class Numbers:
    """Those of workers that have ended are in `counters`, `history` and `sums` only.

    `sums`: other counters. `gauges`: what adds up over workers that run.
    `process`: gauges of processes, which add up, too; None if they were not measured.
    `lag`: of the event loop that is slowest. `started_at`: unix time of the last start.
    `trouble`: the first worker's that has one. `is_saturated`: whether any worker is.
    """

    counters: Counters = dataclasses.field(default_factory=Counters)
    history: History = dataclasses.field(default_factory=History)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    gauges: dict[str, float] = dataclasses.field(default_factory=dict)
    process: dict[str, float] | None = None
    lag: float = 0.0
    started_at: float = 0.0
    trouble: str = ""
    is_saturated: bool = False
    workers: int = 0

    def plain(self) -> dict[str, Any]:
        """What is kept of a worker that has ended, in types that JSON has."""
        return {
            "counters": self.counters.plain(),
            "history": self.history.plain(),
            "sums": self.sums,
        }

    def add_plain(self, plain: Mapping[str, Any], pace: Pace) -> None:
        self.counters.add_plain(plain["counters"], pace)
        self.history.add_plain(plain["history"], pace)
        add(self.sums, plain["sums"])


def add(sums: dict[str, float], others: Mapping[str, float]) -> None:
    for name, number in others.items():
        sums[name] = sums.get(name, 0) + number


# All of them, at the time of the call.
Source = Callable[[], Numbers]


class OwnNumbers:
    """Those of this process. `server`: the proxy's, which is made after it."""

    def __init__(self, recorder: Recorder, pool: Pool, lag: LoopLag, trouble: Trouble):
        self.server: Any = None
        self.recorder = recorder
        self._pool = pool
        self._lag = lag
        self._trouble = trouble
        self._started_at = kernel.started_at()

    def __call__(self) -> Numbers:
        self.recorder.fold()
        server, pool = self.server, self._pool
        return Numbers(
            self.recorder.counters,
            self.recorder.history,
            sums={
                "connections_accepted": server.accepted,
                "upstream_connections_opened": pool.opened,
                "log_lines_dropped": log.own_lines_dropped(),
                "cpu_seconds": time.process_time(),
            },
            gauges={
                "in_flight": server.in_flight(),
                **server.open,
                "connections": len(server.pool),
                "connections_limit": server.connections,
                "upstream_busy": pool.busy,
                "upstream_idle": pool.idle,
            },
            lag=self._lag.seconds(),
            started_at=self._started_at,
            trouble=self._trouble.sentence(),
            is_saturated=self._trouble.is_saturated(),
            workers=1,
        )
